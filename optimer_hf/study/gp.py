"""A small Gaussian process: scores, and where known their gradients, as a function of merge
weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy.linalg import cho_solve, solve_triangular
from scipy.linalg.lapack import dpotri
from scipy.optimize import minimize

from optimer_hf.study.kernel import (
    Hyperparameters,
    correlate,
    cross_covariance,
    cross_product,
    joint_quadratic,
    noise_of,
    squared_distances,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]
    Indices = NDArray[np.intp]


N_KEPT = 100  # points that a process is fitted to
BEST, NEWEST = 0.4, 0.25  # shares of them
# derivatives that a process is fitted to, and bounds of the number of gradients
N_DERIVATIVES, N_GRADIENTS = 256, (12, 32)
# the same of the fit of its hyperparameters
N_ROWS_OF_FIT, N_SCORES_OF_FIT, N_GRADIENTS_OF_FIT = 160, 60, (4, 16)
FIT_TOLERANCE = 1e-5  # of the log posterior density, relative, at which that fit ends
GRADIENT_NOISE = 3e-3  # variance that is expected of it, in variances of the scores


def _prior(d: int, *, with_gradients: bool) -> tuple["Array", "Array"]:
    """Return mean and standard deviation of the Gaussian prior on the log hyperparameters."""
    mean = np.concatenate(
        [np.log([0.3, 0.5, 1e-3]), np.full(d + 1, np.log(0.5) + 0.5 * np.log(d + 1))]
    )
    deviation = np.concatenate([[1.5, 2.0, 2.0], np.full(d + 1, 0.8)])
    if not with_gradients:
        return mean, deviation
    return np.append(mean, np.log(GRADIENT_NOISE)), np.append(deviation, 2.0)


def _no_slopes() -> "Indices":
    return np.empty(0, dtype=np.intp)


@dataclass(frozen=True)
class GaussianProcess:
    """A fitted process over weights scaled to [0, 1]^d; it knows the scores at `points`, and the
    gradients at points[slopes].
    """

    points: "Array"
    hyperparameters: Hyperparameters
    center: float
    spread: float
    cholesky: "NDArray[np.floating]"
    coefficients: "Array"
    slopes: "Indices" = field(default_factory=_no_slopes)

    def mean(self, points: "Array") -> "Array":
        """Return the posterior mean at points [n, d], in the units of the scores, in a fraction of
        the time that `predict` takes; with gradients the last bits differ.
        """
        expected = cross_product(
            points, self.points, self.slopes, self.hyperparameters, self.coefficients
        )
        return self.center + self.spread * expected

    def predict(self, points: "Array") -> tuple["Array", "Array"]:
        """Return posterior mean and variance at points [n, d], in the units of the scores."""
        h = self.hyperparameters
        cross = cross_covariance(points, self.points, self.slopes, h)
        prior = h.matern + h.quadratic * (1 + 2 * ((points - 0.25) ** 2).sum(1)) ** 2
        reduction = (
            solve_triangular(self.cholesky, cross.T, lower=True, check_finite=False) ** 2
        ).sum(0)
        variance = np.maximum(prior - reduction, 1e-12)
        return self.center + self.spread * (cross @ self.coefficients), self.spread**2 * variance

    def condition_on(self, points: "Array") -> "GaussianProcess":
        """Return the process as if points [n, d] had scored their posterior mean.

        The mean stays the same everywhere, and the variance shrinks near the points (Desautels et
        al., JMLR 2014). Hyperparameters stay the same.
        """
        n, everywhere = len(self.points), np.vstack([self.points, points])
        expected = (self.predict(points)[0] - self.center) / self.spread
        measured = self.cholesky @ (self.cholesky.T @ self.coefficients)
        lower = np.linalg.cholesky(_covariance(everywhere, self.slopes, self.hyperparameters))
        measured = np.concatenate([measured[:n], expected, measured[n:]])
        coefficients = cho_solve((lower, True), measured)
        return replace(self, points=everywhere, cholesky=lower, coefficients=coefficients)


def _covariance(points: "Array", slopes: "Indices", h: Hyperparameters) -> "Array":
    """Return the covariance of the scores measured at points [n, d] and the gradients measured at
    points[slopes], with noise.
    """
    correlation, _ = correlate(points, slopes)(h.scales)
    noise = np.diag(noise_of(len(points), len(correlation) - len(points), h))
    return np.asarray(
        h.matern * correlation + h.quadratic * joint_quadratic(points, slopes) + noise
    )


def choose_informative(points: "Array", values: "Array", n_kept: int | None = None) -> "Indices":
    """Return the indices of the points [n, d] that a process is fitted to, in order.

    Up to `n_kept` points, by default N_KEPT, these are all of them. Beyond that, that many are
    chosen: the first (the base), the newest, those with the largest `values` [n, m], column by
    column, and then again and again the point farthest from those chosen.

    The time of a fit grows with the cube of its points. The choice depends on nothing but the
    arguments, so a resumed search repeats it.
    """
    n, n_kept = len(points), N_KEPT if n_kept is None else n_kept
    if n <= n_kept:
        return np.arange(n)
    chosen = dict.fromkeys([0, *range(n - int(NEWEST * n_kept), n)])
    n_with_best = len(chosen) + int(BEST * n_kept)
    for index in np.argsort(-values, axis=0, kind="stable").ravel():
        if len(chosen) == n_with_best:
            break
        chosen.setdefault(int(index))
    distances = squared_distances(points, points[list(chosen)], np.ones(points.shape[1])).min(1)
    while len(chosen) < n_kept:
        farthest = int(np.argmax(distances))
        if farthest in chosen:  # the others repeat points that are chosen
            break
        chosen[farthest] = None
        distances = np.minimum(distances, ((points - points[farthest]) ** 2).sum(axis=1))
    return np.array(sorted(chosen))


def keep_informative(points: "Array", values: "Array", gradients: "Array") -> "Array":
    """Return gradients [n, m, d] at points [n, d] with those that a process is not fitted to set to
    NaN. The points that keep theirs are chosen by `choose_informative` among those that have any.
    """
    known = np.flatnonzero(np.isfinite(gradients).any(axis=(1, 2)))
    n_kept = _within(N_GRADIENTS, N_DERIVATIVES // points.shape[1])
    kept = known[choose_informative(points[known], values[known], n_kept)]
    result = np.full_like(gradients, np.nan)
    result[kept] = gradients[kept]
    return result


def _within(bounds: tuple[int, int], number: int) -> int:
    return min(max(number, bounds[0]), bounds[1])


def fit(points: "Array", scores: "Array", gradients: "Array | None" = None) -> GaussianProcess:
    """Fit a process to scores [n] at points [n, d] of the unit box, and to their gradients [n, d]
    where those are known (others are NaN): the maximum a posteriori of the hyperparameters, with
    exact gradients.
    """
    slopes = _no_slopes()
    if gradients is not None:
        slopes = np.flatnonzero(np.isfinite(gradients).all(axis=1))
    center, spread = float(scores.mean()), float(max(scores.std(), 1e-9))
    y = (scores - center) / spread
    if gradients is not None:
        y = np.concatenate([y, (gradients[slopes] / spread).ravel()])
    h = _most_likely(*_subset(points, slopes, y))
    lower = np.linalg.cholesky(_covariance(points, slopes, h))
    coefficients = cho_solve((lower, True), y)
    return GaussianProcess(points, h, center, spread, lower, coefficients, slopes)


def _subset(points: "Array", slopes: "Indices", y: "Array") -> tuple["Array", "Indices", "Array"]:
    """Return points, slopes and `y` (see `_most_likely`) for the fit of the hyperparameters. With
    gradients it takes less than predictions do: N_ROWS_OF_FIT scores and derivatives.
    """
    n, d = points.shape
    if not len(slopes):
        return points, slopes, y
    scores, derivatives = y[:n], y[n:].reshape(-1, d)
    with_score = choose_informative(points, scores[:, None], N_SCORES_OF_FIT)
    n_kept = _within(N_GRADIENTS_OF_FIT, (N_ROWS_OF_FIT - len(with_score)) // d)
    kept = choose_informative(points[slopes], scores[slopes, None], n_kept)
    rows = np.union1d(with_score, slopes[kept])
    at = np.searchsorted(rows, slopes[kept])
    return points[rows], at, np.concatenate([scores[rows], derivatives[kept].ravel()])


def _most_likely(points: "Array", slopes: "Indices", y: "Array") -> Hyperparameters:
    """Return the maximum a posteriori of the hyperparameters, given the scores `y` at points and,
    after those, the derivatives at points[slopes].
    """
    n, d = points.shape
    correlations, quadratic = correlate(points, slopes), joint_quadratic(points, slopes)
    mean, deviation = _prior(d, with_gradients=len(slopes) > 0)

    def loss(vector: "Array") -> tuple[float, "Array"]:
        h = _hyperparameters(vector, d)
        correlation, pull_back = correlations(h.scales)
        kernel = h.matern * correlation + h.quadratic * quadratic
        np.einsum("ii->i", kernel)[:] += noise_of(n, len(y) - n, h)
        try:
            lower = np.linalg.cholesky(kernel)
        except np.linalg.LinAlgError:
            return 1e10, np.zeros_like(vector)
        if len(slopes):
            inverse = _inverse(lower)
        else:  # the bits of earlier versions
            inverse = cho_solve((lower, True), np.eye(n), check_finite=False)
        alpha = inverse @ y
        value = 0.5 * y @ alpha + np.log(np.diag(lower)).sum()
        inner = inverse - np.multiply.outer(alpha, alpha)  # d value / d kernel, times two
        gradient = np.empty_like(vector)
        gradient[0] = 0.5 * h.matern * (inner * correlation).sum()
        gradient[1] = 0.5 * h.quadratic * (inner * quadratic).sum()
        gradient[2] = 0.5 * h.noise * np.trace(inner[:n, :n])
        gradient[3 : d + 4] = pull_back(0.5 * h.matern * inner)
        gradient[d + 4 :] = 0.5 * h.gradient_noise * np.trace(inner[n:, n:])
        z = (vector - mean) / deviation
        return float(value + 0.5 * z @ z), gradient + z / deviation

    # losses on fixed items can be smooth to e^-16 of their variance; JITTER is e^-18.4
    bounds = [(-8, 4), (-8, 5), (-16, 2)] + [(-4, 4)] * (d + 1) + [(-16, 4)] * (len(mean) - d - 4)
    options = {"maxiter": 30, "ftol": FIT_TOLERANCE} if len(slopes) else {"maxiter": 60}
    best = minimize(loss, mean, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return _hyperparameters(best.x, d)


def _inverse(lower: "NDArray[np.floating]") -> "Array":
    """Return the inverse of a matrix from its Cholesky factor, in a fraction of the time that
    solving for every column takes; the last bits differ.
    """
    half, _ = dpotri(lower.T, lower=False)  # LAPACK's order of a transposed array is ours
    inverse = half + half.T  # the other half is 0, as that of the factor is
    np.einsum("ii->i", inverse)[:] *= 0.5
    return np.asarray(inverse)


def _hyperparameters(vector: "Array", d: int) -> Hyperparameters:
    return Hyperparameters(vector[: d + 4], *vector[d + 4 :])


@dataclass(frozen=True)
class WeightedSum:
    """The posterior of an objective: a weighted sum of independent processes, one for each term."""

    processes: Sequence[GaussianProcess]
    weights: "Array"

    def mean(self, points: "Array") -> "Array":
        """Return the posterior mean of the sum at points [n, d]."""
        means = np.array([process.mean(points) for process in self.processes])
        return np.asarray(self.weights @ means)

    def predict(self, points: "Array") -> tuple["Array", "Array"]:
        """Return posterior mean and variance of the sum at points [n, d]."""
        means, variances = zip(
            *(process.predict(points) for process in self.processes), strict=True
        )
        return self.weights @ np.array(means), self.weights**2 @ np.array(variances)

    def condition_on(self, points: "Array") -> "WeightedSum":
        """Return the sum with every process conditioned on points [n, d]."""
        return replace(self, processes=[process.condition_on(points) for process in self.processes])
