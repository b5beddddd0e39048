"""Digests of files and values, and the differences between two records."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from optimer_hf.files.text import quote

N_PIECES, PIECE = 1024, 2**16  # a fingerprint reads at most this many pieces of PIECE bytes: 64 MiB


def differences(found: Any, expected: Any, where: str = "") -> list[str]:
    """Return one line for each field in which two JSON values differ."""
    if isinstance(found, dict) and isinstance(expected, dict):
        pairs = [(key, found.get(key), expected.get(key)) for key in expected | found]
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        pairs = [(str(i), *pair) for i, pair in enumerate(zip(found, expected, strict=True))]
    else:
        told = f"{where}: found {_quote_given(found)}, expected {_quote_given(expected)}"
        return [] if found == expected else [told]
    return [
        text
        for key, one, other in pairs
        for text in differences(one, other, f"{where}.{key}" if where else key)
    ]


def _quote_given(value: Any) -> str:
    """Return a JSON value for a message: short, without fields that nobody has given."""
    return "nothing" if value is None else quote(_drop_empty(value))


def _drop_empty(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _drop_empty(each) for key, each in value.items() if each not in (None, [], {})}
    return [_drop_empty(each) for each in value] if isinstance(value, list) else value


# -- digests ---------------------------------------------------------------------------------------


def sha256_file(path: Path) -> str:
    """Return the sha256 of a file, which is read again only if its size or time has changed."""
    status = path.stat()
    return _sha256(path, status.st_size, status.st_mtime_ns)


def fingerprint(path: Path) -> str:
    """Return a digest that distinguishes versions of a file in a fraction of a second.

    A file of up to N_PIECES * PIECE bytes is read whole. Of a larger one, the digest covers the
    size and N_PIECES pieces spread evenly over the file. Use `sha256_file` to prove equality.
    """
    size = path.stat().st_size
    places = list(range(0, size, PIECE))
    if len(places) > N_PIECES:
        places = [index * (size - PIECE) // (N_PIECES - 1) for index in range(N_PIECES)]
    state = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for place in places:
            file.seek(place)
            state.update(file.read(PIECE))
    return state.hexdigest()


def fingerprint_of(content: bytes) -> str:
    """Return the `fingerprint` of a file with this content, of up to N_PIECES * PIECE bytes."""
    return hashlib.sha256(str(len(content)).encode() + content).hexdigest()


@functools.lru_cache(maxsize=1024)
def _sha256(path: Path, n_bytes: int, modified: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: Any) -> str:
    """Return the sha256 of a JSON value in canonical form, so equal values have equal digests."""
    text = json.dumps(
        value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False
    )
    return hashlib.sha256(text.encode()).hexdigest()
