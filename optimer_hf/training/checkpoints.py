"""The checkpoints of a run -> the newest one that is as it was written.

The Trainer loads what it finds and fails at a file that a power cut, a full disk or a stray copy
has damaged. So each checkpoint is sealed: synced to the disk, then told apart by a digest of every
file (of one over 2 GiB, of samples of it). One without its seal was not finished.
"""

import hashlib
import json
import logging
import re
import shutil
from pathlib import Path

from optimer_hf.files.digest import fingerprint
from optimer_hf.files.staging import sync_all, write_text

logger = logging.getLogger(__name__)


STARTED, BLOCKS, CHECKPOINTS = "started.json", "blocks.npy", "checkpoints"  # of a run that goes on
SPENT_FILE = "spent.json"

SEAL = "sealed.json"
LARGEST_READ = 2**31  # bytes; a larger file is read in samples
STATE = "trainer_state.json"


def seal(folder: Path) -> None:
    """Write down the digest of every file of a checkpoint, once they are all on the disk."""
    (folder / SEAL).unlink(missing_ok=True)
    sync_all(folder)
    write_text(folder / SEAL, json.dumps(_digests_of(folder)))


def newest_whole(folder: Path) -> Path | None:
    """Return the newest checkpoint in a folder that is as it was sealed; changes nothing."""
    return next((path for path in _checkpoints_in(folder) if not _damage(path)), None)


def drop_damaged(folder: Path) -> None:
    """Remove the checkpoints that are newer than the newest whole one: the Trainer keeps the
    highest numbers.
    """
    for path in _checkpoints_in(folder):
        damage = _damage(path)
        if not damage:
            return
        logger.warning("%s: %s; it is dropped", path, damage)
        shutil.rmtree(path, ignore_errors=True)


def _checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, the newest first; other names are somebody else's."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir()]
    numbered = [path for path in found if re.fullmatch(r"checkpoint-[0-9]{1,18}", path.name)]
    return sorted(numbered, key=lambda path: -int(path.name.rpartition("-")[2]))


def _damage(folder: Path) -> str:
    """Return what is wrong with a checkpoint, nothing where it is whole."""
    try:
        sealed = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        found = _digests_of(folder)
    except (OSError, ValueError, RecursionError):
        return "was not finished"
    if not isinstance(sealed, dict) or STATE not in sealed:
        return "was not finished"
    changed = sorted(name for name, digest in sealed.items() if found.get(name) != digest)
    return f"{changed[0]} is not as it was written" if changed else ""


def _digests_of(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SEAL]
    return {path.relative_to(folder).as_posix(): _digest_of(path) for path in files}


def _digest_of(file: Path) -> str:
    if file.stat().st_size > LARGEST_READ:
        return fingerprint(file)
    with open(file, "rb") as opened:  # not sha256_file, which believes a time of change
        return hashlib.file_digest(opened, "sha256").hexdigest()
