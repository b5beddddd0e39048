"""A study and a comparison as Python shows them: reprs, HTML and DataFrames."""

import json
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

from optimer_hf.comparison.sealed import compare
from optimer_hf.errors import StudyError
from optimer_hf.scoring.objective import gains
from optimer_hf.searching.loop import search
from optimer_hf.searching.runner import InProcess
from optimer_hf.study.directory import open_study
from optimer_hf.study.tables import list_trials, trials_to_markdown
from tests.support.landscapes import (
    FunctionPool,
    TellingPool,
    config_of,
    failing_at,
    with_test,
)

CRASHED = 3


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    pool = failing_at({CRASHED: RuntimeError("<b>no</b>")})
    return search(with_test(), tmp_path_factory.mktemp("tables") / "a<b", runner=InProcess(pool))


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    return compare(
        search(with_test(), tmp_path_factory.mktemp("tables") / "s", runner=InProcess(TellingPool)),
        pool=TellingPool,
    )


def test_the_best_trial_is_the_one_that_was_decided_and_has_the_best_weights(study):
    assert study.decision is not None
    assert study.best_trial.number == study.decision.incumbent
    assert study.best_weights == study.best_trial.weights
    assert study.trials == study.log.trials_at("search")


def test_a_study_without_a_decision_has_no_best_trial_and_shows_all_the_same(tmp_path):
    study = open_study(with_test(), tmp_path / "new")
    assert repr(study) == "Study('new', 0 of 14 trials, not finished)"
    assert "no trial yet" in study._repr_html_()
    with pytest.raises(StudyError, match="not finished"):
        _ = study.best_weights


def test_reprs_fit_into_two_lines(study, comparison):
    for value in (study, study.trials[0], study.trials[0].terms, comparison):
        assert len(repr(value)) < 200, repr(value)
    assert repr(study.trials[0].terms["t"]).startswith("TermScore(")
    assert "14 trials, best w " in repr(study)
    assert repr(study.trials[CRASHED]).endswith(": crashed)")
    many = replace(study.trials[0], weights={f"vector-{n}": 0.5 for n in range(1000)})
    assert "... 994 more" in repr(many) and len(repr(many)) < 250


def test_a_row_of_the_frame_is_a_trial(study):
    frame = study.to_dataframe()
    assert frame.index.name == "trial" and list(frame.index) == [t.number for t in study.trials]
    for trial in study.trials:
        row = frame.loc[trial.number]
        assert {n: row[f"weight/{n}"] for n in trial.weights} == trial.weights
        if trial.status == "crashed":
            assert np.isnan(row["objective"]) and not row["feasible"]
            continue
        assert row["objective"] == study.value(trial)
        assert row["score/t"] == trial.terms["t"].score
        assert row["gain/u"] == gains(trial.terms, study.base)["u"]
    assert len(study.to_dataframe("rescore")) == len(study.log.trials_at("rescore"))


class HarderPool(FunctionPool):
    """Adds one to the losses of items that only re-scoring sees."""

    def score(self, weights, asked, *, gradients=False):
        scored = super().score(weights, asked)
        more = float(asked[0].limit is None)
        terms = {
            label: replace(term, items=[(top + more, bottom) for top, bottom in term.items])
            for label, term in scored.terms.items()
        }
        return replace(scored, terms=terms)


def test_trials_that_were_scored_again_are_shown_over_the_base_on_their_own_items(tmp_path):
    config = config_of()
    mean = config.objective.model_copy(update={"combine": "weighted_mean"})
    config = config.model_copy(update={"objective": mean})
    study = search(config, tmp_path / "s", runner=InProcess(HarderPool))
    rows = list_trials(study, "rescore", sort="trial")
    _, _, first, *others = trials_to_markdown(study, rows).splitlines()
    assert "| +0.0000 loss |" in first
    gains = [study.value(row.trial) - study.value(rows[0].trial) for row in rows[1:]]
    shown = zip(gains, others, strict=True)
    assert all(f"| {gain:+.4f} loss |" in line for gain, line in shown)
    assert all(gain > 0 for gain in gains)


def test_a_row_of_the_list_has_the_trial_and_the_numbers_of_the_frame(study):
    rows, frame = list_trials(study), study.to_dataframe()
    assert [row.trial.number for row in rows if row.is_best] == [study.best_trial.number]
    assert sorted(row.trial.number for row in rows) == list(frame.index)
    assert not rows[-1].is_sound and rows[-1].trial.number == CRASHED
    for row in rows[:-1]:
        assert row.objective == study.value(row.trial) and row.is_feasible
        assert row.gains == gains(row.trial.terms, study.base)
    for row in rows:
        for name, value in row.columns.items():
            expected = frame.loc[row.trial.number, name]
            assert value == expected or np.isnan([value, expected]).all(), name
        number, best, *others = row.to_json().items()
        assert number == ("trial", row.trial.number) and best == ("best", row.is_best)
        assert dict(others).keys() == row.columns.keys()
    assert json.loads(json.dumps(rows[-1].to_json(), allow_nan=False))["objective"] is None
    with pytest.raises(FrozenInstanceError):
        rows[0].objective = 0.0


def test_a_row_of_the_frame_of_a_comparison_is_a_weight_set(comparison):
    frame = comparison.to_dataframe()
    assert list(frame.index) == [row.title for row in comparison.rows]
    merge = frame.loc[comparison.merge.title]
    assert merge["objective"] == comparison.value(comparison.merge)
    assert {n: merge[f"weight/{n}"] for n in "wxyz"} == comparison.merge.weights


def test_a_notebook_shows_tables_without_markup_of_names(study, comparison):
    page = study._repr_html_()
    assert "Study a&lt;b: 14 trials, best w " in page and "a<b" not in page
    assert page.count("<tr>") == 1 + 1 + 5  # header, base, the best five
    assert comparison._repr_html_().count("<tr>") == 1 + len(comparison.rows)
