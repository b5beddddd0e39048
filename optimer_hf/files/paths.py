"""Names of hidden files, paths that move with their folder, and the cache directory."""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

ATOMIC_PREFIX = ".partial-"

LONGEST_NAME = 200  # bytes; file systems allow 255, and hiding a name adds to it

FREE_TEXT = ("system_instruction", "generation")  # may begin with a slash without being a path

Place = Sequence[str | int]  # the keys and indices that lead to a value in a file


def strings_in(value: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[Place, str]]:
    """Yield each text or path in a config that may name a file, with its place in the config."""
    if isinstance(value, str | Path):
        yield at, str(value)
    items: Iterable[tuple[str | int, Any]] = ()
    if isinstance(value, dict):
        items = [(key, item) for key, item in value.items() if key not in FREE_TEXT]
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for key, item in items:
        yield from strings_in(item, (*at, key))


def drop_folders(value: Any) -> Any:
    """Shorten every path in a value, absolute or relative, to the file name, and FILE.py:NAME to
    the name: code stays where it is.
    """
    return _map_texts(
        value, lambda text: _last_name(text) if text.startswith(("/", "./", "../")) else text
    )


def _last_name(text: str) -> str:
    name = re.sub(r"^.*\.py:(?=\w+$)", "", Path(text).name)
    return "elsewhere" if name in ("", "..") else name  # a folder above, which has no name here


def _map_texts(value: Any, replace: Callable[[str], str]) -> Any:
    """Apply `replace` to each text in a config that may name a file."""
    if isinstance(value, dict):
        return {
            key: item if key in FREE_TEXT else _map_texts(item, replace)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_map_texts(item, replace) for item in value]
    return replace(value) if isinstance(value, str) else value


def hidden_name(name: str, mark: str, *, before: bool = False) -> str:
    """Return a hidden file name with `mark` in it; the digest replaces a name that is too long."""
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:16] + Path(name).suffix[:16]
    return f"{ATOMIC_PREFIX}{mark}{name}" if before else f"{ATOMIC_PREFIX}{name}{mark}"


def cache_dir() -> Path:
    """Return the folder for converted models: $OPTIMER_CACHE, or `optimer` in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    return Path(os.environ.get("OPTIMER_CACHE", str(Path(home) / "optimer")))
