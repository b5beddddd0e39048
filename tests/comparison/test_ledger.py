"""ledger.py: ledger.json is read as it was written, also by version 0.1.0."""

import json
from pathlib import Path

from optimer_hf.comparison.ledger import (
    Ledger,
    StageCost,
    TrainingCost,
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
