"""kernel.py: covariances of derivatives against finite differences of the kernel."""

import numpy as np
import pytest

from optimer_hf.study.kernel import (
    Hyperparameters,
    correlate,
    cross_covariance,
    features,
    joint_quadratic,
    matern,
    quadratic,
    squared_distances,
)

STEP = 1e-4


@pytest.mark.parametrize("d", [1, 2, 7, 8, 9, 16, 17, 40, 128])
def test_squared_distances_are_the_plain_ones_to_the_last_bit(d):
    rng = np.random.default_rng(d)
    a, b, scales = rng.normal(size=(301, d)), rng.normal(size=(70, d)), rng.random(d) + 0.1
    plain = (((a[:, None] - b[None]) / scales) ** 2).sum(-1)
    assert np.array_equal(squared_distances(a, b, scales), plain)


def by_differences(kernel, points, slopes):
    """Return the covariance of all rows: scores as they are, derivatives as central differences of
    the kernel between shifted points.
    """
    n, d = points.shape
    steps = [np.zeros(d), *(STEP * np.eye(d)), *(-STEP * np.eye(d))]
    shifted = np.vstack([points + step for step in steps])
    wide = kernel(shifted, shifted).reshape(len(steps), n, len(steps), n)

    def differences(values):  # of the first axis: the point itself, then its derivatives
        return np.concatenate([values[:1], (values[1 : d + 1] - values[d + 1 :]) / (2 * STEP)])

    half = differences(wide)
    whole = differences(half.transpose(2, 3, 0, 1)).transpose(2, 3, 0, 1)
    rows = [(0, i) for i in range(n)] + [(1 + k, i) for i in slopes for k in range(d)]
    return np.array([[whole[a, i, b, j] for b, j in rows] for a, i in rows])


@pytest.mark.parametrize("d", [1, 3, 6])
def test_covariances_of_derivatives_equal_central_differences_of_the_kernel(d):
    rng = np.random.default_rng(d)
    points, slopes, scales = rng.random((6, d)), np.array([0, 2, 5]), 0.4 + rng.random(d + 1)
    correlation, _ = correlate(points, slopes)(scales)
    expected = by_differences(
        lambda a, b: matern(features(a), features(b), scales)[0], points, slopes
    )
    assert correlation == pytest.approx(expected, abs=1e-5 * abs(expected).max())
    expected = by_differences(quadratic, points, slopes)
    assert joint_quadratic(points, slopes) == pytest.approx(expected, abs=1e-6)


def test_new_points_vary_with_the_rows_of_a_process_as_its_own_points_do():
    rng = np.random.default_rng(0)
    points, slopes = rng.random((6, 3)), np.array([1, 4])
    h = Hyperparameters(np.log([0.7, 0.4, 1e-3, 0.6, 0.9, 0.5, 1.2]))
    own = h.matern * correlate(points, slopes)(h.scales)[0]
    own += h.quadratic * joint_quadratic(points, slopes)
    assert cross_covariance(points, points, slopes, h) == pytest.approx(own[:6])


@pytest.mark.parametrize("d", [1, 4, 16])
def test_scores_vary_together_as_much_with_gradients_as_without(d):
    rng = np.random.default_rng(d)
    fitted, none = rng.random((40, d)), np.empty(0, dtype=np.intp)
    points = np.vstack([fitted, fitted + 1e-9, rng.random((40, d))])
    h = Hyperparameters(np.log([0.7, 0.4, 1e-3, *(0.2 + rng.random(d + 1))]))
    without = cross_covariance(points, fitted, none, h)
    with_gradients = cross_covariance(points, fitted, np.array([0, 7]), h)
    assert np.allclose(with_gradients[:, :40], without, rtol=0, atol=1e-13)


@pytest.mark.parametrize("slopes", [[], [1], [0, 2, 3]])
def test_what_is_pulled_back_equals_finite_differences_in_the_log_scales(slopes):
    rng = np.random.default_rng(0)
    points, scales = rng.random((5, 3)), 0.4 + rng.random(4)
    at = correlate(points, np.array(slopes, dtype=np.intp))
    correlation, pull_back = at(scales)
    inner = rng.normal(size=correlation.shape)
    inner = inner + inner.T
    expected = [
        (inner * (at(scales * np.exp(step))[0] - at(scales * np.exp(-step))[0])).sum() / 2e-5
        for step in 1e-5 * np.eye(4)
    ]
    assert pull_back(inner) == pytest.approx(np.array(expected), rel=1e-6, abs=1e-6)
