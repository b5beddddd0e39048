"""ledger.py: ledger.json is read as it was written, also by version 0.1.0."""

import json
import re
from pathlib import Path

import pytest

from optimer_hf.comparison.ledger import (
    TITLES,
    Ledger,
    MixtureCost,
    StageCost,
    TrainingCost,
    TrialCost,
    describe_ledger,
    read_ledger,
    write_ledger,
)


def test_stages_that_a_run_did_not_have_are_left_out(tmp_path: Path):
    ledger = Ledger(train=TrainingCost(tokens=5), write=StageCost(seconds=1.5))
    file = tmp_path / "ledger.json"
    write_ledger(ledger, file)
    assert read_ledger(file) == ledger
    assert json.loads(file.read_text()) == {"format_version": 1} | ledger.to_json()


def test_the_ledger_of_0_1_0_is_read(golden: Path):
    ledger = read_ledger(golden / "runs" / "tiny" / "ledger.json")
    assert ledger.other_searches is not None and ledger.other_searches.n == 9
    assert ledger.search is not None and ledger.search.n == 10


def test_a_ledger_in_words_has_no_names_of_fields_and_leaves_out_what_took_nothing():
    assert set(TITLES) == set(Ledger.model_fields)
    search = TrialCost(
        n=30, items=3840, tokens=9000, seconds=125.0, forward=100.0, merge=20.0, ask=5.0
    )
    ledger = Ledger(
        train=TrainingCost(n=1, seconds=3725.0, tokens=1, tokens_per_second=9, mfu=0.413),
        search=search,
        rescore=TrialCost(n=4),
        data_mixture=MixtureCost(
            attempts=3, seconds=9.0, ratio_search_only=66.4, ratio_end_to_end=14.0
        ),
        this_invocation=StageCost(seconds=4.25, peak_bytes=1_234_000_000),
    )
    assert describe_ledger(ledger) == [
        ["training the vectors", "1 h 2 min", "1 training, 1 token, 9 tokens a second, 41 % MFU"],
        [
            "search",
            "2 min 5 s",
            "30 merges, 3,840 items, 9,000 tokens: 80 % in the model, 16 % merging, "
            "4 % choosing weights",
        ],
        ["scoring the best again", "0.0 s", "4 merges, whose scores were known"],
        [
            "as many data mixtures instead (estimate)",
            "9.0 s",
            "66.4 times the search, 14 times search and training together",
        ],
        ["this call of `optimer run`", "4.2 s", "at most 1.23 GB of memory"],
    ]


@pytest.mark.parametrize("backward", [0.0, 0.2])
def test_the_shares_of_few_trials_sum_to_a_hundred_percent(backward):
    """Their seconds are rounded to tenths, so the phases may sum to more, or to less."""
    cost = TrialCost(
        n=2,
        items=4,
        tokens=9,
        seconds=0.1,
        forward=0.1,
        backward=backward,
        harness=0.03,
        merge=0.02,
    )
    ((_, _, text),) = describe_ledger(Ledger(search=cost))
    shares = [int(share) for share in re.findall(r"(\d+) %", text)]
    assert len(shares) == 3 + bool(backward) and abs(sum(shares) - 100) <= 1
