"""sensitivity.py: the slopes of a pool from two passes."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from optimer_hf.errors import ConfigError, EvaluationError
from optimer_hf.scoring.objective import combine
from optimer_hf.scoring.scores import TermScore
from optimer_hf.searching.runner import InProcess
from optimer_hf.searching.sensitivity import sensitivity_of, to_json, to_markdown
from optimer_hf.searching.trial import Scored
from tests.support.landscapes import (
    OPTIMA,
    FunctionPool,
    GradientPool,
    ValuesOnlyPool,
    config_of,
    failing_at,
    slope,
)


def test_slopes_are_the_derivatives_of_the_value_at_the_base_and_at_the_average():
    config, pool = config_of(), FunctionPool(config_of(), noise=0)
    measured = sensitivity_of(config, runner=InProcess(lambda c: GradientPool(c, noise=0)))
    asked = config.objective.asked_terms("search")
    base = pool.score(dict.fromkeys("wxyz", 0.0), asked).terms
    for at, trial in enumerate(measured.places):
        for name in "wxyz":
            low, high = (
                pool.score(trial.weights | {name: trial.weights[name] + move}, asked).terms
                for move in (-1e-5, 1e-5)
            )
            rise = combine(config.objective, high, base) - combine(config.objective, low, base)
            assert measured.slopes[name].value[at] == pytest.approx(rise / 2e-5, abs=1e-8)
            expected = -slope("q", trial.weights)[name] / base["q"].score
            assert measured.slopes[name].terms["q"][at] == pytest.approx(expected)
    # the optimum of the objective is [.35, .5, .05, .1], that of q, which has no weight, elsewhere
    assert list(measured.slopes) == ["x", "w", "z", "y"]
    advice = {name: slope.advice for name, slope in measured.slopes.items()}
    assert advice["x"] == advice["w"] == "search, may need much"
    assert advice["y"] == advice["z"] == "search, needs little"


class LargePool:
    """Thirty-two vectors, of which every fourth lowers the loss of t, and none that of u."""

    inputs: dict[str, str] = {}
    calls: list[dict[str, float]] = []

    def __init__(self, config) -> None:
        self.calls.clear()

    def score(self, weights, asked, *, gradients=False):
        assert gradients
        self.calls.append(dict(weights))
        slopes = {name: -1.0 if index % 4 == 0 else 2.0 for index, name in enumerate(weights)}
        loss = 3 + sum(slopes[name] * weight for name, weight in weights.items()) / 100
        scores = {"t": TermScore([(loss, 1.0)], False), "u": TermScore([(0.5, 1.0)], True)}
        return Scored(scores, {"merge": 0.0, "evaluate": 1.0}, 1, {"t": slopes})


def test_a_large_pool_takes_two_trials_and_names_the_vectors_worth_searching():
    names = [f"v{index}" for index in range(32)]
    config = config_of(
        vectors={name: {"source": f"a/{name}"} for name in names},
        objective={"terms": [{"task": "t", "metric": "loss"}, {"task": "u"}]},
    )
    measured = sensitivity_of(config, runner=InProcess(LargePool))
    assert [sum(weights.values()) for weights in LargePool.calls] == [0, pytest.approx(1, abs=0.01)]
    assert measured.worth_searching == names[::4]
    assert measured.lacking == ["u"]
    text = to_markdown(measured)
    assert "| v4 | +33.33 / +33.33 | +33.33 / +33.33 | search, may need much |" in text
    assert "| v1 | -66.67 / -66.67 | -66.67 / -66.67 | leave out |" in text
    assert f"Worth searching: {', '.join(names[::4])}." in text
    assert "Without a gradient, so not in it: u." in text
    data = json.loads(json.dumps(to_json(measured)))
    assert data["worth_searching"] == names[::4]
    assert data["places"]["base"]["gradients"]["t"]["v4"] == -1
    assert data["vectors"]["v4"]["objective"] == pytest.approx([1 / 3, 1 / 3])


def test_a_vector_that_helps_only_a_term_without_weight_says_so(monkeypatch):
    monkeypatch.setitem(OPTIMA, "t", [0.6, 0.3, -0.1, 0.0])
    monkeypatch.setitem(OPTIMA, "u", [0.1, 0.7, -0.1, 0.2])
    measured = sensitivity_of(config_of(), runner=InProcess(GradientPool))
    assert measured.slopes["y"].advice == "leave out, helps only q"
    assert "The objective falls with y, at both places." in to_markdown(measured)


def overflowing(*where: tuple[int, str]):
    """Return a pool class whose gradients are not finite: of these terms, in these calls."""

    class Overflowing(GradientPool):
        def score(self, weights, asked, *, gradients=False):
            scored, call = super().score(weights, asked, gradients=gradients), len(self.calls) - 1
            slopes = {
                label: gradient | {"x": math.inf} if (call, label) in where else gradient
                for label, gradient in scored.gradients.items()
            }
            return replace(scored, gradients=slopes)

    return Overflowing


@pytest.mark.parametrize("call", [0, 1])
@pytest.mark.parametrize("label", ["u", "q"])
def test_a_term_whose_gradient_is_not_finite_at_one_place_is_left_out(call, label):
    whole = sensitivity_of(config_of(), runner=InProcess(GradientPool))
    measured = sensitivity_of(config_of(), runner=InProcess(overflowing((call, label))))
    assert measured.lacking == (["u"] if label == "u" else [])  # q has no weight
    for name, slope_of in measured.slopes.items():
        kept = {k: v for k, v in whole.slopes[name].terms.items() if k != label}
        assert slope_of.terms == kept
        assert slope_of.value == (kept["t"] if label == "u" else whole.slopes[name].value)
    assert label not in to_markdown(measured).partition("\n")[0].split(" | ")
    assert json.dumps(to_json(measured))


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ([(1, "t"), (1, "u")], r"not finite at average: t, u\)"),
        ([(0, "t"), (1, "u")], r"not finite at base: t; average: u\)"),
    ],
)
def test_without_a_term_that_has_slopes_at_both_places_the_error_names_the_place(where, why):
    with pytest.raises(EvaluationError, match=why):
        sensitivity_of(config_of(), runner=InProcess(overflowing(*where)))


@pytest.mark.parametrize(
    ("pool", "error", "why"),
    [
        (ValuesOnlyPool, EvaluationError, r"none of its terms \(t, u\) has a gradient"),
        (failing_at({1: ValueError("no")}), EvaluationError, "average: cannot be scored: ValueErr"),
    ],
)
def test_a_pool_whose_slopes_cannot_be_measured_is_an_error(pool, error, why):
    with pytest.raises(error, match=why):
        sensitivity_of(config_of(), runner=InProcess(pool))


def test_an_engine_without_gradients_is_refused_before_anything_is_opened():
    with pytest.raises(ConfigError, match="engine: vllm has no gradients"):
        sensitivity_of(config_of(engine="vllm"), runner=InProcess(lambda config: np.nan))
