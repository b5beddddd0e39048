"""Make the panels of a report: a figure each, with what a reader should conclude from it."""

import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optimer_hf.comparison.costs import ledger_of_study
from optimer_hf.comparison.result import Comparison, verdicts
from optimer_hf.comparison.rows import RowKind, SealedRow, weights_key
from optimer_hf.errors import OptimerError
from optimer_hf.merging.geometry_cache import read_or_measure
from optimer_hf.report.drawing import (
    COLOURS,
    INK,
    Panel,
    draw_interval,
    make_figure,
    row_label,
    seal_note,
    seconds_of,
)
from optimer_hf.scoring.formatting import Unit
from optimer_hf.scoring.objective import gains
from optimer_hf.study.directory import Study
from optimer_hf.study.prediction import front
from optimer_hf.study.space import anchors, to_unit
from optimer_hf.study.surrogate import Surrogate
from optimer_hf.study.trials import Trial
from optimer_hf.vectors.record import VectorFile, read_record
from optimer_hf.vectors.training_record import PartialRun, RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

logger = logging.getLogger(__name__)


N_POINTS = 61  # on the grid of a slice
NEARLY_PARALLEL = 0.2  # cosine
LEAST_GAIN = 0.001  # of a weight that is said to gain something
VISIBLE_WIDTH = 0.005  # of a range of weights, whose ends differ in two decimals
SETTLED = 0.02  # share of the gain that the last fifth of the trials may still add
FEWEST_LATE = 5  # trials without a gain before a search has settled
FEWEST_TERMS = 2  # of a front; vectors, of a table of cosines


# -- the search ------------------------------------------------------------------------------------


