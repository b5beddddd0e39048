"""gp.py: the process against its own likelihood, and the points that it is fitted to."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from optimer_hf.study import gp as surrogate
from optimer_hf.study.gp import (
    GaussianProcess,
    Hyperparameters,
    WeightedSum,
    choose_informative,
    fit,
    keep_informative,
)


def smooth(points):
    """A quadratic bowl with a gentle wave, as merges have it."""
    return 3 - ((points - 0.4) ** 2).sum(1) + 0.1 * np.sin(3 * points[:, 0])


@pytest.fixture(scope="module")
def fitted():
    points = np.random.default_rng(0).random((30, 3))
    return points, smooth(points), fit(points, smooth(points))


def posterior_loss(vector, points, scores):
    """The negative log posterior of the hyperparameters, written again from Rasmussen & Williams
    with cdist.
    """
    d = points.shape[1]
    y = (scores - scores.mean()) / scores.std()
    features = np.hstack([points, 0.5 * points.sum(1, keepdims=True)])
    r = np.sqrt(5) * cdist(features / np.exp(vector[3:]), features / np.exp(vector[3:]))
    kernel = np.exp(vector[0]) * (1 + r + r**2 / 3) * np.exp(-r)
    kernel += np.exp(vector[1]) * (1 + 2 * (points - 0.25) @ (points - 0.25).T) ** 2
    kernel += (np.exp(vector[2]) + 1e-8) * np.eye(len(y))
    mean = np.array(
        [np.log(0.3), np.log(0.5), np.log(1e-3)] + [np.log(0.5) + 0.5 * np.log(d + 1)] * (d + 1)
    )
    deviation = np.array([1.5, 2, 2] + [0.8] * (d + 1))
    sign, determinant = np.linalg.slogdet(kernel)
    assert sign > 0
    return (
        0.5 * y @ np.linalg.solve(kernel, y)
        + 0.5 * determinant
        + 0.5 * (((vector - mean) / deviation) ** 2).sum()
    )


def test_gradient_of_the_fit_equals_finite_differences(monkeypatch):
    points = np.random.default_rng(1).random((12, 2))
    scores = smooth(points) + 0.05 * np.random.default_rng(2).normal(size=12)
    caught = {}

    def spy(loss, start, **options):
        caught["loss"], caught["start"] = loss, start
        return real(loss, start, **options)

    real = surrogate.minimize
    monkeypatch.setattr(surrogate, "minimize", spy)
    fit(points, scores)
    for offset in (0.0, 0.5, -0.7):
        vector = caught["start"] + offset * np.linspace(-1, 1, len(caught["start"]))
        value, gradient = caught["loss"](vector)
        assert value == pytest.approx(posterior_loss(vector, points, scores), rel=1e-9)
        step = 1e-5
        for index in range(len(vector)):
            moved = step * np.eye(len(vector))[index]
            slope = (
                posterior_loss(vector + moved, points, scores)
                - posterior_loss(vector - moved, points, scores)
            ) / (2 * step)
            assert gradient[index] == pytest.approx(slope, rel=1e-4, abs=1e-5)


def test_the_fit_ends_where_no_small_step_of_the_hyperparameters_helps():
    points = np.random.default_rng(3).random((20, 2))
    scores = smooth(points) + 0.1 * np.random.default_rng(4).normal(size=20)
    best = fit(points, scores).hyperparameters.vector
    here = posterior_loss(best, points, scores)
    for index in range(len(best)):
        for step in (-0.05, 0.05):
            assert (
                posterior_loss(best + step * np.eye(len(best))[index], points, scores) > here - 1e-3
            )


def test_noiseless_smooth_scores_are_interpolated(fitted):
    points, scores, process = fitted
    assert process.predict(points)[0] == pytest.approx(scores, abs=5e-4 * scores.std())


@pytest.mark.parametrize("d", [1, 4, 8])
def test_noiseless_scores_of_crowded_points_do_not_break_the_fit(d):
    rng = np.random.default_rng(d)
    around = 0.4 + 10 ** rng.uniform(-4, 0, (100, 1)) * rng.normal(size=(100, d))
    points = np.clip(around, 0, 1)
    scores = -((points - 0.4) ** 2).sum(axis=1)
    process = fit(points, scores).condition_on(points[-3:] + 1e-4).condition_on(points[-2:])
    mean, variance = process.predict(points)
    assert mean == pytest.approx(scores, abs=5e-4 * scores.std())
    assert np.isfinite(variance).all()


def test_unseen_points_of_a_smooth_function_are_predicted(fitted):
    fresh = np.random.default_rng(5).random((200, 3))
    mean, _ = fitted[2].predict(fresh)
    residual = ((mean - smooth(fresh)) ** 2).mean() / smooth(fresh).var()
    assert residual < 0.01


def test_variance_is_small_at_data_and_grows_away_from_it():
    points = 0.3 * np.random.default_rng(0).random((15, 2))
    process = fit(points, smooth(points))
    _, at_data = process.predict(points)
    _, far = process.predict(np.array([[1.0, 1.0], [0.0, 1.0]]))
    assert far.min() > 10 * at_data.max()
    assert at_data.min() > 0


def test_prediction_equals_the_dense_formula(fitted):
    points, scores, process = fitted
    h, fresh = process.hyperparameters, np.random.default_rng(6).random((5, 3))

    def kernel(a, b):
        fa, fb = (np.hstack([x, 0.5 * x.sum(1, keepdims=True)]) / h.scales for x in (a, b))
        r = np.sqrt(5) * cdist(fa, fb)
        return (
            h.matern * (1 + r + r**2 / 3) * np.exp(-r)
            + h.quadratic * (1 + 2 * (a - 0.25) @ (b - 0.25).T) ** 2
        )

    gram = kernel(points, points) + (h.noise + 1e-8) * np.eye(len(points))
    y = (scores - scores.mean()) / scores.std()
    mean, variance = process.predict(fresh)
    cross = kernel(fresh, points)
    assert mean == pytest.approx(
        scores.mean() + scores.std() * cross @ np.linalg.solve(gram, y), abs=1e-5
    )
    dense = np.diag(kernel(fresh, fresh) - cross @ np.linalg.solve(gram, cross.T)) * scores.var()
    assert variance == pytest.approx(dense, rel=1e-2, abs=1e-7)


def test_the_same_trials_give_the_same_process(fitted):
    points, scores, process = fitted
    assert (fit(points, scores).hyperparameters.vector == process.hyperparameters.vector).all()


def test_equal_scores_everywhere_do_not_break_the_fit():
    points = np.random.default_rng(0).random((6, 2))
    mean, variance = fit(points, np.full(6, 0.5)).predict(points)
    assert mean == pytest.approx(np.full(6, 0.5), abs=1e-6)
    assert np.isfinite(variance).all()


def test_a_repeated_point_does_not_break_the_fit():
    points = np.repeat(np.random.default_rng(0).random((4, 2)), 3, axis=0)
    scores = smooth(points) + 0.1 * np.random.default_rng(1).normal(size=12)
    mean, _ = fit(points, scores).predict(points)
    assert np.isfinite(mean).all()


def test_a_weighted_sum_adds_means_and_variances(fitted):
    points, _, process = fitted
    other = fit(points, points[:, 0] * 2)
    both = WeightedSum([process, other], np.array([0.25, -2.0]))
    (m1, v1), (m2, v2) = process.predict(points), other.predict(points)
    mean, variance = both.predict(points)
    assert mean == pytest.approx(0.25 * m1 - 2 * m2)
    assert variance == pytest.approx(0.0625 * v1 + 4 * v2)


def test_hyperparameters_are_read_off_a_log_scale():
    h = Hyperparameters(np.log([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert (h.matern, h.quadratic, h.noise) == pytest.approx((1, 2, 3))
    assert h.scales == pytest.approx([4, 5])
    assert isinstance(fit(np.eye(2), np.array([0.0, 1.0])), GaussianProcess)


def test_conditioning_keeps_the_mean_and_shrinks_the_variance_near_the_points():
    rng = np.random.default_rng(3)
    points = rng.random((20, 3))
    process = fit(points, np.sin(3 * points).sum(1) + 0.01 * rng.normal(size=20))
    pending, elsewhere = rng.random((4, 3)), rng.random((50, 3))
    told = process.condition_on(pending)
    mean, variance = process.predict(elsewhere)
    told_mean, told_variance = told.predict(elsewhere)
    assert (process.mean(elsewhere) == mean).all()  # without gradients bit for bit
    assert told_mean == pytest.approx(mean, abs=1e-4)
    assert (told_variance <= variance + 1e-9).all()
    assert (told.predict(pending)[1] < 0.7 * process.predict(pending)[1]).all()


def test_up_to_the_bound_a_process_is_fitted_to_every_point():
    points = np.random.default_rng(0).random((surrogate.N_KEPT, 3))
    assert np.array_equal(choose_informative(points, points), np.arange(surrogate.N_KEPT))


@given(seed=st.integers(0, 2**32 - 1), n=st.integers(101, 400), distinct=st.integers(1, 400))
@settings(max_examples=25, deadline=None)
def test_of_many_points_the_first_the_newest_the_best_and_far_ones_are_kept(seed, n, distinct):
    rng = np.random.default_rng(seed)
    points = rng.random((distinct, 4))[rng.integers(distinct, size=n)]
    values = rng.normal(size=(n, 2))
    kept = choose_informative(points, values)
    assert np.array_equal(kept, choose_informative(points.copy(), values.copy()))
    assert np.all(np.diff(kept) > 0) and len(kept) <= surrogate.N_KEPT
    n_distinct = len(np.unique(points, axis=0))
    assert len(kept) == surrogate.N_KEPT or n_distinct < surrogate.N_KEPT + 1
    assert {0, *range(n - 25, n), *np.argmax(values, axis=0)} <= set(kept)
    if distinct <= 20:  # each different point is there
        assert len(np.unique(points[kept], axis=0)) == len(np.unique(points, axis=0))


def test_a_process_of_many_points_predicts_near_the_best_as_one_of_all():
    rng = np.random.default_rng(0)
    points = rng.random((260, 3))
    scores = smooth(points) + 0.01 * rng.normal(size=260)
    kept = choose_informative(points, scores[:, None])
    near = 0.4 + 0.1 * rng.normal(size=(50, 3))
    few, all_of_them = fit(points[kept], scores[kept]), fit(points, scores)
    assert few.predict(near)[0] == pytest.approx(all_of_them.predict(near)[0], abs=0.02)
    assert few.predict(near)[0] == pytest.approx(smooth(near), abs=0.03)


# -- with gradients --------------------------------------------------------------------------------


def slope(points):
    """The gradient of `smooth`."""
    gradient = -2 * (points - 0.4)
    gradient[:, 0] += 0.3 * np.cos(3 * points[:, 0])
    return gradient


def known_at(points, rows):
    """Return the gradients of `smooth` at some rows of points, NaN at the others."""
    gradients = np.full_like(points, np.nan)
    gradients[rows] = slope(points[rows])
    return gradients


def test_gradients_that_nobody_knows_change_no_bit_of_a_fit(fitted):
    points, scores, process = fitted
    with_none = fit(points, scores, np.full_like(points, np.nan))
    assert (with_none.coefficients == process.coefficients).all()
    assert (with_none.hyperparameters.vector == process.hyperparameters.vector).all()


def test_the_own_gradient_of_a_fit_with_gradients_equals_finite_differences(monkeypatch):
    rng, caught = np.random.default_rng(1), {}
    points = rng.random((9, 3))

    def spy(loss, start, **options):
        caught["loss"], caught["start"] = loss, start
        return real(loss, start, **options)

    real = surrogate.minimize
    monkeypatch.setattr(surrogate, "minimize", spy)
    fit(points, smooth(points), known_at(points, [0, 2, 5]))
    loss, start = caught["loss"], caught["start"]
    assert len(start) == 3 + 4 + 1
    for offset in (0.0, 0.5, -0.7):
        vector = start + offset * np.linspace(-1, 1, len(start))
        gradient = loss(vector)[1]
        for index, moved in enumerate(1e-5 * np.eye(len(vector))):
            expected = (loss(vector + moved)[0] - loss(vector - moved)[0]) / 2e-5
            assert gradient[index] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_noiseless_gradients_are_interpolated():
    points = np.random.default_rng(0).random((8, 3))
    process = fit(points, smooth(points), slope(points))
    step = 1e-4 * np.eye(3)[:, None]
    found = (process.predict((points + step).reshape(-1, 3))[0]).reshape(3, 8)
    found = (found - process.predict((points - step).reshape(-1, 3))[0].reshape(3, 8)).T / 2e-4
    assert found == pytest.approx(slope(points), abs=0.03)
    assert process.predict(points)[0] == pytest.approx(smooth(points), abs=2e-3)


@pytest.mark.parametrize("d", [4, 8])
def test_unseen_points_are_predicted_from_few_scores_with_gradients(d):
    rng = np.random.default_rng(d)
    points, fresh = rng.random((2 * d, d)), rng.random((200, d))
    without, with_them = fit(points, smooth(points)), fit(points, smooth(points), slope(points))

    def error(process):
        return ((process.predict(fresh)[0] - smooth(fresh)) ** 2).mean() / smooth(fresh).var()

    assert error(with_them) < 0.02 < 0.2 < error(without)


def test_the_noise_of_gradients_is_learned():
    rng = np.random.default_rng(0)
    points = rng.random((40, 3))
    noisy = slope(points) + 0.05 * rng.normal(size=points.shape)
    process = fit(points, smooth(points), noisy)
    learned = process.spread * np.sqrt(process.hyperparameters.gradient_noise)
    assert learned == pytest.approx(0.05, rel=0.3)


def test_a_process_with_gradients_is_conditioned_like_any_other():
    rng = np.random.default_rng(3)
    points = rng.random((10, 3))
    process = fit(points, smooth(points), known_at(points, [0, 4, 9]))
    pending, elsewhere = rng.random((3, 3)), rng.random((50, 3))
    told = process.condition_on(pending)
    mean, variance = process.predict(elsewhere)
    told_mean, told_variance = told.predict(elsewhere)
    assert process.mean(elsewhere) == pytest.approx(mean, rel=1e-9, abs=1e-12)
    assert told_mean == pytest.approx(mean, abs=1e-4)
    assert (told_variance <= variance + 1e-9).all()
    assert (told.predict(pending)[1] < 0.7 * process.predict(pending)[1]).all()


def test_repeated_points_with_gradients_do_not_break_the_fit():
    points = np.repeat(np.random.default_rng(0).random((4, 2)), 3, axis=0)
    mean, variance = fit(points, smooth(points), slope(points)).predict(points)
    assert mean == pytest.approx(smooth(points), abs=5e-3)
    assert np.isfinite(variance).all()


def test_of_many_gradients_those_of_the_first_the_newest_and_the_best_are_kept():
    rng = np.random.default_rng(0)
    points = rng.random((100, 16))
    values, gradients = smooth(points)[:, None], slope(points)[:, None]
    gradients[10:20] = np.nan  # these trials took none
    kept = keep_informative(points, values, gradients)
    has_one = np.isfinite(kept).all(axis=(1, 2))
    assert has_one.sum() == surrogate.N_DERIVATIVES // 16
    known = np.flatnonzero(np.isfinite(gradients).all(axis=(1, 2)))
    assert has_one[[0, 99, known[np.argmax(values[known, 0])]]].all()
    assert not has_one[10:20].any()
    assert (kept[has_one] == gradients[has_one]).all()
