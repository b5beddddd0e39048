"""Read the tensors of a safetensors directory a few rows at a time.

A model directory comes in; rows of its tensors go out, by name. The safetensors library checks the
headers. The bytes come from plain reads instead of a memory map, so memory stays at a few blocks
for any model size, and a file that shrinks meanwhile is an error and not a crash.
"""

import copy
import json
import logging
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from optimer_hf.errors import ModelError
from optimer_hf.files.text import LFS_POINTER, first_line
from optimer_hf.models.blocks import matrix_rows, matrix_shape, row_blocks
from optimer_hf.models.headers import LARGEST_HEADER
from optimer_hf.models.layout import INDEX, find_weights_files, read_index
from optimer_hf.printable import warn_once

logger = logging.getLogger(__name__)


DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SAFETENSORS_DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}
TORCH_DTYPES = {label: dtype for dtype, label in SAFETENSORS_DTYPES.items()}

# torch.compile, FSDP and activation checkpointing put these anywhere in a name
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
OUTER_WRAPPER = "module."  # DDP puts this in front of a name

MOST_TENSORS = 100_000  # in one file
LONGEST_AXIS = 2**40  # more than any file holds; safetensors accepts any shape with zero elements


# -- reading ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Location:
    """The location of a tensor, and the state of its file when the header was read."""

    file: Path
    label: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int
    state: tuple[int, int]


