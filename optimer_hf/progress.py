"""Show the progress of long work, and measure what it costs.

Terminals and notebooks get a bar, everything else gets a plain log line every few seconds. Every
stage that takes more than two seconds reports here. Nothing is stored: lasting figures belong in
the stage's ledger.
"""

import html
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter, process_time
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from optimer_hf.printable import make_visible

logger = logging.getLogger(__name__)


SECONDS_BETWEEN_LINES = 15.0
SECONDS_BETWEEN_VIEWS = 0.25  # each update of a notebook bar is a message to the browser


@dataclass(frozen=True)
class Cost:
    """Wall-clock seconds, and CPU seconds over all threads of this process."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @classmethod
    def now(cls) -> "Cost":
        """Return both counters; only their differences mean anything."""
        return cls(perf_counter(), process_time())

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds)

    def __mul__(self, n: float) -> "Cost":
        return Cost(self.seconds * n, self.cpu_seconds * n)

    def since(self) -> "Cost":
        """Return the cost since this moment."""
        return Cost.now() + self * -1


class _Bar(Protocol):
    """The display of a Meter."""

    def show(self, done: int, figures: str) -> None:
        """Show that `done` units are done, next to `figures`."""
        ...

    def close(self) -> None:
        """Leave the last state on the screen."""
        ...


class _TerminalBar:
    """A rich bar on stderr."""

    def __init__(self, title: str, total: int, done: int) -> None:
        columns = [
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
        ]
        self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
        self._bar.start()
        self._task = self._bar.add_task(title, total=total, completed=done, figures="")

    def show(self, done: int, figures: str) -> None:
        self._bar.update(self._task, completed=done, figures=figures)

    def close(self) -> None:
        self._bar.stop()


class _NotebookBar:
    """A bar in the output of a notebook cell.

    It needs only IPython. The bars of tqdm and rich need ipywidgets, and warn or stay empty
    without it.
    """

    def __init__(self, title: str, total: int, done: int) -> None:
        self._title, self._total = title, total
        self._last: tuple[int, str] = (done, "")
        self._shown_at = perf_counter()
        self._output = _Output(*self._views())

    def show(self, done: int, figures: str) -> None:
        self._last = done, figures
        if perf_counter() - self._shown_at > SECONDS_BETWEEN_VIEWS:
            self._shown_at = perf_counter()
            self._output.update(*self._views())

    def close(self) -> None:
        self._output.update(*self._views())

    def _views(self) -> tuple[str, str]:
        """Return the content of the cell as text and as HTML."""
        done, figures = self._last
        text = f"{self._title}: {figures}" if figures else f"{self._title}: {done}/{self._total}"
        bar = f'<progress value="{done}" max="{self._total}"></progress>'
        return text, f"{bar} {html.escape(text)}"


class _Output:
    """A part of a notebook cell's output that can be updated."""

    def __init__(self, text: str, page: str) -> None:
        from IPython.display import display

        self._handle = display(self._bundle(text, page), raw=True, display_id=True)

    def update(self, text: str, page: str) -> None:
        """Replace the text and the HTML."""
        if self._handle is not None:  # it is None without a front end
            self._handle.update(self._bundle(text, page), raw=True)

    @staticmethod
    def _bundle(text: str, page: str) -> dict[str, str]:
        return {"text/plain": text, "text/html": page}


def _is_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    return "IPython" in sys.modules and Console(stderr=True).is_jupyter


def _open_bar(title: str, total: int, done: int) -> _Bar | None:
    """Return the right bar for this output; None where only log lines make sense."""
    if _is_notebook():
        return _NotebookBar(title, total, done)
    return _TerminalBar(title, total, done) if sys.stderr.isatty() else None


@contextmanager
def announce(text: str) -> Iterator[None]:
    """Show what is being done while there is nothing to count yet.

    The text appears at once. Terminals and notebooks keep it visible until the work is done.
    """
    text = make_visible(text)
    if _is_notebook():
        output, started = _Output(f"{text} ...", html.escape(f"{text} ...")), perf_counter()
        yield
        summary = f"{text}: {perf_counter() - started:.1f} s"
        output.update(summary, html.escape(summary))
    elif sys.stderr.isatty():
        with Console(stderr=True).status(escape(text)):
            yield
    else:
        logger.info("%s", text)
        yield


class Meter:
    """A context manager that counts finished units of work and shows rate and time left."""

    def __init__(self, title: str, total: int, unit: str, *, done: int = 0) -> None:
        self.title, self.total, self.unit = make_visible(title), total, unit
        self._first = self._done = done
        self._started = self._last_line = perf_counter()
        self._note = ""
        self._bar: _Bar | None = None

    def __enter__(self) -> Self:
        self._bar = _open_bar(self.title, self.total, self._done)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            logger.info("%s: %s", self.title, self._figures())

    def advance(self, n: int, note: str = "") -> None:
        """Count `n` more units; `note` is a short text to show next to the figures."""
        self._done += n
        self._note = make_visible(note)
        if self._bar is not None:
            self._bar.show(self._done, self._figures())
        elif self._done < self.total and perf_counter() - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = perf_counter()
            logger.info(
                "%s: %s, %s left", self.title, self._figures(), _clock(self._seconds_left())
            )

    def _rate(self) -> float:
        return (self._done - self._first) / max(perf_counter() - self._started, 1e-9)

    def _seconds_left(self) -> float:
        return (self.total - self._done) / max(self._rate(), 1e-9)

    def _figures(self) -> str:
        text = f"{self._done:,}/{self.total:,} {self.unit}"
        rate = self._rate()
        if rate > 0:  # else all of it was done before
            text += f", {rate:,.0f} {self.unit}/s" if rate >= 2 else f", {1 / rate:.1f} s each"
        return f"{text}, {self._note}" if self._note else text


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
