"""plan_file.py: plans on disk, and beside what their stages took."""

import json
from pathlib import Path

import pytest

from optimer_hf.comparison.ledger import Ledger, StageCost, TrainingCost, TrialCost
from optimer_hf.experiment.plan_file import (
    Plan,
    Stage,
    _show_time,
    compare_with_ledger,
    to_markdown,
)
from optimer_hf.progress import Cost

KINDS = {
    "train longer: it": "train",
    "search": "search",
    "re-score": "rescore",
    "mixtures": "mixtures",
    "train longer: search": "other_searches",
    "train longer: re-score": "other_searches",
    "sealed test": "sealed",
}


def plan_of(**changes: object) -> Plan:
    stages = [
        Stage(kind=kind, name=name, work="", cost=Cost(10.0 * n, n))
        for n, (name, kind) in enumerate(KINDS.items(), start=1)
    ]
    sizes = {"memory_bytes": 2 * 10**9, "device_bytes": 0, "disk_bytes": 10**7}
    return Plan.model_validate({"stages": stages, **sizes, **changes})


def test_a_plan_is_read_as_it_was_written(tmp_path: Path):
    plan = plan_of(downloads=[{"reference": "a/b", "n_bytes": 5, "licence": None, "gated": True}])
    plan.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == plan
    assert json.loads((tmp_path / "plan.json").read_text())["cost"]["seconds"] == 280
    assert "to fetch: a/b (under 0.1 MB, licence ?)" in to_markdown(plan)


def test_stages_that_0_1_0_wrote_without_kinds_get_them_from_their_names(tmp_path: Path):
    plan = plan_of()
    data = plan.model_dump(mode="json", exclude={"format_version"})
    for stage in data["stages"]:
        del stage["kind"]
    (tmp_path / "plan.json").write_text(json.dumps(data))
    assert Plan.read(tmp_path / "plan.json") == plan


def test_a_search_whose_name_begins_like_a_training_counts_as_a_search():
    ledger = Ledger(
        train=TrainingCost(seconds=1, cpu_seconds=1),
        other_searches=TrialCost(seconds=2, cpu_seconds=2),
        this_invocation=StageCost(peak_bytes=10**9),
    )
    text = compare_with_ledger(plan_of(), ledger)
    assert "| train | 10 s | 1 s | 10.00 | 1 s | 1 s | 1.00 |" in text
    assert "| other_searches | 110 s | 2 s | 55.00 | 11 s | 2 s | 5.50 |" in text
    assert "| together | 120 s | 3 s |" in text
    assert "Memory: planned 2.00 GB, taken 1.00 GB, ratio 2.00" in text


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (300, "5 min"), (9000, "2.5 h")])
def test_times_are_readable(seconds: float, text: str):
    assert _show_time(seconds) == text
