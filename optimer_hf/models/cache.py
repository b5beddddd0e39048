"""What the cache holds: GGUF files of packages, converted GGUF files, copies of bases with more
tokens, and generation configs for vLLM. Each is a directory in a folder of its kind, most are as
large as a model, and it is written again when it is needed. Nothing else in these folders is
touched: they may be shared with others.
"""

import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import Timeout

from optimer_hf.files.locks import locking
from optimer_hf.files.paths import ATOMIC_PREFIX, cache_dir, hidden_name
from optimer_hf.files.staging import finish_move, lock_of_cached
from optimer_hf.files.text import markdown_table
from optimer_hf.models.gguf_record import CONVERSION_FILE
from optimer_hf.models.layout import GENERATION_CONFIG
from optimer_hf.models.packages import is_packaged_gguf
from optimer_hf.models.union import UNION_FILE

KINDS: Mapping[str, Callable[[Path], bool]] = {  # folder -> whether a directory in it is ours
    "converted": lambda path: (path / CONVERSION_FILE).is_file(),
    "generation": lambda path: (path / GENERATION_CONFIG).is_file(),
    "gguf": is_packaged_gguf,
    "union": lambda path: (path / UNION_FILE).is_file(),
}
LEFT_OVER = re.compile(rf"{re.escape(ATOMIC_PREFIX)}[0-9a-f]{{8}}-(.+)")


@dataclass(frozen=True)
class Cached:
    """A directory of the cache. `used` is the time in seconds since 1970 of its last use."""

    path: Path
    n_bytes: int
    used: float

    @property
    def kind(self) -> str:
        """What it is: converted, generation, gguf or union."""
        return self.path.parent.name


def list_cache(unused_days: float = 0.0) -> list[Cached]:
    """Return what the cache holds and what has not been used for so many days, the largest first.

    What killed processes left half-written is removed.
    """
    _sweep()
    before = time.time() - 86_400 * unused_days
    entries = []
    for kind, is_ours in KINDS.items():
        for path in (cache_dir() / kind).glob("[!.]*"):
            with suppress(FileNotFoundError):  # another process removes it meanwhile
                if is_ours(path):
                    entries.append(Cached(path, _size_of(path), path.stat().st_mtime))
    kept = (each for each in entries if each.used <= before)
    return sorted(kept, key=lambda each: (-each.n_bytes, each.path))


def remove_cached(entry: Cached) -> bool:
    """Remove a directory of the cache at once, unless a process is writing it; return whether it is
    gone. If it is killed meanwhile, the next call of `list_cache` removes the rest.
    """
    lock = lock_of_cached(entry.path)
    try:
        with locking(lock):
            aside = hidden_name(entry.path.name, f"{secrets.token_hex(4)}-", before=True)
            with suppress(FileNotFoundError):  # another process was faster
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
    for folder in (cache_dir() / kind for kind in KINDS):
        for name in {*_names_of_leftovers(folder)}:
            finish_move(folder / name)


def _names_of_leftovers(folder: Path) -> Iterator[str]:
    for path in folder.glob(f"{ATOMIC_PREFIX}*"):
        if (match := LEFT_OVER.fullmatch(path.name)) is not None:
            yield match[1]


def _size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
