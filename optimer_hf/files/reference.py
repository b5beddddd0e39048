"""References to models, vectors and files: local paths, Hub repositories and packages.

Local ones are absolute in memory and relative to the file that names them on disk, so that a folder
can be moved: the types of this module read and write them so.
"""

import glob
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    PlainSerializer,
    SerializationInfo,
    ValidationInfo,
)

COMMIT = re.compile(r"[0-9a-f]{40}")  # a full git hash


# -- references ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """The name of a model or vector in a file.

    It is a local path, `org/name@rev`, `hf://org/name@rev` or `pypi:package`.
    """

    text: str

    @property
    def path(self) -> Path | None:
        """The local path, or None if the reference is to the Hub or a package."""
        path = expand_home(Path(self.text))
        return path if path.is_absolute() else None

    @property
    def package(self) -> str | None:
        """The PyPI package that contains the model as a GGUF file, or None."""
        return self.text.removeprefix("pypi:") if self.text.startswith("pypi:") else None

    @property
    def repo(self) -> tuple[str, str | None]:
        """The Hub repository id and the revision (None: the default branch)."""
        repo_id, _, revision = self.text.removeprefix("hf://").partition("@")
        return repo_id, revision or None


def is_pinned(reference: str) -> bool:
    """Whether a reference names the same bytes for everybody.

    That holds for a Hub repository at a commit, and for a package, whose weights are in the lock.
    """
    ref = Reference(reference)
    if ref.path is not None:
        return False
    return ref.package is not None or COMMIT.fullmatch(ref.repo[1] or "") is not None


def pin(reference: str, commit: str | None) -> str:
    """Return a Hub reference with its commit, or unchanged if no commit is known."""
    return reference if commit is None else f"{reference}@{commit}"


def name_of_reference(reference: str) -> str:
    """Return a reference for people: the last part of a local path, or a Hub id with a
    short commit.
    """
    path = Reference(reference).path
    if path is not None:
        return path.name
    return re.sub(rf"@({COMMIT.pattern})$", lambda match: f"@{match[1][:8]}", reference)


def absolute_reference(text: str, folder: Path) -> str:
    """Make a local reference absolute, relative to `folder`; keep Hub ids, `hf://` and `pypi:`.

    `a/b` is a Hub id unless it exists as a local path. A reference is a local path if it starts
    with `.`, `/` or `~`, or if the number of its slashes is not one.
    """
    if text.startswith(("hf://", "pypi:")):
        return text
    name = text.partition("@")[0]  # a revision may contain slashes: org/name@refs/pr/1
    looks_local = text.startswith((".", "/", "~")) or name.count("/") != 1
    is_local = looks_local or is_there(folder / expand_home(Path(text)))
    return str(absolute_path(Path(text), folder)) if is_local else text


def absolute_path(path: Path, folder: Path) -> Path:
    """Return a path as seen from a folder, with all links followed but one to a file whose name has
    no ending, as in the cache of the Hub: the link's own name says what is in it.
    """
    whole = folder / expand_home(path)
    if os.path.islink(whole) and not os.path.isdir(whole):  # noqa: PTH112, PTH114 - never raise
        target = Path(os.path.realpath(whole))
        return target if target.suffix else whole.parent.resolve() / whole.name
    return whole.resolve()


def relative_reference(text: str, folder: Path) -> str:
    """Return an absolute path as `absolute_reference` reads it from `folder`; leave others as they
    are.
    """
    if not Path(text).is_absolute():
        return text
    path = os.path.relpath(text, folder)
    return path if path.startswith(".") else f"./{path}"


AnyPath = str | os.PathLike[str]  # a path as a caller in Python gives it


def reference_from_here(given: AnyPath) -> str:
    """Return what a caller in Python names as a reference: paths are seen from the working
    directory, and a path object never is a Hub id.
    """
    if isinstance(given, os.PathLike):
        return str(absolute_path(Path(given), Path.cwd()))
    return absolute_reference(given, Path.cwd())


def expand_home(path: Path) -> Path:
    """Expand `~` in a path; leave the path as it is if no user has that name."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def is_there(path: Path) -> bool:
    """Whether a path exists; an impossible path, such as a name that is too long, does not."""
    try:
        return path.exists()
    except (OSError, ValueError):  # ValueError: the path contains a null byte
        return False


