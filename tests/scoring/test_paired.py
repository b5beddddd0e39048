"""paired.py: the paired interval of a difference of two objectives."""

import math

import numpy as np
import pytest

from optimer_hf.scoring.objective import gains
from optimer_hf.scoring.paired import paired_interval
from optimer_hf.scoring.scores import TermScore
from tests.support.scores import BASE, OTHER, TERMS, losses, objective_of


@pytest.mark.parametrize("rule", ["relative_to_base", "worst"])
def test_scores_beside_themselves_have_no_interval(rule):
    interval = paired_interval(objective_of(*TERMS, combine=rule), OTHER, OTHER, BASE)
    assert (interval.difference, interval.low, interval.high) == (0, -math.inf, math.inf)
    assert interval.kind == "none" and not interval.excludes_zero


def test_a_constant_improvement_is_settled_and_no_certain_number():
    objective = objective_of({"task": "a", "metric": "m", "name": "loss"})
    base = {"loss": losses(*[2.0] * 20)}
    interval = paired_interval(
        objective, {"loss": losses(*[1.0] * 20)}, {"loss": losses(*[1.5] * 20)}, base
    )
    assert interval.difference == pytest.approx(0.25)
    assert 0 < interval.low < 0.22 and 0.25 < interval.high < 0.3
    assert interval.excludes_zero


def test_pairing_makes_the_interval_narrower_than_the_noise_between_items():
    rng = np.random.default_rng(0)
    hard = rng.normal(5, 2, 200)
    objective = objective_of({"task": "a", "metric": "m", "name": "loss"})
    sides = [
        {"loss": losses(*(hard + shift + 0.05 * rng.normal(size=200)))}
        for shift in (0.0, -0.05, 0.0)
    ]
    assert paired_interval(objective, sides[1], sides[2], sides[0]).excludes_zero
    assert paired_interval(objective, sides[1], sides[2], sides[0]).difference > 0


@pytest.mark.parametrize("rule", ["relative_to_base", "weighted_mean"])
def test_the_95_percent_interval_covers_the_truth_about_95_times_in_100(rule):
    rng = np.random.default_rng(1)
    objective = objective_of({"task": "a", "metric": "m", "name": "loss"}, combine=rule)
    covered = 0
    for _ in range(200):
        hard = rng.gamma(9, 0.5, 80)
        sides = [
            {"loss": losses(*(scale * hard + 0.3 * rng.normal(size=80)))}
            for scale in (1.0, 0.9, 0.95)
        ]
        interval = paired_interval(objective, sides[1], sides[2], sides[0])
        truth = 0.05 if rule == "relative_to_base" else 0.05 * 4.5
        covered += interval.low <= truth <= interval.high
    assert 0.89 * 200 <= covered <= 0.99 * 200


def test_gains_of_negative_losses_and_zero_bases_have_the_right_sign():
    def losses(*values):
        return {"f": TermScore([(value, 1.0) for value in values], False)}

    objective = objective_of({"function": "f", "higher_is_better": False})
    better, base = losses(*np.linspace(-3, -3.2, 12)), losses(*[-2] * 12)
    interval = paired_interval(objective, better, base, base)
    assert 0 < interval.low <= interval.difference <= interval.high
    assert gains(losses(1.0), losses(0.0)) == {"f": -1.0}
