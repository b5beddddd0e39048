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
N_REFINEMENTS = 4
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
) -> "Array":
    """Return the point [d] of the unit box with the largest acquisition among random candidates,
    after refinements in ever smaller steps.

    Candidates are uniform draws, scaled Dirichlet draws (blends of a given sum), and perturbations
    of the points `near` [n, d]. `allowed` moves points into the part of the box that is searched.
    """
    uniform = rng.random((N_CANDIDATES // 2, d))
    blends = rng.dirichlet(np.full(d, 0.7), N_CANDIDATES // 2) * rng.uniform(
        0, 1.6, (N_CANDIDATES // 2, 1)
    )
    steps = 10 ** rng.uniform(-2.5, -0.5, (len(near), N_CANDIDATES // 8, 1))
    around = near[:, None] + steps * rng.normal(size=(len(near), N_CANDIDATES // 8, d))
    candidates = allowed(np.clip(np.vstack([uniform, blends, around.reshape(-1, d), near]), 0, 1))
    values = acquisition(candidates)
    for number in range(N_REFINEMENTS):
        best = candidates[np.argsort(-values)[:5]]
        moves = 0.15 * 0.5**number * rng.normal(size=(48, len(best), d))
        moves *= rng.random(moves.shape) < 0.6
        candidates = allowed(np.clip(np.vstack([best, (best + moves).reshape(-1, d)]), 0, 1))
        values = acquisition(candidates)
    return np.asarray(candidates[np.argmax(values)])


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
