"""Draw the figures of a report and write them as SVG, PNG or PDF."""

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from optimer_hf.comparison.rows import SealedRow
from optimer_hf.files.staging import replacing
from optimer_hf.scoring.intervals import Interval
from optimer_hf.study.trials import Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


INK = "#1b1b1f"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe & Ito 2008
PAGE_COLOURS = {  # colours with another shade in dark mode
    INK: "currentColor",
    COLOURS[0]: "var(--blue)",
    COLOURS[1]: "var(--accent)",
}
STYLE = {
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "figure.constrained_layout.h_pad": 0.08,  # inches: a title keeps away from the ticks above it
    "figure.facecolor": "none",
    "figure.labelsize": 9,
    "font.size": 9,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "optimer",
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
}
WIDTH = 5.2  # inches: at 72 points an inch, a phone shows a figure at its own size

FIGURE_METADATA = {  # by suffix; None removes what differs from one drawing to the next
    ".png": {"Software": None},
    ".svg": {"Date": None, "Creator": None},
    ".pdf": {"CreationDate": None, "Creator": None, "Producer": None},
}


@dataclass(frozen=True)
class Panel:
    """A figure, what to conclude from it, and a text for readers who cannot see it (`shows`)."""

    name: str
    title: str
    conclusion: str
    shows: str
    figure: "Figure"


def draw_interval(
    axis: "Axes", at: float, interval: Interval, marked: bool, factor: float = 100.0
) -> None:
    """Draw a difference as a point with a bar for its interval, at a height of the axis."""
    middle, low, high = (factor * v for v in (interval.difference, interval.low, interval.high))
    colour = COLOURS[1] if marked else COLOURS[0]
    if interval.kind != "none":
        axis.plot([low, high], [at, at], color=colour, linewidth=1.4)
    axis.plot(middle, at, "o", color=colour, markersize=4)


# -- drawing ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def use_style() -> Iterator[None]:
    """Draw with the style of a report inside a `with` statement."""
    import matplotlib
    from cycler import cycler

    style: Any = STYLE | {"axes.prop_cycle": cycler(color=COLOURS)}
    with matplotlib.rc_context(style):
        yield


def make_figure(
    height: float, rows: int = 1, columns: int = 1
) -> tuple["Figure", Sequence["Axes"]]:
    """Return a figure of a height in inches, and its axes row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def row_label(row: SealedRow) -> str:
    """Return the title of a row, shortened for a figure; `seal_note` explains its star."""
    title = row.title if len(row.title) <= 34 else f"{row.title[:32]}…"
    return title + " *" * row.chosen_after_seal


def seal_note(rows: Sequence[SealedRow]) -> str:
    """Return a line that explains the stars of some rows; nothing if they have none."""
    return "\n* chosen after the seal was opened" * any(row.chosen_after_seal for row in rows)


def seconds_of(trial: Trial) -> float:
    """Return how long a trial took, by the clock."""
    return sum(trial.seconds.get(phase, 0.0) for phase in ("ask", "merge", "evaluate"))


def to_svg(panel: Panel) -> str:
    """Return a figure as inline SVG with a text for screen readers and ids unique in a page."""
    buffer = io.StringIO()
    panel.figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{panel.name}-", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    label = str(Markup.escape(panel.shows))
    text = text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    for colour, name in PAGE_COLOURS.items():
        text = text.replace(colour, name)
    return text.strip()


def write_figure(figure: "Figure", path: Path) -> None:
    """Write a figure without metadata, so that the same figure gives the same bytes."""
    bare: Any = FIGURE_METADATA[path.suffix]
    with replacing(path) as partial:
        figure.savefig(partial, dpi=160, facecolor="white", metadata=bare)
