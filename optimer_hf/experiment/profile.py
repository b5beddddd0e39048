"""Profiles of a recipe folder: values that are laid over its study.yaml and its train files."""

from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimer_hf.errors import ConfigError
from optimer_hf.files.layered import Layered
from optimer_hf.files.model import (
    list_mistakes,
    list_unknown_fields,
    parse,
    warn_of_idle_fields,
)
from optimer_hf.files.paths import Place
from optimer_hf.files.reading import read_yaml
from optimer_hf.files.text import did_you_mean, quote
from optimer_hf.scoring.objective import Term
from optimer_hf.study.config import StudyConfig
from optimer_hf.training.config import TrainConfig
from optimer_hf.training.fields import list_field_mistakes

STUDY = "study.yaml"
SECTIONS = ("study", "train")  # the key of what goes over study.yaml, and over every train file

NAMING = ("name", "task", "text", "function")  # fields of a term that can name it


ELSEWHERE = {"base_model", "name", "objective", "scores", "terms", "vectors"}  # of other files


@dataclass(frozen=True)
class Profile:
    """A profile: its file, and by section the values that it lays over others."""

    path: Path
    sections: dict[str, dict[str, Any]]


def is_profile(keys: Set[str]) -> bool:
    """Whether a file with these keys is a profile, perhaps with mistakes."""
    return bool(keys & set(SECTIONS)) and not keys & ELSEWHERE


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


def list_profiled_fields(folder: Path) -> set[tuple[str, str]]:
    """Return the sections and fields that some profile in a recipe folder sets, such as `train` and
    `max_tokens`. Files with mistakes are passed over.
    """
    fields: set[tuple[str, str]] = set()
    for path in folder.glob("*.yaml"):
        with suppress(ConfigError):
            if is_profile(set(read_yaml(path))):
                sections = read_profile(path).sections
                fields |= {(name, field) for name, data in sections.items() for field in data}
    return fields


def lay_over(path: Path, profile: Profile | None, section: str) -> Layered:
    """Read a file, and lay the values in a section of a profile over its own. Where these are a
    list of terms, a mapping in the profile goes by what tables call each.
    """
    data = read_yaml(path)
    if profile is None:
        return Layered(path, data)
    places: dict[tuple[str, ...], tuple[Path, Place]] = {}

    def replace(below: Any, above: Any, at: tuple[str, ...], place: tuple[Any, ...]) -> Any:
        if isinstance(below, list) and isinstance(above, dict):
            labels = [_label_of(item) for item in below]
            _refuse_other_labels(above, labels, profile.path, place)
            return [
                replace(item, above[label], (*at, str(i)), (*place, label))
                if label in above
                else item
                for i, (label, item) in enumerate(zip(labels, below, strict=True))
            ]
        if isinstance(below, dict) and isinstance(above, dict):
            return below | {
                key: replace(below.get(key), value, (*at, str(key)), (*place, key))
                for key, value in above.items()
            }
        places[at] = (profile.path, place)
        return above

    fields = replace(data, profile.sections[section], (), (section,))
    return Layered(path, fields, places)


def _label_of(item: Any) -> str | None:
    """Return what tables call a term that is written in a file; None for any other item."""
    given = item if isinstance(item, dict) else {}
    fields: dict[str, Any] = {key: str(given[key]) for key in NAMING if given.get(key) is not None}
    if "text" in fields:
        fields["text"] = Path(fields["text"])
    return Term.model_construct(None, **fields).label if fields else None


def _refuse_other_labels(
    changes: Mapping[str, Any], labels: Sequence[str | None], path: Path, at: Place
) -> None:
    """Raise ConfigError for values, at a place in a profile, of items that a list lacks."""
    known = [label for label in labels if label is not None]
    if not known:
        message = (
            f"{at[-1]}: found a mapping, but the items of this list have no names. Give a list."
        )
        raise ConfigError(list_mistakes(path, [(at, message)]))
    unknown = [
        ((*at, label), f"nothing is named {label!r}; known: {', '.join(known)}.")
        for label in changes
        if label not in known
    ]
    if unknown:
        raise ConfigError(list_mistakes(path, unknown))


@dataclass(frozen=True)
class RecipeFiles:
    """The files of a recipe folder with the values of a profile, and their configs: of the study,
    and of every vector to train.
    """

    file: Layered
    study: StudyConfig
    train_files: dict[str, Layered]
    trainings: dict[str, TrainConfig]


def read_recipe_files(
    folder: Path, profile: Profile | None, tokens: int | None = None
) -> RecipeFiles:
    """Read a recipe folder; every vector is trained on `tokens` if they are given. Raises
    ConfigError for mistakes in the fields.
    """
    study = lay_over(folder / STUDY, profile, "study")
    vectors, files, trainings = study.data.get("vectors"), {}, {}
    for name, vector in vectors.items() if isinstance(vectors, dict) else ():
        if isinstance(vector, dict) and "train" in vector:
            file = lay_over(folder / str(vector["train"]), profile, "train")
            budget = {"max_tokens": tokens} if tokens else {}
            training = parse(TrainConfig, {**file.data, **budget}, file)
            if mistakes := list_field_mistakes(training):
                raise ConfigError(list_mistakes(file, mistakes))
            files[name], trainings[name] = file, training
    config = parse(StudyConfig, study.data, study)
    if profile is None:  # which may make a field idle that the whole run needs
        for each, origin in ((config, study), *((trainings[n], files[n]) for n in files)):
            warn_of_idle_fields(each, origin)
    return RecipeFiles(study, config, files, trainings)


def check_profile(path: Path) -> RecipeFiles | None:
    """Return the files of the recipe folder that a profile lies in, with its values; None without
    a study.yaml beside it. Raises ConfigError for mistakes in the fields.
    """
    profile = read_profile(path)
    if (path.parent / STUDY).exists():
        return read_recipe_files(path.parent, profile)
    unknown = [
        list_unknown_fields(cls, data, Layered(path, data, {(): (path, (section,))}))
        for section, cls in (("study", StudyConfig), ("train", TrainConfig))
        for data in (profile.sections[section],)
    ]
    if any(unknown):
        raise ConfigError("\n".join(filter(None, unknown)))
    return None
