"""Panels about scores: the gains of the merge and of others, by term and in total."""

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from optimer_hf.comparison.result import Comparison
from optimer_hf.comparison.rows import RowKind, SealedRow, weights_key
from optimer_hf.report.answer import leading_gains, verdict_of
from optimer_hf.report.drawing import (
    INK,
    LOOKS,
    MERGE,
    Panel,
    Part,
    add_key,
    choose_limits,
    draw_interval,
    make_figure,
    row_label,
    seal_note,
)
from optimer_hf.report.evidence import Evidence
from optimer_hf.scoring.formatting import OF_TERMS, Unit, describe_interval
from optimer_hf.scoring.intervals import Answer, Interval
from optimer_hf.study.space import anchors
from optimer_hf.study.trials import Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LANES: Mapping[Part, float] = {"other": 0.0, "target": -0.2, "best": 0.22, "merge": 0.0}
WIDEST_INTERVAL = 2.0  # times the span of the points, that an axis makes room for
Gains = Sequence[tuple[SealedRow, Interval]]


def part_of(row: SealedRow, best: SealedRow) -> Part:
    """Return the part that a row plays in a comparison whose best baseline is `best`."""
    if row.kind in ("merge", "retargeted"):
        return "merge" if row.kind == "merge" else "target"
    return "best" if row == best else "other"


def limits_of(gains: Gains, best: SealedRow, factor: float) -> tuple[float, float]:
    """Return limits that show the merge and the best baseline with their intervals; one that is so
    wide that it would squeeze everything else runs to the edge.
    """
    shown = [interval for row, interval in gains if part_of(row, best) in ("merge", "best")]
    focus = [factor * interval.difference for interval in shown]
    low, high = min(0.0, *focus), max(0.0, *focus)
    room = WIDEST_INTERVAL * (high - low)
    ends = [e for i in shown if i.kind != "none" for e in (factor * i.low, factor * i.high)]
    focus += [min(max(end, low - room), high + room) for end in ends]
    return choose_limits(focus, [factor * interval.difference for _, interval in gains])


# -- by term ---------------------------------------------------------------------------------------


def terms_panel(evidence: Evidence) -> Panel:
    """Show the gains of the merge on every term, beside the best baseline and all others, on one
    axis: those of the sealed test or, without one, those of the search.
    """
    is_sealed = evidence.comparison is not None
    shown = evidence.comparison or search_comparison(evidence)
    score = "sealed score" if is_sealed else "search score"
    baseline = "the base" if is_sealed else evidence.study.baseline
    best = shown.best_baseline()
    gains = {
        label: [(row, shown.term_interval(row, label)) for row in shown.rows[1:]]
        for label in shown.base.scores
    }
    merged = {label: _of_merge(each) for label, each in gains.items()}
    ordered = sorted(gains, key=lambda label: -merged[label].difference)
    figure, axes = make_figure(1.35 + 0.42 * len(gains))
    axes[0].set_xlim(limits_of([pair for each in gains.values() for pair in each], best, 100))
    for at, label in enumerate(ordered):
        _draw_term(axes[0], at, label, gains[label], best)
    axes[0].axvline(0, color=INK, linewidth=0.7, zorder=0)
    note = _label_terms(axes[0], ordered, shown)
    start = "the base" if is_sealed else evidence.baseline_on_axes
    figure.supxlabel(f"{score}, gain over {start}: % (accuracies: points){note}")
    add_key(figure, list(dict.fromkeys(part_of(row, best) for row in shown.rows[1:])))
    values = "; ".join(f"{label} {OF_TERMS.show(merged[label].difference)}" for label in ordered)
    return Panel(
        "terms",
        f"Gain by term, {score}",
        f"The merge against {baseline}: {_say_answers(merged)}.",
        f"Gains of the merge over {baseline} by term, {score}: {values}.",
        figure,
    )


def _of_merge(gains: Gains) -> Interval:
    return next(interval for row, interval in gains if row.kind == "merge")


def _draw_term(axis: "Axes", at: int, label: str, gains: Gains, best: SealedRow) -> None:
    """Draw the gains on one term, the merge last, so that nothing covers it."""
    axis.axhline(at, color=INK, linewidth=0.3, alpha=0.3, zorder=0)
    for part, lane in LANES.items():
        for row, interval in gains:
            if part_of(row, best) == part:
                gain = describe_interval(interval, OF_TERMS, is_gain=True)
                hint = f"{label}, {row.title}: {gain}"
                look = replace(LOOKS[part], has_bar=part in ("merge", "best"))
                draw_interval(axis, at + lane, interval, look, 100, hint)


def _label_terms(axis: "Axes", labels: Sequence[str], shown: Comparison) -> str:
    """Label the rows of an axis with terms, and return a note about the mark on some."""
    counted = {term.label for term in shown.objective.terms if term.weight > 0}
    names = [label if label in counted else f"{label} †" for label in labels]
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0, pad=8)
    return "\n† recorded, but not part of the objective" * (len(counted) < len(labels))


def _say_answers(merged: Mapping[str, Interval]) -> str:
    """Return in which terms the merge is better, worse, or neither."""
    sides: dict[str, list[str]] = {"better": [], "worse": [], "no significant difference": []}
    for label, interval in merged.items():
        sides.setdefault(interval.answer, []).append(label)
    return "; ".join(f"{side} in {', '.join(each)}" for side, each in sides.items() if each)


