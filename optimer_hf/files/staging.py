"""Atomic writes of files and directories, even if the process is killed."""

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
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import Timeout

from optimer_hf.errors import OutputError
from optimer_hf.files.disk import naming_disk_errors
from optimer_hf.files.locks import (
    SECONDS_TO_LOCK,
    UNTIL_FREE,
    hold_place,
    locking,
    remove_dead_locks,
)
from optimer_hf.files.paths import ATOMIC_PREFIX, hidden_name
from optimer_hf.files.reference import is_there

COMPLETE = f"{ATOMIC_PREFIX}complete"  # a complete staged directory, inside the one that it fills
INSTEAD = f"{ATOMIC_PREFIX}instead"  # the same, but the old content must be removed first
WHOLE = "complete-"  # marks a complete directory beside the one that it replaces

NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EROFS}


def make_directory(path: Path) -> None:
    """Make a directory and its parents if necessary; raises OutputError if that fails."""
    try:
        Path(os.path.realpath(path)).mkdir(parents=True, exist_ok=True)  # also behind a link
    except OSError as error:
        raise OutputError(
            f"{path}: cannot create this directory ({error.strerror}). Give another place."
        ) from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling to write to, which replaces `path`, or the file that it links to,
    at the end.

    After a crash or a power cut the file has either the old content or the new. Raises OutputError
    for a device, a pipe or a socket, which would be replaced, too.
    """
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    if is_there(path) and not (path.is_file() or path.is_dir()):
        raise OutputError(f"{path}: found a device or a pipe, expected a file. Give another place.")
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
    """Replace a file atomically: after a crash it has either the old text or the new."""
    with replacing(path) as temporary:
        temporary.write_text(text if text.endswith("\n") else text + "\n", encoding="utf-8")


@contextlib.contextmanager
def staged_directory(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty directory to write into, and move it to `out` at the end.

    `out` appears complete or not at all, even after a power cut. With `replace`, an existing
    directory stays unchanged until then.

    Raises OutputError before anything is written if `out` already contains files (without
    `replace`) or another process is writing to it. If writing fails, removes the partial directory
    and raises OutputError.
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
            except Exception as error:
                if is_there(staging.parent) or isinstance(error, OutputError):
                    raise
                raise OutputError(
                    f"{out}: its folder was removed while it was written. Give the command again."
                ) from error
            finally:
                shutil.rmtree(staging, ignore_errors=True)


def write_once(out: Path, mark: str, write: Callable[[], None]) -> None:
    """Write a directory of a cache with `write`, unless it has the file `mark` already. If
    several processes need it, one writes it and the others wait.
    """
    with using_cached(out):
        try:
            if not (out / mark).exists():
                write()
        except OutputError:  # without locks in the file system, another process may be faster
            if not (out / mark).exists():
                raise


@contextlib.contextmanager
def using_cached(out: Path) -> Iterator[None]:
    """Keep other processes from writing or removing a directory of a cache, which may not exist
    yet. Its time is then that of its last use.
    """
    make_directory(out.parent)
    with locking(lock_of_cached(out), UNTIL_FREE):
        finish_move(out)
        yield
        with contextlib.suppress(OSError):
            os.utime(out)


def lock_of_cached(out: Path) -> Path:
    """Return the lock file of a directory of a cache, which is beside it."""
    return out.parent / f".{out.name}.lock"


def _stages_inside(place: Path, replace: bool) -> bool:
    """Whether the new content must be staged inside an existing directory.

    A mount point, the working directory, a directory in a read-only folder and (without `replace`)
    one that contains leftovers cannot be replaced by another directory.
    """
    return place.is_dir() and (
        place.is_mount()
        or Path.cwd().is_relative_to(place)
        or not os.access(place.parent, os.W_OK)
        or (not replace and any(place.iterdir()))
    )


def _move(staging: Path, out: Path, place: Path) -> None:
    """Move a staged directory into place; errors call the place `out`."""
    try:
        if place.exists():
            place.rmdir()  # not every file system replaces an empty directory
        os.replace(staging, place)
    except OSError:
        require_empty(out)  # raises if another process has written into it
        raise
    _sync(place.parent)


def _whole_beside(place: Path) -> Path:
    """Return the path at which a complete directory waits to replace `place`."""
    return place.with_name(hidden_name(place.name, WHOLE, before=True))


def _swap(place: Path) -> None:
    """Replace `place` by the complete directory beside it, and remove the old one."""
    old = place.with_name(_staging_name(place.name))
    if is_there(place):
        os.replace(place, old)
    os.replace(_whole_beside(place), place)
    _sync(place.parent)
    shutil.rmtree(old, ignore_errors=True)


def is_half_filled(place: Path) -> bool:
    """Whether a directory was being filled by a process that died; `finish_move` ends it."""
    return is_there(place / COMPLETE) or is_there(place / INSTEAD)


def _fill(place: Path) -> None:
    """Move the content of the complete staged directory inside `place` up into `place`.

    If it replaces the old content, that is removed first.
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
    """Finish a `staged_directory` that was complete when its process died, and clean up.

    Dead processes that were writing to `out` may have left old states and locks behind.
    """
    place = Path(os.path.realpath(out))
    for folder in (place.parent, place):
        remove_dead_locks(folder)
    with naming_disk_errors(out, "It is not complete"):
        if is_half_filled(place):
            with hold_place(place, beside=place):
                if is_half_filled(place):
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
    """Yield an empty temporary directory, which is removed at the end.

    Directories with the same prefix that this user's dead processes left are removed, too.
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
    """Return a temporary name for `name` that is unique to this process and keeps the suffix."""
    return hidden_name(name, f"{secrets.token_hex(4)}-", before=True)


def _remove_leftovers(folder: Path, name: str) -> None:
    """Remove what processes left when they died while writing `name`; the caller holds its lock."""
    for entry in _leftovers(folder, name):
        _remove(entry)


def _leftovers(folder: Path, name: str) -> list[Path]:
    """Return the staging entries for `name` in a folder, in use or left by dead processes."""
    ending = hidden_name(name, "", before=True).removeprefix(ATOMIC_PREFIX)
    leftovers = []
    for entry in folder.glob(f"{ATOMIC_PREFIX}????????-*"):
        mark, _, rest = entry.name.removeprefix(ATOMIC_PREFIX).partition("-")
        if rest == ending and re.fullmatch("[0-9a-f]{8}", mark):
            leftovers.append(entry)
    return leftovers


def _remove(entry: Path) -> None:
    """Remove a file, a link or a whole directory, as far as permissions allow."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            entry.unlink()


def sync_all(folder: Path) -> None:
    """Flush every file in a folder to the disk, so that a power cut loses none."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    """Flush a file or the entries of a directory to the disk, if the file system supports it."""
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
    """Raise OutputError unless `out` is missing or an empty directory.

    What a killed process left in it while writing `out` does not count.
    """
    finish_move(out)
    if is_there(out) and (not out.is_dir() or _others_in(out)):
        raise OutputError(
            f"{out}: already exists and is not empty. Give a new or an empty directory."
        )


def _require_directory(out: Path) -> None:
    """Raise OutputError if `out` is a file and not a directory that can be replaced."""
    finish_move(out)
    if is_there(out) and not out.is_dir():
        raise OutputError(f"{out}: found a file, expected a directory. Give another place.")


def _others_in(out: Path) -> bool:
    return any(not entry.name.startswith(ATOMIC_PREFIX) for entry in out.iterdir())
