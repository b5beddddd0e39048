"""Digests: of files, of values, and what differs between two records."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

N_PIECES, PIECE = 1024, 2**16  # of a fingerprint, 64 MiB together; bytes


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
