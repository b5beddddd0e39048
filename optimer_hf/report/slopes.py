"""Measured gradients in a report: tangents at the trials, and which vector would help if there were
more of it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from optimer_hf.report.drawing import MERGE
from optimer_hf.scoring.formatting import Unit
from optimer_hf.study.directory import Study
from optimer_hf.study.gradients import value_gradient
from optimer_hf.study.screening import screen_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

TANGENT = 0.05  # half of its length, as a share of the range of the weight
FAINTEST = 0.05  # opacity below which a tangent is not drawn
STEP = 0.1  # of a weight, for which a slope is stated
LEAST_RISE = 0.001  # over a step, below which the objective counts as level
NEAR_END = 1e-3  # of a bound, within which a weight is at it

Slopes = dict[int, dict[str, float]]


def slopes_of_trials(study: Study) -> Slopes:
    """Return the derivatives of the objective in every searched weight, by number of the trial and
    name of the vector, for the trials that measured them.
    """
    slopes = {
        trial.number: value_gradient(study.config.objective, trial, study.base)
        for trial in study.trials
        if trial.status == "ok"
    }
    return {number: each for number, each in slopes.items() if each is not None}


def draw_tangents(
    axis: "Axes",
    at: Sequence[float],
    values: Sequence[float],
    slopes: Sequence[float],
    opacity: "Array",
    length: float,
) -> None:
    """Draw a short line with the measured slope through every trial: `values` and `slopes` in the
    unit of the axis, [n_trials]; trials without a slope have NaN. `length` is that of the axis.
    """
    half = TANGENT * length
    for x, y, slope, alpha in zip(at, values, slopes, opacity, strict=True):
        if alpha >= FAINTEST and np.isfinite(slope):
            ends = [x - half, x + half], [y - half * slope, y + half * slope]
            axis.plot(*ends, color=MERGE, alpha=float(alpha), linewidth=1.2)


def say_what_would_help(study: Study, slopes: Slopes, unit: Unit) -> str:
    """Return which vectors would help if there were more or less of them, by the slopes measured at
    the merge; nothing where they were not measured.
    """
    best = study.best_trial
    if best.number not in slopes:
        return ""
    rises = {name: STEP * slope for name, slope in slopes[best.number].items()}
    steep = {name: rise for name, rise in rises.items() if abs(rise) >= LEAST_RISE}
    screen = screen_of(study.config, study.trials)
    left_out = screen.left_out if screen is not None else {}
    ends = {
        name: "screen" if name in left_out else _end_in_the_way(study, name, rise > 0)
        for name, rise in steep.items()
        if name not in left_out or rise > 0
    }
    steep = {name: steep[name] for name in ends}
    parts = [_say(steep, ends, unit, end, text) for end, text in ENDS.items()]
    hint = " ".join(part for part in parts if part)
    return hint or "There the measured slopes are level: a little more of no vector would help."


def say_what_is_left_out(study: Study, unit: Unit) -> str:
    """Return which vectors search.screen leaves out, and why; nothing without it."""
    screen = screen_of(study.config, study.trials)
    if screen is None or not screen.left_out:
        return ""
    places = " and ".join(place.origin for place in screen.places)
    promises = ", ".join(
        f"{name} {unit.show_difference(STEP * rise)}" for name, rise in screen.left_out.items()
    )
    return (
        f"search.screen keeps {len(screen.kept)} of {len(study.config.free)} vectors by the slopes "
        f"at {places}. The others stay at 0; for {STEP:g} of their way to the bound those slopes "
        f"promise: {promises}."
    )


ENDS = {  # what keeps the search from following a slope, and what to say about such vectors
    "high": "More of {names} would help beyond the bounds",
    "low": "Less of {names} would help beyond the bounds",
    "screen": "Some of {names} would help, but search.screen leaves them out; raise it and go on",
    "total": "More of {names} would help, but search.total allows no larger sum",
    None: "The objective is not level in {names}, so more trials may help",
}


def _say(
    steep: dict[str, float], ends: dict[str, str | None], unit: Unit, end: str | None, text: str
) -> str:
    names = sorted(
        (name for name in steep if ends[name] == end), key=lambda name: -abs(steep[name])
    )
    if not names:
        return ""
    rises = ", ".join(f"{name} {unit.show_difference(steep[name])}" for name in names)
    return f"{text.format(names=', '.join(names))} (for {STEP:g} more: {rises})."


def _end_in_the_way(study: Study, name: str, rising: bool) -> str | None:
    """Return which end keeps a weight of the merge from going where the objective rises."""
    config, weights = study.config, study.best_trial.weights
    low, high = config.free[name]
    if rising and weights[name] >= high - NEAR_END:
        return "high"
    if not rising and weights[name] <= low + NEAR_END:
        return "low"
    total = sum(weights[each] for each in config.free)
    if rising and config.search.total is not None and total >= config.search.total[1] - NEAR_END:
        return "total"
    return None
