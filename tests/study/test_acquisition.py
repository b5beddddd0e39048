"""acquisition.py: expected improvement against Monte Carlo and an integral; the maximiser."""

from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from optimer_hf.study.acquisition import climb, log_expected_improvement, maximise


@pytest.mark.parametrize(
    ("mean", "deviation", "best"), [(0.0, 1.0, 0.0), (0.3, 0.2, 0.5), (2.0, 0.5, 1.0), (-1, 2, 1)]
)
def test_log_expected_improvement_equals_monte_carlo(mean, deviation, best):
    draws = mean + deviation * np.random.default_rng(0).normal(size=2_000_000)
    expected = np.log(np.maximum(draws - best, 0).mean())
    value = log_expected_improvement(np.array([mean]), np.array([deviation**2]), best)[0]
    assert value == pytest.approx(expected, abs=0.01)


@given(st.floats(-30, 5))
@settings(deadline=None)
def test_log_expected_improvement_equals_the_integral_down_to_the_tail(z):
    value = log_expected_improvement(np.array([z]), np.array([1.0]), 0.0)[0]
    # E[max(z + e, 0)], the density scaled by its value where improvement starts: no underflow
    scaled, _ = quad(
        lambda t: t * np.exp(z * t - t**2 / 2), 0, 40 + max(z, 0), points=[min(1, 1 / max(-z, 1))]
    )
    assert value == pytest.approx(norm.logpdf(z) + np.log(scaled), abs=0.05)


def test_log_expected_improvement_is_finite_and_increasing_far_below_the_best():
    means = np.linspace(-1000, 0, 20001)
    values = log_expected_improvement(means, np.ones_like(means), 0.0)
    assert np.isfinite(values).all()
    assert (np.diff(values) > 0).all()


@pytest.mark.parametrize("d", [1, 2, 4, 6])
def test_maximise_finds_the_optimum_of_a_known_function(d):
    target = np.random.default_rng(d).uniform(0.05, 0.4, d)
    best = maximise(
        lambda x: -((x - target) ** 2).sum(1), d, np.random.default_rng(0), np.full((1, d), 0.5)
    )
    assert np.abs(best - target).max() < 0.05


def test_maximise_finds_an_optimum_in_a_corner_and_stays_in_the_cube():
    best = maximise(lambda x: x.sum(1), 3, np.random.default_rng(0), np.zeros((1, 3)))
    assert best == pytest.approx(np.ones(3), abs=0.02)
    assert (best <= 1).all()


def test_maximise_never_loses_a_point_that_it_was_given():
    peak = np.array([0.123, 0.456, 0.789])
    best = maximise(
        lambda x: -(np.abs(x - peak).sum(1) ** 0.1), 3, np.random.default_rng(0), peak[None]
    )
    assert (best == peak).all()


@pytest.mark.parametrize("d", [1, 4, 16])
def test_a_bound_spares_the_acquisition_and_changes_nothing(d):
    target = np.random.default_rng(d).uniform(0.05, 0.4, d)
    counts = {"all": 0, "spared": 0}

    def bound(x):
        return -((x - target) ** 2).sum(1)

    def acquisition(name, x):
        counts[name] += len(x)
        return bound(x) - 0.05 * np.abs(np.sin(40 * x)).sum(1) / d

    best = [
        maximise(partial(acquisition, name), d, np.random.default_rng(0), near, bound=upper)
        for near in [np.full((3, d), 0.3)]
        for name, upper in (("all", None), ("spared", bound))
    ]
    assert (best[0] == best[1]).all()
    assert counts["spared"] < counts["all"] / 2


@pytest.mark.parametrize("d", [1, 4, 16, 64])
def test_a_climb_ends_at_the_optimum_in_any_number_of_dimensions(d):
    target = np.random.default_rng(d).uniform(-0.2, 1.2, d)  # some beyond the box
    best = climb(lambda x: -((x - target) ** 2).sum(1), np.full(d, 0.5))
    assert best == pytest.approx(np.clip(target, 0, 1), abs=1e-4)


def test_a_climb_never_loses_its_start_and_stays_where_it_is_allowed():
    peak = np.array([0.123, 0.456, 0.789])
    assert (climb(lambda x: -(np.abs(x - peak).sum(1) ** 0.1), peak) == peak).all()

    def allowed(points):  # a sum of at most 1
        return points / np.maximum(points.sum(1, keepdims=True), 1.0)

    best = climb(lambda x: (x * [1, 2, 3]).sum(1), np.full(3, 0.2), allowed=allowed)
    assert best.sum() <= 1 + 1e-12 and best @ [1, 2, 3] == pytest.approx(3, abs=1e-3)
