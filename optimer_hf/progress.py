"""Progress of long work: a rich bar on a terminal, a plain log line every few seconds elsewhere;
and what work has cost.

Comes before every stage that takes more than two seconds. Nothing here is stored; figures that last
belong to the ledger of the stage.
"""

import logging
import sys
from dataclasses import dataclass
from time import perf_counter, process_time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from optimer_hf.printable import visible

logger = logging.getLogger(__name__)


SECONDS_BETWEEN_LINES = 15.0


@dataclass(frozen=True)
class Cost:
    """Seconds on the clock, and CPU-seconds of all threads of this process."""

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
        """Return what has been spent since this moment."""
        return Cost.now() + self * -1


class Meter:
    """Counts units of one piece of work and shows rate and time left; a context manager."""

    def __init__(self, title: str, total: int, unit: str, *, done: int = 0) -> None:
        self.title, self.total, self.unit = visible(title), total, unit
        self._first = self._done = done
        self._started = self._last_line = perf_counter()
        self._note = ""
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            columns = [
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[figures]}", markup=False),
            ]
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(
                self.title, total=self.total, completed=self._done, figures=""
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif kind is None:
            logger.info("%s: %s", self.title, self._figures())

    def advance(self, n: int, note: str = "") -> None:
        """Count `n` more units; `note` is a short text shown with the figures."""
        self._done += n
        self._note = visible(note)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, figures=self._figures())
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
        text += (
            f", {rate:,.0f} {self.unit}/s" if rate >= 2 else f", {1 / max(rate, 1e-9):.1f} s each"
        )
        return f"{text}, {self._note}" if self._note else text


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
