"""How the process of a command ends: signals, what an interrupted command left, a prompt exit."""

import atexit
import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import NoReturn

RESUMABLE = {"run", "train", "search", "compare", "retarget", "push", "pull"}


class TerminatedError(KeyboardInterrupt):
    """SIGTERM or SIGHUP; as after Ctrl-C, everything tidies up on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def raising_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise TerminatedError in the main thread, unless they are ignored
    (nohup) or have a handler; further ones do not disturb the tidying up.
    """

    process = os.getpid()

    def end(number: int, _: object) -> None:
        if os.getpid() != process:  # one forked from it, which has nothing to tidy up
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
    """Return what an interrupted command left, and the command that resumes it, without secrets."""
    if command not in RESUMABLE:
        return "Nothing half-written was left behind."
    kept = "Finished stages and trials and the last checkpoint are kept"
    shown = without_secrets(arguments)
    hint = "" if len(shown) == len(arguments) else ", with your --token"
    return f"{kept}; to go on: optimer {shlex.join(shown)}{hint}"


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """Return a command line without --token and its value, and with `...` for whatever holds a
    token, or the value of an environment variable that is one.
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
    """End the process now: run what is registered for the exit (temporary directories, child
    processes, clusters, trackers), flush, and skip the rest.

    The rest would free every tensor and module and join the idle threads of libraries, for seconds.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # a full disk, a closed pipe; as Python itself ends then
            status = status or 120
    os._exit(status)
