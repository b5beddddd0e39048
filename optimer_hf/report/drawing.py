"""Draw the figures of a report and write them as SVG, PNG or PDF."""

import contextlib
import copy
import io
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np
from markupsafe import Markup

from optimer_hf.comparison.rows import SealedRow
from optimer_hf.files.staging import replacing
from optimer_hf.scoring.intervals import Interval
from optimer_hf.study.trials import Trial

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


INK, QUIET, PAPER = "#1b1b1f", "#8a8a96", "#ffffff"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe & Ito 2008
BASELINE, MERGE, TARGET = COLOURS[:3]  # what these three mean in every figure
PAGE_COLOURS = {  # colours with another shade in dark mode
    INK: "currentColor",
    QUIET: "var(--faint)",
    BASELINE: "var(--blue)",
    MERGE: "var(--accent)",
    TARGET: "var(--green)",
}
DARK = {  # the same colours in pictures for dark pages
    INK: "#e8e8ee",
    QUIET: "#7d7d8a",
    PAPER: "#16161a",
    BASELINE: "#6aa5ff",
    MERGE: "#ff9a4d",
    TARGET: "#35c08e",
}
STYLE = {
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.constrained_layout.h_pad": 0.08,  # inches: a title keeps away from the ticks above it
    "figure.facecolor": "none",
    "figure.labelsize": 10,
    "font.size": 10,
    "legend.fontsize": 9.5,
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
DOTS = 320  # an inch of a PNG: two pixels for each one of a page 832 pixels wide
TITLE_HEIGHT, TITLE_SIZE = 0.3, 12  # inches and points, of a figure that stands alone
HINT = "hint: "  # begins the id of a mark that shows a text when the mouse is over it

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


# -- marks -----------------------------------------------------------------------------------------


Part = Literal["merge", "best", "target", "other"]  # that a row plays in a comparison


@dataclass(frozen=True)
class Look:
    """How the differences of rows with one part are drawn, and what the key calls them."""

    name: str
    colour: str
    marker: str
    size: float
    has_bar: bool = True


LOOKS: Mapping[Part, Look] = {
    "merge": Look("the merge", MERGE, "D", 6.0),
    "best": Look("best baseline", BASELINE, "o", 5.5),
    "target": Look("re-targeted", TARGET, "s", 4.5),
    "other": Look("other baselines", QUIET, "o", 3.5),
}


def add_hint(artist: "Artist", text: str) -> None:
    """Let a mark of an SVG show a text when the mouse is over it; its quotes become single ones,
    since ids are written between double ones.
    """
    artist.set_gid(HINT + " ".join(text.split()).replace('"', "'"))


def draw_interval(
    axis: "Axes", at: float, interval: Interval, look: Look, factor: float, hint: str
) -> None:
    """Draw a difference, times `factor`, as a point with a bar for its interval. A point beyond the
    limits of the axis is an arrow at its edge, with the number beside it unless there are no bars.
    """
    low, high = axis.get_xlim()
    middle, *ends = (factor * v for v in (interval.difference, interval.low, interval.high))
    if low <= middle <= high:
        if interval.kind != "none" and look.has_bar:
            axis.plot(np.clip(ends, low, high), [at, at], color=look.colour, linewidth=1.6)
        (point,) = axis.plot(middle, at, look.marker, color=look.colour, markersize=look.size)
    else:
        edge, marker, side, shift = (
            (low, "<", "left", 6) if middle < low else (high, ">", "right", -6)
        )
        (point,) = axis.plot(edge, at, marker, color=look.colour, markersize=5)
        axis.annotate(
            f"{middle:+.3g}" if look.has_bar else "",
            (edge, at),
            (shift, 0),
            textcoords="offset points",
            ha=side,
            va="center",
            color=look.colour,
        )
    point.set_clip_on(False)
    add_hint(point, hint)


def add_key(figure: "Figure", parts: Collection[Part]) -> None:
    """Explain the marks of the parts above a figure."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [], [], linestyle="none", color=look.colour, marker=look.marker, markersize=look.size
        )
        for part, look in LOOKS.items()
        if part in parts
    ]
    names = [look.name for part, look in LOOKS.items() if part in parts]
    figure.legend(
        handles, names, loc="outside upper left", ncols=4, handletextpad=0.1, columnspacing=1.2
    )


def choose_limits(focus: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Return limits of an axis that show 0, all of `focus`, and of the others those that do not
    squeeze it: within the span of `focus` on either side.
    """
    low, high = min(0.0, *focus), max(0.0, *focus)
    span = max(high - low, 1e-3)
    near = [value for value in others if low - span <= value <= high + span]
    low, high = min(low, *near, low), max(high, *near, high)
    room = 0.05 * max(high - low, span)
    return low - room, high + room


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
    height: float, rows: int = 1, columns: int = 1, *, share: bool = False
) -> tuple["Figure", Sequence["Axes"]]:
    """Return a figure of a height in inches, and its axes row by row; with `share`, they have the
    same limits.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share)
    return figure, list(axes.flat)


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
    _print(panel.figure, buffer, ".svg")
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{panel.name}-", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(rf'<g id="{panel.name}-{HINT}([^"]*)">', r"<g><title>\1</title>", text)
    label = str(Markup.escape(panel.shows))
    text = text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    for colour, name in PAGE_COLOURS.items():
        text = text.replace(colour, name)
    return text.strip()


def write_figure(figure: "Figure", path: Path, *, paper: str = PAPER) -> None:
    """Write a figure without metadata, so that the same figure gives the same bytes."""
    with replacing(path) as partial, open(partial, "wb") as file:
        _print_on(paper, figure, file, path.suffix)


def _print_on(paper: str, figure: "Figure", file: IO[Any], suffix: str) -> None:
    figure.set_facecolor(paper)
    figure.set_dpi(DOTS)
    _print(figure, file, suffix)


def _print(figure: "Figure", file: IO[Any], suffix: str) -> None:
    """Write a figure in the format of a suffix. `Figure.savefig` would draw everything twice, the
    first time to find out where it is, although it is laid out when it is drawn.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_pdf import FigureCanvasPdf
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    bare: Any = FIGURE_METADATA[suffix]
    canvas: Any  # its methods that print have no types
    match suffix:
        case ".png":
            canvas = FigureCanvasAgg(figure)
            canvas.print_png(file, metadata=bare)
        case ".svg":
            canvas = FigureCanvasSVG(figure)
            canvas.print_svg(file, metadata=bare)
        case ".pdf":
            canvas = FigureCanvasPdf(figure)
            canvas.print_pdf(file, metadata=bare)


