"""The panels of a report: what a person should conclude, with a figure or a table."""

import itertools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from optimer_hf.comparison.costs import ledger
from optimer_hf.comparison.result import Comparison, verdicts
from optimer_hf.comparison.rows import RowKind, SealedRow
from optimer_hf.errors import OptimerError
from optimer_hf.merging import geometry
from optimer_hf.report.drawing import (
    COLOURS,
    INK,
    Panel,
    _draw_interval,
    _figure,
    _label,
    _note,
    _seconds,
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


N_POINTS = 61  # of a slice
NEARLY_PARALLEL = 0.2  # cosine
TOLD_APART = 0.005  # width of a range of weights that two decimals show
SETTLED = 0.02  # of the gain that the last fifth of the trials may still add
FEWEST_LATE = 5  # trials that must have brought nothing before a search has settled
NO_PAIR = 2  # terms a front needs


# -- the search ------------------------------------------------------------------------------------


def _progress(study: Study, trials: Sequence[Trial], unit: Unit) -> Panel:
    base = study.value(trials[0])
    values = np.array([unit.factor * (study.value(trial) - base) for trial in trials])
    best = np.maximum.accumulate(values)
    cost = np.cumsum([_seconds(trial) for trial in trials]) / 60
    figure, axes = _figure(2 * 2.1, rows=2)
    for axis, x, label in ((axes[0], [t.number for t in trials], "trial"), (axes[1], cost, "min")):
        low = max(values.min(), -2 * max(best[-1], 1e-9))  # a broken merge must not hide the rest
        axis.plot(x, np.maximum(values, low), "o", markersize=4, alpha=0.6, label="trial")
        axis.step(x, best, where="post", color=COLOURS[1], label="best so far")
        axis.set_xlabel({"trial": "trial", "min": "minutes of trials"}[label])
    figure.supylabel(f"{unit.text.replace('the base', study.baseline)}, items of the search")
    axes[0].legend(loc="lower right")
    numbers = [trial.number for trial in trials]
    last = numbers[int(np.argmax(values))]
    late = min(max(len(trials) // 5, FEWEST_LATE), len(trials))
    gained = best[-1] - best[-1 - late] if len(trials) > late else best[-1]
    has_settled = gained <= SETTLED * best[-1]
    raised = f"by {unit.show(gained / unit.factor)}" if gained > 0 else "by nothing"
    told = f"the last {late} trials raised the best score (trial {last}) {raised}: " + (
        "the search has settled" if has_settled else "more trials may find more"
    )
    told += (
        f". On the items of the search, over {study.baseline}, trial {last} has "
        f"{unit.show(best[-1] / unit.factor)}, the merge (trial {study.best_trial.number}) "
        f"{unit.show(values[numbers.index(study.best_trial.number)] / unit.factor)}"
    )
    return Panel(
        "progress",
        "Best merge over trials and over cost",
        f"{told[0].upper()}{told[1:]}.",
        f"Gain of {len(trials)} trials over {study.baseline} on the items of the search and the "
        f"best so far, {unit.show(best[-1] / unit.factor)} at the end, over the "
        f"number of the trial and over {cost[-1]:.1f} minutes.",
        figure,
    )


def _weights(study: Study, posterior: Surrogate) -> Panel:
    free, best = study.config.free, study.best_trial.weights
    ranges = {name: _alike(study, posterior, best, name) for name in free}
    figure, axes = _figure(0.9 + 0.34 * len(free))
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
    axes[0].set_xlabel("weight, as far as it was searched")
    sizes = {name: high - low for name, (low, high) in ranges.items()}
    tight, loose = min(sizes, key=lambda n: sizes[n]), max(sizes, key=lambda n: sizes[n])
    told = f"The weight of {tight} is known best ({ranges[tight][0]:.2f} to {ranges[tight][1]:.2f})"
    if sizes[loose] >= TOLD_APART and tight != loose:
        low, high = ranges[loose]
        told += f"; that of {loose} could be anywhere from {low:.2f} to {high:.2f}"
    rows = "; ".join(f"{n} {best[n]:g} ({a:.2f} to {b:.2f})" for n, (a, b) in ranges.items())
    fixed = ", ".join(f"{name} {weight:g}" for name, weight in study.config.fixed.items())
    held = f" Fixed by the study, in every trial: {fixed}." if fixed else ""
    return Panel(
        "weights",
        "Weights, and how sure they are",
        f"{told}: within its bar, with the others fixed, no weight is clearly worse."
        f"{_at_an_edge(free, best)}{held}",
        f"Weight of every vector and its range: {rows}.{held}",
        figure,
    )


def _at_an_edge(free: Mapping[str, tuple[float, float]], best: Mapping[str, float]) -> str:
    """Return what to do about weights at the end of their bounds; 0 is an end of its own."""
    found = [name for name, bounds in free.items() if best[name] in bounds and best[name] != 0]
    if not found:
        return ""
    return f" At the end of the bounds, where wider ones may find more: {', '.join(found)}."


def _alike(
    study: Study, posterior: Surrogate, weights: Mapping[str, float], name: str
) -> tuple[float, float]:
    """Return the smallest and largest weight of a vector, the others held at `weights`, whose
    posterior mean is within one standard deviation of the best one's.
    """
    grid, points = _slice(study, weights, name)
    here = to_unit(study.config, [weights])
    mean, variance = posterior.predict(points)
    best = posterior.predict(here)[0][0]
    within = [*grid[mean + np.sqrt(variance) >= best], weights[name]]
    return float(min(within)), float(max(within))


def _slice(study: Study, weights: Mapping[str, float], name: str) -> tuple["Array", "Array"]:
    """Return a grid of weights of one vector, and the points [n, d] with the others held at
    `weights`.
    """
    low, high = study.config.free[name]
    grid = np.linspace(low, high, N_POINTS)
    sets = [{**weights, name: float(weight)} for weight in grid]
    return grid, to_unit(study.config, sets)


def _slices(study: Study, posterior: Surrogate, trials: Sequence[Trial], unit: Unit) -> Panel:
    free, best = list(study.config.free), study.best_trial.weights
    values = [unit.factor * (study.value(t) - study.value(trials[0])) for t in trials]
    points = to_unit(study.config, [trial.weights for trial in trials])
    here = to_unit(study.config, [best])[0]
    figure, axes = _figure(1.9 * -(-len(free) // 2), rows=-(-len(free) // 2), columns=2)
    gained = {}
    for at, (name, axis) in enumerate(zip(free, axes, strict=False)):
        grid, line = _slice(study, best, name)
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
    figure.supxlabel("weight, the others as in the merge")
    figure.supylabel(unit.text)
    most = max(gained, key=lambda name: gained[name])
    idle = [name for name in free if gained[name] < 0.001]
    told = (
        f"{most} matters most: its best weight gains {unit.show(gained[most])} over leaving it out"
        if gained[most] >= 0.001
        else f"none of {', '.join(free)} gains more than {unit.show(0.001)} over leaving it out"
    )
    if idle and gained[most] >= 0.001:
        told += f"; {', '.join(idle)} add{'s' if len(idle) == 1 else ''} nothing"
    return Panel(
        "slices",
        "What each weight does",
        f"{told}.",
        "Posterior mean with two standard deviations along the weight of every vector, and the "
        "trials, the fainter the further they are from the line.",
        figure,
    )


# -- scores ----------------------------------------------------------------------------------------


def _terms(study: Study, comparison: Comparison | None) -> Panel:
    found = comparison or _of_search(study)
    where = "sealed test" if comparison is not None else "items of the search"
    rows = [row for row in found.rows[1:] if _is_shown(row, found)]
    labels = list(found.base.scores)
    figure, axes = _figure((0.65 + 0.2 * len(rows)) * len(labels), rows=len(labels))
    labels_of: dict[str, list[str]] = {"better": [], "worse": [], "no significant difference": []}
    baseline = "the base" if comparison is not None else study.baseline
    for axis, label in zip(axes, labels, strict=True):
        for at, row in enumerate(reversed(rows)):
            interval = found.term_interval(row, label)
            _draw_interval(axis, at, interval, row.kind == "merge")
            if row.kind == "merge":
                labels_of.setdefault(interval.answer, []).append(label)
        axis.axvline(0, color=INK, linewidth=0.7)
        axis.set_yticks(range(len(rows)), [_label(row) for row in reversed(rows)])
        axis.set_ylim(-0.7, len(rows) - 0.3)
        axis.set_title(label)
    figure.supxlabel(f"gain over {baseline}, %, 95 % interval (accuracies: points){_note(rows)}")
    said = "; ".join(f"{side} in {', '.join(each)}" for side, each in labels_of.items() if each)
    return Panel(
        "terms",
        f"Scores per term, {where}",
        f"The merge against {baseline}: {said}.",
        f"Gain of {len(rows)} merges over {baseline} in {', '.join(labels)}, with paired 95 % "
        "intervals.",
        figure,
    )


def _is_shown(row: SealedRow, comparison: Comparison) -> bool:
    """The vectors alone, the average, the best other row and the merge."""
    kinds = ("fixed", "alone", "average", "merge")
    return row.kind in kinds or row == comparison.best_baseline()


def _of_search(study: Study) -> Comparison:
    """Return anchors and incumbent on the search items, as if they were a comparison."""
    trials = [trial for trial in study.trials if trial.status == "ok"]
    kinds: list[tuple[RowKind, str]] = [
        ("base", ""),
        *(("alone", name) for name in study.config.free),
        ("average", ""),
    ]
    anchor_of = {
        origin: kind for (origin, _), kind in zip(anchors(study.config), kinds, strict=False)
    }
    rows = [_row_of(t, *anchor_of[t.origin]) for t in trials if t.origin in anchor_of]
    best = study.best_trial.number
    rows += [_row_of(trial, "merge", "") for trial in trials if trial.number == best]
    return Comparison(rows, study.config.objective, {})


def _row_of(trial: Trial, kind: RowKind, subject: str) -> SealedRow:
    n_known = trial.number
    return SealedRow(
        kind, subject, trial.weights, trial.terms, False, n_known, trial.seconds, trial.n_tokens
    )


def _sealed(comparison: Comparison) -> Panel:
    unit = Unit.of(comparison.objective)
    rows = sorted(comparison.rows[1:], key=comparison.value)
    figure, axes = _figure(0.8 + 0.2 * len(rows))
    for at, row in enumerate(rows):
        interval = comparison.interval(row, comparison.base)
        _draw_interval(axes[0], at, interval, not row.is_baseline, unit.factor)
    axes[0].axvline(0, color=INK, linewidth=0.7)
    axes[0].set_yticks(range(len(rows)), [_label(row) for row in rows])
    figure.supxlabel(f"{unit.text}, paired 95 % interval{_note(rows)}")
    base = comparison.value(comparison.base)
    values = "; ".join(
        f"{row.marked_title} {unit.show(comparison.value(row) - base)}" for row in reversed(rows)
    )
    told = verdicts(comparison)[0]
    return Panel(
        "sealed",
        "Everything on the sealed test",
        f"{told[0].upper()}{told[1:]}",
        f"Objective of every row over the base: {values}.",
        figure,
    )


def _front(study: Study, trials: Sequence[Trial]) -> Panel:
    choices = front(study)
    labels = list(choices[0].gains)[:3]
    pairs = list(itertools.combinations(labels, 2))
    figure, axes = _figure(2.3 * len(pairs), rows=len(pairs))
    everywhere = {t.number: gains(t.terms, study.base) for t in trials}
    best = study.best_trial.number
    for axis, (a, b) in zip(axes, pairs, strict=True):
        axis.plot(*_columns(everywhere.values(), a, b), "o", markersize=4, alpha=0.35)
        kept = [choice.gains for choice in choices]
        axis.plot(*_columns(kept, a, b), "o", markersize=5, color=COLOURS[2], label="not beaten")
        axis.plot(*_columns([everywhere[best]], a, b), "D", color=COLOURS[1], label="merge")
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
        f"{len(choices)} of {len(trials)} trials are beaten by no other in every term; one of them "
        "other than the merge is taken with optimer recipe --pick."
        + ("" if len(choices[0].gains) == len(labels) else " The first three terms are drawn."),
        f"Gains of the trials in {' against '.join(labels)}.",
        figure,
    )


def _columns(points: Any, a: str, b: str) -> tuple[list[float], list[float]]:
    rows = list(points)
    return [100 * row[a] for row in rows], [100 * row[b] for row in rows]


# -- vectors and their training --------------------------------------------------------------------


def _cosines(study: Study) -> Panel | None:
    """Return the angles of the pool, or None when a vector or the base cannot be read any more."""
    config = study.config
    sources = {name: str(vector.source) for name, vector in config.vectors.items()}
    if len(sources) < NO_PAIR:
        return None
    try:
        kept = study.directory / "geometry.json"
        found = geometry.read_or_measure(sources, config.base_model, config.dtype, kept)
    except OptimerError as error:
        logger.warning("the report has no cosines: %s", error)
        return None
    names = list(sources)
    table = np.eye(len(names))
    for a, b, value in found.cosines:
        table[names.index(a), names.index(b)] = table[names.index(b), names.index(a)] = value
    figure, axes = _figure(1.0 + 0.45 * len(names))
    axes[0].set(xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5))
    for i, j in itertools.product(range(len(names)), repeat=2):
        shade = {"color": COLOURS[int(table[i, j] < 0)], "alpha": 0.6 * abs(table[i, j])}
        axes[0].bar(j, 1, width=1, bottom=i - 0.5, linewidth=0, **shade)
        axes[0].text(j, i, f"{table[i, j]:+.2f}", ha="center", va="center")
    axes[0].set_xticks(range(len(names)), names)
    axes[0].set_yticks(range(len(names)), names)
    a, b, value = max(found.cosines, key=lambda pair: abs(pair[2]))
    told = (
        "pull in the same direction, so their weights compete"
        if value > NEARLY_PARALLEL
        else "work against each other"
        if value < -NEARLY_PARALLEL
        else "are all but orthogonal, and so are all others"
    )
    return Panel(
        "cosines",
        "Angles between the vectors",
        f"{a} and {b} (cosine {value:+.2f}) {told}.",
        "Cosines: " + "; ".join(f"{a}, {b} {v:+.3f}" for a, b, v in found.cosines) + ".",
        figure,
    )


def _records(study: Study) -> dict[str, VectorFile]:
    paths = {name: Path(str(vector.source)) for name, vector in study.config.vectors.items()}
    found = {name: read_record(path) for name, path in paths.items() if path.is_dir()}
    return {name: record for name, record in found.items() if record is not None}


def training_runs(records: Mapping[str, VectorFile]) -> dict[str, RunRecord | PartialRun]:
    """Return the training of each vector, for those whose vector.json says how long it was."""
    runs = {name: record.training for name, record in records.items()}
    return {name: run for name, run in runs.items() if run and run.n_steps and run.n_tokens}


def _losses(
    series: Mapping[str, Sequence[float]], runs: Mapping[str, RunRecord | PartialRun]
) -> Panel:
    figure = _over_tokens(series, runs, "training loss, nats a token", {})
    parts = {n: max(len(values) // 5, 1) for n, values in series.items()}
    ends = {n: (np.mean(v[: parts[n]]), np.mean(v[-parts[n] :])) for n, v in series.items()}
    said = ", ".join(f"{name} {first:.2f} to {last:.2f}" for name, (first, last) in ends.items())
    return Panel(
        "losses",
        "Loss along continual pre-training",
        f"Means of the first and the last fifth: {said}. Each step sees new text: only a drop "
        "beyond the scatter counts; the scores say what was learned.",
        f"Training loss of {', '.join(series)} over tokens.",
        figure,
    )


def _norms(
    series: Mapping[str, Sequence[float]], runs: Mapping[str, RunRecord | PartialRun]
) -> Panel:
    steps = {name: runs[name].norm_steps for name in series}
    figure = _over_tokens(series, runs, "norm of the vector", steps)
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


def _over_tokens(
    series: Mapping[str, Sequence[float]],
    runs: Mapping[str, RunRecord | PartialRun],
    label: str,
    steps: Mapping[str, Sequence[int] | None],
) -> "Figure":
    """Draw values over the tokens read; without the steps they are of, evenly spread."""
    figure, axes = _figure(2.4)
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


def _ledger(study: Study) -> Panel:
    spent = ledger(study)
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
    runs = [record.training for record in _records(study).values()]
    if seconds := sum(run.seconds or 0.0 for run in runs if run is not None):
        stages = {"training of the vectors": seconds} | stages
    figure, axes = _figure(0.8 + 0.24 * len(stages))
    axes[0].barh(range(len(stages)), [seconds / 60 for seconds in stages.values()])
    axes[0].set_yticks(range(len(stages)), list(stages))
    axes[0].invert_yaxis()
    axes[0].set_xlabel("minutes")
    total = sum(stages.values())
    most = max(stages, key=lambda stage: stages[stage])
    told = f"{100 * stages[most] / max(total, 1e-9):.0f} % of {total / 60:.1f} min went into {most}"
    if (mixtures := spent.data_mixture) is not None:
        told += (
            f"; as many data mixtures would have cost {mixtures.ratio_search_only} times the "
            f"search, {mixtures.ratio_end_to_end} times with the training of the vectors"
        )
    return Panel(
        "ledger",
        "Where the time went",
        f"{told}.",
        "; ".join(f"{stage}: {seconds:.1f} s" for stage, seconds in stages.items()),
        figure,
    )
