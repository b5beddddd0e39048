"""mixtures.json in a study directory: where `optimer run` trained the data mixtures among its
baselines.

A later `optimer compare` scores them, too, so that no row of a run is left out.
"""

from pathlib import Path

from optimer_hf.files.model import VersionedFile
from optimer_hf.files.reference import LocalPath

MIXTURES_FILE = "mixtures.json"


class Mixtures(VersionedFile):
    """mixtures.json: the directory of each trained mixture, by the name of its row."""

    models: dict[str, LocalPath]


def read_mixtures(directory: Path) -> dict[str, str]:
    """Return the directories of the mixtures of a study that are still there, by name."""
    file = directory / MIXTURES_FILE
    if not file.exists():
        return {}
    return {name: str(path) for name, path in Mixtures.read(file).models.items() if path.is_dir()}


def record_mixture(directory: Path, name: str, model: Path) -> None:
    """Record that the mixture of a name was trained into the directory `model`."""
    known = {name: Path(path) for name, path in read_mixtures(directory).items()}
    if known.get(name) != model.resolve():
        Mixtures(models=known | {name: model.resolve()}).write(directory / MIXTURES_FILE)
