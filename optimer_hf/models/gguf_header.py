"""Read the header of a GGUF file and check every count and size against the file.

gguf-py trusts the counts that it reads, so eight changed bytes keep it busy for hours. Here the
size of the file limits everything that is read or allocated.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimer_hf.errors import ModelError

MOST_LAYERS, MOST_PARTS, LARGEST_SIZE = 1_000, 10_000, 2**31
LONGEST_ARRAY, LONGEST_KEPT, LONGEST_NAME = 2**21, 4096, 2**16  # vocabularies reach 262 k tokens
STRING, ARRAY = 8, 9
SCALARS = "BbHhIif?__Qqd"  # struct's letter for each type; 8 and 9 are a string and an array


class _DamageError(Exception):
    """The bytes of a file are damaged."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor as the header describes it, with llama.cpp's shape: the fastest axis first."""

    shape: tuple[int, ...]
    label: str  # F32, Q4_K ...
    n_elements: int


@dataclass(frozen=True)
class GgufHeader:
    """The metadata and tensors of a GGUF file.

    Long arrays and arrays of texts are reduced to their length.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    @property
    def architecture(self) -> str:
        return str(self.metadata["general.architecture"])

    @property
    def model_metadata(self) -> dict[str, Any]:
        """The metadata of the architecture, with its prefix removed from the keys."""
        prefix = f"{self.architecture}."
        return {
            key.removeprefix(prefix): value
            for key, value in self.metadata.items()
            if key.startswith(prefix)
        }


@dataclass(frozen=True)
class Length:
    """The length of an array whose values were skipped."""

    length: int


class _Cursor:
    """A position in the bytes of a file, which never moves past the end."""

    def __init__(self, data: Any, n_bytes: int) -> None:
        self.data, self.n_bytes, self.at = data, n_bytes, 0

    def skip(self, n_bytes: int) -> int:
        start = self.at
        if n_bytes > self.n_bytes - start:
            raise _DamageError(
                f"needs {n_bytes:,} bytes at {start:,}, the file has {self.n_bytes:,}"
            )
        self.at = start + n_bytes
        return start

    def number(self, letter: str) -> Any:
        size = struct.calcsize(letter)
        return struct.unpack_from(f"<{letter}", self.data, self.skip(size))[0]

    def text(self, longest: int | None = None) -> str:
        length = self.number("Q")
        if longest is not None and length > longest:
            raise _DamageError(f"a name of {length:,} bytes at {self.at:,}")
        start = self.skip(length)
        return bytes(self.data[start : self.at]).decode("utf-8", "strict" if longest else "replace")

    def value(self) -> Any:
        kind = self.number("I")
        if kind == STRING:
            return self.text()
        return self.array() if kind == ARRAY else self.number(_letter(kind))

    def array(self) -> Any:
        kind, length = self.number("I"), self.number("Q")
        if length > LONGEST_ARRAY:
            raise _DamageError(f"an array of {length:,} values at {self.at:,}")
        if kind == STRING:
            for _ in range(length):
                self.skip(self.number("Q"))
            return Length(length)
        letter = _letter(kind)
        start = self.skip(length * struct.calcsize(f"<{letter}"))
        if length > LONGEST_KEPT:
            return Length(length)
        return list(struct.unpack_from(f"<{length}{letter}", self.data, start))


def _letter(kind: int) -> str:
    letter = SCALARS[kind] if kind < 13 else "_"
    if letter == "_":
        raise _DamageError(f"a value of the unknown type {kind}")
    return letter


def read_header(path: Path) -> GgufHeader:
    """Return the header of a GGUF file (versions 2 and 3, little-endian).

    Raises ModelError for any other file, and if a count, size or offset exceeds the file.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise ModelError(f"{path}: not a GGUF file (its first four bytes are not 'GGUF').")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                metadata, tensors = _read(_Cursor(data, size))
        header = GgufHeader(path, metadata, tensors)
        _check_sizes(header)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error}).") from None
    except (_DamageError, UnicodeDecodeError, struct.error) as error:
        raise ModelError(
            f"{path}: this GGUF file is cut short or damaged ({error}). Fetch it again."
        ) from None
    return header


def _read(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    cursor.skip(4)
    version = cursor.number("I")
    if version not in (2, 3):
        raise _DamageError(f"version {version}, expected 2 or 3, little-endian")
    n_tensors, n_values = cursor.number("Q"), cursor.number("Q")
    if n_tensors * 24 + n_values * 13 > cursor.n_bytes:
        raise _DamageError(
            f"{n_tensors:,} tensors and {n_values:,} values do not fit into the file"
        )
    metadata: dict[str, Any] = {}
    for _ in range(n_values):
        key = cursor.text(LONGEST_NAME)
        if key in metadata:
            raise _DamageError(f"key {key!r} occurs twice")
        metadata[key] = cursor.value()
    places = [_tensor(cursor) for _ in range(n_tensors)]
    tensors = {name: tensor for name, tensor, _, _ in places}
    if len(tensors) < len(places):
        raise _DamageError("a tensor occurs twice")
    _check_places(cursor, metadata, places)
    return metadata, tensors


def _tensor(cursor: _Cursor) -> tuple[str, GgufTensor, int, int]:
    """Read one entry: name, tensor, offset and size in bytes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name, n_axes = cursor.text(LONGEST_NAME), cursor.number("I")
    if not 1 <= n_axes <= 4:
        raise _DamageError(f"tensor {name!r} has {n_axes} axes")
    shape = tuple(cursor.number("Q") for _ in range(n_axes))
    kind, offset = cursor.number("I"), cursor.number("Q")
    known = {int(each): each for each in GGML_QUANT_SIZES}
    if kind not in known:
        raise _DamageError(f"tensor {name!r} has the unknown type {kind}")
    block, block_bytes = GGML_QUANT_SIZES[known[kind]]
    n_elements = math.prod(shape)
    if not n_elements or shape[0] % block:
        raise _DamageError(f"tensor {name!r} has the shape {list(shape)} in {known[kind].name}")
    tensor = GgufTensor(shape, GGMLQuantizationType(kind).name, n_elements)
    return name, tensor, offset, n_elements // block * block_bytes


def _check_places(
    cursor: _Cursor, metadata: dict[str, Any], places: list[tuple[str, GgufTensor, int, int]]
) -> None:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise _DamageError(f"general.alignment is {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    for name, _, offset, n_bytes in places:
        if start + offset + n_bytes > cursor.n_bytes:
            raise _DamageError(
                f"tensor {name!r} ends at byte {start + offset + n_bytes:,}, the file has "
                f"{cursor.n_bytes:,}"
            )


def _check_sizes(header: GgufHeader) -> None:
    """Refuse absurd numbers of layers, heads and experts."""
    if not isinstance(header.metadata.get("general.architecture"), str):
        raise _DamageError("general.architecture is missing")
    for key, value in header.model_metadata.items():
        numbers = value if isinstance(value, list) else [value]
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, int):
                continue
            limit = LARGEST_SIZE
            if key.endswith("block_count"):
                limit = min(MOST_LAYERS, max(1, len(header.tensors)))
            elif "head_count" in key or "expert_count" in key or "used_count" in key:
                limit = MOST_PARTS
            if not 0 <= number <= limit:
                raise _DamageError(
                    f"{header.architecture}.{key} is {number:,}, expected 0 to {limit:,}"
                )
