"""Profiles of a recipe folder: values that are laid over its study.yaml and its train files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimer_hf.errors import ConfigError
from optimer_hf.files.layered import Layered
from optimer_hf.files.model import list_mistakes
from optimer_hf.files.paths import Place
from optimer_hf.files.reading import read_yaml
from optimer_hf.files.text import did_you_mean, quote

SECTIONS = ("study", "train")  # the key of what goes over study.yaml, and over every train file


@dataclass(frozen=True)
class Profile:
    """A profile: its file, and by section the values that it lays over others."""

    path: Path
    sections: dict[str, dict[str, Any]]


def read_profile(path: Path) -> Profile:
    """Read a profile. Raises ConfigError for other keys, and for sections that are no mappings."""
    data, mistakes = read_yaml(path), []
    for key, value in data.items():
        if key not in ("format_version", *SECTIONS):
            hint = did_you_mean(str(key), list(SECTIONS))
            mistakes.append(((key,), f"unknown field {key!r}.{hint}"))
        elif key in SECTIONS and not isinstance(value, dict):
            found = "nothing" if value is None else quote(value)
            message = f"{key}: found {found}, expected a mapping of fields to values."
            mistakes.append(((key,), message))
    if mistakes:
        raise ConfigError(list_mistakes(path, mistakes))
    return Profile(path, {key: data.get(key, {}) for key in SECTIONS})


def lay_over(path: Path, profile: Profile | None, section: str) -> Layered:
    """Read a file, and lay the values in a section of a profile over its own."""
    data = read_yaml(path)
    if profile is None:
        return Layered(path, data)
    places: dict[tuple[str, ...], Place] = {}

    def replace(below: Any, above: Any, at: tuple[str, ...], place: tuple[Any, ...]) -> Any:
        if isinstance(below, list) and isinstance(above, dict):
            names = [item.get("name") if isinstance(item, dict) else None for item in below]
            for name in above:
                if name not in names:
                    known = ", ".join(map(str, names))
                    message = f"nothing is named {name!r}; known: {known}."
                    raise ConfigError(list_mistakes(profile.path, [((*place, name), message)]))
            return [
                replace(item, above[name], (*at, str(i)), (*place, name)) if name in above else item
                for i, (name, item) in enumerate(zip(names, below, strict=True))
            ]
        if isinstance(below, dict) and isinstance(above, dict):
            return below | {
                key: replace(below.get(key), value, (*at, str(key)), (*place, key))
                for key, value in above.items()
            }
        places[at] = place
        return above

    fields = replace(data, profile.sections[section], (), (section,))
    return Layered(path, fields, profile.path, places)
