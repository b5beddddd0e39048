"""screening.py: which vectors of a large pool are searched, by the slopes at two places."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from optimer_hf.errors import ConfigError
from optimer_hf.files.model import parse
from optimer_hf.report.page import write_report
from optimer_hf.report.slopes import say_what_is_left_out, say_what_would_help, slopes_of_trials
from optimer_hf.scoring.formatting import Unit
from optimer_hf.scoring.scores import TermScore
from optimer_hf.searching.loop import search, search_on
from optimer_hf.searching.runner import InProcess
from optimer_hf.searching.trial import Scored, run_trial
from optimer_hf.searching.workers import Workers
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.prediction import predict, reweight
from optimer_hf.study.screening import screen_of, searched_part
from optimer_hf.study.trials import Candidate
from tests.support.landscapes import ValuesOnlyPool, config_of, outcome

NAMES = [f"v{index}" for index in range(12)]
GOOD = {"t": (1, 4, 9), "u": (2, 7)}  # vectors that lower a loss; each has its optimum at .3


class LargePool:
    """Twelve vectors: three help t, two help u a little, the others help nothing."""

    inputs: dict[str, str] = {}
    differentiable: tuple[str, ...] = ("t", "u", "q")
    steepness = {"t": 1.0, "u": 0.1, "q": 0.1}

    def __init__(self, config: StudyConfig) -> None:
        self.optima = {
            label: np.array([0.3 if n in GOOD.get(label, ()) else -0.05 for n in range(12)])
            for label in self.steepness
        }

    def score(self, weights, asked, *, gradients=False):
        point, scores, slopes = np.array(list(weights.values())), {}, {}
        for term in asked:
            apart, steepness = point - self.optima[term.label], self.steepness[term.label]
            scores[term.label] = TermScore([(3 + steepness * float(apart @ apart), 1.0)], False)
            if gradients and term.label in self.differentiable:
                each = (2 * steepness * apart).tolist()
                slopes[term.label] = dict(zip(weights, each, strict=True))
        seconds = {"merge": 0.0, "evaluate": 1.0 + bool(slopes), "backward": float(bool(slopes))}
        return Scored(scores, seconds, 1, slopes)


def large(screen, gradients="always", n_trials=8, bounds=(0.0, 1.5), **changes) -> StudyConfig:
    settings = {"n_trials": n_trials, "rescore_top": 2, "gradients": gradients, "screen": screen}
    data = config_of().model_dump() | {
        "vectors": {name: {"source": f"a/{name}", "bounds": bounds} for name in NAMES},
        "search": settings | changes.pop("search", {}),
    }
    return StudyConfig.model_validate(data | changes)


def places(config, pool=LargePool):
    """Return the base and the average as trials with gradients."""
    asked, runs = config.objective.asked_terms("search"), pool(config)
    sets = [dict.fromkeys(NAMES, 0.0), dict.fromkeys(NAMES, 1 / 12)]
    return [
        run_trial(runs, Candidate(number, origin, weights, with_gradients=True), asked)
        for number, (origin, weights) in enumerate(zip(("base", "average"), sets, strict=True))
    ]


def kept(config, trials) -> set[int]:
    return {int(name[1:]) for name in screen_of(config, trials).kept}


def test_the_steepest_of_the_objective_and_of_each_term_are_kept():
    config = large(5)
    trials = places(config)
    assert kept(config, trials) == {*GOOD["t"], *GOOD["u"]}
    assert kept(large(1), trials) < set(GOOD["t"])
    assert kept(large(2), trials) == {1, 2}  # 1 promises most for the objective and for t
    assert len(kept(large(9), trials)) == 9
    assert screen_of(large(12), trials).left_out == {}
    left_out = screen_of(config, trials).left_out
    assert len(left_out) == 7 and all(rise < 0 for rise in left_out.values())


def test_auto_keeps_those_with_which_the_objective_rises():
    config = large("auto", "never")
    assert kept(config, places(config)) == {*GOOD["t"]}  # u falls with what t gains


@pytest.mark.parametrize("gradients", ["always", "auto"])
def test_auto_searches_all_vectors_where_the_trials_have_gradients(gradients, tmp_path, caplog):
    caplog.set_level("INFO")
    study = search(large("auto", gradients), tmp_path / "a", runner=InProcess(LargePool))
    whole = search(large(None, gradients), tmp_path / "n", runner=InProcess(LargePool))
    assert screen_of(study.config, study.trials) is None
    assert outcome(study) == outcome(whole)
    assert caplog.text.count("search.screen auto leaves nothing out") == 1
    assert caplog.text.count("it takes them") == 2 * (gradients == "auto") or gradients == "always"


def test_a_promise_counts_within_the_bounds():
    below = large(1, vectors={"w": {"source": "a/w", "bounds": [-2, 0.1]}, "x": "a/x", "y": "a/y"})
    trials = [
        Candidate(number, "x", dict.fromkeys("wxy", 0.0)).to_trial(
            {label: TermScore([(3.0, 1.0)], False) for label in "tuq"},
            {},
            1,
            {label: {"w": 1.0, "x": -1.0, "y": 0.0} for label in "tuq"},
        )
        for number in range(2)
    ]
    assert screen_of(below, trials).kept == ["w"]  # 2 downwards against 1.5 upwards
    assert screen_of(below, trials).left_out["x"] == pytest.approx(1.5 / 3)


def test_without_two_places_or_without_slopes_nothing_is_left_out():
    config = large(3)
    base, average = places(config)
    assert screen_of(config, []) is None and screen_of(config, [base]) is None
    assert screen_of(large(None), [base, average]) is None
    bare = replace(average, gradients={})
    assert searched_part(config, [base, bare]) is config
    late = replace(average, number=5)
    assert screen_of(config, [base, bare, late]) is not None
    other = replace(average, gradients={"q": average.gradients["q"]})  # q has no weight
    assert screen_of(config, [base, other]) is None


def test_as_many_are_kept_as_the_lowest_total_needs():
    config = large(1, bounds=(0.0, 0.4), search={"total": [1.0, 1.5]})
    assert len(kept(config, places(config))) == 3
    study_of = searched_part(config, places(config))
    assert len(study_of.free) == 3 and set(study_of.fixed.values()) == {0.0}


@pytest.mark.parametrize(
    "by", [{"mlp": {}, "q": {"fixed": 0.2}, "else": {"bounds": [-0.1, 0.9]}}, {"layers": 3}]
)
def test_groups_that_are_left_out_stay_at_0(by):
    config = large(2, vectors={"w": {"source": "a/w", "by": by}, "x": "a/x", "y": "a/y"})
    slopes = {name: -float(number) for number, name in enumerate(config.free)}
    trials = [
        Candidate(number, "x", dict.fromkeys(config.weight_names, 0.0)).to_trial(
            {label: TermScore([(3.0, 1.0)], False) for label in "tuq"}, {}, 1, {"t": slopes}
        )
        for number in range(2)
    ]
    kept, part = screen_of(config, trials).kept, searched_part(config, trials)
    assert kept == ["x", "y"]
    assert part.free == {name: config.free[name] for name in kept}
    assert part.weight_names == config.weight_names and part.groups == config.groups
    left_out = [name for name in config.free if name not in kept]
    assert part.fixed == config.fixed | dict.fromkeys(left_out, 0.0)


class DearLargePool(LargePool):
    """Gradients take twenty times as long as the scores."""

    def score(self, weights, asked, *, gradients=False):
        scored = super().score(weights, asked, gradients=gradients)
        dear = {"evaluate": 21.0, "backward": 20.0} if scored.gradients else {}
        return replace(scored, seconds=scored.seconds | dear)


def test_auto_screens_where_gradients_cost_too_much(tmp_path, caplog):
    caplog.set_level("INFO")
    config = large("auto", "auto", n_trials=5)
    study = search(config, tmp_path / "s", runner=InProcess(DearLargePool))
    assert kept(config, study.trials) == {*GOOD["t"]}
    assert [bool(trial.gradients) for trial in study.trials] == [True] * 2 + [False] * 3
    assert "it goes on without them" in caplog.text


@pytest.mark.parametrize(
    ("gradients", "screen"), [("always", 4), ("auto", 4), ("never", 4), ("never", "auto")]
)
def test_a_screened_search_moves_the_kept_alone_and_resumes(gradients, screen, tmp_path, caplog):
    caplog.set_level("INFO")
    config = large(screen, gradients)
    whole = search(config, tmp_path / "whole", runner=InProcess(LargePool))
    screen_found = screen_of(config, whole.trials)
    names = screen_found.kept
    assert len(names) == (4 if screen == 4 else 3)
    assert [trial.origin for trial in whole.trials[:2]] == ["base", "average"]
    later = gradients != "never"
    assert [bool(trial.gradients) for trial in whole.trials] == [True] * 2 + [later] * 6
    for trial in whole.trials[2:]:
        assert {name for name, weight in trial.weights.items() if weight} <= set(names)
        assert set(trial.weights) == set(NAMES)
    said = f"the gradients of base and average choose {len(names)} of 12 vectors"
    assert caplog.text.count(said) == 1
    assert ("times as long" in caplog.text) == (gradients != "never")
    if not later:
        first = [*(f"{name} alone" for name in names), "average", "surrogate"][:6]
        assert [trial.origin for trial in whole.trials[2:]][: len(first)] == first
    lines = (whole.directory / "trials.jsonl").read_bytes().splitlines(keepends=True)
    for n_lines in (1, 2, 6):
        there = tmp_path / f"s{n_lines}"
        there.mkdir()
        (there / "study.json").write_bytes((whole.directory / "study.json").read_bytes())
        (there / "trials.jsonl").write_bytes(b"".join(lines[:n_lines]) + lines[n_lines][:9])
        assert outcome(search(config, there, runner=InProcess(LargePool))) == outcome(whole)


@pytest.mark.usefixtures("warm_workers")
def test_workers_wait_for_the_places_of_a_screen_and_try_each_of_the_kept_alone(tmp_path):
    config = large(4, "never")
    study = search(config, tmp_path / "s", runner=Workers(n_workers=2, pool=LargePool))
    assert [trial.origin for trial in study.trials[:2]] == ["base", "average"]
    names = screen_of(config, study.trials).kept
    for trial in study.trials[2:]:
        assert {name for name, weight in trial.weights.items() if weight} <= set(names)
    origins = [trial.origin for trial in sorted(study.trials, key=lambda trial: trial.number)]
    assert origins[2:] == [*(f"{name} alone" for name in names), "average", "surrogate"]


def test_a_prediction_stays_within_what_the_screen_of_the_study_keeps(tmp_path):
    study = search(large(3, n_trials=6), tmp_path / "s", runner=InProcess(LargePool))
    names = screen_of(study.config, study.trials).kept
    for target in (None, {"t": 1.0}, {"u": 1.0}):
        weights = predict(study, target).weights
        assert list(weights) == NAMES
        assert {name for name, weight in weights.items() if weight} <= set(names)
    assert any(predict(study).weights.values())


def test_a_study_goes_on_with_another_screen(tmp_path):
    search(large(None, "never", 5), tmp_path / "s", runner=InProcess(LargePool))
    study = search(large(3, "never", 9), tmp_path / "s", runner=InProcess(LargePool))
    assert [bool(trial.gradients) for trial in study.trials] == [False] * 5 + [True] * 2 + [
        False
    ] * 2
    assert len(screen_of(study.config, study.trials).kept) == 3
    study = search(large(12, "always", 11), tmp_path / "s", runner=InProcess(LargePool))
    assert screen_of(study.config, study.trials).left_out == {}
    assert study.config.digest() == large(None, "never").digest()


def test_a_pool_without_gradients_is_searched_whole(tmp_path, caplog):
    settings = {"n_trials": 8, "rescore_top": 0}
    with_screen = config_of(search=settings | {"screen": 2})
    study = search(with_screen, tmp_path / "s", runner=InProcess(ValuesOnlyPool))
    without = search(config_of(search=settings), tmp_path / "n", runner=InProcess(ValuesOnlyPool))
    assert outcome(study) == outcome(without)
    assert "no term has a gradient at the base" in caplog.text


def test_a_screen_needs_what_can_take_gradients(tmp_path):
    data = large(3).model_dump() | {"engine": "vllm"}
    data["search"]["gradients"] = "never"
    with pytest.raises(ConfigError, match=r"search\.screen.*engine vllm has no gradients"):
        parse(StudyConfig, data, tmp_path / "study.yaml")


@pytest.mark.parametrize("bounds", [[0.2, 1.0], [-1.0, -0.2]])
@pytest.mark.parametrize("total", [None, [1.0, 1.5]])
def test_a_screen_needs_bounds_that_include_zero(bounds, total, tmp_path):
    data = large(3, search={"total": total}).model_dump()
    data["vectors"]["v5"]["bounds"] = bounds
    shown = f"bounds of 'v5' are [{bounds[0]:g}, {bounds[1]:g}]; let them include 0"
    with pytest.raises(ConfigError, match=rf"search\.screen: .* {re.escape(shown)}"):
        parse(StudyConfig, data, tmp_path / "study.yaml")


@pytest.mark.parametrize("gradients", ["always", "never"])
def test_a_screened_search_keeps_the_total(gradients, tmp_path):
    config = large(3, gradients, bounds=(0.0, 0.5), search={"total": [1.0, 1.2]})
    study = search(config, tmp_path / "s", runner=InProcess(LargePool))
    for trial in study.trials[1:]:
        assert 1.0 - 4e-4 <= sum(trial.weights.values()) <= 1.2 + 4e-4


def test_a_search_for_another_objective_screens_for_that(tmp_path):
    config = large(2)
    study = search(config, tmp_path / "s", runner=InProcess(LargePool))
    target = reweight(config.objective, {"u": 1.0})
    other = search_on(study, target, tmp_path / "on", 2, runner=InProcess(LargePool))
    assert kept(other.config, other.trials) == set(GOOD["u"])
    moved = {n for n, w in other.trials[-1].weights.items() if w}
    assert moved <= {f"v{n}" for n in GOOD["u"]}


def test_the_report_says_what_is_left_out_and_what_of_it_would_help(tmp_path):
    study = search(large(2), tmp_path / "s", runner=InProcess(LargePool))
    unit, screen = Unit.of(study.config.objective), screen_of(study.config, study.trials)
    text = say_what_is_left_out(study, unit)
    assert text.startswith("search.screen keeps 2 of 12 vectors by the slopes at base and average.")
    assert all(f"{name} " in text for name in screen.left_out)
    more = say_what_would_help(study, slopes_of_trials(study), unit)
    assert "Some of v4, v9 would help, but search.screen leaves them out" in more
    panels = {
        panel.name: panel for panel in write_report(study, tmp_path / "r.html", vectors=False)
    }
    assert text in panels["slices"].conclusion
    whole = search(large(None), tmp_path / "w", runner=InProcess(LargePool))
    assert say_what_is_left_out(whole, unit) == ""
    assert json.loads((study.directory / "study.json").read_text())["search"]["screen"] == 2
