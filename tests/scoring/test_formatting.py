"""What is said of differences: in the unit of the objective, with the right baseline, and the same
everywhere.
"""

import json
import re

import numpy as np
import pytest
from click.testing import CliRunner

from optimer_hf.cli import main
from optimer_hf.comparison.result import table, verdicts
from optimer_hf.comparison.results_file import results_of, table_of
from optimer_hf.comparison.sealed import compare
from optimer_hf.comparison.summary import front_lines
from optimer_hf.comparison.tables import intervals_to_markdown, to_markdown
from optimer_hf.hub import card
from optimer_hf.recipes.write import _scores
from optimer_hf.report.page import write_report
from optimer_hf.scoring.formatting import Unit, describe_interval
from optimer_hf.scoring.intervals import Interval
from optimer_hf.scoring.scores import TermScore
from optimer_hf.searching import retargeting
from optimer_hf.searching.loop import search
from optimer_hf.searching.runner import InProcess
from optimer_hf.study.directory import Study, load_study
from optimer_hf.study.prediction import front
from tests.support.landscapes import FunctionPool, config_of


def test_an_end_of_an_interval_that_is_not_0_is_not_shown_as_0():
    interval = Interval(-0.018, -0.0365, -0.000009, "bootstrap-t")
    assert Unit(100.0, "in percent").show_interval(interval) == "[-3.65, -0.0009]"


class Losses(FunctionPool):
    """A dozen losses a term around 1, or accuracies, which no two weights have alike."""

    n_items, higher = 12, False

    def score(self, weights, asked, *, gradients=False):
        scored = super().score(weights, asked)
        rng = np.random.default_rng(round(1e6 * sum(weights.values())))
        for label, score in scored.terms.items():
            tops = [0.3 * top + 0.01 * rng.normal() for top, _ in score.items[: self.n_items]]
            tops = [1 - 0.5 * top for top in tops] if self.higher else tops
            scored.terms[label] = TermScore([(top, 1.0) for top in tops], self.higher)
        return scored


class Accuracies(Losses):
    higher = True


class TwoItems(Losses):
    n_items = 2


def study_of(directory, rule="relative_to_base", pool=Losses, searched=None, **changes) -> Study:
    metric = "bits_per_byte" if not pool.higher else "acc"

    def objective(rule, suffix):
        names = [{"task": f"{name}{suffix}", "name": name, "metric": metric} for name in "tu"]
        return {"combine": rule, "terms": names, "limit": 12}

    config = config_of(
        objective=objective(searched or rule, ""),
        test=objective(rule, "_test"),
        **{"search": {"n_trials": 9, "rescore_top": 2}} | changes,
    )
    return search(config, directory, runner=InProcess(pool))


@pytest.mark.parametrize("pool", [Losses, Accuracies], ids=["losses", "accuracies"])
@pytest.mark.parametrize("rule", ["relative_to_base", "weighted_mean", "worst"])
def test_every_output_counts_in_the_unit_of_the_objective(tmp_path, rule, pool):
    study = study_of(tmp_path / "s", rule, pool)
    comparison = compare(study, pool=pool)
    base, merge = (
        np.mean([row.scores[label].score for label in "tu"])
        for row in (comparison.base, comparison.merge)
    )
    gain = comparison.value(comparison.merge) - comparison.value(comparison.base)
    if rule == "weighted_mean":
        name, sign = ("acc", 1) if pool.higher else ("bits_per_byte", -1)
        assert gain == pytest.approx(sign * (merge - base))
        shown, of_base = f"{gain:+.4f} {name}", f"{base:.4f} {name}"
        difference = rf"[+-]\d\.\d{{4}} {name} \["
    else:
        shown, of_base, difference = f"{100 * gain:+.2f} %", "+0.00 %", r"[+-]\d+\.\d\d points \["
    header, lines = table(comparison)
    assert table_of(results_of(comparison)) == (header, lines)
    cells = {line[0]: line[-1] for line in lines}
    assert (cells["base"], cells["searched merge"]) == (of_base, shown)
    (verdict,) = verdicts(comparison)
    assert re.search(difference, verdict)
    assert ("points" in verdict) == ("%" in shown)
    sealed = _scores(study, study.best_trial, comparison)["sealed"]
    assert f"over the base {shown} [" in sealed.summary
    assert sealed.verdicts == [verdict]
    panels = {panel.name: panel for panel in write_report(study, tmp_path / "r.html")}
    assert f"searched merge {shown}" in panels["sealed"].shows
    by = re.search(r"[+-](\d+\.\d+ \S+) \[", verdict)
    assert by is not None
    is_better = verdict.endswith(": better.")
    said = f" by {by[1]} on" if is_better else " do not differ significantly on"
    assert f"{said} the sealed test." in first_sentence(tmp_path / "r.html")
    unit = Unit.of(study.config.objective)
    best = max(map(study.value, study.trials)) - study.value(study.trials[0])
    assert f"best gain so far, {unit.show(best)} at the end" in panels["progress"].shows
    assert shown in to_markdown(comparison)
    printed = "\n".join(front_lines(study))
    assert f"gains over {study.baseline}" in printed
    for choice in front(study)[:1]:
        row = [f"{100 * gain:+.2f} %" for gain in choice.gains.values()]
        assert f"| {choice.trial.number} | {' | '.join(row)} |" in printed


