"""results_file.py: results.json is read as it was written, also by version 0.1.0."""

from pathlib import Path

import pytest

from optimer_hf.comparison.result import table
from optimer_hf.comparison.results_file import (
    IntervalRecord,
    Results,
    read_results,
    results_of,
    table_of,
)
from optimer_hf.comparison.sealed import compare
from optimer_hf.comparison.sealed_file import read_comparison
from optimer_hf.errors import ConfigError
from optimer_hf.files.text import markdown_table
from optimer_hf.scoring.intervals import FEWEST
from optimer_hf.searching.loop import search
from optimer_hf.searching.runner import InProcess
from optimer_hf.study.directory import load_study
from tests.support.landscapes import TEST, FunctionPool, with_test


def test_results_are_read_as_they_were_written(tmp_path: Path):
    test = {"limit": 4, "terms": TEST["terms"]}
    study = search(with_test(test=test), tmp_path / "s", runner=InProcess(FunctionPool))
    comparison = compare(study, pool=FunctionPool)
    results = results_of(comparison)
    results.write(tmp_path / "results.json")
    assert read_results(tmp_path / "results.json", study.config) == results
    assert results.merge.weights == study.best_trial.weights
    assert results.limited == list(comparison.base.scores)
    assert table_of(results) == table(comparison)


def test_rows_of_0_1_0_get_their_kinds_from_their_titles(golden: Path):
    path = golden / "runs" / "tiny"
    study = load_study(path)
    comparison = read_comparison(study)
    results = read_results(path / "results.json", study.config)
    assert comparison is not None
    # of rows with equal weights one was scored
    assert {(row.kind, row.subject) for row in comparison.rows} <= results.by_key.keys()
    assert results.merge.weights == comparison.merge.weights
    # the first table in results.md, as that version wrote it
    assert markdown_table(*table_of(results)) in (path / "results.md").read_text()


def test_a_damaged_row_is_named_with_its_file(tmp_path: Path):
    path = tmp_path / "results.json"
    path.write_text('{"rows": [{"name": "base"}, 3]}')
    study = with_test()
    with pytest.raises(ConfigError, match=r"results\.json: field 'rows\.0\.weights' is missing"):
        read_results(path, study)


@pytest.mark.parametrize("n", [None, 0, FEWEST - 1, FEWEST])
def test_few_items_are_told_by_their_number(n: int | None):
    record = IntervalRecord(difference=0.1, n_fewest=n, verdict="better")
    assert record.has_few_items == (n is not None and n < FEWEST)


def test_other_fields_are_refused():
    with pytest.raises(ValueError, match="extra"):
        Results.model_validate({"rows": [], "other": 1})
