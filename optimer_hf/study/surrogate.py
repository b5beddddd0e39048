"""Recorded trials -> the surrogate that predicts the objective."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import log_ndtr

from optimer_hf.scoring.objective import Objective, combine, gains, headroom
from optimer_hf.scoring.scores import Scores
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.gp import GaussianProcess, WeightedSum, choose_informative, fit
from optimer_hf.study.space import to_unit
from optimer_hf.study.trials import Trial

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


EDGE = 0.125  # standard deviations; the base lies on the edge of a constraint of 0


def columns(config: StudyConfig, trials: Sequence[Trial]) -> "Array":
    """Return what the surrogate learns, [n_trials, n_columns]: a gain per counting term, or the
    value for `worst`.

    Crashed trials and broken ones are set to a floor, ten times the best gain (at least 0.5) below
    the base: a Gaussian process takes no infinities, and how bad a broken merge is does not matter.
    """
    base = trials[0].terms
    counting = [term for term in config.objective.terms_at("search") if term.weight > 0]
    per_term = config.objective.combine != "worst"
    n_columns = len(counting) if per_term else 1
    table = np.full((len(trials), n_columns), -np.inf)
    for row, trial in enumerate(trials):
        if trial.status == "ok":
            each = _surrogate_gains(config.objective, trial.terms, base)
            values = [each[term.label] for term in counting]
            table[row] = values if per_term else [combine(config.objective, trial.terms, base)]
    return _apply_floor(table)


def _apply_floor(table: "Array") -> "Array":
    floor = -max(10 * float(table.max(initial=0.0)), 0.5)
    return np.asarray(np.maximum(table, floor))


def _surrogate_gains(objective: Objective, scores: Scores, base: Scores) -> dict[str, float]:
    """Return gains in the unit that `combine` averages: weighted_mean takes losses as they are, not
    relative ones.
    """
    each = gains(scores, base)
    if objective.combine != "weighted_mean":
        return each
    return {
        label: g if base[label].higher_is_better else g * abs(base[label].score)
        for label, g in each.items()
    }


@dataclass(frozen=True)
class Surrogate:
    """What the record says of weights that were not tried: the objective, and by constraint how far
    it is from being broken.
    """

    objective: WeightedSum
    constraints: Sequence[GaussianProcess] = ()

    @property
    def points(self) -> "Array":
        """The trials that it was fitted to, in [0, 1]^d."""
        return self.objective.processes[0].points

    def predict(self, points: "Array") -> tuple["Array", "Array"]:
        """Return posterior mean and variance of the objective at points [n, d] in [0, 1]."""
        return self.objective.predict(points)

    def log_feasibility(self, points: "Array") -> "Array":
        """Return the log of the probability that points keep every constraint, [n]."""
        total = np.zeros(len(points))
        for process in self.constraints:
            mean, variance = process.predict(points)
            total += log_ndtr(mean / np.sqrt(variance))
        return total

    def ranking(self, points: "Array", caution: float = 0.0) -> "Array":
        """Return the posterior mean of the objective minus `caution` standard deviations. Where a
        constraint may break by that measure, the score is far lower, and falls with the
        probability that it breaks.
        """
        kept = np.full(len(points), True)
        for process in self.constraints:
            mean, variance = process.predict(points)
            kept &= mean >= (caution - EDGE) * np.sqrt(variance)
        broken = np.maximum(self.log_feasibility(points), -1e5) - 1e6
        mean, variance = self.predict(points)
        return np.where(kept, mean - caution * np.sqrt(variance), broken)

    def condition_on(self, points: "Array") -> "Surrogate":
        """Return the surrogate as if points [n, d] were measured where it expects them: trials that
        still run are not asked for again.
        """
        if not len(points):
            return self
        return Surrogate(
            self.objective.condition_on(points),
            [process.condition_on(points) for process in self.constraints],
        )


def fit_surrogate(
    config: StudyConfig, trials: Sequence[Trial], preference: "Array | None" = None
) -> Surrogate:
    """Fit the posterior of the objective and its constraints to trials whose first one is the base,
    of many to the `informative` ones.

    A `preference` [n_terms] weights the terms instead of the objective, each relative to how far
    its best trial is from the middle one. Trials that crashed by no fault of their weights say
    nothing.
    """
    trials = [trial for trial in trials if not trial.is_blameless]
    table = columns(config, trials)
    points = to_unit(config, [trial.weights for trial in trials])
    counting = [term.weight for term in config.objective.terms_at("search") if term.weight > 0]
    weights = np.array(counting) / sum(counting) if table.shape[1] > 1 else np.ones(1)
    kept = choose_informative(points, np.column_stack([table @ weights, table]))
    if preference is not None:
        weights = preference / np.maximum(table.max(axis=0) - np.median(table, axis=0), 1e-6)
    processes = [fit(points[kept], column[kept]) for column in table.T]
    limits = [fit(points[kept], column[kept]) for column in _headrooms(config, trials).T]
    return Surrogate(WeightedSum(processes, weights), limits)


def _headrooms(config: StudyConfig, trials: Sequence[Trial]) -> "Array":
    """Return the headroom of every constraint, [n_trials, n_constraints], with the same floor."""
    base = trials[0].terms
    known = [c for c in config.objective.constraints if c.label in base]
    table = np.full((len(trials), len(known)), -np.inf)
    for row, trial in enumerate(trials):
        if trial.status == "ok":
            table[row] = [headroom(c, trial.terms[c.label], base[c.label]) for c in known]
    return np.column_stack([_apply_floor(column) for column in table.T]) if known else table