def write_picture(panel: Panel, path: Path) -> None:
    """Write a panel with its title above it, in the format that the suffix of `path` names."""
    write_figure(_copy_with_title(panel), path)


def to_png(panel: Panel) -> bytes:
    """Return what `write_picture` would write as PNG."""
    buffer = io.BytesIO()
    _print_on(PAPER, _copy_with_title(panel), buffer, ".png")
    return buffer.getvalue()


def write_pictures(panel: Panel, light: Path, dark: Path) -> None:
    """Write a panel with its title above it as two pictures, for light and for dark pages."""
    figure = _copy_with_title(panel)
    write_figure(figure, light)
    figure.set_layout_engine("none")  # where everything is stands by now
    for artist in figure.findobj():
        _darken(artist)
    write_figure(figure, dark, paper=DARK[PAPER])


def _copy_with_title(panel: Panel) -> "Figure":
    """Return a copy of a figure, higher by its title: that of its key, where it has one above."""
    from matplotlib.font_manager import FontProperties

    figure: Figure = copy.deepcopy(panel.figure)
    figure.set_figheight(figure.get_figheight() + TITLE_HEIGHT)
    if figure.legends:
        (key,) = figure.legends
        key.set_title(panel.title, prop=FontProperties(size=TITLE_SIZE, weight="bold"))
        key.set_alignment("left")
    else:
        figure.suptitle(panel.title, x=0.02, ha="left", fontsize=TITLE_SIZE, fontweight="bold")
    return figure


def _darken(artist: "Artist") -> None:
    """Give an artist the colours for dark pages."""
    from matplotlib.collections import Collection
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.text import Text

    match artist:
        case Line2D():
            artist.set_color(_dark(artist.get_color()))
            artist.set_markerfacecolor(_dark(artist.get_markerfacecolor()))
            artist.set_markeredgecolor(_dark(artist.get_markeredgecolor()))
        case Text():
            artist.set_color(_dark(artist.get_color()))
        case Patch():
            artist.set_facecolor(_dark(artist.get_facecolor()))
            artist.set_edgecolor(_dark(artist.get_edgecolor()))
        case Collection():
            artist.set_facecolor([_dark(colour) for colour in artist.get_facecolor()])
            artist.set_edgecolor([_dark(colour) for colour in artist.get_edgecolor()])


def _dark(colour: Any) -> Any:
    """Return a colour as it is on dark pages, with its transparency."""
    from matplotlib.colors import to_hex, to_rgba

    if isinstance(colour, str) and colour in ("none", "auto"):
        return colour
    return to_rgba(DARK.get(to_hex(colour), colour), to_rgba(colour)[3])
