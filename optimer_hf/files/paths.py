"""Paths as text: names of hidden files, paths that move with their folder, the cache directory."""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from optimer_hf.files.reference import is_there

ATOMIC_PREFIX = ".partial-"

LONGEST_NAME = 200  # bytes; file systems take 255, and what hides a name is added

FREE_TEXT = ("system_instruction", "generation")  # may begin with a slash and is no path

Place = Sequence[str | int]  # where in a file: keys and indices


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


def relocate(value: Any, old: Path, new: Path) -> Any:
    """Return a value of a file of ours with paths replaced by those that lie to `new` as they lay
    to `old`, where something is there: a copied folder has its own files.
    """

    def move(text: str) -> str:
        if not Path(text).is_absolute():
            return text
        path = Path(os.path.normpath(new / os.path.relpath(text, old)))
        return str(path) if is_there(path) else text

    return _map_texts(value, move)


def make_relative(value: Any, folder: Path) -> Any:
    """Return a value of a file of ours with every absolute path in it relative to a folder."""
    return _map_texts(
        value, lambda text: os.path.relpath(text, folder) if Path(text).is_absolute() else text
    )


def drop_folders(value: Any) -> Any:
    """Return a value with every path in it, absolute or relative, cut down to the file's name."""
    return _map_texts(
        value, lambda text: Path(text).name if text.startswith(("/", "./", "../")) else text
    )


def _map_texts(value: Any, replaced: Callable[[str], str]) -> Any:
    """Return a value of a file of ours with the texts in it replaced that may name files."""
    if isinstance(value, dict):
        return {
            key: item if key in FREE_TEXT else _map_texts(item, replaced)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_map_texts(item, replaced) for item in value]
    return replaced(value) if isinstance(value, str) else value


def hidden_name(name: str, mark: str, *, before: bool = False) -> str:
    """Return `name` hidden and marked; a name that would become too long by its digest."""
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:16] + Path(name).suffix[:16]
    return f"{ATOMIC_PREFIX}{mark}{name}" if before else f"{ATOMIC_PREFIX}{name}{mark}"


def cache_dir() -> Path:
    """Return where converted models are kept: $OPTIMER_CACHE, or `optimer` in the user's cache
    directory.
    """
    home = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    return Path(os.environ.get("OPTIMER_CACHE", str(Path(home) / "optimer")))
