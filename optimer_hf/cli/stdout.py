"""Stdout is for results: whatever libraries, and the processes that they start, write there goes
to stderr.
"""

import contextlib
import io
import os
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TextIO

STDOUT = "stdout"  # in errors, where others have a file

_results: ContextVar[TextIO | None] = ContextVar("results", default=None)


class Results(io.TextIOWrapper):
    """Stdout. An OSError that it raises names it, as those of files do."""

    def write(self, text: str, /) -> int:
        with _naming_stdout():
            return super().write(text)

    def flush(self) -> None:
        with _naming_stdout():
            super().flush()


@contextlib.contextmanager
def _naming_stdout() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.filename = STDOUT
        raise


def result_stream() -> TextIO:
    """Return the stream that a command prints its results to."""
    return _results.get() or sys.stdout


@contextlib.contextmanager
def keep_for_results() -> Iterator[None]:
    """Within it, `sys.stdout` is stderr for everybody but `result_stream`."""
    if _results.get() is not None or sys.stdout is None or sys.stderr is None:
        yield
        return
    token = _results.set(sys.stdout)
    with contextlib.redirect_stdout(sys.stderr):
        try:
            yield
        finally:
            _results.reset(token)


def separate_from_descriptor() -> None:
    """Let `sys.stdout` write where it writes, and the file descriptor 1 to stderr: C libraries and
    child processes write there. Nothing changes if either stream is closed or replaced.
    """
    stream = sys.stdout
    if not isinstance(stream, io.TextIOWrapper):
        return
    try:
        if (stream.fileno(), sys.stderr.fileno()) != (1, 2):
            return
        stream.flush()
        own = os.dup(1)
        os.dup2(2, 1)
    except (AttributeError, OSError, ValueError):
        return
    unbuffered = stream.write_through
    sys.stdout = Results(
        os.fdopen(own, "wb", buffering=0 if unbuffered else -1),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=unbuffered,
    )
