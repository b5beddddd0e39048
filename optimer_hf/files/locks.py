"""Locks between processes: who may write a place."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from optimer_hf.errors import OutputError
from optimer_hf.files.paths import ATOMIC_PREFIX, hidden_name

WAIT_SECONDS = 60.0
SWEEP_SECONDS = 0.3  # for as long a lock may be held by who removes it
UNTIL_FREE = -1.0  # seconds: as long as the process lives that holds a lock
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}

SECONDS_TO_LOCK = 60  # between the making of a scratch directory and its lock, at most


# -- locks and leftovers ---------------------------------------------------------------------------


@contextlib.contextmanager
def hold_place(place: Path, *, wait: bool = False, beside: Path | None = None) -> Iterator[bool]:
    """Hold a place for this process while it is written; not re-entrant, gone with the process.

    The lock is a hidden file in `beside` (None: the folder of `place`), which has to be there.
    Locks that dead processes left in either are removed. Raises OutputError when another process
    holds the place, with `wait` only after WAIT_SECONDS.
    Yields whether the file system has locks at all.
    """
    folder = place.parent if beside is None else beside
    file = folder / hidden_name(place.name, ".lock")
    for each in {folder, place.parent}:
        remove_dead_locks(each)
    with contextlib.ExitStack() as stack:
        try:
            has_locks = stack.enter_context(locking(file, WAIT_SECONDS if wait else SWEEP_SECONDS))
        except Timeout:
            raise OutputError(
                f"{place}: another process is writing it. Wait for it, or give another place."
            ) from None
        try:
            yield has_locks
        finally:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)


def remove_dead_locks(folder: Path) -> None:
    """Remove the locks of `hold_place` in a folder that no process holds.

    Each is unlinked while it is held, and who waited for it takes another of that name.
    """
    with contextlib.suppress(OSError):  # a name that is too long
        for file in list(folder.glob(f"{ATOMIC_PREFIX}*.lock")):
            with contextlib.suppress(OSError, Timeout), locking(file) as is_held:
                if is_held:
                    file.unlink()


@contextlib.contextmanager
def locking(file: Path, seconds: float = 0.0) -> Iterator[bool]:
    """Hold a lock file for this process; one that a dead process left is free.

    Raises filelock.Timeout when a live process holds it for longer than `seconds`. Yields whether
    the file system has locks: without them nothing is held.
    """
    lock = FileLock(file)
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        raise
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