def progress_panel(study: Study, trials: Sequence[Trial], unit: Unit) -> Panel:
    """Show the gain of every trial and the best so far, over trials and over minutes."""
    base = study.value(trials[0])
    values = np.array([unit.factor * (study.value(trial) - base) for trial in trials])
    best = np.maximum.accumulate(values)
    cost = np.cumsum([seconds_of(trial) for trial in trials]) / 60
    figure, axes = make_figure(2 * 2.1, rows=2)
    for axis, x, label in (
        (axes[0], [t.number for t in trials], "trial"),
        (axes[1], cost, "minutes of trials"),
    ):
        low = max(values.min(), -2 * max(best[-1], 1e-9))  # a broken merge must not hide the rest
        axis.plot(x, np.maximum(values, low), "o", markersize=4, alpha=0.6, label="trial")
        axis.step(x, best, where="post", color=COLOURS[1], label="best so far")
        axis.set_xlabel(label)
    figure.supylabel(f"{unit.text.replace('the base', study.baseline)}, items of the search")
    axes[0].legend(loc="lower right")
    numbers = [trial.number for trial in trials]
    last = numbers[int(np.argmax(values))]
    late = min(max(len(trials) // 5, FEWEST_LATE), len(trials))
    gained = best[-1] - best[-1 - late] if len(trials) > late else best[-1]
    has_settled = gained <= SETTLED * best[-1]
    change = f"raised the best score by {unit.show(gained / unit.factor)}"
    change = f"{change} (trial {last})" if gained > 0 else "did not raise the best score"
    outlook = "the search has settled" if has_settled else "more trials may find more"
    text = (
        f"The last {late} trials {change}: {outlook}. On the items of the search, trial {last} "
        f"gains {unit.show(best[-1] / unit.factor)} over {study.baseline}, and the merge (trial "
        f"{study.best_trial.number}) "
        f"{unit.show(values[numbers.index(study.best_trial.number)] / unit.factor)}"
    )
    return Panel(
        "progress",
        "Best merge over trials and over cost",
        f"{text}.",
        f"Gain of {len(trials)} trials over {study.baseline} on the items of the search, and the "
        f"best gain so far, {unit.show(best[-1] / unit.factor)} at the end, by trial and over "
        f"{cost[-1]:.1f} minutes.",
        figure,
    )


def weights_panel(study: Study, posterior: Surrogate) -> Panel:
    """Show the weight of every vector, and the range in which it is not clearly worse."""
    free, best = study.config.free, study.best_trial.weights
    ranges = {name: _plausible_range(study, posterior, best, name) for name in free}
    figure, axes = make_figure(0.9 + 0.34 * len(free))
    for at, (name, (low, high)) in enumerate(ranges.items()):
        axes[0].plot([low, high], [at, at], linewidth=7, alpha=0.35, color=COLOURS[0])
        axes[0].plot(best[name], at, "o", color=COLOURS[1])
        axes[0].annotate(
            f"{best[name]:g}", (best[name], at), (0, 7), textcoords="offset points", ha="center"
        )
    axes[0].set_yticks(range(len(free)), list(free))
    axes[0].set_ylim(len(free) - 0.4, -0.8)
    lowest, highest = min(low for low, _ in free.values()), max(high for _, high in free.values())
    axes[0].set_xlim(lowest - 0.05 * (highest - lowest), highest + 0.05 * (highest - lowest))
    axes[0].set_xlabel("weight, within the bounds of the search")
    sizes = {name: high - low for name, (low, high) in ranges.items()}
    tight, loose = min(sizes, key=lambda n: sizes[n]), max(sizes, key=lambda n: sizes[n])
    text = f"The weight of {tight} is known best ({ranges[tight][0]:.2f} to {ranges[tight][1]:.2f})"
    if sizes[loose] >= VISIBLE_WIDTH and tight != loose:
        low, high = ranges[loose]
        text += f"; that of {loose} could be anywhere from {low:.2f} to {high:.2f}"
    rows = "; ".join(f"{n} {best[n]:g} ({a:.2f} to {b:.2f})" for n, (a, b) in ranges.items())
    fixed = ", ".join(f"{name} {weight:g}" for name, weight in study.config.fixed.items())
    held = f" The study fixes in every trial: {fixed}." if fixed else ""
    return Panel(
        "weights",
        "Weights, and how sure they are",
        f"{text}. Within its bar, with the others fixed, no weight is clearly worse."
        f"{_weights_at_bounds(free, best)}{held}",
        f"Weights of the vectors, each with its range: {rows}.{held}",
        figure,
    )


def _weights_at_bounds(free: Mapping[str, tuple[float, float]], best: Mapping[str, float]) -> str:
    """Return what to do about weights at the end of their bounds, except those at 0."""
    ends = [name for name, bounds in free.items() if best[name] in bounds and best[name] != 0]
    if not ends:
        return ""
    return f" At the end of its bounds, so wider ones may help: {', '.join(ends)}."


def _plausible_range(
    study: Study, posterior: Surrogate, weights: Mapping[str, float], name: str
) -> tuple[float, float]:
    """Return the smallest and the largest plausible weight of a vector, with the others fixed.

    A weight is plausible if its posterior mean plus one standard deviation reaches the posterior
    mean of `weights`.
    """
    grid, points = _slice_points(study, weights, name)
    here = to_unit(study.config, [weights])
    mean, variance = posterior.predict(points)
    best = posterior.predict(here)[0][0]
    within = [*grid[mean + np.sqrt(variance) >= best], weights[name]]
    return float(min(within)), float(max(within))


def _slice_points(study: Study, weights: Mapping[str, float], name: str) -> tuple["Array", "Array"]:
    """Return a grid of weights for one vector [n], and its points in the unit box [n, d] with the
    others fixed at `weights`.
    """
    low, high = study.config.free[name]
    grid = np.linspace(low, high, N_POINTS)
    sets = [{**weights, name: float(weight)} for weight in grid]
    return grid, to_unit(study.config, sets)


def slices_panel(study: Study, posterior: Surrogate, trials: Sequence[Trial], unit: Unit) -> Panel:
    """Show the posterior mean along the weight of every vector, with the others fixed."""
    free, best = list(study.config.free), study.best_trial.weights
    values = [unit.factor * (study.value(t) - study.value(trials[0])) for t in trials]
    points = to_unit(study.config, [trial.weights for trial in trials])
    here = to_unit(study.config, [best])[0]
    figure, axes = make_figure(1.9 * -(-len(free) // 2), rows=-(-len(free) // 2), columns=2)
    gained = {}
    for at, (name, axis) in enumerate(zip(free, axes, strict=False)):
        grid, line = _slice_points(study, best, name)
        mean, variance = (a * unit.factor**p for p, a in enumerate(posterior.predict(line), 1))
        deviation = np.sqrt(variance)
        axis.fill_between(grid, mean - 2 * deviation, mean + 2 * deviation, alpha=0.2, linewidth=0)
        axis.plot(grid, mean)
        off = np.linalg.norm(np.delete(points - here, at, axis=1), axis=1)
        x = [trial.weights[name] for trial in trials]
        axis.scatter(x, values, s=10, alpha=np.exp(-4 * off), color=COLOURS[1], linewidths=0)
        axis.axvline(best[name], color=INK, linewidth=0.7, linestyle=":")
        low = float((mean - 2 * deviation).min())
        axis.set_ylim(max(low, -2 * max(float(mean.max()), 1e-9)), None)
        axis.set_title(name)
        gained[name] = float(mean.max() - mean[int(np.argmin(np.abs(grid)))]) / unit.factor
    for axis in axes[len(free) :]:
        axis.set_visible(False)
    figure.supxlabel("weight; the others are those of the merge")
    figure.supylabel(unit.text)
    return Panel(
        "slices",
        "What each weight does",
        _say_what_weights_gain(gained, unit),
        "Posterior mean with two standard deviations along the weight of every vector, and the "
        "trials; those further from the line are fainter.",
        figure,
    )


def _say_what_weights_gain(gained: Mapping[str, float], unit: Unit) -> str:
    """Return which vectors gain over leaving them out, and which do not."""
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


# -- scores ----------------------------------------------------------------------------------------


def terms_panel(study: Study, comparison: Comparison | None) -> Panel:
    """Show the gains of some rows on every term, of the sealed test or (None) of the search."""
    shown = comparison or _search_comparison(study)
    where = "sealed test" if comparison is not None else "items of the search"
    rows = [row for row in shown.rows[1:] if _is_shown(row, shown)]
    labels = list(shown.base.scores)
    figure, axes = make_figure((0.65 + 0.2 * len(rows)) * len(labels), rows=len(labels))
    labels_of: dict[str, list[str]] = {"better": [], "worse": [], "no significant difference": []}
    baseline = "the base" if comparison is not None else study.baseline
    for axis, label in zip(axes, labels, strict=True):
        for at, row in enumerate(reversed(rows)):
            interval = shown.term_interval(row, label)
            draw_interval(axis, at, interval, row.kind == "merge")
            if row.kind == "merge":
                labels_of.setdefault(interval.answer, []).append(label)
        axis.axvline(0, color=INK, linewidth=0.7)
        axis.set_yticks(range(len(rows)), [row_label(row) for row in reversed(rows)])
        axis.set_ylim(-0.7, len(rows) - 0.3)
        axis.set_title(label)
    figure.supxlabel(
        f"gain over {baseline}, %, 95 % interval (accuracies: points){seal_note(rows)}"
    )
    answers = "; ".join(f"{side} in {', '.join(each)}" for side, each in labels_of.items() if each)
    return Panel(
        "terms",
        f"Scores by term, {where}",
        f"The merge against {baseline}: {answers}.",
        f"Gains of {len(rows)} merges over {baseline} in {', '.join(labels)}, with paired 95 % "
        "intervals.",
        figure,
    )


def _is_shown(row: SealedRow, comparison: Comparison) -> bool:
    """Whether a row is a vector alone, the average, the merge or the best baseline."""
    kinds = ("fixed", "alone", "average", "merge")
    return row.kind in kinds or row == comparison.best_baseline()


def _search_comparison(study: Study) -> Comparison:
    """Return the anchors and the best trial on the items of the search, as a comparison."""
    trials = [trial for trial in study.trials if trial.status == "ok"]
    kinds: list[tuple[RowKind, str]] = [
        ("base", ""),
        *(("alone", name) for name in study.config.free),
        ("average", ""),
    ]
    first = {weights_key(trial.weights): trial for trial in reversed(trials)}
    rows = [
        _row_of_trial(first[key], *kind)
        for kind, (_, weights) in zip(kinds, anchors(study.config), strict=False)
        if (key := weights_key(weights)) in first
    ]
    best = study.best_trial.number
    rows += [_row_of_trial(trial, "merge", "") for trial in trials if trial.number == best]
    return Comparison(rows, study.config.objective, {})


def _row_of_trial(trial: Trial, kind: RowKind, subject: str) -> SealedRow:
    n_known = trial.number
    return SealedRow(
        kind, subject, trial.weights, trial.terms, False, n_known, trial.seconds, trial.n_tokens
    )


def sealed_panel(comparison: Comparison) -> Panel:
    """Show the gain of every row of the sealed test over the base."""
    unit = Unit.of(comparison.objective)
    rows = sorted(comparison.rows[1:], key=comparison.value)
    figure, axes = make_figure(0.8 + 0.2 * len(rows))
    for at, row in enumerate(rows):
        interval = comparison.interval(row, comparison.base)
        draw_interval(axes[0], at, interval, not row.is_baseline, unit.factor)
    axes[0].axvline(0, color=INK, linewidth=0.7)
    axes[0].set_yticks(range(len(rows)), [row_label(row) for row in rows])
    figure.supxlabel(f"{unit.text}, paired 95 % interval{seal_note(rows)}")
    base = comparison.value(comparison.base)
    values = "; ".join(
        f"{row.marked_title} {unit.show(comparison.value(row) - base)}" for row in reversed(rows)
    )
    verdict = verdicts(comparison)[0]
    return Panel(
        "sealed",
        "Everything on the sealed test",
        f"{verdict[0].upper()}{verdict[1:]}",
        f"Gain of every row over the base: {values}.",
        figure,
    )


def front_panel(study: Study, trials: Sequence[Trial]) -> Panel:
    """Show the trials that no other one beats in every term."""
    choices = front(study)
    labels = list(choices[0].gains)[:3]
    pairs = list(itertools.combinations(labels, 2))
    figure, axes = make_figure(2.3 * len(pairs), rows=len(pairs))
    everywhere = {t.number: gains(t.terms, study.base) for t in trials}
    best = study.best_trial.number
    for axis, (a, b) in zip(axes, pairs, strict=True):
        axis.plot(*_columns_of(everywhere.values(), a, b), "o", markersize=4, alpha=0.35)
        kept = [choice.gains for choice in choices]
        axis.plot(
            *_columns_of(kept, a, b), "o", markersize=5, color=COLOURS[2], label="on the front"
        )
        axis.plot(*_columns_of([everywhere[best]], a, b), "D", color=COLOURS[1], label="merge")
        for at, values in ((a, axis.set_xlim), (b, axis.set_ylim)):
            shown = np.array([each[at] for each in kept]) * 100
            room = 0.6 * max(float(np.ptp(shown)), 0.1)
            values(shown.min() - room, shown.max() + room)
        axis.set_xlabel(f"{a}, gain in %")
        axis.set_ylabel(f"{b}, gain in %")
    axes[0].legend(loc="best")
    return Panel(
        "front",
        "Pareto front",
        f"No other trial beats {len(choices)} of the {len(trials)} in every term. To take one of "
        "them instead of the merge, use optimer recipe --pick."
        + ("" if len(choices[0].gains) == len(labels) else " The first three terms are drawn."),
        f"Gains of the trials in {' against '.join(labels)}.",
        figure,
    )


def _columns_of(points: Any, a: str, b: str) -> tuple[list[float], list[float]]:
    rows = list(points)
    return [100 * row[a] for row in rows], [100 * row[b] for row in rows]


# -- vectors and their training --------------------------------------------------------------------


def cosines_panel(study: Study) -> Panel | None:
    """Show the angles between the vectors; None if a vector or the base cannot be read any more.

    The vectors are read unless the study has kept their angles.
    """
    config = study.config
    sources = {name: str(vector.source) for name, vector in config.vectors.items()}
    if len(sources) < FEWEST_TERMS:
        return None
    try:
        kept = study.directory / "geometry.json"
        measured = read_or_measure(
            sources, config.base_model, config.dtype, kept, config.vocabulary
        )
    except OptimerError as error:
        logger.warning("the report leaves out the cosines: %s", error)
        return None
    names = list(sources)
    table = np.eye(len(names))
    for a, b, value in measured.cosines:
        table[names.index(a), names.index(b)] = table[names.index(b), names.index(a)] = value
    figure, axes = make_figure(1.0 + 0.45 * len(names))
    axes[0].set(xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5))
    for i, j in itertools.product(range(len(names)), repeat=2):
        shade = {"color": COLOURS[int(table[i, j] < 0)], "alpha": 0.6 * abs(table[i, j])}
        axes[0].bar(j, 1, width=1, bottom=i - 0.5, linewidth=0, **shade)
        axes[0].text(j, i, f"{table[i, j]:+.2f}", ha="center", va="center")
    axes[0].set_xticks(range(len(names)), names)
    axes[0].set_yticks(range(len(names)), names)
    a, b, value = max(measured.cosines, key=lambda pair: abs(pair[2]))
    relation = (
        "point in similar directions, so their weights compete"
        if value > NEARLY_PARALLEL
        else "work against each other"
        if value < -NEARLY_PARALLEL
        else "are nearly orthogonal, and so are all others"
    )
    return Panel(
        "cosines",
        "Angles between the vectors",
        f"{a} and {b} (cosine {value:+.2f}) {relation}.",
        "Cosines: " + "; ".join(f"{a}, {b} {v:+.3f}" for a, b, v in measured.cosines) + ".",
        figure,
    )


def read_records(study: Study) -> dict[str, VectorFile]:
    """Return the records of the vectors that are on this disk and have one, by name."""
    paths = {name: Path(str(vector.source)) for name, vector in study.config.vectors.items()}
    records = {name: read_record(path) for name, path in paths.items() if path.is_dir()}
    return {name: record for name, record in records.items() if record is not None}


def training_runs(records: Mapping[str, VectorFile]) -> dict[str, RunRecord | PartialRun]:
    """Return the training of each vector, for those whose vector.json says how long it was."""
    runs = {name: record.training for name, record in records.items()}
    return {name: run for name, run in runs.items() if run and run.n_steps and run.n_tokens}


def losses_panel(
    series: Mapping[str, Sequence[float]], runs: Mapping[str, RunRecord | PartialRun]
) -> Panel:
    """Show the training loss of every vector over tokens."""
    figure = _draw_over_tokens(series, runs, "training loss, nats a token", {})
    parts = {n: max(len(values) // 5, 1) for n, values in series.items()}
    ends = {n: (np.mean(v[: parts[n]]), np.mean(v[-parts[n] :])) for n, v in series.items()}
    changes = ", ".join(f"{name} {first:.2f} to {last:.2f}" for name, (first, last) in ends.items())
    return Panel(
        "losses",
        "Loss along continual pre-training",
        f"Means of the first and the last fifth: {changes}. Each step sees new text, so only a "
        "drop beyond the scatter counts; the scores show what was learned.",
        f"Training loss of {', '.join(series)} over tokens.",
        figure,
    )


def norms_panel(
    series: Mapping[str, Sequence[float]], runs: Mapping[str, RunRecord | PartialRun]
) -> Panel:
    """Show the norm of every vector over the tokens of its training."""
    steps = {name: runs[name].norm_steps for name in series}
    figure = _draw_over_tokens(series, runs, "norm of the vector", steps)
    shares = {n: values[-1] / max(values[len(values) // 2], 1e-30) for n, values in series.items()}
    most = max(shares, key=lambda name: shares[name])
    return Panel(
        "norms",
        "Growth of the vectors",
        f"In the second half of its training {most} grew most, by "
        f"{100 * (shares[most] - 1):.0f} %.",
        "Norm over tokens, at the end: "
        + ", ".join(f"{name} {values[-1]:.3g}" for name, values in series.items())
        + ".",
        figure,
    )


def _draw_over_tokens(
    series: Mapping[str, Sequence[float]],
    runs: Mapping[str, RunRecord | PartialRun],
    label: str,
    steps: Mapping[str, Sequence[int] | None],
) -> "Figure":
    """Draw values over the tokens read, at the given steps or (None) evenly spread."""
    figure, axes = make_figure(2.4)
    for name, values in series.items():
        n_steps, n_tokens = runs[name].n_steps or 1, runs[name].n_tokens or 0
        at = steps.get(name) or np.linspace(0, n_steps, len(values) + 1)[1:]
        x = np.asarray(at) * n_tokens / n_steps
        axes[0].plot(x, values, label=name)
    axes[0].set_xlabel("tokens")
    axes[0].set_ylabel(label)
    axes[0].legend(ncols=2)
    return figure


# -- cost and evidence -----------------------------------------------------------------------------


def ledger_panel(study: Study) -> Panel:
    """Show how many minutes each stage took."""
    spent = ledger_of_study(study)
    stages = {
        f"{stage}, {part}": seconds
        for stage, cost in (("search", spent.search), ("rescore", spent.rescore))
        if cost is not None
        for part, seconds in (
            ("ask", cost.ask),
            ("merge", cost.merge),
            ("forward", cost.forward),
            ("harness", cost.harness),
        )
    }
    runs = [record.training for record in read_records(study).values()]
    if seconds := sum(run.seconds or 0.0 for run in runs if run is not None):
        stages = {"training of the vectors": seconds} | stages
    figure, axes = make_figure(0.8 + 0.24 * len(stages))
    axes[0].barh(range(len(stages)), [seconds / 60 for seconds in stages.values()])
    axes[0].set_yticks(range(len(stages)), list(stages))
    axes[0].invert_yaxis()
    axes[0].set_xlabel("minutes")
    total = sum(stages.values())
    most = max(stages, key=lambda stage: stages[stage])
    text = f"{100 * stages[most] / max(total, 1e-9):.0f} % of {total / 60:.1f} min went into {most}"
    if (mixtures := spent.data_mixture) is not None:
        text += (
            f"; as many data mixtures would have cost {mixtures.ratio_search_only} times the "
            f"search, or {mixtures.ratio_end_to_end} times the search and the training of the "
            "vectors"
        )
    return Panel(
        "ledger",
        "Where the time went",
        f"{text}.",
        "; ".join(f"{stage}: {seconds:.1f} s" for stage, seconds in stages.items()),
        figure,
    )
