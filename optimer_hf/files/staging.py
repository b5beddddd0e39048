"""Files and directories that are written whole or not at all, also when the process is killed."""

import contextlib
import errno
import glob
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import Timeout

from optimer_hf.errors import OutputError
from optimer_hf.files.disk import naming_disk_errors
from optimer_hf.files.locks import SECONDS_TO_LOCK, hold_place, locking, remove_dead_locks
from optimer_hf.files.paths import ATOMIC_PREFIX, hidden_name
from optimer_hf.files.reference import is_there

COMPLETE = f"{ATOMIC_PREFIX}complete"  # a staged directory that only has to be moved out of there
INSTEAD = f"{ATOMIC_PREFIX}instead"  # and the same, once what is there was removed
WHOLE = "complete-"  # and a directory beside the one whose place it takes

NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EROFS}


def make_directory(path: Path) -> None:
    """Make a directory and its parents unless it is there; raise OutputError where that cannot
    be.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be made a directory ({error.strerror}). Give another place."
        ) from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling to write; it replaces `path` at the end: after a crash or a power
    cut the file holds the old content or the new one.
    """
    make_directory(path.parent)
    try:
        with hold_place(path, wait=True) as alone:
            if alone:
                _remove_leftovers(path.parent, path.name)
            temporary = path.with_name(_staging_name(path.name))
            try:
                yield temporary
                _sync(temporary)
                os.replace(temporary, path)
                _sync(path.parent)
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}). The old state was kept."
        ) from None


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically: after a crash it holds the old text or the new one."""
    with replacing(path) as temporary:
        temporary.write_text(text if text.endswith("\n") else text + "\n", encoding="utf-8")


@contextlib.contextmanager
def staged_directory(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty directory of this process to write into, and move it to `out` at the end.

    `out` appears whole or not at all, also after a power cut; with `replace` a directory that is
    there stays as it is until then. Raises OutputError when `out` holds files already (without
    `replace`) or another process is writing it, before anything is written, and when the disk
    refuses data, after the partial directory was removed.
    """
    require = _require_directory if replace else require_empty
    require(out)
    place = Path(os.path.realpath(out))
    kept = "The old state was kept" if replace else "Nothing was left behind"
    with naming_disk_errors(out, kept):
        make_directory(place.parent)
        inside = _stages_inside(place, replace)
        parent = place if inside else place.parent
        with hold_place(place, beside=parent) as alone:
            require(out)
            if alone:
                _remove_leftovers(parent, place.name)
            staging = parent / _staging_name(place.name)
            try:
                staging.mkdir()
                yield staging
                sync_all(staging)
                if inside:
                    staging.rename(place / (INSTEAD if replace else COMPLETE))
                    _fill(place)
                elif replace:
                    os.replace(staging, _whole_beside(place))
                    _swap(place)
                else:
                    _move(staging, out, place)
            finally:
                shutil.rmtree(staging, ignore_errors=True)


def _stages_inside(place: Path, replace: bool) -> bool:
    """Whether a directory that is there cannot be replaced by another: a mount point, a working
    directory, one in a folder that cannot be written to, or (without `replace`) with leftovers in
    it.
    """
    return place.is_dir() and (
        place.is_mount()
        or Path.cwd().is_relative_to(place)
        or not os.access(place.parent, os.W_OK)
        or (not replace and any(place.iterdir()))
    )


def _move(staging: Path, out: Path, place: Path) -> None:
    """Move a staged directory into place; `out` is how a message names the place."""
    try:
        if place.exists():
            place.rmdir()  # not every file system replaces an empty directory
        os.replace(staging, place)
    except OSError:
        require_empty(out)  # says so when somebody wrote into it meanwhile
        raise
    _sync(place.parent)


def _whole_beside(place: Path) -> Path:
    """Return where a whole directory waits that only has to take the place of another."""
    return place.with_name(hidden_name(place.name, WHOLE, before=True))


def _swap(place: Path) -> None:
    """Put the whole directory beside `place` there, and remove what was there until now."""
    old = place.with_name(_staging_name(place.name))
    if is_there(place):
        os.replace(place, old)
    os.replace(_whole_beside(place), place)
    _sync(place.parent)
    shutil.rmtree(old, ignore_errors=True)


