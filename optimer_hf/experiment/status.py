"""Say how far the work in a directory is: a run, runs under several seeds, a study, or a training.

Only records are read, without a lock, so that it may be asked while another process works there.
"""

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from optimer_hf.comparison.sealed_file import SealedLog
from optimer_hf.errors import StudyError
from optimer_hf.experiment.marks import DONE_FILE, read_claim
from optimer_hf.files.locks import lock_of_place
from optimer_hf.files.text import count, markdown_table, show_seconds
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.directory import Study, find_study
from optimer_hf.study.trials import (
    DECISIONS_FILE,
    STUDY_FILE,
    TRIALS_FILE,
    DecisionLog,
    TrialLog,
)
from optimer_hf.training.checkpoints import CHECKPOINTS, STARTED
from optimer_hf.vectors.training_record import TRAINING_FILE, TrainingRecord

LOCKS = Path("/proc/locks")  # of Linux; elsewhere nobody can be asked who holds a lock


@dataclass(frozen=True)
class Progress:
    """One part of the work in a directory: what is done of it, in words, and whether it is all."""

    part: str
    state: str
    is_done: bool


@dataclass(frozen=True)
class Status:
    """What a directory holds and how far that is.

    `process` is the id of the process that works there (None: nobody, or not known), and
    `seconds_since` the time since a record there last changed.
    """

    directory: str
    kind: str
    parts: list[Progress]
    process: int | None
    seconds_since: float | None

    @property
    def is_done(self) -> bool:
        """Whether every part is done."""
        return all(part.is_done for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        """Return the status as JSON values."""
        return asdict(self) | {"is_done": self.is_done}


def status_of(directory: Path) -> Status:
    """Return how far the work in a directory is.

    Raises StudyError for a directory in which none of our commands has worked, and an OptimerError
    for records that are damaged.
    """
    claim = read_claim(directory)
    if claim is not None and claim.seeds:
        kind, parts = f"runs of {claim}", [*_parts_of_seeds(directory)]
    elif claim is not None:
        kind, parts = f"run of {claim}", [*_parts_of_run(directory)]
    elif (study := find_study(directory)) is not None:
        kind, parts = "study", [*_parts_of_study(study)]
    elif (directory / TRAINING_FILE).exists() or (directory / STARTED).exists():
        kind, parts = "training", [_progress_of_training(directory, "training")]
    else:
        raise StudyError(
            f"{directory}: holds no run, study or training. Give a directory that `optimer run`, "
            "`search` or `train` writes to."
        )
    return Status(str(directory), kind, parts, _holder_of(directory), _seconds_since(directory))


def status_to_text(status: Status) -> str:
    """Return a status as Markdown: what it is, a row for each part, and who works there."""
    still = [part.part for part in status.parts if not part.is_done]
    state = f"still to do: {', '.join(still)}" if still else "finished"
    rows = [[part.part, part.state] for part in status.parts]
    lines = [f"{status.directory}: {status.kind}, {state}", "", markdown_table(["part", ""], rows)]
    if status.process is not None:
        lines.append(f"process {status.process} is working in it")
    if status.seconds_since is not None:
        lines.append(f"last change: {show_seconds(status.seconds_since)} ago")
    return "\n".join(lines)


# -- parts -----------------------------------------------------------------------------------------


def _parts_of_seeds(directory: Path) -> Iterator[Progress]:
    for seed in sorted(directory.glob("seed-*")):
        parts = [*_parts_of_run(seed)]
        open_parts = [part for part in parts if not part.is_done]
        state = f"{open_parts[0].part}: {open_parts[0].state}" if open_parts else "finished"
        yield Progress(seed.name, state, not open_parts)


def _parts_of_run(directory: Path) -> Iterator[Progress]:
    for vector in sorted((directory / "vectors").glob("[!.]*")):
        yield _progress_of_training(vector, f"vector {vector.name}")
    for mixture in sorted((directory / "mixtures").glob("[!.]*")):
        yield _progress_of_training(mixture, f"data mixture {mixture.name}")
    study = directory / "study"
    has_study = (study / STUDY_FILE).exists()
    yield from _parts_of_study(study) if has_study else [Progress("search", "not begun", False)]
    is_done = (directory / DONE_FILE).exists()
    yield Progress("results and model", "written" if is_done else "not written yet", is_done)


def _progress_of_training(directory: Path, part: str) -> Progress:
    if (directory / TRAINING_FILE).exists():
        tokens = TrainingRecord.read(directory / TRAINING_FILE).training.n_tokens
        return Progress(part, f"trained on {count(tokens, 'token')}", True)
    steps = [
        int(path.name.rpartition("-")[2])
        for path in (directory / CHECKPOINTS).glob("checkpoint-*")
        if path.name.rpartition("-")[2].isdecimal()
    ]
    reached = (
        f"begun, checkpoint of step {max(steps):,}" if steps else "text packed, no checkpoint yet"
    )
    return Progress(part, reached, False)


def _parts_of_study(directory: Path) -> Iterator[Progress]:
    config = StudyConfig.read_record(directory / STUDY_FILE)
    log = TrialLog(directory / TRIALS_FILE, repair=False)
    study = Study(directory, config, log, DecisionLog(directory / DECISIONS_FILE, repair=False))
    yield _progress_of_search(study)
    decision = study.decision
    if decision is not None and decision.rescore:
        n_open, n = len(study.trials_to_rescore()), len(decision.rescore)
        yield Progress("scoring the best again", f"{n - n_open} of {count(n, 'merge')}", not n_open)
    if config.test is not None:
        n_rows = len(SealedLog(directory, config, repair=False).scored)
        state = f"{count(n_rows, 'row')} scored" if n_rows else "not opened yet"
        yield Progress("sealed test", state, n_rows > 0)


def _progress_of_search(study: Study) -> Progress:
    trials, n_trials = study.trials, study.config.search.n_trials
    state = f"{len(trials):,} of {count(n_trials, 'trial')}"
    if n_crashed := sum(trial.status == "crashed" for trial in trials):
        state += f", {n_crashed:,} crashed"
    if study.has_best_trial:
        state += f"; the best is trial {study.best_trial.number}"
    return Progress("search", state, study.is_searched)


# -- who works there -------------------------------------------------------------------------------


def _holder_of(directory: Path) -> int | None:
    """Return the process that holds a lock of a directory; None if nobody does, or if the system
    does not say. The locks themselves are not touched: a command that starts now would be refused.

    A training locks its directory from beside it, or from inside where it must. An inode has its
    number on one file system only, so the device is compared, too. Some file systems (btrfs,
    overlay) show files another device than the kernel names: nobody is found there.
    """
    place, held = Path(os.path.realpath(directory)), set()
    for file in (place / ".lock", lock_of_place(place), lock_of_place(place, place)):
        with contextlib.suppress(OSError):
            lock = file.stat()
            device = f"{os.major(lock.st_dev):02x}:{os.minor(lock.st_dev):02x}"
            held.add(f"{device}:{lock.st_ino}")
    with contextlib.suppress(OSError, ValueError):
        for line in LOCKS.read_text(encoding="ascii").splitlines():
            fields = line.split()
            if "->" not in fields and fields[5] in held:
                return int(fields[4])
    return None


def _seconds_since(directory: Path) -> float | None:
    """Return the seconds since a record in a directory last changed."""
    files = [
        *directory.glob("*.json*"),
        *directory.glob("*/*.json*"),
        *directory.glob("*/*/*.json"),
    ]
    times = []
    for file in files:
        with contextlib.suppress(OSError):
            times.append(file.stat().st_mtime)
    return max(time.time() - max(times), 0.0) if times else None
