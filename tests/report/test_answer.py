"""answer.py: the first screen says what the sealed test says, and nothing that it does not."""

from pathlib import Path

import pytest

from optimer_hf.comparison.result import Comparison
from optimer_hf.comparison.rows import SealedRow
from optimer_hf.comparison.sealed import compare
from optimer_hf.report.answer import answer_of, verdict_of
from optimer_hf.report.evidence import read_evidence
from optimer_hf.report.score_panels import answer_panel
from optimer_hf.scoring.formatting import Unit
from optimer_hf.scoring.objective import Objective
from optimer_hf.scoring.scores import TermScore
from optimer_hf.searching.loop import search
from optimer_hf.searching.runner import InProcess
from tests.support.landscapes import FunctionPool, TellingPool, config_of, with_test


@pytest.fixture(scope="module", params=[TellingPool, FunctionPool], ids=["enough", "few"])
def compared(request, tmp_path_factory):
    """A compared study, with enough items for a verdict or too few."""
    directory = tmp_path_factory.mktemp("answer") / "my study"
    study = search(with_test(), directory, runner=InProcess(request.param))
    compare(study, pool=request.param)
    return read_evidence(study), request.param is TellingPool


def test_the_verdict_is_that_of_the_interval_to_the_best_baseline(compared):
    evidence, is_enough = compared
    comparison = evidence.comparison
    interval = comparison.interval(comparison.merge, comparison.best_baseline())
    verdict = answer_of(evidence).verdict
    if is_enough:
        verb = {"better": "beats", "worse": "is worse than"}[interval.answer]
        assert verdict.startswith(f"The merge {verb} the best of ")
        assert f"by {abs(100 * interval.difference):.2f} points on the sealed test" in verdict
    else:
        assert verdict == (
            "Too few items for a verdict: the sealed test has 4 of 't', and 10 are needed."
        )


def test_a_small_difference_is_not_shown_as_none():
    def row(kind, loss, step=0.0):
        items = [(loss + 0.01 * at + step * (at * 7 % 5), 1.0) for at in range(12)]
        return SealedRow(kind, "", {"x": loss}, {"t": TermScore(items, False)}, False, 9, {}, 0)

    objective = Objective.model_validate({"terms": [{"task": "t", "metric": "loss"}]})
    rows = [row("base", 3.0), row("average", 2.0), row("merge", 1.99999, -2e-6)]
    comparison = Comparison(rows, objective, {})
    verdict = verdict_of(comparison)
    assert verdict == (
        "The merge beats the best of 2 baselines (uniform average) by 0.0004 points on the sealed "
        "test."
    )
    shown = answer_panel(comparison).shows
    assert "over uniform average, the best baseline +0.0004 points [+0.000" in shown


def test_bars_are_in_proportion_and_hollow_where_nothing_is_certain(compared):
    evidence, is_enough = compared
    comparison, bars = evidence.comparison, answer_of(evidence).bars
    others = [comparison.best_baseline(), comparison.base]
    intervals = [comparison.interval(comparison.merge, other) for other in others]
    assert [bar.is_certain for bar in bars] == [i.excludes_zero for i in intervals]
    assert not any(bar.is_certain for bar in bars) or is_enough
    (zero,) = {bar.zero for bar in bars}
    scale = [(bar.end - zero) / i.difference for bar, i in zip(bars, intervals, strict=True)]
    scale += [(bar.low - zero) / i.low for bar, i in zip(bars, intervals, strict=True)]
    assert scale == pytest.approx([scale[0]] * 4, rel=0.02)
    assert all(0 <= place <= 100 for bar in bars for place in (bar.low, bar.high, bar.end))
    show = Unit.of(comparison.objective).show_difference
    assert bars[0].text == show(intervals[0].difference)


def test_the_search_score_comes_second_and_by_its_name(compared):
    evidence, _ = compared
    best, (note,) = evidence.study.best_trial, answer_of(evidence).notes
    gain = evidence.unit.show(evidence.study.over_base(best).difference)
    assert note.startswith(f"In the search it scored {gain} over the base (trial {best.number} of ")
    assert "scored again on more items" in note and "the sealed score does not" in note


def test_commands_name_the_folder_but_not_where_it_is(compared, tmp_path):
    evidence, _ = compared
    (command,) = answer_of(evidence).commands
    assert command.text.splitlines() == [
        "optimer recipe 'my study' recipe.yaml",
        "optimer build recipe.yaml merged",
    ]
    recipe = evidence.folder / "recipe.yaml"
    recipe.touch()
    try:
        (command,) = answer_of(evidence).commands
    finally:
        recipe.unlink()
    assert command.text == "optimer build 'my study' merged"


def answer_without_test(directory: Path, **changes):
    return answer_of(
        read_evidence(search(config_of(**changes), directory, runner=InProcess(FunctionPool)))
    )


def test_weights_are_bars_from_zero_and_say_what_is_fixed_or_left_out(tmp_path):
    vectors = {
        "w": {"source": "/nowhere/w", "bounds": [-0.5, 1.0]},
        "x": {"source": "/nowhere/x", "fixed": -0.5},
        "y": {"source": "/nowhere/y", "bounds": [0.0, 1.0]},
        "z": {"source": "/nowhere/z", "fixed": 0.0},
    }
    answer = answer_without_test(
        tmp_path / "s", vectors=vectors, search={"n_trials": 4, "rescore_top": 0}
    )
    weights = {weight.name: weight for weight in answer.weights}
    assert {weight.zero for weight in weights.values()} == {33.33}
    assert (weights["x"].left, weights["x"].width, weights["x"].note) == (0.0, 33.33, "fixed")
    assert (weights["z"].width, weights["z"].note) == (0.0, "fixed")
    for weight in weights.values():
        end = weight.left + (weight.width if float(weight.text) > 0 else 0)
        assert end == pytest.approx(33.33 + 100 * float(weight.text) / 1.5, abs=0.02)


def test_an_untested_merge_has_no_bars_and_is_called_untested(tmp_path):
    answer = answer_without_test(tmp_path / "s", search={"n_trials": 5, "rescore_top": 0})
    assert answer.verdict.startswith("Not tested: the study has no sealed test")
    assert answer.bars == []
    study = search(with_test(), tmp_path / "t", runner=InProcess(FunctionPool))
    answer = answer_of(read_evidence(study))
    assert answer.verdict.startswith("Not tested yet")
    assert next(command.text for command in answer.commands) == "optimer compare t"
