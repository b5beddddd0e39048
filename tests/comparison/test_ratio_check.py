"""ratio_check.py: rank correlations with their intervals."""

import numpy as np
import pytest
from scipy.stats import spearmanr

from optimer_hf.comparison.ratio_check import correlation_interval, rank_correlation


def test_the_interval_of_a_rank_correlation_covers_the_true_one():
    """Over pairs from a bivariate normal distribution, whose rank correlation is known."""
    rng, rho, n = np.random.default_rng(0), 0.8, 8
    truth = 6 / np.pi * np.arcsin(rho / 2)
    covered = []
    for _ in range(2000):
        first, noise = rng.normal(size=(2, n))
        correlation = rank_correlation(first, rho * first + np.sqrt(1 - rho**2) * noise)
        interval = correlation_interval(correlation, n)
        covered.append(interval is None or interval[0] <= truth <= interval[1])
    assert 0.92 <= np.mean(covered) <= 0.985


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [([1, 2, 3, 4], [2, 4, 6, 9], 1.0), ([1, 2, 3, 4], [4, 3, 2, 1], -1.0)],
)
def test_perfect_agreement_has_no_interval(first, second, expected):
    correlation = rank_correlation(first, second)
    assert correlation == pytest.approx(expected)
    assert correlation_interval(correlation, 4) is None


def test_numbers_that_are_all_alike_have_no_rank_correlation():
    assert rank_correlation([1, 1, 1, 1], [1, 2, 3, 4]) is None
    assert correlation_interval(None, 4) is None


def test_ties_share_a_rank():
    first, second = [1.0, 2.0, 2.0, 4.0, 5.0], [1.0, 3.0, 2.0, 5.0, 4.0]
    assert rank_correlation(first, second) == pytest.approx(spearmanr(first, second).statistic)
