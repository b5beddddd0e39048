"""Locks between processes, so that only one writes to a place at a time."""

import contextlib
import errno
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from optimer_hf.errors import OutputError
from optimer_hf.files.paths import ATOMIC_PREFIX, hidden_name

WAIT_SECONDS = 60.0
SWEEP_SECONDS = 0.3  # a process that removes dead locks may hold one for this long
UNTIL_FREE = -1.0  # seconds: wait for as long as another process holds the lock
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}

SECONDS_TO_LOCK = 60  # a new scratch directory is locked at the latest after this time


# -- locks and leftovers ---------------------------------------------------------------------------


@contextlib.contextmanager
def hold_place(place: Path, *, wait: bool = False, beside: Path | None = None) -> Iterator[bool]:
    """Reserve a place for this process while it writes there.

    The lock is a hidden file in `beside` (None: the folder that contains `place`), which must
    exist. It is not re-entrant and ends with the process. Locks left by dead processes are removed
    from both folders. Yields whether the file system supports locks.

    Raises OutputError if another process holds the place; with `wait`, only after WAIT_SECONDS.
    """
    file = lock_of_place(place, beside)
    for each in {file.parent, place.parent}:
        remove_dead_locks(each)
    with contextlib.ExitStack() as stack:
        try:
            has_locks = stack.enter_context(locking(file, WAIT_SECONDS if wait else SWEEP_SECONDS))
        except Timeout:
            raise OutputError(
                f"{place}: another process is writing to it. Wait for it, or give another place."
            ) from None
        try:
            yield has_locks
        finally:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)


def lock_of_place(place: Path, beside: Path | None = None) -> Path:
    """Return the lock file of `hold_place`."""
    return (place.parent if beside is None else beside) / hidden_name(place.name, ".lock")


def remove_dead_locks(folder: Path) -> None:
    """Remove the locks of `hold_place` that no process holds any more.

    Each lock is unlinked while held; a process that was waiting for it creates a new one.
    """
    with contextlib.suppress(OSError):  # a name that is too long
        for file in list(folder.glob(f"{ATOMIC_PREFIX}*.lock")):
            with contextlib.suppress(OSError, Timeout), locking(file) as is_held:
                if is_held:
                    file.unlink()


@contextlib.contextmanager
def locking(file: Path, seconds: float = 0.0) -> Iterator[bool]:
    """Hold a lock file for this process; a lock left by a dead process counts as free.

    Yields whether the file system supports locks: if not, nothing is held. Raises filelock.Timeout
    if a live process keeps the lock for longer than `seconds`.
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
