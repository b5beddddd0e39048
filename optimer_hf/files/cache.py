"""What the cache holds: converted GGUF files and copies of bases with more tokens. Each is a
directory in a folder of its kind, is as large as a model, and is written again when it is needed.
"""

import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import Timeout

from optimer_hf.files.locks import locking
from optimer_hf.files.paths import ATOMIC_PREFIX, cache_dir, hidden_name
from optimer_hf.files.staging import finish_move
from optimer_hf.files.text import markdown_table

LEFT_OVER = re.compile(rf"{re.escape(ATOMIC_PREFIX)}[0-9a-f]{{8}}-(.+)")


@dataclass(frozen=True)
class Cached:
    """A directory of the cache. `used` is the time in seconds since 1970 at which it was last
    asked for.
    """

    path: Path
    n_bytes: int
    used: float

    @property
    def kind(self) -> str:
        """What it is: converted, gguf or union."""
        return self.path.parent.name


def list_cache(unused_days: float = 0.0) -> list[Cached]:
    """Return what the cache holds and nobody has asked for in so many days, the largest first.

    What killed processes left half-written is removed.
    """
    _sweep()
    before = time.time() - 86_400 * unused_days
    entries = [
        Cached(path, _size_of(path), path.stat().st_mtime)
        for path in cache_dir().glob("*/*")
        if path.is_dir() and not path.name.startswith(".")
    ]
    kept = (each for each in entries if each.used <= before)
    return sorted(kept, key=lambda each: (-each.n_bytes, each.path))


def remove_cached(entry: Cached) -> bool:
    """Remove a directory of the cache at once, unless a process is writing it; return whether it
    did. If it is killed meanwhile, the next call of `list_cache` removes the rest.
    """
    lock = entry.path.parent / f".{entry.path.name}.lock"
    try:
        with locking(lock):
            aside = hidden_name(entry.path.name, f"{secrets.token_hex(4)}-", before=True)
            os.replace(entry.path, entry.path.with_name(aside))
            finish_move(entry.path)
            lock.unlink(missing_ok=True)
    except Timeout:
        return False
    return True


def to_markdown(entries: Sequence[Cached]) -> str:
    """Return a table of directories of the cache."""
    rows = [
        [
            each.path.name,
            each.kind,
            f"{each.n_bytes / 1e9:.2f} GB",
            f"{datetime.fromtimestamp(each.used, UTC):%Y-%m-%d}",
        ]
        for each in entries
    ]
    return markdown_table(["name", "kind", "size", "last used"], rows)


def _sweep() -> None:
    for folder in cache_dir().glob("*"):
        for name in {*_names_of_leftovers(folder)}:
            finish_move(folder / name)


def _names_of_leftovers(folder: Path) -> Iterator[str]:
    for path in folder.glob(f"{ATOMIC_PREFIX}*"):
        if (match := LEFT_OVER.fullmatch(path.name)) is not None:
            yield match[1]


def _size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
