"""surrogate.py: what it learns from a trial."""

from dataclasses import replace

import numpy as np
import pytest

from optimer_hf.scoring.scores import TermScore
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.space import from_unit, to_unit
from optimer_hf.study.surrogate import (
    column_gradients,
    columns,
    fit_surrogate,
    headroom_gradients,
    headrooms,
)
from optimer_hf.study.trials import Trial
from tests.support.landscapes import config_of


def test_crashed_and_very_bad_trials_are_learned_at_a_floor():
    def trial(loss, status="ok"):
        terms = (
            {"t": TermScore([(loss, 1.0)], False), "u": TermScore([(loss, 1.0)], False)}
            if status == "ok"
            else {}
        )
        return Trial(0, "x", "search", dict.fromkeys("wxyz", 0.0), status, terms, {})

    table = columns(config_of(), [trial(2.0), trial(1.8), trial(0, "crashed"), trial(1e9)])
    assert table[:, 0] == pytest.approx([0, 0.1, -1, -1])


def test_the_surrogate_of_a_weighted_mean_learns_losses_in_their_own_unit():
    objective = config_of().objective.model_dump() | {"combine": "weighted_mean"}

    def trial(t, u):
        terms = {"t": TermScore([(t, 1.0)], False), "u": TermScore([(u, 1.0)], False)}
        return Trial(0, "x", "search", dict.fromkeys("wxyz", 0.0), "ok", terms, {})

    table = columns(config_of(objective=objective), [trial(100.0, 1.0), trial(90.0, 0.5)])
    assert table[1] == pytest.approx([10.0, 0.5])
    table = columns(config_of(objective=objective), [trial(0.0, 1.0), trial(0.25, 0.5)])
    assert table[1] == pytest.approx([-0.25, 0.5])


# -- gradients -------------------------------------------------------------------------------------


def pool_config(combine="relative_to_base", n_trials=12) -> StudyConfig:
    """Return a study with unequal bounds, a fixed vector, and an accuracy beside the losses, where
    that is allowed.
    """
    other = "accuracy" if combine != "weighted_mean" else "second"
    return StudyConfig.model_validate(
        {
            "base_model": "a/b",
            "vectors": {
                "x": {"source": "a/x", "bounds": [-0.5, 1.0]},
                "fixed": {"source": "a/f", "fixed": 0.3},
                "y": {"source": "a/y", "bounds": [0.0, 0.5]},
            },
            "objective": {
                "combine": combine,
                "terms": [
                    {"task": "loss", "metric": "loss", "weight": 2.0},
                    {"task": other, "metric": "acc" if other == "accuracy" else "loss"},
                ],
                "constraints": [
                    {"task": "kept", "metric": "loss", "max_relative_to_base": 0.1},
                    {"task": "solved", "metric": "acc", "max_relative_to_base": 0.1},
                ],
            },
            "search": {"n_trials": n_trials},
        }
    )


def scores_at(weights):
    """Return the score of every term, and its gradient in x and y."""
    x, y = weights["x"], weights["y"]
    wave, other = 0.1 * np.cos(x + y), 0.1 * np.cos(x - y)
    return {
        "loss": (2 + 0.5 * (x - 0.4) ** 2 + 0.5 * x * y, {"x": x - 0.4 + 0.5 * y, "y": 0.5 * x}),
        "accuracy": (0.3 + 0.1 * np.sin(x + y), {"x": wave, "y": wave}),
        "second": (3 - 0.2 * np.sin(x - y), {"x": -2 * other, "y": 2 * other}),
        "kept": (4 + x + y**2, {"x": 1.0, "y": 2 * y}),
        "solved": (0.5 - 0.1 * x, {"x": -0.1, "y": 0.0}),
    }


def trial_at(number, weights, *, without=()) -> Trial:
    scores = scores_at(weights)
    terms = {
        label: TermScore([(score, 1.0)], label in ("accuracy", "solved"))
        for label, (score, _) in scores.items()
    }
    gradients = {label: each for label, (_, each) in scores.items() if label not in without}
    return Trial(number, "x", "search", weights, "ok", terms, {}, gradients=gradients)


