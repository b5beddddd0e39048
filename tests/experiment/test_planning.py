"""planning.py: what a run will take, measured on the real base, and compared with what it took."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from optimer_hf.comparison.ledger import Ledger, TrialCost
from optimer_hf.errors import ModelError
from optimer_hf.experiment import planning, run, stages
from optimer_hf.experiment.folder import Run, load_inputs
from optimer_hf.experiment.marks import Done
from optimer_hf.experiment.plan_file import Plan, Stage
from optimer_hf.experiment.planning import list_downloads
from optimer_hf.progress import Cost
from optimer_hf.study.config import StudyConfig
from optimer_hf.training.config import TrainConfig
from tests.support.experiments import run_optimer


def test_a_plan_counts_the_work_that_the_run_then_does(recipe_dir: Path, tmp_path: Path):
    out = tmp_path / "out"
    result = run_optimer("plan", recipe_dir, out, "--format", "json")
    assert result.exit_code == 0, result.output
    planned = json.loads(result.stdout)
    work = {stage["name"]: stage["work"] for stage in planned["stages"]}
    assert work["train aaa"] == work["train xyz"] == "1,024 tokens"
    assert all(
        stage["cost"][key] > 0 for stage in planned["stages"] for key in ("seconds", "cpu_seconds")
    )
    assert planned["memory_bytes"] > 50e6 and planned["downloads"] == []

    assert run_optimer("run", recipe_dir, out).exit_code == 0
    spent = json.loads((out / "ledger.json").read_text())
    for stage, entry in (("search", "search"), ("re-score", "rescore")):
        n, items = work[stage].split(" trials of ")
        assert int(n) == spent[entry]["n"]
        assert int(n) * int(items.split()[0].replace(",", "")) == spent[entry]["items"]
    rows, items = work["sealed test"].split(" rows of ")
    assert int(rows) >= spent["sealed"]["n"]  # rows with equal weights are scored once
    assert spent["sealed"]["items"] == spent["sealed"]["n"] * int(items.split()[0])
    table = (out / "results.md").read_text().partition("## Planned and taken")[2]
    assert all(f"| {stage} |" in table for stage in ("train", "search", "sealed", "together"))
    assert "Memory: planned" in table


def test_a_plan_of_other_inputs_is_not_compared_with_what_the_run_took(
    recipe_dir: Path, tmp_path: Path
):
    ledger = Ledger(search=TrialCost(seconds=2, cpu_seconds=2))
    other = Run(recipe_dir, tmp_path / "out")
    stages = (Stage(kind="search", name="search", work="w", cost=Cost(1, 1)),)
    plan = Plan(stages=stages, memory_bytes=1, device_bytes=0, disk_bytes=0)
    for digest, is_compared in ((None, True), (other.inputs_digest(), True), ("0" * 64, False)):
        plan.model_copy(update={"inputs_sha256": digest}).write(other.out / "plan.json")
        text = run._compare_with_plan(other, Done(inputs_sha256=other.inputs_digest()), ledger)
        assert ("| search | 1 s | 2 s |" in text) == is_compared
        assert ("was made for other inputs" in text) != is_compared


def test_a_corpus_with_fewer_bytes_than_tokens_is_said_before_the_run(tmp_path: Path):
    (tmp_path / "texts").mkdir()
    for name in ("a.txt", "b.md"):
        (tmp_path / "texts" / name).write_text("x" * 5_000)
    fields = {"name": "n", "base_model": "a/b", "corpus": tmp_path / "texts"}
    trainings = {
        str(n): TrainConfig.model_validate(fields | {"max_tokens": n, "block_size": 100})
        for n in (10_000, 10_099, 10_100)
    }
    (said,) = stages.warn_of_short_texts(trainings)
    assert "train 10100: texts has 10,000 bytes, too few for max_tokens 10,100" in said
    (tmp_path / "texts" / "c.parquet").write_bytes(b"")
    assert not [*stages.warn_of_short_texts(trainings)]


def test_a_study_of_ready_vectors_has_a_plan_of_its_search(finished: Path, tmp_path: Path):
    path = tmp_path / "study.yaml"
    StudyConfig.read(finished / "study" / "study.json").write(path)
    result = run_optimer("plan", path)
    assert result.exit_code == 0, result.output
    assert "| search | 7 trials of" in result.stdout and "train" not in result.stdout
    assert run_optimer("plan", path, "--short").exit_code == 1


def test_other_searches_and_mixtures_are_counted(recipe_dir: Path, tmp_path: Path):
    inputs = load_inputs(Run(recipe_dir, tmp_path / "out"))
    config, trainings = inputs.study, inputs.trainings
    more = config.model_dump() | {
        "baselines": {
            "searches": {
                "chance": {"surrogate": "random", "n_trials": 5, "limit": 3},
                "longer": {"n_trials": 9},
            },
            "mixtures": {"mixed": {"budget": "one"}},
            "merge_methods": ["ties"],
        }
    }
    plan = planning.make_plan(StudyConfig.model_validate(more), trainings, tmp_path, is_run=True)
    work = {stage.name: stage.work for stage in plan.stages}
    assert work["mixtures"] == "1,024 tokens"
    assert work["chance: search"] == "5 trials of 9 items"
    assert work["longer: search"].removeprefix("9") == work["search"].removeprefix("7")


def test_what_does_not_fit_is_said_with_the_setting_that_mends_it(tmp_path: Path):
    warnings = planning._warn_of_room(10**15, 10**18, tmp_path / "not" / "yet")
    assert "per_device_train_batch_size" in warnings[0] and "another disk" in warnings[1]
    assert planning._warn_of_room(1, 1, tmp_path) == ()


@pytest.mark.parametrize(
    ("changes", "blocks"),
    [
        ({"num_train_epochs": 3}, 1),
        ({"gradient_accumulation_steps": 2, "max_steps": 10**6}, 2),
    ],
)
def test_the_probe_trains_as_many_steps_as_it_says_at_the_batch_of_a_run(
    recipe_dir: Path,
    tmp_path: Path,
    changes: dict[str, int],
    blocks: int,
):
    trainings = load_inputs(Run(recipe_dir, tmp_path / "out")).trainings
    config = trainings["aaa"].model_copy(update={"trainer": {"bf16": False, **changes}})
    planning._measure_training(config, tmp_path / "probe")
    record = json.loads((tmp_path / "probe" / "training.json").read_text())["training"]
    assert record["n_tokens"] == planning.PROBE_STEPS * blocks * config.block_size


@pytest.mark.parametrize(
    ("failing", "changes", "message"),
    [
        ("train", {}, r"a training step of '\w+' does not fit .* or block_size\.$"),
        ("train", {"lora": None}, r"a training step of '\w+' does not fit .* or train a LoRA"),
        ("open_engine", None, r"a trial does not fit .*--dtype int8((?!train).)*$"),
    ],
    ids=["LoRA", "full parameters", "without training"],
)
def test_what_does_not_fit_into_an_accelerator_is_said_of_the_stage_that_does_not(
    recipe_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
    changes: dict[str, None] | None,
    message: str,
):
    def full(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    inputs = load_inputs(Run(recipe_dir, tmp_path / "out"))
    config, trainings = inputs.study, inputs.trainings
    monkeypatch.setattr(planning, failing, full)
    monkeypatch.setattr(planning, "open_vector", lambda *arguments: None)
    chosen = {n: t.model_copy(update=changes) for n, t in trainings.items() if changes is not None}
    with pytest.raises(ModelError, match=message):
        planning.make_plan(config, chosen, tmp_path, is_run=False)


def test_a_base_that_is_not_here_is_not_fetched_unasked(tmp_path: Path, hub):
    study = {
        "base_model": "nobody/nothing",
        "vectors": {"w": {"source": "nobody/vector"}},
        "objective": {"terms": [{"task": "piqa"}]},
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    result = run_optimer("plan", path)
    assert result.exit_code == 1
    assert "nobody/nothing: is not on this disk" in result.output and "--fetch" in result.output


def test_a_plan_does_not_download_what_is_here(base, published_base):
    objective = {"terms": [{"task": "none"}]}
    study = {"base_model": published_base, "vectors": {"v": {"source": "./v"}}}
    config = StudyConfig.model_validate(study | {"objective": objective})
    assert list_downloads(config) == ()
    shutil.rmtree(base.path.parents[1])
    assert [each.reference for each in list_downloads(config)] == [published_base]
