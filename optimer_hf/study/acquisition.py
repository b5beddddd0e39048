"""Expected improvement of a Gaussian process, and the point where an acquisition is largest."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import minimize
from scipy.special import log_ndtr

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


N_CANDIDATES = 1024
N_REFINEMENTS, N_BEST = 4, 5  # rounds, and the candidates around which they look
N_PROMISING = 50  # candidates with the largest bounds
N_STEPS, DIFFERENCE = 30, 1e-5  # of a climb


def log_expected_improvement(mean: "Array", variance: "Array", best: float) -> "Array":
    """Return log E[max(f - best, 0)], larger is better, stable far below `best` (Ament et al.,
    arXiv 2310.20708).
    """
    deviation = np.sqrt(variance)
    z = (mean - best) / deviation
    log_density = -0.5 * z**2 - 0.5 * np.log(2 * np.pi)
    near = z > -8
    result = np.empty_like(z)
    inside = np.exp(log_density[near]) + z[near] * np.exp(log_ndtr(z[near]))
    result[near] = np.log(np.maximum(inside, 1e-300))
    # phi(z) / z^2 is the tail of the improvement
    result[~near] = log_density[~near] - 2 * np.log(-z[~near])
    return result + np.log(deviation)


def maximise(
    acquisition: Callable[["Array"], "Array"],
    d: int,
    rng: np.random.Generator,
    near: "Array",
    *,
    allowed: Callable[["Array"], "Array"] = lambda points: points,
    bound: Callable[["Array"], "Array"] | None = None,
) -> "Array":
    """Return the point [d] of the unit box with the largest acquisition among random candidates,
    after refinements in ever smaller steps.

    Candidates are uniform draws, scaled Dirichlet draws (blends of a given sum), and perturbations
    of the points `near` [n, d]. `allowed` moves points into the part of the box that is searched.
    A `bound` that the acquisition is never above spares it where it cannot be among the largest.
    """
    uniform = rng.random((N_CANDIDATES // 2, d))
    blends = rng.dirichlet(np.full(d, 0.7), N_CANDIDATES // 2) * rng.uniform(
        0, 1.6, (N_CANDIDATES // 2, 1)
    )
    steps = 10 ** rng.uniform(-2.5, -0.5, (len(near), N_CANDIDATES // 8, 1))
    around = near[:, None] + steps * rng.normal(size=(len(near), N_CANDIDATES // 8, d))
    candidates = allowed(np.clip(np.vstack([uniform, blends, around.reshape(-1, d), near]), 0, 1))
    values = _largest_values(acquisition, candidates, bound)
    for number in range(N_REFINEMENTS):
        best = candidates[np.argsort(-values)[:N_BEST]]
        moves = 0.15 * 0.5**number * rng.normal(size=(48, len(best), d))
        moves *= rng.random(moves.shape) < 0.6
        candidates = allowed(np.clip(np.vstack([best, (best + moves).reshape(-1, d)]), 0, 1))
        values = _largest_values(acquisition, candidates, bound)
    return np.asarray(candidates[np.argmax(values)])


def _largest_values(
    acquisition: Callable[["Array"], "Array"],
    points: "Array",
    bound: Callable[["Array"], "Array"] | None,
) -> "Array":
    """Return the acquisition [n] at points, or its bound where that is below the N_BEST largest."""
    if bound is None:
        return acquisition(points)
    values = bound(points)
    order = np.argsort(-values)
    promising, others = order[:N_PROMISING], order[N_PROMISING:]
    values[promising] = acquisition(points[promising])
    least = np.sort(values[promising])[-N_BEST]
    others = others[values[others] >= least]
    if len(others):
        values[others] = acquisition(points[others])
    return values


def climb(
    acquisition: Callable[["Array"], "Array"],
    start: "Array",
    *,
    allowed: Callable[["Array"], "Array"] = lambda points: points,
) -> "Array":
    """Return the local maximum [d] of an acquisition near `start` [d], by L-BFGS-B with one-sided
    differences, all points of which are computed at once; `start` if nothing is larger.

    In sixteen dimensions random candidates come nowhere near the maximum.
    """

    def loss(point: "Array") -> tuple[float, "Array"]:
        steps = np.where(point + DIFFERENCE > 1, -DIFFERENCE, DIFFERENCE)
        values = acquisition(allowed(np.vstack([point, point + np.diag(steps)])))
        return -float(values[0]), (values[0] - values[1:]) / steps

    bounds = [(0.0, 1.0)] * len(start)
    end = minimize(
        loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": N_STEPS}
    ).x
    both = np.vstack([start, allowed(np.clip(end, 0, 1)[None])])
    return np.asarray(both[np.argmax(acquisition(both))])
