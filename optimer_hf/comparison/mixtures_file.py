"""mixtures.json in a study directory: where `optimer run` trained the data mixtures among its
baselines.

A later `optimer compare` scores them, too, so that no row of a run is left out.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from optimer_hf.files.model import FileModel, VersionedFile
from optimer_hf.files.reference import LocalPath

MIXTURES_FILE = "mixtures.json"


class Attempt(FileModel):
    """One attempt at a data mixture: where its model is, and the shares of the vectors' text that
    it was trained on.
    """

    model: LocalPath
    shares: dict[str, float]


class Mixtures(VersionedFile):
    """mixtures.json: the directory of each trained mixture, by the name of its row, and the
    attempts at a mixture at equal cost, by their number.
    """

    models: dict[str, LocalPath] = {}
    attempts: dict[int, list[Attempt]] = Field(default={}, exclude_if=lambda known: not known)


def read_mixtures(directory: Path) -> dict[str, str]:
    """Return the directories of the mixtures of a study that are still there, by name."""
    models = _read(directory).models.items()
    return {name: str(path) for name, path in models if path.is_dir()}


def record_mixture(directory: Path, name: str, model: Path) -> None:
    """Record that the mixture of a name was trained into the directory `model`."""
    known = {each: Path(path) for each, path in read_mixtures(directory).items()}
    if known.get(name) != model.resolve():
        _change(directory, models=known | {name: model.resolve()})


def read_attempts(directory: Path) -> dict[int, list[Attempt]]:
    """Return the attempts at a mixture of a study, by their number, without those of which a model
    is gone.
    """
    attempts = _read(directory).attempts.items()
    return {n: each for n, each in attempts if all(attempt.model.is_dir() for attempt in each)}


def recorded_shares(directory: Path) -> dict[int, list[dict[str, float]]]:
    """Return the shares of the attempts at a mixture of a study, by their number, whether their
    models are there or not.
    """
    attempts = _read(directory).attempts.items()
    return {n: [attempt.shares for attempt in each] for n, each in attempts}


def record_attempts(directory: Path, attempts: Sequence[Attempt]) -> None:
    """Record the models of as many attempts at a mixture."""
    known, n = _read(directory).attempts, len(attempts)
    if known.get(n) != list(attempts):
        _change(directory, attempts=known | {n: list(attempts)})


def _read(directory: Path) -> Mixtures:
    file = directory / MIXTURES_FILE
    return Mixtures.read(file) if file.exists() else Mixtures()


def _change(directory: Path, **changes: Any) -> None:
    """Write mixtures.json with some fields replaced."""
    _read(directory).model_copy(update=changes).write(directory / MIXTURES_FILE)
