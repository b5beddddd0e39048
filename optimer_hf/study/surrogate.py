"""Recorded trials -> a surrogate, which predicts the objective at weights that were not tried."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import log_ndtr

from optimer_hf.scoring.objective import Objective, combine, gains, headroom
from optimer_hf.scoring.scores import Scores
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.gp import (
    GaussianProcess,
    WeightedSum,
    choose_informative,
    fit,
    keep_informative,
)
from optimer_hf.study.gradients import gain_per_score
from optimer_hf.study.space import to_unit
from optimer_hf.study.trials import Trial

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


SMALLEST_SPREAD = 1e-9  # of values over the trials; less is rounding
EDGE = 0.125  # standard deviations; the base is at the edge of a constraint of 0


def columns(config: StudyConfig, trials: Sequence[Trial]) -> "Array":
    """Return what the surrogate learns, [n_trials, n_columns]: the gain of every term with a weight
    above 0, or under `worst` the value of the objective.

    Crashed and very bad trials get a floor, ten times the best gain (at least 0.5) below the base:
    a Gaussian process takes no infinities, and how bad a broken merge is does not matter.
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


def _floor(table: "Array") -> float:
    return -max(10 * float(table.max(initial=0.0)), 0.5)


def _apply_floor(table: "Array") -> "Array":
    return np.asarray(np.maximum(table, _floor(table)))


def column_gradients(config: StudyConfig, trials: Sequence[Trial], table: "Array") -> "Array":
    """Return the gradients of `columns`, which are `table`, along the sides of the unit box,
    [n_trials, n_columns, d].

    NaN where a trial has none, and at the floor, which is flat. Under `worst` it is that of the
    worst term.
    """
    base, objective = trials[0].terms, config.objective
    is_relative = objective.combine != "weighted_mean"
    counting = [term.label for term in objective.terms_at("search") if term.weight > 0]
    free = config.free
    result = np.full((*table.shape, len(free)), np.nan)
    for row, trial in enumerate(trials):
        labels = counting if trial.gradients else []
        if objective.combine == "worst" and labels:
            each = gains(trial.terms, base)
            labels = [min(counting, key=lambda label: each[label])]
        for column, label in enumerate(labels):
            per_score = gain_per_score(base[label], is_relative=is_relative)
            result[row, column] = per_score * _score_gradient(free, trial, label)
    result[table <= _floor(table)] = np.nan
    return result


def _score_gradient(free: Mapping[str, tuple[float, float]], trial: Trial, label: str) -> "Array":
    """Return the gradient [d] of a score along the sides of the unit box, NaN if unknown; `free`
    are the bounds of the searched weights.
    """
    gradient = trial.gradients.get(label, {})
    return np.array([gradient.get(name, np.nan) * (b - a) for name, (a, b) in free.items()])


def _surrogate_gains(objective: Objective, scores: Scores, base: Scores) -> dict[str, float]:
    """Return gains in the unit that `combine` averages: under weighted_mean losses count as they
    are, not relative to the base.
    """
    each = gains(scores, base)
    if objective.combine != "weighted_mean":
        return each
    return {
        label: g if base[label].higher_is_better else g * (abs(base[label].score) or 1.0)
        for label, g in each.items()
    }