BASE = trial_at(0, {"x": 0.0, "y": 0.0, "fixed": 0.3})


@pytest.mark.parametrize("combine", ["relative_to_base", "weighted_mean", "worst"])
@pytest.mark.parametrize("learned", ["columns", "headrooms"])
def test_gradients_equal_central_differences_of_what_the_surrogate_learns(combine, learned):
    config, step = pool_config(combine), 1e-3
    table_of, gradients_of = (
        (columns, column_gradients) if learned == "columns" else (headrooms, headroom_gradients)
    )
    for point in np.random.default_rng(0).random((5, 2)):
        trial = trial_at(1, from_unit(config, point))
        point = to_unit(config, [trial.weights])[0]  # rounded

        def at(moved, number):
            low, high = np.array(list(config.free.values())).T
            weights = dict(zip(config.free, low + moved * (high - low), strict=True))
            return trial_at(number, weights | config.fixed)

        shifts = [point + sign * step * side for sign in (1, -1) for side in np.eye(2)]
        table = table_of(config, [BASE, *(at(moved, 1 + i) for i, moved in enumerate(shifts))])[1:]
        expected = ((table[:2] - table[2:]) / (2 * step)).T
        pair = [BASE, trial]
        found = gradients_of(config, pair, table_of(config, pair))[1]
        assert found == pytest.approx(expected, abs=1e-6)


def test_terms_without_gradients_are_learned_from_values_alone():
    config = pool_config()
    points = np.random.default_rng(0).random((6, 2))
    sets = [BASE.weights, *(from_unit(config, point) for point in points)]
    trials = [
        trial_at(number, weights, without=("accuracy", "solved"))
        for number, weights in enumerate(sets)
    ]
    surrogate = fit_surrogate(config, trials)
    assert [len(process.slopes) for process in surrogate.objective.processes] == [7, 0]
    assert [len(process.slopes) for process in surrogate.constraints] == [7, 0]


def test_a_trial_at_the_floor_has_no_gradient():
    weights = {"x": 0.4, "y": 0.0, "fixed": 0.3}
    terrible = {label: TermScore([(1e9, 1.0)], False) for label in ("loss", "kept")}
    bad = trial_at(1, weights)
    bad = replace(bad, terms=bad.terms | terrible)
    crashed = Trial(2, "x", "search", weights, "crashed", {}, {})
    trials = [BASE, bad, crashed]
    for table_of, gradients_of in ((columns, column_gradients), (headrooms, headroom_gradients)):
        gradients = gradients_of(pool_config(), trials, table_of(pool_config(), trials))
        known = np.isfinite(gradients).all(axis=-1)
        assert known.tolist() == [[True, True], [False, True], [False, False]]


@pytest.mark.parametrize("combine", ["relative_to_base", "weighted_mean", "worst"])
def test_a_surrogate_with_gradients_predicts_better(combine):
    config = pool_config(combine)
    points, fresh = (
        np.random.default_rng(0).random((4, 2)),
        np.random.default_rng(1).random((60, 2)),
    )
    trials = [BASE, *(trial_at(i, from_unit(config, p)) for i, p in enumerate(points, start=1))]
    told = [BASE, *(trial_at(i, from_unit(config, p)) for i, p in enumerate(fresh, start=1))]
    counting = np.array([2, 1]) / 3 if combine != "worst" else np.ones(1)
    expected = columns(config, told)[1:] @ counting

    def error(trials):
        mean, _ = fit_surrogate(config, trials).predict(to_unit(config, [t.weights for t in told]))
        return np.sqrt(((mean[1:] - expected) ** 2).mean()) / expected.std()

    without = [replace(trial, gradients={}) for trial in trials]
    assert error(trials) < 0.5 * error(without)