def match_pattern(pattern: Path) -> list[Path] | None:
    """Return the paths that match a pattern with wildcards, sorted; None if it has none. A folder
    that is there is called as it is called, also `data [1]`.
    """
    root = next((folder for folder in pattern.parents if is_there(folder)), Path())
    rest = str(pattern.relative_to(root))
    if not glob.has_magic(rest):
        return None
    return sorted(root / name for name in glob.glob(rest, root_dir=root, recursive=True))  # noqa: PTH207


def _folder(info: ValidationInfo) -> Path:
    return Path((info.context or {}).get("folder", "."))


def _relative_to_folder(value: Any, info: SerializationInfo) -> str:
    """Return a path or reference as it stands in a file of the folder that is written to."""
    folder = (info.context or {}).get("folder")
    return str(value) if folder is None else relative_reference(str(value), folder)


WRITTEN_RELATIVE = PlainSerializer(_relative_to_folder, when_used="json-unless-none")


def _note_path(info: ValidationInfo, text: str, absolute: str) -> str:
    """Return the absolute path of a field, and note it for `list_absent_files_of_data`."""
    (info.context or {}).get("noted", {})[str(info.field_name), text] = absolute
    return absolute


def _text_of_path(value: Any, info: ValidationInfo) -> Any:
    """Turn a path object into absolute text, since it is no Hub id; keep any other value."""
    if not isinstance(value, os.PathLike):
        return value
    return str(absolute_path(Path(value), _folder(info)))


ReferenceText = Annotated[
    str,
    BeforeValidator(_text_of_path),
    AfterValidator(
        lambda text, info: _note_path(info, text, absolute_reference(text, _folder(info)))
    ),
    WRITTEN_RELATIVE,
]


def _vector_or_reference(text: str | None, info: ValidationInfo) -> str | None:
    """Keep the name of a vector in the same file, make any other reference absolute.

    `base` becomes None.
    """
    vectors = info.data.get("vectors")  # None if `vectors` itself is not valid
    if text is None or text == "base":
        return None
    if vectors is None or text in vectors:
        return text
    is_word = not text.startswith((".", "/", "~", "pypi:")) and "/" not in text
    if is_word and not is_there(_folder(info) / text):
        raise ValueError(
            f"expected 'base', a vector ({', '.join(vectors)}) or a model (org/name, a directory)"
        )
    return _note_path(info, text, absolute_reference(text, _folder(info)))


TokenizerSource = Annotated[str | None, AfterValidator(_vector_or_reference), WRITTEN_RELATIVE]


def tokenizer_reference(named: str | None, sources: Mapping[str, str | None]) -> str | None:
    """Return the model that a TokenizerSource names; None means the base.

    `sources` maps each vector in the same file to its model.
    """
    return None if named is None else sources.get(named, named)


def _local_path(path: Path, info: ValidationInfo) -> Path:
    return Path(_note_path(info, str(path), str(absolute_path(path, _folder(info)))))


LocalPath = Annotated[Path, AfterValidator(_local_path), WRITTEN_RELATIVE]


def _relative_text(text: str, info: ValidationInfo) -> str:
    _local_path(Path(text), info)
    return text


RelativeText = Annotated[str, AfterValidator(_relative_text)]  # a path, kept as written


def _local_text(text: str, info: ValidationInfo) -> str:
    if not text.startswith((".", "/", "~")):
        return text
    return _note_path(info, text, str((_folder(info) / expand_home(Path(text))).resolve()))


LocalText = Annotated[  # a path if it looks like one; its name says nothing about its format
    str, AfterValidator(_local_text), WRITTEN_RELATIVE
]


FUNCTION_IN_FILE = re.compile(r"(?P<file>.+\.py):(?P<name>[A-Za-z_]\w*)")


def _function_text(text: str, info: ValidationInfo) -> str:
    """Make the file of FILE.py:NAME absolute; keep a name alone."""
    match = FUNCTION_IN_FILE.fullmatch(text)
    if match is None:
        if ":" in text or "/" in text:
            raise ValueError("expected a name, or FILE.py:NAME of a function in a local file")
        return text
    return f"{_local_path(Path(match['file']), info)}:{match['name']}"


FunctionText = Annotated[str, AfterValidator(_function_text), WRITTEN_RELATIVE]


def function_in_file(text: str) -> tuple[Path, str] | None:
    """Return file and name of a function that a FunctionText names; None for a name alone."""
    match = FUNCTION_IN_FILE.fullmatch(text)
    return None if match is None else (Path(match["file"]), match["name"])