@dataclass(frozen=True)
class Surrogate:
    """Predicts the objective, and for each constraint how far it is from being broken."""

    objective: WeightedSum
    constraints: Sequence[GaussianProcess] = ()

    @property
    def points(self) -> "Array":
        """The trials that it was fitted to, as points [n, d] of the unit box."""
        return self.objective.processes[0].points

    @property
    def has_gradients(self) -> bool:
        """Whether it was fitted to gradients, too."""
        return any(len(process.slopes) for process in self.objective.processes)

    def predict(self, points: "Array") -> tuple["Array", "Array"]:
        """Return posterior mean and variance [n] of the objective at points [n, d]."""
        return self.objective.predict(points)

    def mean(self, points: "Array") -> "Array":
        """Return the posterior mean [n] of the objective at points [n, d]."""
        return self.objective.mean(points)

    def log_feasibility(self, points: "Array") -> "Array":
        """Return the log probability [n] that points [n, d] keep every constraint."""
        total = np.zeros(len(points))
        for process in self.constraints:
            mean, variance = process.predict(points)
            total += log_ndtr(mean / np.sqrt(variance))
        return total

    def ranking(self, points: "Array", caution: "float | Array" = 0.0) -> "Array":
        """Return a number [n] for points [n, d], larger is better: the posterior mean of the
        objective minus `caution` (one number, or [n]) standard deviations. Points that may break a
        constraint by that measure come far below all others, in the order of their probability to
        keep it.
        """
        kept = np.full(len(points), True)
        for process in self.constraints:
            mean, variance = process.predict(points)
            kept &= mean >= (caution - EDGE) * np.sqrt(variance)
        broken = np.maximum(self.log_feasibility(points), -1e5) - 1e6
        mean, variance = self.predict(points)
        return np.where(kept, mean - caution * np.sqrt(variance), broken)

    def condition_on(self, points: "Array") -> "Surrogate":
        """Return the surrogate as if points [n, d] had scored what it expects, so that trials that
        are still running are not suggested again.
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
    """Fit a surrogate of the objective and its constraints to trials, the first of which is the
    base; see `choose_informative` and `keep_informative` for what happens to many.

    A `preference` [n_terms] replaces the term weights of the objective, each relative to the
    distance between the best and the median trial of its term. Trials that crashed through no fault
    of their weights are left out, and so are constraints that are as far from being broken in all
    trials as at the base.
    """
    trials = [trial for trial in trials if not trial.is_blameless]
    table = columns(config, trials)
    points = to_unit(config, [trial.weights for trial in trials])
    counting = [term.weight for term in config.objective.terms_at("search") if term.weight > 0]
    weights = np.array(counting) / sum(counting) if table.shape[1] > 1 else np.ones(1)
    values = np.column_stack([table @ weights, table])
    kept = choose_informative(points, values)
    if preference is not None:
        weights = preference / np.maximum(table.max(axis=0) - np.median(table, axis=0), 1e-6)
    limits = headrooms(config, trials)
    gradients = _gradients(config, [trials[row] for row in kept], table[kept], limits[kept])
    gradients = keep_informative(points[kept], values[kept], gradients)
    processes = [
        fit(points[kept], column[kept], gradients[:, number])
        for number, column in enumerate(np.hstack([table, limits]).T)
    ]
    n_columns = table.shape[1]
    constraints = [
        process
        for process, headroom in zip(processes[n_columns:], limits.T, strict=True)
        if np.ptp(headroom) > SMALLEST_SPREAD or len(process.slopes)  # something moves it
    ]
    return Surrogate(WeightedSum(processes[:n_columns], weights), constraints)


def _gradients(
    config: StudyConfig, trials: Sequence[Trial], table: "Array", limits: "Array"
) -> "Array":
    """Return the gradients of columns and headrooms, NaN where unknown."""
    return np.hstack(
        [column_gradients(config, trials, table), headroom_gradients(config, trials, limits)]
    )


def headrooms(config: StudyConfig, trials: Sequence[Trial]) -> "Array":
    """Return the headroom of every constraint, [n_trials, n_constraints], with a floor."""
    base = trials[0].terms
    known = [c for c in config.objective.constraints if c.label in base]
    table = np.full((len(trials), len(known)), -np.inf)
    for row, trial in enumerate(trials):
        if trial.status == "ok":
            table[row] = [headroom(c, trial.terms[c.label], base[c.label]) for c in known]
    return np.column_stack([_apply_floor(column) for column in table.T]) if known else table


def headroom_gradients(config: StudyConfig, trials: Sequence[Trial], table: "Array") -> "Array":
    """Return the gradients of `headrooms`, which are `table`, along the sides of the unit box,
    [n_trials, n_constraints, d]; NaN where unknown and at the floor.
    """
    base = trials[0].terms
    known = [c.label for c in config.objective.constraints if c.label in base]
    free = config.free
    result = np.full((*table.shape, len(free)), np.nan)
    for column, label in enumerate(known):
        slope = (1.0 if base[label].higher_is_better else -1.0) / (abs(base[label].score) or 1.0)
        for row, trial in enumerate(trials):
            result[row, column] = slope * _score_gradient(free, trial, label)
        result[table[:, column] <= _floor(table[:, column]), column] = np.nan
    return result
