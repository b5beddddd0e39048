"""Strict file models: read YAML or JSON into a record, or raise an error that names the field."""

import contextlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from optimer_hf.errors import ConfigError
from optimer_hf.files.layered import Layered, Origin, file_of
from optimer_hf.files.paths import Place, strings_in
from optimer_hf.files.reading import line_of
from optimer_hf.files.reading import read_yaml as read_yaml
from optimer_hf.files.reference import AnyPath, function_in_file, is_there, match_pattern
from optimer_hf.files.staging import write_text
from optimer_hf.files.text import did_you_mean, field_path, prefix_field, quote

logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=BaseModel)

Mistake = tuple[Place, str]  # a place, and what is wrong there


class FieldError(ValueError):
    """Fields of a model contradict each other; `mistakes` names the places and what is wrong."""

    def __init__(self, mistakes: Sequence[Mistake]) -> None:
        super().__init__("; ".join(prefix_field(*each) for each in mistakes))
        self.mistakes = mistakes


class FileModel(BaseModel):
    """Part of one of our files: it is frozen and refuses unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )

    def mistakes(self) -> Iterator[Mistake]:
        """Yield contradictions between valid fields, which are all reported at once."""
        yield from ()

    def __repr_args__(self) -> Iterator[tuple[str | None, Any]]:
        """Yield the fields that differ from their defaults, which is what a reader asks for."""
        fields = type(self).model_fields
        for name, value in super().__repr_args__():
            if name not in fields or value != fields[name].get_default(call_default_factory=True):
                yield name, value

    def idle_fields(self) -> Iterator[Mistake]:
        """Yield fields that do nothing beside others, and what to do about them."""
        yield from ()

    @model_validator(mode="after")
    def _refuse_mistakes(self) -> Self:
        if mistakes := list(self.mistakes()):
            raise FieldError(mistakes)
        return self


class VersionedFile(FileModel):
    """The top level of one of our files."""

    format_version: Literal[1] = Field(default=1, examples=[1])
    """Version of the file format."""

    @classmethod
    def read(cls, path: AnyPath) -> Self:
        """Read and validate a YAML or JSON file.

        Raises a ConfigError that lists every mistake with its line and field, the value found and
        the value expected.
        """
        return parse(cls, read_yaml(Path(path)), Path(path))

    def write(self, path: AnyPath) -> None:
        """Write as JSON (which is YAML too), atomically, with paths relative to where it lies."""
        data = self.model_dump(mode="json", context={"folder": Path(path).resolve().parent})
        write_text(Path(path), json.dumps(data, indent=2, ensure_ascii=False))


class WrittenFile(VersionedFile):
    """A file that people write: `read` names the fields in it that do nothing."""

    @classmethod
    def read(cls, path: AnyPath) -> Self:
        config = super().read(path)
        warn_of_idle_fields(config, Path(path))
        return config


# -- reading ---------------------------------------------------------------------------------------


def parse(cls: type[ModelT], data: Mapping[str, Any], origin: Origin) -> ModelT:
    """Validate `data`, read from `origin`, as a `cls`.

    Raises one ConfigError that names every mistake.
    """
    try:
        return cls.model_validate(data, context={"folder": file_of(origin).resolve().parent})
    except ValidationError as error:
        mistakes = [each for mistake in error.errors() for each in _explain(cls, mistake)]
        raise ConfigError(list_mistakes(origin, mistakes)) from None


def warn_of_idle_fields(config: FileModel, origin: Origin) -> None:
    """Log each field of a config, read from `origin`, that does nothing, once in a process: such a
    file is sound, and a study or a training that began with it goes on.
    """
    for where, message in _idle_in(config):
        _warn_once(list_mistakes(origin, [(where, f"{prefix_field(where, message)}.")]))


@cache
def _warn_once(line: str) -> None:
    logger.warning("%s", line)


def _idle_in(value: Any, at: Place = ()) -> Iterator[Mistake]:
    """Yield the `idle_fields` of every model in a value."""
    inside: Mapping[Any, Any] = {}
    if isinstance(value, FileModel):
        yield from (((*at, *where), message) for where, message in value.idle_fields())
        inside = dict(value)
    elif isinstance(value, Mapping):
        inside = value
    elif isinstance(value, list | tuple):
        inside = dict(enumerate(value))
    for key, each in inside.items():
        yield from _idle_in(each, (*at, key))


def list_unknown_fields(cls: type[BaseModel], data: Mapping[str, Any], origin: Origin) -> str:
    """Return one line for each field of data, which may lack some, that a `cls` does not have."""
    try:
        cls.model_validate(data, context={"folder": file_of(origin).resolve().parent})
    except ValidationError as error:
        unknown = [each for each in error.errors() if each["type"] == "extra_forbidden"]
        return list_mistakes(origin, [line for each in unknown for line in _explain(cls, each)])
    return ""


def list_mistakes(origin: Origin | str, mistakes: Iterable[Mistake]) -> str:
    """Return one line per mistake: the file that sets the field and its line (or another origin),
    and what is wrong.
    """
    return "\n".join(f"{_locate(origin, where)}: {message}" for where, message in mistakes)


def _locate(origin: Origin | str, where: Place) -> str:
    """Return where a field stands: the file, with its line if it is YAML, or another origin."""
    if isinstance(origin, Layered):
        origin, where = origin.locate(where)
    return f"{origin}{_at_line(origin, where)}"


def list_absent_files(origin: Origin, config: Any) -> str:
    """Return the missing local files that a config, read from `origin`, names.

    The lines look like those of `list_mistakes`; the text is empty if no file is missing.
    """
    return list_mistakes(
        origin,
        (
            (at, f"{field_path(at)}: {text}: no such file or directory.")
            for at, text in strings_in(config)
            if Path(text).is_absolute() and not _exists(text)
        ),
    )


def list_absent_files_of_data(cls: type[BaseModel], data: Mapping[str, Any], path: Path) -> str:
    """Return `list_absent_files` of data read from `path`, even if it is not a valid `cls`."""
    noted: dict[tuple[str, str], str] = {}
    with contextlib.suppress(ValidationError):
        cls.model_validate(data, context={"folder": path.resolve().parent, "noted": noted})
    absent = []
    for at, text in strings_in(data):
        names = ((str(part), each) for part in at for each in (text, str(Path(text))))
        absolute = next((noted[name] for name in names if name in noted), text)
        if Path(absolute).is_absolute() and not _exists(absolute):
            absent.append((at, f"{field_path(at)}: {absolute}: no such file or directory."))
    return list_mistakes(path, absent)


def _exists(text: str) -> bool:
    """Whether a path exists, or is a pattern that matches a file; of FILE.py:NAME, the file."""
    if (function := function_in_file(text)) is not None:
        return is_there(function[0])
    return is_there(Path(text)) or bool(match_pattern(Path(text)))


def refuse_absent_files(configs: Mapping[Path, Any]) -> None:
    """Raise a ConfigError that lists the missing files named by `configs` (path -> config)."""
    lines = [text for path, config in configs.items() if (text := list_absent_files(path, config))]
    if lines:
        raise ConfigError("\n".join(lines))


def _at_line(path: Path | str, location: Sequence[str | int]) -> str:
    """Return `:LINE` of a field in a YAML file, or of its innermost parent that exists."""
    if isinstance(path, str) or path.suffix not in (".yaml", ".yml") or not path.is_file():
        return ""
    line = line_of(path, location)
    return f":{line}" if line else ""


def _explain(cls: type[BaseModel], mistake: Mapping[str, Any]) -> Iterator[Mistake]:
    """Yield the mistakes in one pydantic error: the field, what was found, what was expected."""
    where = tuple(mistake["loc"])
    field, message = field_path(where), mistake["msg"].rstrip(".")
    cause = mistake.get("ctx", {}).get("error")
    if isinstance(cause, FieldError):
        for inner, text in cause.mistakes:
            yield (*where, *inner), f"{prefix_field((*where, *inner), text)}."
    elif mistake["type"] == "extra_forbidden":
        hint = did_you_mean(str(where[-1]), _fields_at(cls, where[:-1]))
        yield where, f"unknown field {field!r}.{hint}"
    elif mistake["type"] == "missing":
        yield where, f"field {field!r} is missing."
    elif where and where[-1] == "[key]" and not isinstance(mistake["input"], str):
        place, found = where[:-2], quote(mistake["input"])
        message = f"found the name {found}, which is no text in YAML. Put it in quotes, as in 'no'."
        yield place, f"{field_path(place)}: {message}"
    else:
        hint = ""
        if mistake["type"] == "literal_error" and isinstance(mistake["input"], str):
            close = did_you_mean(mistake["input"], re.findall("'(.+?)'", message))
            hint = close if "mean" in close else ""
        message = message.removeprefix("Value error, ")
        if mistake["type"] in ("model_type", "model_attributes_type", "dict_type"):
            message = "Expected a mapping of fields to values"
        yield where, f"{field}: found {quote(mistake['input'])}. {message}.{hint}"


def _fields_at(cls: type[BaseModel], where: Sequence[str | int]) -> list[str]:
    """Return the names of the fields that are allowed at a place in a file."""
    models: list[type[BaseModel]] = [cls]
    for part in where:
        inner = [
            model_inside
            for model in models
            if part in model.model_fields
            for model_inside in _models_in(model.model_fields[str(part)].annotation)
        ]
        models = inner or models  # a key of a mapping or an item of a list
    return list(dict.fromkeys(name for model in models for name in model.model_fields))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for arg in getattr(annotation, "__args__", ()) for model in _models_in(arg)]
