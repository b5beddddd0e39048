"""A small Gaussian process: scores as a function of merge weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from scipy.linalg import cho_solve, solve_triangular
from scipy.optimize import minimize

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


JITTER = 1e-8
CACHED = 2**14  # numbers that stay in the processor's cache
N_KEPT = 100  # points that a process is fitted to
BEST, NEWEST = 0.4, 0.25  # shares of them


@dataclass(frozen=True)
class Hyperparameters:
    """Kernel variances and length scales; the fit changes `vector`, their logarithms."""

    vector: "Array"

    @property
    def matern(self) -> float:
        """Variance of the Matern part."""
        return float(np.exp(self.vector[0]))

    @property
    def quadratic(self) -> float:
        """Variance of the quadratic part."""
        return float(np.exp(self.vector[1]))

    @property
    def noise(self) -> float:
        """Variance of the observation noise."""
        return float(np.exp(self.vector[2]))

    @property
    def scales(self) -> "Array":
        """Length scale of every feature."""
        return np.exp(self.vector[3:])


def _prior(d: int) -> tuple["Array", "Array"]:
    """Return mean and standard deviation of the Gaussian prior on the log hyperparameters."""
    mean = np.concatenate(
        [np.log([0.3, 0.5, 1e-3]), np.full(d + 1, np.log(0.5) + 0.5 * np.log(d + 1))]
    )
    return mean, np.concatenate([[1.5, 2.0, 2.0], np.full(d + 1, 0.8)])


def _features(points: "Array") -> "Array":
    """Append the sum of the weights, so that a cliff along it does not shorten all scales."""
    return np.hstack([points, points.sum(axis=1, keepdims=True) * 0.5])


def _squared_distances(a: "Array", b: "Array", scales: "Array") -> "Array":
    """Return the squared distances of all pairs in length scales, [n, m].

    Equal to the last bit to `(((a[:, None] - b) / scales) ** 2).sum(-1)`, since it adds in the same
    order (eight partial sums), but several times as fast, since the summands stay in the cache.
    """
    squared = np.empty((len(a), len(b)))
    n_rows, columns = max(1, CACHED // max(1, len(b))), np.ascontiguousarray(b.T)
    for start in range(0, len(a), n_rows):
        rows = a[start : start + n_rows]

        def along(k: int, rows: "Array" = rows) -> "Array":
            difference = rows[:, k, None] - columns[k]
            difference /= scales[k]
            difference *= difference
            return np.asarray(difference)

        squared[start : start + n_rows] = _add_up(along, len(scales))
    return squared


def _add_up(summand: Callable[[int], "Array"], n: int) -> "Array":
    """Return the sum of n arrays, in the order in which numpy adds up to 128 numbers."""
    n_in_eights = n - n % 8
    if n_in_eights == 0:
        total, first_left = summand(0), 1
    else:
        sums = [summand(k) for k in range(8)]
        for k in range(8, n_in_eights):
            sums[k % 8] += summand(k)
        fours = [sums[k] + sums[k + 1] for k in range(0, 8, 2)]
        total, first_left = (fours[0] + fours[1]) + (fours[2] + fours[3]), n_in_eights
    for k in range(first_left, n):
        total += summand(k)
    return total


def _matern(a: "Array", b: "Array", scales: "Array") -> tuple["Array", "Array"]:
    """Return the Matern 5/2 correlation of all pairs, and the factor that its derivatives in the
    log scales have in common.
    """
    squared = _squared_distances(a, b, scales)
    r = np.sqrt(5.0 * squared + 1e-16)
    decay = np.exp(-r)
    return (1 + r + r**2 / 3) * decay, 5.0 / 3.0 * (1 + r) * decay


def _quadratic(a: "Array", b: "Array") -> "Array":
    return (1.0 + 2.0 * (a - 0.25) @ (b - 0.25).T) ** 2


@dataclass(frozen=True)
class GaussianProcess:
    """A fitted process over weights scaled to [0, 1]^d."""

    points: "Array"
    hyperparameters: Hyperparameters
    center: float
    spread: float
    cholesky: "NDArray[np.floating]"
    coefficients: "Array"

    def predict(self, points: "Array") -> tuple["Array", "Array"]:
        """Return posterior mean and variance at points [n, d], in the units of the scores."""
        h = self.hyperparameters
        correlation, _ = _matern(_features(points), _features(self.points), h.scales)
        cross = h.matern * correlation + h.quadratic * _quadratic(points, self.points)
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
        h, everywhere = self.hyperparameters, np.vstack([self.points, points])
        expected = (self.predict(points)[0] - self.center) / self.spread
        measured = self.cholesky @ (self.cholesky.T @ self.coefficients)
        lower = np.linalg.cholesky(_covariance(everywhere, h))
        coefficients = cho_solve((lower, True), np.concatenate([measured, expected]))
        return replace(self, points=everywhere, cholesky=lower, coefficients=coefficients)


def _covariance(points: "Array", h: Hyperparameters) -> "Array":
    """Return the covariance of scores measured at points [n, d], with noise, [n, n]."""
    correlation, _ = _matern(_features(points), _features(points), h.scales)
    noise = (h.noise + JITTER) * np.eye(len(points))
    return np.asarray(h.matern * correlation + h.quadratic * _quadratic(points, points) + noise)


def choose_informative(points: "Array", values: "Array") -> "NDArray[np.intp]":
    """Return the indices of the points [n, d] that a process is fitted to, in order.

    Up to N_KEPT points, these are all of them. Beyond that, N_KEPT are chosen: the first (the
    base), the newest, those with the largest `values` [n, m], column by column, and then again and
    again the point farthest from those chosen.

    The time of a fit grows with the cube of its points. The choice depends on nothing but the
    arguments, so a resumed search repeats it.
    """
    n = len(points)
    if n <= N_KEPT:
        return np.arange(n)
    chosen = dict.fromkeys([0, *range(n - int(NEWEST * N_KEPT), n)])
    n_with_best = len(chosen) + int(BEST * N_KEPT)
    for index in np.argsort(-values, axis=0, kind="stable").ravel():
        if len(chosen) == n_with_best:
            break
        chosen.setdefault(int(index))
    distances = _squared_distances(points, points[list(chosen)], np.ones(points.shape[1])).min(1)
    while len(chosen) < N_KEPT:
        farthest = int(np.argmax(distances))
        if farthest in chosen:  # the others repeat points that are chosen
            break
        chosen[farthest] = None
        distances = np.minimum(distances, ((points - points[farthest]) ** 2).sum(axis=1))
    return np.array(sorted(chosen))


def fit(points: "Array", scores: "Array") -> GaussianProcess:
    """Fit a process to scores [n] at points [n, d] of the unit box: the maximum a posteriori of the
    hyperparameters, with exact gradients.
    """
    d = points.shape[1]
    center, spread = float(scores.mean()), float(max(scores.std(), 1e-9))
    y = (scores - center) / spread
    features, quadratic = _features(points), _quadratic(points, points)
    distances = (features[:, None] - features[None]) ** 2
    mean, deviation = _prior(d)

    def loss(vector: "Array") -> tuple[float, "Array"]:
        h = Hyperparameters(vector)
        correlation, slope = _matern(features, features, h.scales)
        kernel = (
            h.matern * correlation + h.quadratic * quadratic + (h.noise + JITTER) * np.eye(len(y))
        )
        try:
            lower = np.linalg.cholesky(kernel)
        except np.linalg.LinAlgError:
            return 1e10, np.zeros_like(vector)
        inverse = cho_solve((lower, True), np.eye(len(y)), check_finite=False)
        alpha = inverse @ y
        value = 0.5 * y @ alpha + np.log(np.diag(lower)).sum()
        inner = inverse - np.outer(alpha, alpha)  # d value / d kernel, times two
        gradient = np.empty_like(vector)
        gradient[0] = 0.5 * h.matern * (inner * correlation).sum()
        gradient[1] = 0.5 * h.quadratic * (inner * quadratic).sum()
        gradient[2] = 0.5 * h.noise * np.trace(inner)
        shared = 0.5 * h.matern * inner * slope
        gradient[3:] = np.einsum("ij,ijk->k", shared, distances) / h.scales**2
        z = (vector - mean) / deviation
        return float(value + 0.5 * z @ z), gradient + z / deviation

    # losses on fixed items can be smooth to e^-16 of their variance; JITTER is e^-18.4
    bounds = [(-8, 4), (-8, 5), (-16, 2)] + [(-4, 4)] * (d + 1)
    best = minimize(loss, mean, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 60})
    h = Hyperparameters(best.x)
    lower = np.linalg.cholesky(_covariance(points, h))
    return GaussianProcess(points, h, center, spread, lower, cho_solve((lower, True), y))


@dataclass(frozen=True)
class WeightedSum:
    """The posterior of an objective: a weighted sum of independent processes, one for each term."""

    processes: Sequence[GaussianProcess]
    weights: "Array"

    def predict(self, points: "Array") -> tuple["Array", "Array"]:
        """Return posterior mean and variance of the sum at points [n, d]."""
        means, variances = zip(
            *(process.predict(points) for process in self.processes), strict=True
        )
        return self.weights @ np.array(means), self.weights**2 @ np.array(variances)

    def condition_on(self, points: "Array") -> "WeightedSum":
        """Return the sum with every process conditioned on points [n, d]."""
        return replace(self, processes=[process.condition_on(points) for process in self.processes])