def _is_half_filled(place: Path) -> bool:
    return is_there(place / COMPLETE) or is_there(place / INSTEAD)


def _fill(place: Path) -> None:
    """Move what a complete staged directory inside `place` holds into `place`; what is there is
    removed before when it is to be replaced.
    """
    if is_there(place / INSTEAD):
        for entry in place.iterdir():
            if not entry.name.startswith(ATOMIC_PREFIX):
                _remove(entry)
        os.replace(place / INSTEAD, place / COMPLETE)
    for entry in sorted((place / COMPLETE).iterdir()):
        os.replace(entry, place / entry.name)
    (place / COMPLETE).rmdir()
    _sync(place)


def finish_move(out: Path) -> None:
    """Finish a `staged_directory` that was complete, and killed while it was moved to `out`, and
    remove what dead processes left that wrote `out`: old states and locks.
    """
    place = Path(os.path.realpath(out))
    for folder in (place.parent, place):
        remove_dead_locks(folder)
    with naming_disk_errors(out, "It is not complete"):
        if _is_half_filled(place):
            with hold_place(place, beside=place):
                if _is_half_filled(place):
                    _fill(place)
        if is_there(_whole_beside(place)):
            with hold_place(place):
                if is_there(_whole_beside(place)):
                    _swap(place)
    if _leftovers(place.parent, place.name):
        with contextlib.suppress(OutputError, OSError), hold_place(place) as alone:
            if alone:
                _remove_leftovers(place.parent, place.name)


@contextlib.contextmanager
def scratch_directory(prefix: str) -> Iterator[Path]:
    """Yield an empty temporary directory that is gone afterwards, and remove those with the same
    prefix that dead processes of this user left.
    """
    root = Path(tempfile.gettempdir())
    for left in root.glob(f"{glob.escape(prefix)}*"):
        with contextlib.suppress(OSError, Timeout):
            status = left.lstat()
            is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
            if not is_own or time.time() - status.st_mtime < SECONDS_TO_LOCK:
                continue
            with locking(left / ".lock") as is_held:
                if is_held:
                    shutil.rmtree(left, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as made,
        locking(Path(made) / ".lock"),
    ):
        yield Path(made)


def _staging_name(name: str) -> str:
    """Return a name that no other process uses while it writes `name`; its suffix stays."""
    return hidden_name(name, f"{secrets.token_hex(4)}-", before=True)


def _remove_leftovers(folder: Path, name: str) -> None:
    """Remove what processes left that died while they wrote `name`; the caller holds its lock."""
    for entry in _leftovers(folder, name):
        _remove(entry)


def _leftovers(folder: Path, name: str) -> list[Path]:
    """Return what processes stage in a folder that write `name`, or left there when they died."""
    ending = hidden_name(name, "", before=True).removeprefix(ATOMIC_PREFIX)
    found = []
    for entry in folder.glob(f"{ATOMIC_PREFIX}????????-*"):
        mark, _, rest = entry.name.removeprefix(ATOMIC_PREFIX).partition("-")
        if rest == ending and re.fullmatch("[0-9a-f]{8}", mark):
            found.append(entry)
    return found


def _remove(entry: Path) -> None:
    """Remove a file, a link or a whole directory, as far as that is allowed."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            entry.unlink()


def sync_all(folder: Path) -> None:
    """Have the disk hold every file of a folder, so that a power cut does not lose any."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    """Have the disk hold a file or the entries of a directory, where the file system can say so."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # our own file, made unreadable on purpose
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(descriptor)


def require_empty(out: Path) -> None:
    """Raise OutputError unless `out` is absent or an empty directory; what a killed process left in
    it while it wrote `out` does not count.
    """
    finish_move(out)
    if is_there(out) and (not out.is_dir() or _others_in(out)):
        raise OutputError(
            f"{out}: already exists and is not empty. Remove it or give another output directory."
        )


def _require_directory(out: Path) -> None:
    """Raise OutputError for a file where a directory is to be replaced."""
    finish_move(out)
    if is_there(out) and not out.is_dir():
        raise OutputError(f"{out}: a file; expected a directory. Remove it or give another one.")


def _others_in(out: Path) -> bool:
    return any(not entry.name.startswith(ATOMIC_PREFIX) for entry in out.iterdir())
