"""Searches over landscapes that are functions of the weights, without a model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from optimer_hf.scoring.scores import TermScore
from optimer_hf.searching.trial import Scored
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.directory import Study
from optimer_hf.study.trials import TrialLog

OPTIMA = {"t": [0.6, 0.3, 0.1, 0.0], "u": [0.1, 0.7, 0.0, 0.2], "q": [0.0, 0.0, 0.5, 0.5]}


def config_of(**changes) -> StudyConfig:
    data = {
        "base_model": "a/b",
        "vectors": {name: {"source": f"a/{name}"} for name in "wxyz"},
        "objective": {
            "terms": [
                {"task": "t", "metric": "loss"},
                {"task": "u", "metric": "loss"},
                {"task": "q", "metric": "loss", "weight": 0},
            ],
            "limit": 4,
        },
        "search": {"n_trials": 12, "rescore_top": 2},
    }
    return StudyConfig.model_validate(data | changes)


def landscape(label: str, weights) -> float:
    """A loss with one optimum per term, and a cliff in the sum of the weights, as merges have."""
    point = np.array(list(weights.values()))
    return 3 + ((point - OPTIMA[label]) ** 2).sum() + 0.3 * max(0, point.sum() - 1.8) ** 2


class FunctionPool:
    """Scores weights by a function; counts its calls."""

    n_items = 4
    inputs: dict[str, str] = {}

    def __init__(self, config: StudyConfig, *, noise: float = 0.1) -> None:
        self.noise, self.calls = noise, []

    def score(self, weights, asked, *, gradients=False):
        limits = {each.label: each.limit for each in asked}
        self.calls.append((dict(weights), list(limits), limits))
        jitter = self.noise * np.random.default_rng(0).normal(size=self.n_items)
        scores = {
            t.label: TermScore([(landscape(t.label, weights) + e, 1.0) for e in jitter], False)
            for t in asked
        }
        return Scored(scores, {"merge": 0.0, "evaluate": 0.0}, 10)


def slope(label: str, weights) -> dict[str, float]:
    """The derivative of `landscape` in every weight."""
    point = np.array(list(weights.values()))
    each = 2 * (point - OPTIMA[label]) + 0.6 * max(0, point.sum() - 1.8)
    return dict(zip(weights, each.tolist(), strict=True))


class GradientPool(FunctionPool):
    """Takes the gradients that it is asked for, in `backward` seconds on top of one second."""

    backward = 1.0
    differentiable: tuple[str, ...] = ("t", "u", "q")

    def score(self, weights, asked, *, gradients=False):
        scored = super().score(weights, asked)
        if not gradients:
            return replace(scored, seconds={"merge": 0.0, "evaluate": 1.0})
        labels = [each.label for each in asked if each.label in self.differentiable]
        return replace(
            scored,
            seconds={"merge": 0.0, "evaluate": 1.0 + self.backward, "backward": self.backward},
            gradients={label: slope(label, weights) for label in labels},
        )


class DearGradientPool(GradientPool):
    """Takes nine times as long with gradients."""

    backward = 8.0


class ValuesOnlyPool(GradientPool):
    """Has no term with a gradient."""

    differentiable = ()


class TellingPool(FunctionPool):
    """Has enough items for a verdict."""

    n_items = 12


def no_pool_for(what: str):
    """Return a function that fails the test if a pool is opened."""
    return lambda config: pytest.fail(f"{what} is scored already, no pool may be opened")


class FailingPool(FunctionPool):
    """Raises for some calls, by their number."""

    failures: dict[int, Exception] = {}

    def score(self, weights, asked, *, gradients=False):
        scored = super().score(weights, asked)
        if len(self.calls) - 1 in self.failures:
            raise self.failures[len(self.calls) - 1]
        return scored


def failing_at(failures):
    """Return a pool class whose calls with these numbers raise these errors."""
    return type("FailingHere", (FailingPool,), {"failures": failures})


TEST = {
    "terms": [
        {"task": f"{name}_test", "name": name, "metric": "loss", "weight": float(name != "q")}
        for name in "tuq"
    ]
}


def with_test(**changes):
    return config_of(**{"test": TEST, "search": {"n_trials": 14, "rescore_top": 2}} | changes)


def no_pool(config):
    pytest.fail("a finished study must not open its pool")


def outcome(study: Study):
    """Everything of a study's trials but the clock."""
    return [replace(trial, seconds={}, error=None) for trial in study.log.trials]


def outcome_of(directory: Path):
    return [replace(t, seconds={}) for t in TrialLog(directory / "trials.jsonl").trials]
