"""seeds_file.py: numbers over seeds, their intervals, and the file that they are written to."""

import json
from pathlib import Path

import pytest
from scipy.stats import ttest_1samp

from optimer_hf.experiment.seeds_file import SeededRow, SeedResults, Spread

VALUES = [0.03, 0.05, 0.04, 0.08]


def test_an_interval_is_that_of_students_t_over_the_seeds():
    expected = ttest_1samp(VALUES, 0).confidence_interval(0.95)
    assert Spread(values=VALUES).interval == pytest.approx((expected.low, expected.high))
    assert Spread(values=[0.03]).interval is None
    assert Spread(values=[0.0, 0.0]).interval is None


def test_results_are_read_as_they_were_written(tmp_path: Path):
    row = SeededRow(
        kind="best_scale",
        subject="x",
        chosen_after_seal=True,
        gain=Spread(values=VALUES),
        merge_minus=Spread(values=[0.0] * 4),
    )
    results = SeedResults(merges=[{"a": 0.5}, {"a": 0.75}], rows=[row])
    file = tmp_path / "results.json"
    results.write(file)
    assert SeedResults.read(file) == results
    (written,) = json.loads(file.read_text())["rows"]
    assert written["name"] == "x at its best scale"
    assert written["gain"]["mean"] == pytest.approx(0.05)
    assert written["gain"]["interval"] == list(row.gain.interval or ())
    assert written["merge_minus"] == {"values": [0.0] * 4, "mean": 0.0, "interval": None}
