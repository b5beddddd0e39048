"""tables.py: the tables have the numbers of the records, by independent ways to them."""

import pytest

from optimer_hf.comparison.sealed import compare
from optimer_hf.report.evidence import read_evidence
from optimer_hf.report.tables import _unit_of as unit_of
from optimer_hf.report.tables import sealed_table, targets_table, terms_table, trial_table
from optimer_hf.scoring.objective import Objective
from optimer_hf.searching.loop import search
from optimer_hf.searching.runner import InProcess
from tests.support.landscapes import FunctionPool, TellingPool, failing_at, with_test


@pytest.fixture(scope="module")
def evidence(tmp_path_factory):
    config = with_test(retarget={"more u": {"t": 0.2, "u": 1.0}})
    study = search(config, tmp_path_factory.mktemp("t") / "s", runner=InProcess(TellingPool))
    compare(study, pool=TellingPool)
    return read_evidence(study)


def column(table, name: str, group: str = "") -> dict[str, float]:
    """Return the values of a column by the text of the first cell; `group` is above its head."""
    spans = [name for name, n in table.groups for _ in range(n)] or [""] * len(table.heads)
    spans += [""] * (len(table.heads) - len(spans))
    heads = [(head.text, span) for head, span in zip(table.heads, spans, strict=True)]
    at = heads.index((name, group))
    return {row.cells[0].text: row.cells[at].value for row in table.rows}


def test_the_trials_are_those_of_the_data_frame(evidence):
    table, frame = trial_table(evidence), evidence.study.to_dataframe()
    for name in "wxyz":
        expected = frame[f"weight/{name}"]
        assert list(column(table, name, "weight").values()) == list(expected)
    for label in "tuq":
        gains = list(column(table, label, "gain").values())
        assert gains == pytest.approx(list(frame[f"gain/{label}"]))
    base = frame["objective"].iloc[0]
    assert list(column(table, "search score").values()) == pytest.approx(
        list(frame["objective"] - base)
    )
    again = column(table, "scored again")
    rescored = evidence.study.log.trials_at("rescore")
    assert {name for name, value in again.items() if value is not None} == {
        str(trial.number) for trial in rescored
    }
    (merge,) = [row.cells[0].text for row in table.rows if row.part == "merge"]
    assert merge == str(evidence.study.best_trial.number)


def test_a_crashed_trial_says_so_without_its_message(tmp_path):
    pool = failing_at({7: RuntimeError("no room on /home/me")})
    study = search(with_test(), tmp_path / "s", runner=InProcess(pool))
    table = trial_table(read_evidence(study))
    assert {len(row.cells) for row in table.rows} == {len(table.heads)}
    (cell,) = [cell for row in table.rows for cell in row.cells if cell.text == "crashed"]
    assert cell.hint == "RuntimeError"
    assert not any("/home" in cell.hint for row in table.rows for cell in row.cells)


def test_the_sealed_rows_are_those_of_the_comparison(evidence):
    table, frame = sealed_table(evidence.comparison), evidence.comparison.to_dataframe()
    for label in "tuq":
        assert column(table, label) == pytest.approx(dict(frame[f"gain/{label}"]))
    base = frame["objective"].iloc[0]
    assert column(table, "sealed score") == pytest.approx(dict(frame["objective"] - base))
    parts = {row.cells[0].text: row.part for row in table.rows}
    assert parts["searched merge"] == "merge" and parts["re-targeted to more u"] == "target"
    assert list(parts.values()).count("best") == 1
    (merge,) = [row for row in table.rows if row.part == "merge"]
    assert all("paired 95 % interval" in cell.hint for cell in merge.cells[1:])


def test_the_terms_have_their_unit_their_items_and_their_raw_scores(evidence):
    table = terms_table(evidence)
    assert [row.cells[1].text for row in table.rows] == ["loss, lower is better"] * 3
    assert column(table, "items, search") == {"t": 4, "u": 4, "q": 4} | {
        label: len(score.items) for label, score in evidence.study.base.items()
    }
    assert column(table, "weight") == {"t": 1.0, "u": 1.0, "q": 0.0}
    merge = evidence.comparison.merge.scores
    assert column(table, "merge") == {label: score.score for label, score in merge.items()}


def test_a_target_is_compared_under_its_own_objective(evidence):
    (row,) = targets_table(evidence.comparison).rows
    weights = evidence.comparison.row("retargeted", "more u").weights
    assert [cell.value for cell in row.cells[1:5]] == list(weights.values())
    assert row.cells[-1].text in ("better", "worse", "no significant difference at 95 %")


def test_without_a_sealed_test_the_scores_are_those_of_the_search(tmp_path):
    study = search(with_test(), tmp_path / "s", runner=InProcess(FunctionPool))
    table = terms_table(read_evidence(study))
    assert "search scores" in table.caption
    assert [head.text for head in table.heads][-1] == "items, search"


def test_a_function_in_a_file_is_named_without_the_place_of_the_file():
    term = {"name": "t", "function": "/data/me/my_metrics.py:brevity", "higher_is_better": True}
    assert unit_of(Objective.model_validate({"terms": [term]}), "t") == "brevity"
