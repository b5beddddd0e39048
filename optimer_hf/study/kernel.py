"""How scores and their gradients vary together as functions of the merge weights.

Points [n, d] of the unit box come in. Covariances go out: rows for the scores at all points, then d
rows for each of the m points whose gradient is known. The kernel k has a Matern 5/2 part over the
weights and half their sum, and a quadratic part. A derivative has the covariance dk/dx' with a
score and d2k/dx dx' with another derivative (Rasmussen & Williams, section 9.4).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.spatial.distance import cdist

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]
    Indices = NDArray[np.intp]
    PullBack = Callable[[Array], Array]
    Correlate = Callable[[Array], tuple[Array, PullBack]]
    Distances = Callable[[Array, Array, Array], Array]


JITTER = 1e-8
CACHED = 2**14  # numbers that stay in the processor's cache
CENTER = 0.25  # of the quadratic part, on every side of the unit box


@dataclass(frozen=True)
class Hyperparameters:
    """Kernel variances and length scales; the fit changes their logarithms: `vector`, and with
    gradients `log_gradient_noise`.
    """

    vector: "Array"
    log_gradient_noise: float = -np.inf

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
    def gradient_noise(self) -> float:
        """Variance of the noise of a derivative along one side of the unit box."""
        return float(np.exp(self.log_gradient_noise))

    @property
    def scales(self) -> "Array":
        """Length scale of every feature."""
        return np.exp(self.vector[3:])


def features(points: "Array") -> "Array":
    """Append half the sum of the weights [..., d], so that a cliff along it does not shorten all
    scales.
    """
    return np.concatenate([points, points.sum(axis=-1, keepdims=True) * 0.5], axis=-1)


def squared_distances(a: "Array", b: "Array", scales: "Array") -> "Array":
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


def _squared_distances_fast(a: "Array", b: "Array", scales: "Array") -> "Array":
    """Return what `squared_distances` does up to the last bits, which searches without gradients
    keep from version to version.
    """
    return np.asarray(cdist(a / scales, b / scales, "sqeuclidean"))


def matern(a: "Array", b: "Array", scales: "Array") -> tuple["Array", "Array"]:
    """Return the Matern 5/2 correlation of all pairs, and the factor that its derivatives in the
    log scales have in common.
    """
    return _matern_of(squared_distances(a, b, scales))


def _matern_of(squared: "Array") -> tuple["Array", "Array"]:
    """Return what `matern` does, from squared distances."""
    r = np.sqrt(5.0 * squared + 1e-16)
    decay = np.exp(-r)
    return (1 + r + r**2 / 3) * decay, 5.0 / 3.0 * (1 + r) * decay


def quadratic(a: "Array", b: "Array") -> "Array":
    """Return the quadratic part between scores at points a [n, d] and b [m, d], [n, m]."""
    return (1.0 + 2.0 * (a - 0.25) @ (b - 0.25).T) ** 2


# -- with gradients --------------------------------------------------------------------------------


def _radial(squared: "Array") -> tuple["Array", "Array", "Array"]:
    """Return the first three derivatives of the Matern 5/2 correlation in the squared distance."""
    r = np.sqrt(5.0 * squared + 1e-16)
    decay = np.exp(-r)
    return -5 / 6 * (1 + r) * decay, 25 / 12 * decay, -125 / 24 * decay / r


def _steepness(along: "Array", scales: "Array") -> "Array":
    """Return half the gradient [..., d] of a squared distance in the point, from the differences of
    the features `along` [..., d + 1].
    """
    scaled = along / scales**2
    return np.asarray(scaled[..., :-1] + 0.5 * scaled[..., -1:])


def correlate(points: "Array", slopes: "Indices") -> "Correlate":
    """Return a function of the length scales [d + 1]. It returns the Matern correlations of the
    scores at points [n, d] and the derivatives at points[slopes], [n + m * d] squared, and a
    function that takes a symmetric matrix of that shape and returns, for every log scale, the sum
    of its products with the derivatives of the correlations.
    """
    if not len(slopes):
        return _correlate_scores(points)
    scores, cross, derivatives = (
        _correlate_scores_fast(points),
        _correlate_cross(points, points[slopes]),
        _correlate_derivatives(points[slopes]),
    )
    n = len(points)

    def joint(scales: "Array") -> tuple["Array", "PullBack"]:
        (top, of_top), (side, of_side), (bottom, of_bottom) = (
            block(scales) for block in (scores, cross, derivatives)
        )

        def pull_back(inner: "Array") -> "Array":
            return of_top(inner[:n, :n]) + 2 * of_side(inner[:n, n:]) + of_bottom(inner[n:, n:])

        return _join(top, side, bottom), pull_back

    return joint


def _join(top: "Array", side: "Array", bottom: "Array") -> "Array":
    """Return the symmetric matrix of its blocks, a few times as fast as `np.block` does."""
    n, size = len(top), len(top) + len(bottom)
    whole = np.empty((size, size))
    whole[:n, :n], whole[:n, n:], whole[n:, :n], whole[n:, n:] = top, side, side.T, bottom
    return whole


def _correlate_scores(points: "Array") -> "Correlate":
    at = features(points)
    distances = (at[:, None] - at[None]) ** 2

    def block(scales: "Array") -> tuple["Array", "PullBack"]:
        correlation, slope = matern(at, at, scales)
        return correlation, lambda inner: np.asarray(
            np.einsum("ij,ijk->k", inner * slope, distances) / scales**2
        )

    return block


def _correlate_scores_fast(points: "Array") -> "Correlate":
    """Return what `_correlate_scores` does up to the last bits, which searches without gradients
    keep from version to version.
    """
    at = features(points)
    squares = (at[:, None] - at) ** 2

    def block(scales: "Array") -> tuple["Array", "PullBack"]:
        correlation, slope = _matern_of(squares @ scales**-2)
        return correlation, lambda inner: np.asarray(
            np.tensordot(inner * slope, squares) / scales**2
        )

    return block


def _correlate_cross(points: "Array", at: "Array") -> "Correlate":
    """Return the block of scores (rows) with derivatives (columns), see `correlate`."""
    along = features(points[:, None] - at)
    squares, shape = along**2, (len(points), *at.shape)

    def block(scales: "Array") -> tuple["Array", "PullBack"]:
        steepness = _steepness(along, scales)
        first, second, _ = _radial(squares @ scales**-2)

        def pull_back(inner: "Array") -> "Array":
            inner = inner.reshape(shape)
            farther = np.einsum("ij,ijk->k", second * (inner * steepness).sum(axis=-1), squares)
            steeper = np.einsum("ij,ijk,ijk->k", first, features(inner), along)
            return np.asarray(4 * (farther + steeper) / scales**2)

        return (-2 * first[..., None] * steepness).reshape(len(points), -1), pull_back

    return block


def _correlate_derivatives(at: "Array") -> "Correlate":
    """Return the block of derivatives with derivatives, see `correlate`."""
    (m, d), along = at.shape, features(at[:, None] - at)
    squares = along**2

    def block(scales: "Array") -> tuple["Array", "PullBack"]:
        steepness = _steepness(along, scales)
        first, second, third = _radial(squares @ scales**-2)
        metric = _metric(d, scales)
        outer = steepness[:, :, :, None] * steepness[:, :, None, :]
        blocks = -2 * first[..., None, None] * metric - 4 * second[..., None, None] * outer

        def pull_back(inner: "Array") -> "Array":
            inner = inner.reshape(m, d, m, d).transpose(0, 2, 1, 3)
            steep = (inner @ steepness[..., None])[..., 0]
            farther = second * np.einsum("ijkl,kl->ij", inner, metric)
            farther += 2 * third * (steep * steepness).sum(axis=-1)
            steeper = np.einsum("ij,ijk,ijk->k", second, features(steep), along)
            own = np.einsum("ij,ijkl->kl", first, inner)
            metrics = np.append(np.diag(own), 0.25 * own.sum())
            total = np.einsum("ij,ijk->k", farther, squares) + 4 * steeper + metrics
            return np.asarray(4 * total / scales**2)

        return blocks.transpose(0, 2, 1, 3).reshape(m * d, m * d), pull_back

    return block


def joint_quadratic(points: "Array", slopes: "Indices") -> "Array":
    """Return the quadratic part for the rows of `correlate`."""
    d, at = points.shape[1], points[slopes]
    if not len(at):
        return quadratic(points, points)
    moved, own = at - CENTER, 4 * (1.0 + 2.0 * (at - CENTER) @ (at - CENTER).T)
    bottom = 8 * moved.T[None, :, :, None] * moved[:, None, None, :]
    bottom = bottom + own[:, None, :, None] * np.eye(d)[None, :, None, :]
    size = len(at) * d
    side = _quadratic_cross(points, at)
    return _join(quadratic(points, points), side, bottom.reshape(size, size))


def _quadratic_cross(points: "Array", at: "Array") -> "Array":
    moved = points - CENTER
    inner = 4 * (1.0 + 2.0 * moved @ (at - CENTER).T)
    return np.asarray((inner[..., None] * moved[:, None]).reshape(len(points), -1))


def cross_covariance(
    points: "Array", fitted: "Array", slopes: "Indices", h: Hyperparameters
) -> "Array":
    """Return the covariance of scores at points [n, d] with the rows of a process that was fitted
    to the scores at `fitted` and the gradients at fitted[slopes].
    """
    if not len(slopes):
        return _cross_scores(squared_distances, points, fitted, h)[0]
    cross, first = _cross_scores(_squared_distances_fast, points, fitted, h)
    return np.hstack([cross, _cross_derivatives(points, fitted[slopes], first[:, slopes], h)])


def cross_product(
    points: "Array", fitted: "Array", slopes: "Indices", h: Hyperparameters, coefficients: "Array"
) -> "Array":
    """Return the product [n] of `cross_covariance` with coefficients, one for each row of the
    process, without the large array of derivatives.
    """
    n, d = fitted.shape
    if not len(slopes):
        return _cross_scores(squared_distances, points, fitted, h)[0] @ coefficients[:n]
    cross, first = _cross_scores(_squared_distances_fast, points, fitted, h)
    product = cross @ coefficients[:n]
    at, of_gradients = fitted[slopes], coefficients[n:].reshape(-1, d)
    along = of_gradients @ _metric(d, h.scales)
    radial = -2 * h.matern * first[:, slopes] * (points @ along.T - (at * along).sum(axis=1))
    inner = 4 * h.quadratic * (1.0 + 2.0 * (points - CENTER) @ (at - CENTER).T)
    product += (radial + inner * ((points - CENTER) @ of_gradients.T)).sum(axis=1)
    return np.asarray(product)


def _cross_scores(
    distances: "Distances", points: "Array", fitted: "Array", h: Hyperparameters
) -> tuple["Array", "Array"]:
    """Return the covariance of scores at points with those at fitted points, and the derivative of
    the correlation in the squared distance.
    """
    squared = distances(features(points), features(fitted), h.scales)
    correlation, slope = _matern_of(squared)
    return h.matern * correlation + h.quadratic * quadratic(points, fitted), -0.5 * slope


def _cross_derivatives(points: "Array", at: "Array", first: "Array", h: Hyperparameters) -> "Array":
    """Return the covariance of scores at points with derivatives `at` others. It equals the blocks
    that a fit uses, but passes over the large array three times only.
    """
    moved, metric = points - CENTER, _metric(points.shape[1], h.scales)
    side = (points @ metric)[:, None] - at @ metric
    side *= (-2 * h.matern * first)[..., None]
    inner = 4 * h.quadratic * (1.0 + 2.0 * moved @ (at - CENTER).T)
    side += inner[..., None] * moved[:, None]
    return np.asarray(side.reshape(len(points), -1))


def _metric(d: int, scales: "Array") -> "Array":
    """Return the quadratic form [d, d] that a squared distance is."""
    ends = features(np.eye(d))
    return np.asarray((ends / scales**2) @ ends.T)


def noise_of(n_scores: int, n_derivatives: int, h: Hyperparameters) -> "Array":
    """Return the variance of the noise of every row."""
    noise = np.full(n_scores + n_derivatives, h.noise + JITTER)
    noise[n_scores:] = h.gradient_noise + JITTER
    return noise
