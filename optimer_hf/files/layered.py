"""The fields of a file with values of others laid over them, and where each value stands."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optimer_hf.files.paths import Place


@dataclass(frozen=True)
class Layered:
    """The fields of the file `path`, some of them replaced by values of other files.

    `places` maps the place of each replaced value in `data`, as texts, to its file and place there.
    """

    path: Path
    data: Mapping[str, Any]
    places: Mapping[tuple[str, ...], tuple[Path, Place]] = field(default_factory=dict)

    def __str__(self) -> str:
        return str(self.path)

    def locate(self, where: Place) -> tuple[Path, Place]:
        """Return the file that sets a field, and the place of the field in that file."""
        for length in range(len(where), -1, -1):
            found = self.places.get(tuple(map(str, where[:length])))
            if found is not None:
                path, place = found
                return path, (*place, *where[length:])
        return self.path, where


Origin = Path | Layered  # what fields were read from


def file_of(origin: Origin) -> Path:
    """Return the file whose folder the paths in some fields are relative to."""
    return origin.path if isinstance(origin, Layered) else origin
