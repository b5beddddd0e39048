"""Find the newest undamaged checkpoint of a run.

The Trainer loads whatever checkpoint it finds, and fails if a power cut, a full disk or a stray
copy has damaged a file. So each checkpoint is sealed: it is synced to disk, and then the digest of
every file is written beside it (files over 2 GiB are sampled). A checkpoint without a seal is
unfinished.
"""

import hashlib
import logging
import re
import shutil
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from optimer_hf.errors import ConfigError, OutputError
from optimer_hf.files.digest import fingerprint
from optimer_hf.files.model import VersionedFile
from optimer_hf.files.staging import sync_all
from optimer_hf.progress import Cost
from optimer_hf.vectors.training_record import Part, Speed

logger = logging.getLogger(__name__)


STARTED, BLOCKS, CHECKPOINTS = "started.json", "blocks.npy", "checkpoints"  # of an unfinished run
SPENT_FILE = "spent.json"

SEAL = "sealed.json"
LARGEST_READ = 2**31  # bytes; a larger file is read in samples
STATE = "trainer_state.json"


class StartedRecord(VersionedFile):
    """started.json: the settings of a run that has begun (`training`), the digests of what it
    reads, and what was packed for it, in segments of at most `context` tokens.
    """

    config_sha256: str
    training: dict[str, Any] = {}
    inputs: dict[str, str] = {}
    parts: list[Part] = []
    blocks_sha256: str | None = None  # earlier versions did not have it
    context: int | None = Field(default=None, exclude_if=lambda context: context is None)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the run."""
        return self.training


class CheckpointSeal(VersionedFile):
    """sealed.json of a checkpoint: the digest of each of its other files, by its path in there."""

    files: dict[str, str]

    @model_validator(mode="before")
    @classmethod
    def _read_0_1_0(cls, data: Any) -> Any:
        """Read the digests of version 0.1.0, which wrote nothing around them."""
        return {"files": data} if isinstance(data, dict) and STATE in data else data


class SpentRecord(VersionedFile):
    """spent.json of a checkpoint: the time of the whole run so far, in seconds by the clock and of
    processors.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    speed: Speed | None = None

    @classmethod
    def of(cls, cost: Cost, speed: Speed) -> "SpentRecord":
        """Return the record of a cost, and of the choices that decide the speed."""
        return cls(seconds=cost.seconds, cpu_seconds=cost.cpu_seconds, speed=speed)

    @property
    def cost(self) -> Cost:
        """The recorded cost."""
        return Cost(self.seconds, self.cpu_seconds)


def read_started(out: Path) -> StartedRecord | None:
    """Return the record of a run that began in `out` and has not ended, or None."""
    file = out / STARTED
    return StartedRecord.read(file) if file.exists() else None


def seal(folder: Path) -> None:
    """Sync a checkpoint to disk and write the digest of each of its files into its seal."""
    (folder / SEAL).unlink(missing_ok=True)
    sync_all(folder)
    CheckpointSeal(files=_digests_of(folder)).write(folder / SEAL)


def read_spent(checkpoint: Path | None) -> SpentRecord:
    """Return what a run had spent, and how it computed its steps, up to a checkpoint; nothing where
    there is none.
    """
    return SpentRecord() if checkpoint is None else SpentRecord.read(checkpoint / SPENT_FILE)


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest undamaged checkpoint in a folder, or None. Changes nothing."""
    return next((path for path in _checkpoints_in(folder) if not _damage(path)), None)


def drop_damaged(folder: Path) -> None:
    """Remove all checkpoints newer than the newest undamaged one.

    Otherwise the Trainer, which keeps the checkpoints with the highest numbers, would keep them.
    """
    for path in _checkpoints_in(folder):
        damage = _damage(path)
        if not damage:
            return
        logger.warning("%s: %s; removing it", path, damage)
        shutil.rmtree(path, ignore_errors=True)


def refuse_other_processes(folder: Path, sharding: str | None, n_processes: int) -> None:
    """Raise OutputError when a run cannot resume from a folder of checkpoints, because they were
    written by one that was sharded in another way, or by more or fewer processes: it would skip
    other blocks than those it has seen, and follow another schedule.
    """
    for path in _checkpoints_in(folder)[:1]:
        written, now = _processes_of(path), (sharding, n_processes)
        if written != now:
            was, is_now = (
                f"{n} process{'es' * (n > 1)}, {f'sharded with {kind}' if kind else 'not sharded'}"
                for kind, n in (written, now)
            )
            raise OutputError(
                f"{path}: was written by a run of {was}, and this is one of {is_now}. Start it as "
                f"before, or remove {folder} to start again."
            )


def _processes_of(checkpoint: Path) -> tuple[str | None, int]:
    """Return what a checkpoint was sharded with ("FSDP", "DeepSpeed" or None), and how many
    processes wrote it: each of several has a state of its random numbers.
    """
    n_processes = max(1, len([*checkpoint.glob("rng_state_*.pth")]))
    if any(path.is_dir() for path in checkpoint.glob("pytorch_model_fsdp_*")):
        return "FSDP", n_processes
    return "DeepSpeed" if any(checkpoint.glob("global_step*")) else None, n_processes


def _checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder, newest first; files with other names are not ours."""
    folders = [path for path in folder.glob("checkpoint-*") if path.is_dir()]
    numbered = [path for path in folders if re.fullmatch(r"checkpoint-[0-9]{1,18}", path.name)]
    return sorted(numbered, key=lambda path: -int(path.name.rpartition("-")[2]))


def _damage(folder: Path) -> str:
    """Return what is wrong with a checkpoint, or an empty string."""
    try:
        sealed = CheckpointSeal.read(folder / SEAL).files
        digests = _digests_of(folder)
    except (OSError, ConfigError):
        return "was not finished"
    if STATE not in sealed:
        return "was not finished"
    changed = sorted(name for name, digest in sealed.items() if digests.get(name) != digest)
    return f"{changed[0]} has changed since it was written" if changed else ""


def _digests_of(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != SEAL]
    return {path.relative_to(folder).as_posix(): _digest_of(path) for path in files}


def _digest_of(file: Path) -> str:
    if file.stat().st_size > LARGEST_READ:
        return fingerprint(file)
    with open(file, "rb") as opened:  # sha256_file would trust the modification time
        return hashlib.file_digest(opened, "sha256").hexdigest()
