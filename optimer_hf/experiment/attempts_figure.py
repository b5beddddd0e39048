"""Draw what the same tokens bring as attempts at a data mixture, and as vectors with a search."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from optimer_hf.comparison.rows import RowKind
from optimer_hf.experiment.seeds_file import SeededRow
from optimer_hf.report.drawing import (
    BASELINE,
    INK,
    MERGE,
    QUIET,
    TARGET,
    make_figure,
    use_style,
    write_figure,
)
from optimer_hf.scoring.formatting import Unit
from optimer_hf.study.config import StudyConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = dict[int, SeededRow]  # by the number of attempts
COLOURS_OF_LINES = (MERGE, TARGET, QUIET)


def write_attempts_figure(rows: Sequence[SeededRow], config: StudyConfig, path: Path) -> None:
    """Write `draw_attempts` as a PNG."""
    with use_style():
        write_figure(draw_attempts(rows, config), path)


def draw_attempts(rows: Sequence[SeededRow], config: StudyConfig) -> "Figure":
    """Draw the gain of the best of R mixtures over R, as it is and at its best scale, beside the
    merge and the other searches. Bars and bands are 95 % intervals over the seeds.
    """
    unit, curves = Unit.of(config.test or config.objective), [*_list_curves(rows, config)]
    figure, axes = make_figure(3.4)
    _draw_lines(axes[0], rows, unit)
    for curve, marker, name in curves:
        _draw_curve(axes[0], curve, unit, marker, name)
    numbers = sorted({n for curve, _, _ in curves for n in curve})
    axes[0].set_xscale("log", base=2)
    axes[0].set_xticks(numbers, [str(n) for n in numbers])
    axes[0].set_xlabel("attempts R, each on 1/R of the tokens")
    axes[0].set_ylabel(f"sealed gain over the base, {unit.sign}")
    axes[0].axhline(0, color=INK, linewidth=0.7, zorder=0)
    axes[0].margins(x=0.08)
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def _list_single_attempts(config: StudyConfig) -> list[str]:
    """Return the uniform mixtures in the pool that have the tokens of all vectors: one attempt."""
    return [
        name
        for name, shares in config.mixtures.items()
        if len(set(shares.values())) == 1 and config.vectors[name].budget == "all"
    ]


def _list_curves(
    rows: Sequence[SeededRow], config: StudyConfig
) -> Iterator[tuple[Curve, str, str]]:
    """Yield the best of R attempts by R, with a marker and a name."""
    kinds: dict[RowKind, RowKind] = {"attempts": "alone", "scaled_attempts": "best_scale"}
    names = ("best of R mixtures", "at its best scale")
    pool = _list_single_attempts(config)
    for (kind, of_pool), marker, name in zip(kinds.items(), "os", names, strict=True):
        curve = {int(row.subject): row for row in rows if row.kind == kind}
        for row in rows:
            if row.kind == of_pool and row.subject in pool:
                curve.setdefault(1, row)
        yield curve, marker, name


def _draw_curve(axis: "Axes", curve: Curve, unit: Unit, marker: str, name: str) -> None:
    shift = 1.0 if marker == "o" else 1.06  # the bars of two curves lie side by side
    numbers = sorted(curve)
    gains = [unit.factor * curve[n].gain.mean for n in numbers]
    at = [n * shift for n in numbers]
    line = "-" if marker == "o" else ":"
    axis.plot(at, gains, label=name, color=BASELINE, marker=marker, linestyle=line)
    for x, n in zip(at, numbers, strict=True):
        if (interval := curve[n].gain.interval) is not None:
            axis.plot([x, x], [unit.factor * end for end in interval], color=BASELINE)


def _draw_lines(axis: "Axes", rows: Sequence[SeededRow], unit: Unit) -> None:
    """Draw the merge and the other searches as lines over all R, with bands for the intervals."""
    shown = [row for kind in ("merge", "other_search") for row in rows if row.kind == kind]
    for row, colour in zip(shown, COLOURS_OF_LINES, strict=False):
        axis.axhline(unit.factor * row.gain.mean, color=colour, label=row.name)
        if (interval := row.gain.interval) is not None:
            low, high = (unit.factor * end for end in interval)
            axis.axhspan(low, high, color=colour, alpha=0.12, linewidth=0)
