"""Panels about the search: its progress, the weights, and what the surrogate learned of them."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from optimer_hf.files.text import summarize_numbers
from optimer_hf.report.drawing import (
    BASELINE,
    INK,
    MERGE,
    QUIET,
    TARGET,
    Panel,
    add_hint,
    make_figure,
    seconds_of,
)
from optimer_hf.report.evidence import Evidence
from optimer_hf.report.slopes import (
    Slopes,
    draw_tangents,
    say_what_is_left_out,
    say_what_would_help,
    slopes_of_trials,
)
from optimer_hf.scoring.formatting import Unit
from optimer_hf.scoring.objective import gains, is_feasible
from optimer_hf.study.prediction import front
from optimer_hf.study.space import to_unit
from optimer_hf.study.trials import Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from optimer_hf.study.directory import Study

    Array = NDArray[np.float64]
    Flags = NDArray[np.bool_]

N_POINTS = 61  # on the grid of a slice
LEAST_GAIN = 0.001  # of a weight that is said to gain something
VISIBLE_WIDTH = 0.005  # of a range of weights, whose ends differ in two decimals
SETTLED = 0.02  # share of the gain that the last fifth of the trials may still add
FEWEST_LATE = 5  # trials without a gain before a search has settled
FEWEST_TERMS = 2  # of a front
FEWEST_TRIALS = 2  # of a figure of trials
LOWEST = 2  # times the best gain below the base: trials that are worse are drawn at the edge


def search_axis(evidence: Evidence) -> str:
    """Return the label of an axis with search scores, in lines that the lowest figure has room
    for.
    """
    return f"search score,\ngain over {evidence.baseline_on_axes}: {evidence.unit.sign}"


# -- progress --------------------------------------------------------------------------------------


def progress_panel(evidence: Evidence) -> Panel | None:
    """Show the search score of every trial and the best so far of those that keep all constraints;
    None for a single trial.
    """
    trials, unit, study = evidence.trials, evidence.unit, evidence.study
    if len(trials) < FEWEST_TRIALS:
        return None
    values = np.array([unit.factor * evidence.gain(trial) for trial in trials])
    objective = study.config.objective
    is_kept = np.array([is_feasible(objective, trial.terms, study.base) for trial in trials])
    best = np.maximum.accumulate(np.where(is_kept, values, -np.inf))
    numbers = [trial.number for trial in trials]
    figure, axes = make_figure(2.9)
    _draw_trials(axes[0], evidence, values, is_kept)
    axes[0].step(numbers, best, where="post", color=MERGE, label="best so far")
    axes[0].axhline(0, color=INK, linewidth=0.7, zorder=0)
    axes[0].set_xlabel("trial")
    axes[0].locator_params(axis="x", integer=True)
    axes[0].set_ylabel(search_axis(evidence))
    figure.legend(loc="outside upper left", ncols=3)
    minutes = sum(seconds_of(trial) for trial in trials) / 60
    return Panel(
        "progress",
        "Search score over the trials",
        _say_progress(evidence, values, is_kept),
        f"Gain of {len(trials)} trials over {study.baseline} on the items of the search, "
        f"and the best gain so far, {unit.show(best[-1] / unit.factor)} at the end, after "
        f"{minutes:.1f} minutes.",
        figure,
    )


def _draw_trials(axis: "Axes", evidence: Evidence, values: "Array", is_kept: "Flags") -> None:
    """Draw a point for every trial; those far below the base are arrows at the lower edge.
    `is_kept` says which keep all constraints.
    """
    low = min(values.min(), 0.0)
    if (edge := -LOWEST * max(values.max(), 1e-9)) > low:
        low = edge
    for trial, value, keeps in zip(evidence.trials, values, is_kept, strict=True):
        is_merge = trial.number == evidence.study.best_trial.number
        marker = "D" if is_merge else "v" if value < low else "o"
        (point,) = axis.plot(
            trial.number,
            max(value, low),
            marker,
            color=MERGE if is_merge else BASELINE,
            alpha=1.0 if is_merge else 0.6,
            markersize=6 if is_merge else 4,
            linestyle="none",
            zorder=3 if is_merge else 2,
            label="the merge" if is_merge else "trial" if trial is evidence.trials[0] else None,
        )
        shown = evidence.unit.show(value / evidence.unit.factor)
        shown += ", breaks a constraint" * (not keeps)
        add_hint(point, f"trial {trial.number}, {trial.origin}: {shown}")


def _say_progress(evidence: Evidence, values: "Array", is_kept: "Flags") -> str:
    """Return whether the last trials still gained, and what the best trial and the merge gain."""
    study, unit = evidence.study, evidence.unit
    numbers = [trial.number for trial in evidence.trials]
    kept = np.where(is_kept, values, -np.inf)
    best, last = kept.max(), numbers[int(np.argmax(kept))]
    late = min(max(len(values) // 5, FEWEST_LATE), len(values))
    gained = best - kept[:-late].max() if len(values) > late else best
    change = f"raised the best score by {unit.show(gained / unit.factor)}"
    change = f"{change} (trial {last})" if gained > 0 else "did not raise the best score"
    outlook = "the search has settled" if gained <= SETTLED * best else "more trials may find more"
    merge = study.best_trial.number
    text = "" if is_kept.all() else "Trials that break a constraint do not count. "
    text += (
        f"The last {late} trials {change}: {outlook}. The search score of trial {last} is "
        f"{unit.show(best / unit.factor)} over {study.baseline}"
    )
    if merge != last:
        score = unit.show(values[numbers.index(merge)] / unit.factor)
        return f"{text}; that of trial {merge}, the merge, is {score}."
    return f"{text}; it is the merge."


# -- weights ---------------------------------------------------------------------------------------


def weights_panel(evidence: Evidence) -> Panel:
    """Show the weight of every vector, and the range in which it is not clearly worse."""
    study = evidence.study
    free, best = study.config.free, study.best_trial.weights
    ranges = {name: plausible_range(evidence, best, name) for name in free}
    figure, axes = make_figure(0.8 + 0.36 * len(free))
    for at, (name, (low, high)) in enumerate(ranges.items()):
        axes[0].plot(free[name], [at, at], linewidth=7, alpha=0.2, color=QUIET)
        axes[0].plot([low, high], [at, at], linewidth=7, alpha=0.5, color=BASELINE)
        (point,) = axes[0].plot(best[name], at, "D", color=MERGE)
        add_hint(point, f"{name}: {best[name]:g}, between {low:.3g} and {high:.3g}")
        axes[0].annotate(
            f"{best[name]:g}", (best[name], at), (0, 7), textcoords="offset points", ha="center"
        )
    axes[0].axvline(0, color=INK, linewidth=0.7, zorder=0)
    axes[0].set_yticks(range(len(free)), list(free))
    axes[0].tick_params(axis="y", length=0)
    axes[0].set_ylim(len(free) - 0.4, -0.9)
    axes[0].set_xlabel("weight; grey: the bounds of the search")
    rows = "; ".join(f"{n} {best[n]:g} ({a:.2f} to {b:.2f})" for n, (a, b) in ranges.items())
    fixed = ", ".join(f"{name} {weight:g}" for name, weight in study.config.fixed.items())
    held = f" The study fixes in every trial: {fixed}." if fixed else ""
    return Panel(
        "weights",
        "Weights, and how sure they are",
        f"{_say_ranges(ranges)}{_say_bounds(study)}{held}",
        f"Weights of the vectors, each with its range: {rows}.{held}",
        figure,
    )


def _say_ranges(ranges: Mapping[str, tuple[float, float]]) -> str:
    """Return which weight is known best and which least."""
    sizes = {name: high - low for name, (low, high) in ranges.items()}
    tight, loose = min(sizes, key=lambda n: sizes[n]), max(sizes, key=lambda n: sizes[n])
    text = f"The weight of {tight} is known best ({ranges[tight][0]:.2f} to {ranges[tight][1]:.2f})"
    if sizes[loose] >= VISIBLE_WIDTH and tight != loose:
        low, high = ranges[loose]
        text += f"; that of {loose} could be anywhere from {low:.2f} to {high:.2f}"
    return f"{text}. Within its bar, with the others fixed, no weight is clearly worse."


def _say_bounds(study: "Study") -> str:
    """Return what to do about weights at the end of their bounds, except those at 0."""
    if not study.at_bounds:
        return ""
    return f" At the end of its bounds, so wider ones may help: {', '.join(study.at_bounds)}."


def plausible_range(
    evidence: Evidence, weights: Mapping[str, float], name: str
) -> tuple[float, float]:
    """Return the smallest and the largest plausible weight of a vector, with the others fixed.

    A weight is plausible if its posterior mean plus one standard deviation reaches the posterior
    mean of `weights`.
    """
    grid, points = slice_points(evidence, weights, name)
    here = to_unit(evidence.study.config, [weights])
    mean, variance = evidence.posterior.predict(points)
    best = evidence.posterior.predict(here)[0][0]
    within = [*grid[mean + np.sqrt(variance) >= best], weights[name]]
    return float(min(within)), float(max(within))


# -- slices ----------------------------------------------------------------------------------------


def slice_points(
    evidence: Evidence, weights: Mapping[str, float], name: str
) -> tuple["Array", "Array"]:
    """Return a grid of weights for one vector [n], and its points in the unit box [n, d] with the
    others fixed at `weights`.
    """
    config = evidence.study.config
    grid = np.linspace(*config.free[name], N_POINTS)
    return grid, to_unit(config, [{**weights, name: float(weight)} for weight in grid])


def slices_panel(evidence: Evidence) -> Panel | None:
    """Show the posterior mean along the weight of every vector, with the others fixed, on shared
    axes; None for a single trial.
    """
    if len(evidence.trials) < FEWEST_TRIALS:
        return None
    free, best = evidence.study.config.free, evidence.study.best_trial.weights
    columns = {1: 1, 2: 2, 4: 2}.get(len(free), 3)
    rows = -(-len(free) // columns)
    figure, axes = make_figure(0.6 + 1.7 * rows, rows=rows, columns=columns, share=True)
    gained, bottom, slopes = {}, 0.0, slopes_of_trials(evidence.study)
    for (name, (least, most)), axis in zip(free.items(), axes, strict=False):
        gain, low = _draw_slice(axis, evidence, name, slopes)
        bottom = min(bottom, low)
        if least <= 0 <= most:  # otherwise the study never leaves it out
            gained[name] = gain
        axis.set_title(f"{name} = {best[name]:g}")
    for axis in axes[len(free) :]:
        axis.set_visible(False)
    axes[0].set_ylim(bottom, None)
    figure.supxlabel("weight; the others are those of the merge")
    figure.supylabel(search_axis(evidence))
    more = [
        _say_what_weights_gain(gained, evidence.unit),
        say_what_would_help(evidence.study, slopes, evidence.unit),
        say_what_is_left_out(evidence.study, evidence.unit),
    ]
    return Panel(
        "slices",
        "What each weight does",
        " ".join(part for part in more if part),
        "Posterior mean with two standard deviations along the weight of every vector, and the "
        f"trials{', with their measured slopes' * bool(slopes)}; those further from the line are "
        "fainter.",
        figure,
    )


def _draw_slice(axis: "Axes", evidence: Evidence, name: str, slopes: Slopes) -> tuple[float, float]:
    """Draw one slice; return what the best weight gains over 0, and the lowest value to show."""
    config, best = evidence.study.config, evidence.study.best_trial.weights
    factor = evidence.unit.factor
    grid, line = slice_points(evidence, best, name)
    mean, variance = (a * factor**p for p, a in enumerate(evidence.posterior.predict(line), 1))
    deviation = np.sqrt(variance)
    axis.fill_between(grid, mean - 2 * deviation, mean + 2 * deviation, alpha=0.2, linewidth=0)
    axis.plot(grid, mean)
    points = to_unit(config, [trial.weights for trial in evidence.trials])
    here = to_unit(config, [best])[0]
    apart = np.delete(points - here, list(config.free).index(name), axis=1)
    x = [trial.weights[name] for trial in evidence.trials]
    y = [factor * evidence.gain(trial) for trial in evidence.trials]
    alpha = np.exp(-4 * np.linalg.norm(apart, axis=1))
    axis.scatter(x, y, s=10, alpha=alpha, color=MERGE, linewidths=0)
    steps = [factor * slopes.get(t.number, {}).get(name, np.nan) for t in evidence.trials]
    draw_tangents(axis, x, y, steps, alpha, grid[-1] - grid[0])
    axis.axhline(0, color=INK, linewidth=0.5, zorder=0)
    axis.axvline(best[name], color=INK, linewidth=0.7, linestyle=":")
    low = max(float((mean - 2 * deviation).min()), -LOWEST * max(float(mean.max()), 1e-9))
    return float(mean.max() - mean[int(np.argmin(np.abs(grid)))]) / factor, low


def _say_what_weights_gain(gained: Mapping[str, float], unit: Unit) -> str:
    """Return which vectors gain over leaving them out, and which do not; nothing if none may be
    left out.
    """
    if not gained:
        return ""
    most = max(gained, key=lambda name: gained[name])
    if gained[most] < LEAST_GAIN:
        names, least = ", ".join(gained), unit.show(LEAST_GAIN)
        return f"None of {names} gains more than {least} over leaving it out."
    text = (
        f"{most} matters most: its best weight gains {unit.show(gained[most])} over leaving it out"
    )
    idle = [name for name, gain in gained.items() if gain < LEAST_GAIN]
    if idle:
        text += f"; {', '.join(idle)} add{'s' if len(idle) == 1 else ''} nothing"
    return f"{text}."


# -- front -----------------------------------------------------------------------------------------


def front_panel(evidence: Evidence) -> Panel | None:
    """Show the trials that no other one beats in every term; None for fewer than two terms or two
    such trials.
    """
    study, trials = evidence.study, evidence.trials
    if len([t for t in study.config.objective.terms if t.weight > 0]) < FEWEST_TERMS:
        return None
    choices = front(study)
    if len(choices) < FEWEST_TRIALS:
        return None
    labels = list(choices[0].gains)[:3]
    pairs = list(itertools.combinations(labels, 2))
    figure, axes = make_figure(0.4 + 2.2 * len(pairs), rows=len(pairs))
    kept = {choice.trial.number for choice in choices}
    for axis, (a, b) in zip(axes, pairs, strict=True):
        _draw_front(axis, evidence, kept, a, b)
    handles, names = axes[0].get_legend_handles_labels()
    by_name = dict(zip(names, handles, strict=True))
    figure.legend(by_name.values(), by_name.keys(), loc="outside upper left", ncols=3)
    return Panel(
        "front",
        "Pareto front of the search scores",
        f"No other trial beats {len(choices)} of the {len(trials)} in every term. To take one of "
        "them instead of the merge, use optimer recipe --pick."
        + ("" if len(choices[0].gains) == len(labels) else " The first three terms are drawn."),
        f"Gains of the trials in {' against '.join(labels)}.",
        figure,
    )


def _draw_front(axis: "Axes", evidence: Evidence, kept: set[int], a: str, b: str) -> None:
    """Draw the gains of all trials in two terms, within limits that show the front."""
    study = evidence.study
    points = {t.number: gains(t.terms, study.base) for t in evidence.trials}
    best = study.best_trial.number
    for trial in evidence.trials:
        x, y = (100 * points[trial.number][label] for label in (a, b))
        is_merge, is_kept = trial.number == best, trial.number in kept
        (point,) = axis.plot(
            x,
            y,
            "D" if is_merge else "o",
            color=MERGE if is_merge else TARGET if is_kept else QUIET,
            markersize=6 if is_merge else 5 if is_kept else 4,
            zorder=4 if is_merge else 3 if is_kept else 2,
            label="the merge" if is_merge else "on the front" if is_kept else "other trial",
        )
        add_hint(point, _hint_of(trial, {a: x, b: y}))
    for label, limit in ((a, axis.set_xlim), (b, axis.set_ylim)):
        limit(_limits_of_front(100 * points[number][label] for number in kept))
    axis.axhline(0, color=INK, linewidth=0.5, zorder=0)
    axis.axvline(0, color=INK, linewidth=0.5, zorder=0)
    axis.set_xlabel(f"{a}, gain in %")
    axis.set_ylabel(f"{b}, gain in %")


def _hint_of(trial: Trial, shown: Mapping[str, float]) -> str:
    each = ", ".join(f"{label} {gain:+.2f} %" for label, gain in shown.items())
    return f"trial {trial.number}: {each}; weights {summarize_numbers(trial.weights)}"


def _limits_of_front(values: Iterable[float]) -> tuple[float, float]:
    shown: Sequence[float] = list(values)
    room = 0.15 * max(max(shown) - min(shown), 0.1)
    return min(shown) - room, max(shown) + room