class Checkpoint:
    """The tensors of a safetensors directory, single-file or sharded, read lazily."""

    def __init__(self, path: Path, prefix: str = "model") -> None:
        """Read the headers in `path`: those of PREFIX.safetensors, else of the shards in its index.

        Transformers looks in the same order. Without either, read every safetensors file. Raises
        ModelError for missing, damaged or pickled weights, and if index and shards disagree.
        """
        self.path = path
        self._stored: dict[str, _Location] = {}
        index = path / f"{prefix}{INDEX}"
        sharded = index.exists() and not (path / f"{prefix}.safetensors").exists()
        weight_map = read_index(index) if sharded else None
        for file in find_weights_files(path, prefix, weight_map):
            for name, stored in _read_header(file).items():
                if name in self._stored:
                    raise ModelError(
                        f"{file}: tensor {name!r} is in two weights files. Remove the stale file."
                    )
                self._stored[name] = stored
        for name, file_name in (weight_map or {}).items():
            if name not in self._stored or self._stored[name].file.name != file_name:
                raise ModelError(
                    f"{path / file_name}: lacks tensor {name!r}, which {index.name} lists. Fetch "
                    "both again."
                )
        for name in self._stored:
            if weight_map is not None and name not in weight_map:
                raise ModelError(
                    f"{self._stored[name].file}: contains tensor {name!r}, which {index.name} does "
                    "not list. Fetch both again."
                )
        self._unwrap()

    def _unwrap(self) -> None:
        """Remove the prefixes of wrappers from the tensor names, and warn about it once."""
        unwrapped = unwrap_names(self._stored)
        self.wrappers = wrappers_in(unwrapped)
        self.n_wrappers = max(
            (name.count(".") - plain.count(".") for name, plain in unwrapped.items()), default=0
        )
        if not self.wrappers:
            return
        first: dict[str, str] = {}
        for name, plain in unwrapped.items():
            if plain in first:
                raise ModelError(
                    f"{self.path}: contains both {first[plain]!r} and {name!r}, which are the same "
                    f"tensor once the wrapper's prefix ({', '.join(self.wrappers)}) is removed. "
                    "Remove the stale one."
                )
            first[plain] = name
        self._stored = {plain: self._stored[name] for plain, name in first.items()}
        warn_once(
            logger,
            f"{self.path}: ignoring the wrapper prefix {', '.join(self.wrappers)} in its tensor "
            "names (from torch.compile, DDP or FSDP)",
        )

    def rename(self, old_names: Mapping[str, str]) -> "Checkpoint":
        """Return a copy with other tensor names (new name -> current name), without the others."""
        renamed = copy.copy(self)
        renamed._stored = {new: self._stored[old] for new, old in old_names.items()}
        return renamed

    @property
    def names(self) -> list[str]:
        """Tensor names, sorted."""
        return sorted(self._stored)

    @property
    def state(self) -> frozenset[tuple[str, tuple[int, int]]]:
        """Name, size in bytes and modification time in ns of every file, to detect changes."""
        return frozenset((stored.file.name, stored.state) for stored in self._stored.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self._stored[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """dtype of a tensor, from the header; raises ModelError if it cannot be merged."""
        label = self._stored[name].label
        if label not in TORCH_DTYPES:
            raise ModelError(
                f"{self.path}: tensor {name!r} has dtype {label}, which cannot be merged."
            )
        return TORCH_DTYPES[label]

    def n_bytes(self, names: Iterable[str]) -> int:
        """Total size in bytes of some tensors, in the dtype of the file."""
        return sum(math.prod(self.shape(name)) * self.dtype(name).itemsize for name in names)

    def read(self, name: str) -> torch.Tensor:
        """Return a whole tensor in the dtype of the file, in new memory."""
        shape = self.shape(name)
        n_rows = matrix_shape(shape)[0]
        return self.read_rows(name, slice(0, n_rows)).view(shape)

    def read_rows(self, name: str, rows: slice) -> torch.Tensor:
        """Return rows of a tensor's matrix form, see `matrix_shape`."""
        stored, dtype = self._stored[name], self.dtype(name)
        _, *columns = matrix_shape(stored.shape)
        shape = (rows.stop - rows.start, *columns)
        row_bytes = math.prod(columns) * dtype.itemsize
        buffer = torch.empty(shape[0] * row_bytes, dtype=torch.uint8)
        _read_into(buffer, stored, stored.offset + rows.start * row_bytes)
        return buffer.view(dtype).view(shape)

    def are_equal(self, one: str, other: str) -> bool:
        """Whether two tensors contain the same numbers, even in different dtypes."""
        shape, is_same = self.shape(one), self.dtype(one) == self.dtype(other)

        def rows_of(name: str, rows: slice) -> torch.Tensor:
            block = self.read_rows(name, rows)
            return block if is_same else block.double()

        return shape == self.shape(other) and all(
            torch.equal(rows_of(one, rows), rows_of(other, rows)) for rows in row_blocks(shape)
        )


class LoadedTensors:
    """Tensors in memory with the interface of a checkpoint; `path` says where they came from."""

    def __init__(self, path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        self.path = path
        self._tensors = tensors

    @property
    def names(self) -> list[str]:
        """Tensor names, sorted."""
        return sorted(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._tensors[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """dtype of a tensor."""
        return self._tensors[name].dtype

    def n_bytes(self, names: Iterable[str]) -> int:
        """Total size in bytes of some tensors."""
        return sum(self._tensors[name].nbytes for name in names)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor itself, not a copy."""
        return self._tensors[name]

    def read_rows(self, name: str, rows: slice) -> torch.Tensor:
        """Return rows of a tensor's matrix form, not a copy."""
        return matrix_rows(self._tensors[name], rows)


def unwrap_names(names: Iterable[str]) -> dict[str, str]:
    """Return each tensor name without the parts that module wrappers inserted.

    `module.` comes from a wrapper only if all names begin with it (after PEFT's own prefix in an
    adapter).
    """
    plain = {
        name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in names
    }
    for front in ("", "base_model.model."):
        outer = front + OUTER_WRAPPER
        while plain and all(name.startswith(outer) for name in plain.values()):
            plain = {key: front + name.removeprefix(outer) for key, name in plain.items()}
    return plain


def wrappers_in(unwrapped: Mapping[str, str]) -> list[str]:
    """Return the prefixes that `unwrap_names` removed, each once."""
    inner = [f"{part}." for part in WRAPPERS if any(part in name.split(".") for name in unwrapped)]
    dropped = [set(name.split(".")) - set(plain.split(".")) for name, plain in unwrapped.items()]
    is_outer = any(OUTER_WRAPPER.rstrip(".") in parts for parts in dropped)
    return inner + [OUTER_WRAPPER] * is_outer


def _read_header(file: Path) -> dict[str, _Location]:
    """Return the tensors in one file.

    The library checks the header, but not its size nor duplicate names, so we do.
    """
    try:
        with open(file, "rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            text = opened.read(min(size, LARGEST_HEADER + 1))
            status = os.fstat(opened.fileno())
        if (size.to_bytes(8, "little") + text[:64]).startswith(LFS_POINTER):
            raise ModelError(f"{file}: is a Git LFS pointer. Fetch the file: git lfs pull.")
        if len(text) > LARGEST_HEADER or text.count(b'"data_offsets"') > MOST_TENSORS:
            raise ValueError(
                f"its header names more than {MOST_TENSORS:,} tensors or has more than "
                f"{LARGEST_HEADER:,} bytes"
            )
        with safe_open(file, framework="pt"):
            pass
        entries = json.loads(text, object_pairs_hook=_mapping_of_pairs)
        entries.pop("__metadata__", None)
        return {name: _locate(file, entry, 8 + size, status) for name, entry in entries.items()}
    except (torch.OutOfMemoryError, MemoryError, ModelError):
        raise
    except Exception as error:  # a header that safetensors accepts can still have any form
        raise ModelError(
            f"{file}: not a readable safetensors file ({first_line(error)}). Fetch it again."
        ) from None


def _locate(file: Path, entry: Any, start: int, status: os.stat_result) -> _Location:
    """Return the location of a tensor from its entry in a header that ends at byte `start`."""
    shape, (first, last) = tuple(map(int, entry["shape"])), entry["data_offsets"]
    if max(shape, default=0) > LONGEST_AXIS:
        raise ValueError(f"a tensor of shape {list(shape)}, expected axes up to {LONGEST_AXIS:,}")
    state = (status.st_size, status.st_mtime_ns)
    return _Location(file, str(entry["dtype"]), shape, start + first, last - first, state)


def _mapping_of_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"its header names {twice!r} twice")
    return mapping


def _read_into(buffer: torch.Tensor, stored: _Location, offset: int) -> None:
    view = buffer.numpy().data
    try:
        with open(stored.file, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != stored.state:
                raise ModelError(
                    f"{stored.file}: changed while it was being read. Run the command again."
                )
            file.seek(offset)
            done = 0
            while done < len(view):
                n_read = file.readinto(view[done:])
                if not n_read:
                    raise ModelError(f"{stored.file}: ends too early. Fetch it again.")
                done += n_read
    except OSError as error:
        raise ModelError(f"{stored.file}: cannot be read ({error.strerror}).") from None
