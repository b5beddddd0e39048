"""Disk errors, in plain words."""

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

from optimer_hf.errors import OutputError
from optimer_hf.files.reference import is_there

DISK_ERRORS = {  # EXDEV: some file systems (overlayfs) do not move a directory
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS),
    *(errno.EACCES, errno.EPERM, errno.EXDEV, errno.ENAMETOOLONG, errno.ESTALE),
}
SMALLEST_FREE_SPACE = 4 * 2**20  # bytes; less than this is a full disk


@contextlib.contextmanager
def naming_disk_errors(out: Path, kept: str) -> Iterator[None]:
    """Turn disk errors into an OutputError; `kept` says what is left on the disk.

    Libraries report a full disk with many types of error, so any error counts while it is full.
    """
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        reason = None
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            reason = error.strerror
        if reason is None and _is_full(out):
            reason = "the disk is full"
        if reason is None:
            raise
        raise OutputError(
            f"{out}: writing failed ({reason}). {kept}; free space or choose another place."
        ) from error


def _is_full(path: Path) -> bool:
    existing = next((folder for folder in (path, *path.parents) if is_there(folder)), Path.cwd())
    return shutil.disk_usage(existing).free < SMALLEST_FREE_SPACE