def test_a_verified_prediction_is_a_gain_over_the_base_as_the_prediction_is(tmp_path, monkeypatch):
    study = study_of(tmp_path / "s", "weighted_mean")
    search_on = retargeting.search_on
    monkeypatch.setattr(
        retargeting, "search_on", lambda *given, runner: search_on(*given, runner=InProcess(Losses))
    )
    objective = study.config.objective.model_dump(mode="json")
    objective["terms"][0]["weight"] = 3.0
    (tmp_path / "o.yaml").write_text(json.dumps(objective), encoding="utf-8")
    arguments = [tmp_path / "s", tmp_path / "o.yaml", tmp_path / "new", "--n-trials", 2]
    result = CliRunner().invoke(main, ["retarget", *map(str, arguments)])
    new = load_study(tmp_path / "new")
    base = new.log.first(new.best_trial.fidelity)
    gain = new.value(new.best_trial) - new.value(base)
    assert f"verified: value {gain:+.4f} bits_per_byte (trial" in result.stdout, result.output


def test_sealed_numbers_are_in_the_unit_of_the_test_not_of_the_search(tmp_path):
    study = study_of(tmp_path / "s", "weighted_mean", searched="worst")
    comparison = compare(study, pool=Losses)
    panels = {panel.name: panel for panel in write_report(study, tmp_path / "r.html")}
    assert "bits_per_byte" in panels["sealed"].shows and "%" not in panels["sealed"].shows
    assert "%" in panels["progress"].shows
    assert all("bits_per_byte" in line[-1] for line in table(comparison)[1])


def test_the_report_leads_with_the_sealed_test_and_says_of_what_each_number_is(tmp_path):
    vectors = {name: {"source": f"/nowhere/{name}"} for name in "wxyz"}
    vectors["z"]["fixed"] = 0.5
    study = study_of(tmp_path / "s", vectors=vectors)
    write_report(study, tmp_path / "before.html")
    assert first_sentence(tmp_path / "before.html").startswith("Not tested yet: the merge has not")
    before = (tmp_path / "before.html").read_text(encoding="utf-8")
    assert re.search(r"In the search it scored \+\S+ % over the base with z at 0\.5 ", before)
    assert "scored again on more items" in before
    comparison = compare(study, pool=Losses)
    panels = {panel.name: panel for panel in write_report(study, tmp_path / "after.html")}
    by = re.search(r"\+(\d+\.\d+ points) \[", verdicts(comparison)[0])
    assert by is not None
    after = first_sentence(tmp_path / "after.html")
    assert after.startswith("The merge beats the best of ")
    assert after.endswith(f" by {by[1]} on the sealed test.")
    assert "In the search it scored" in (tmp_path / "after.html").read_text(encoding="utf-8")
    assert "over the base with z at 0.5" in panels["progress"].conclusion
    assert "over the base with z at 0.5 on the items of the search" in panels["progress"].shows
    assert "The merge against the base:" in panels["terms"].conclusion


def first_sentence(page) -> str:
    (text,) = re.findall(r"<h1>(.*?)</h1>", page.read_text(encoding="utf-8"), re.S)
    return text.replace("&#39;", "'")


def test_two_items_a_term_are_too_few_for_a_verdict_wherever_one_is_given(tmp_path):
    study = study_of(tmp_path / "s", pool=TwoItems)
    comparison = compare(study, pool=TwoItems)
    panels = {panel.name: panel for panel in write_report(study, tmp_path / "r.html")}
    sealed = results_of(comparison)
    recipe = _scores(study, study.best_trial, comparison)
    said = [
        *verdicts(comparison),
        to_markdown(comparison),
        intervals_to_markdown(comparison),
        panels["terms"].conclusion,
        *(score.summary for score in recipe.values()),
        describe_interval(study.over_next()[1], Unit.of(study.config.objective), is_gain=False),
    ]
    assert panels["sealed"].conclusion.startswith("Too few items to compare the merge with")
    few = "Too few items for a verdict: the sealed test has 2 of 't', and 10 are needed."
    assert first_sentence(tmp_path / "r.html") == few
    for text in said:
        assert "too few items to tell" in text, text
        assert not re.search(
            r"better|worse|significant", text.replace("larger gains are better", "")
        ), text
    assert "better" not in card._results_table(sealed)
    for row in sealed.rows:
        assert row.over_base.verdict == "too few items to tell (2 in term 't')"
        assert row.over_base.has_few_items


def test_a_row_beside_itself_has_no_interval_in_json(tmp_path):
    comparison = compare(study_of(tmp_path / "s"), pool=Losses)
    rows = {row.name: row for row in results_of(comparison).rows}
    own = rows["searched merge"].merge_minus
    assert (own.difference, own.low, own.high) == (0.0, None, None)


@pytest.mark.parametrize(
    ("difference", "shown"),
    [
        (0.0, "+0.00"),
        (0.01, "+1.00"),
        (3e-5, "+0.003"),
        (-2e-7, "-0.00002"),
        (1e-30, "+0.000000000"),
    ],
)
def test_a_difference_that_is_not_zero_is_not_shown_as_zero(difference, shown):
    interval = Interval(difference, difference / 2, 2 * difference, "bootstrap-t", n_fewest=20)
    text = describe_interval(interval, Unit(100.0, "%"), is_gain=False)
    assert text.startswith(f"{shown} points [")
