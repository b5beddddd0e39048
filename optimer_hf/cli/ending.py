"""End the process of a command: handle signals, say what an interrupted command kept, exit fast."""

import atexit
import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import NoReturn

from optimer_hf.cli.stdout import keep_for_results

RESUMABLE = {"run", "train", "search", "compare", "retarget", "push", "pull"}


class TerminatedError(KeyboardInterrupt):
    """SIGTERM or SIGHUP. As after Ctrl-C, everything is cleaned up on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def raising_signals() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise TerminatedError in the main thread, unless they are ignored
    (nohup) or have a handler. Further signals do not disturb the cleaning up.
    """

    process = os.getpid()

    def end(number: int, _: object) -> None:
        if os.getpid() != process:  # a fork of the process, which has nothing to clean up
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        for each in taken:
            signal.signal(each, signal.SIG_IGN)
        raise TerminatedError(number)

    taken = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if threading.current_thread() is threading.main_thread()
        and signal.getsignal(number) is signal.SIG_DFL
    ]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def what_is_kept(command: str | None, arguments: Sequence[str]) -> str:
    """Say what an interrupted command kept, and which command resumes it, without secrets."""
    if command not in RESUMABLE:
        return "No half-written files were left behind."
    kept = "Finished stages and trials and the last checkpoint are kept"
    shown = remove_secrets(arguments)
    hint = "" if len(shown) == len(arguments) else ", with your --token"
    return f"{kept}; to resume: optimer {shlex.join(shown)}{hint}"


def remove_secrets(arguments: Sequence[str]) -> list[str]:
    """Return a command line without --token and its value, and with `...` for every argument that
    contains a token or the value of a secret environment variable.
    """
    from optimer_hf.files.secret import TOKEN, own_secrets

    secrets = own_secrets().values()
    shown, follows = [], False
    for argument in arguments:
        is_secret = TOKEN.search(argument) or any(secret in argument for secret in secrets)
        if not (follows or argument == "--token" or argument.startswith("--token=")):
            shown.append("..." if is_secret else argument)
        follows = argument == "--token" and not follows
    return shown


def leave(status: int) -> NoReturn:
    """End the process now: run the exit handlers (for temporary directories, child processes,
    clusters, trackers), flush, and skip the rest.

    The rest, freeing every tensor and module and joining idle threads of libraries, takes seconds.
    """
    with keep_for_results():
        atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed by the caller
        try:
            stream.flush()
        except (OSError, ValueError) as error:  # a full disk or a closed pipe
            if status == 0:  # else the error is printed already
                _say_what_is_lost(error)
            status = status or 120  # as Python itself
    os._exit(status)


def _say_what_is_lost(error: Exception) -> None:
    """Print why the last results are not where they should be, if there is a place for it."""
    text = explain_disk_error(error) if isinstance(error, OSError) else None
    if text is not None and sys.stderr is not None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"error: {text}\n")
            sys.stderr.flush()


def explain_disk_error(error: OSError) -> str | None:
    """Return the message for a file, or stdout, that cannot be written, and None for other errors,
    also where a pipe was closed by its reader, who has all that it wants.
    """
    from optimer_hf.files.disk import DISK_ERRORS

    if error.errno not in DISK_ERRORS or error.filename is None:
        return None
    remedy = "Free space there, allow access, or give another place."
    return f"{error.filename}: {error.strerror}. {remedy}"