def search_comparison(evidence: Evidence) -> Comparison:
    """Return the anchors and the best trial on the items of the search, as a comparison."""
    study = evidence.study
    kinds: list[tuple[RowKind, str]] = [
        ("base", ""),
        *(("alone", name) for name in study.config.free_parts),
        ("average", ""),
    ]
    first = {weights_key(trial.weights): trial for trial in reversed(evidence.trials)}
    rows = [
        _row_of_trial(first[key], *kind)
        for kind, (_, weights) in zip(kinds, anchors(study.config), strict=False)
        if (key := weights_key(weights)) in first
    ]
    best = study.best_trial.number
    rows += [_row_of_trial(trial, "merge", "") for trial in evidence.trials if trial.number == best]
    return Comparison(rows, study.config.objective, {})


def _row_of_trial(trial: Trial, kind: RowKind, subject: str) -> SealedRow:
    n_known = trial.number
    return SealedRow(
        kind, subject, trial.weights, trial.terms, False, n_known, trial.seconds, trial.n_tokens
    )


# -- in total --------------------------------------------------------------------------------------


def answer_panel(comparison: Comparison) -> Panel:
    """Show the gains of the merge over the best baseline and over the base as bars with their
    intervals, like the first screen of a report. A hollow bar may as well be nothing.
    """
    unit, gains = Unit.of(comparison.objective), leading_gains(comparison)
    figure, axes = make_figure(0.7 + 0.6 * len(gains))
    shown = []
    for at, (gain, interval) in enumerate((gain, gain.interval) for gain in gains):
        value = gain.text
        face = MERGE if interval.excludes_zero else "none"
        axes[0].barh(at, unit.factor * interval.difference, 0.35, facecolor=face, edgecolor=MERGE)
        if interval.kind != "none":
            value = f"{value} {gain.unit.show_interval(interval)}"
            ends = [unit.factor * end for end in (interval.low, interval.high)]
            axes[0].plot(ends, [at, at], "|-", color=INK, linewidth=1.4, markersize=9)
        shown.append((gain.label, value))
    axes[0].axvline(0, color=INK, linewidth=0.7, zorder=0)
    labels = ["\n".join([*textwrap.wrap(name, 30), value]) for name, value in shown]
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].set_ylim(len(labels) - 0.4, -0.6)
    axes[0].tick_params(axis="y", length=0, pad=8)
    figure.supxlabel(f"sealed score, gain of the merge: {unit.sign}")
    return Panel(
        "answer",
        "Gain of the merge, 95 % intervals",
        verdict_of(comparison),
        f"Gains of the merge: {'; '.join(f'{name} {value}' for name, value in shown)}.",
        figure,
    )


def sealed_panel(comparison: Comparison) -> Panel:
    """Show the gain of every row of the sealed test over the base."""
    unit, best = Unit.of(comparison.objective), comparison.best_baseline()
    rows = sorted(comparison.rows[1:], key=comparison.value, reverse=True)
    gains = [(row, comparison.interval(row, comparison.base)) for row in rows]
    figure, axes = make_figure(1.1 + 0.24 * len(rows))
    axes[0].set_xlim(limits_of(gains, best, unit.factor))
    for at, (row, interval) in enumerate(gains):
        hint = f"{row.marked_title}: {describe_interval(interval, unit, is_gain=True)}"
        part = part_of(row, best)
        draw_interval(axes[0], at, interval, LOOKS[part], unit.factor, hint)
    axes[0].axvline(0, color=INK, linewidth=0.7, zorder=0)
    axes[0].set_yticks(range(len(rows)), [row_label(row) for row in rows])
    axes[0].set_ylim(len(rows) - 0.4, -0.6)
    axes[0].tick_params(axis="y", length=0, pad=8)
    figure.supxlabel(f"sealed score, gain over the base: {unit.sign}{seal_note(rows)}")
    add_key(figure, list(dict.fromkeys(part_of(row, best) for row in rows)))
    base = comparison.value(comparison.base)
    values = "; ".join(
        f"{row.marked_title} {unit.show(comparison.value(row) - base)}" for row in rows
    )
    return Panel(
        "sealed",
        "Every row of the sealed test",
        _say_how_many(comparison),
        f"Gain of every row over the base: {values}.",
        figure,
    )


RELATIONS: Mapping[Answer, str] = {  # of the merge to some baselines
    "better": "better than {}",
    "worse": "worse than {}",
    "no significant difference": "not significantly different from {}",
    "equal on every item": "equal to {} on every item",
    "no interval, because all items differ alike": "as far from {} in every item",
}


def _say_how_many(comparison: Comparison) -> str:
    """Return how many baselines the merge is better than, worse than, or neither."""
    baselines = [row for row in comparison.rows if row.is_baseline]
    answers = [comparison.interval(comparison.merge, row).answer for row in baselines]
    if "too few items to tell" in answers:  # all rows have the same items
        return f"Too few items to compare the merge with its {len(baselines)} baselines."
    counts = {answer: answers.count(answer) for answer in RELATIONS if answer in answers}
    parts = [RELATIONS[answer].format(n) for answer, n in counts.items()]
    listed = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    return f"Of {len(baselines)} baselines at 95 %, the merge is {listed}."
