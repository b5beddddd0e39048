"""Tensors on disk: a safetensors directory read and written a few rows at a time.

A directory of any model comes in, rows of its tensors by name go out; row blocks come in, shards
with their index go out. Headers are checked by the safetensors library; bytes are read with plain
reads and not through a memory map, so that memory stays at a few blocks whatever the size of the
model, and a file that shrinks meanwhile is an error and not a crash.
"""

import copy
import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors import safe_open

from optimer_hf.errors import ConfigError, ModelError, OutputError
from optimer_hf.files import digest, fingerprint, first_line, is_there, sha256_file
from optimer_hf.printable import warn_once
from optimer_hf.reading import read_json

logger = logging.getLogger(__name__)

CHUNK_ELEMENTS = 2**19  # of one row block: 2 MiB in float32, so that a sum stays in a CPU's cache
GPU_CHUNK_ELEMENTS = 2**24
GPU_THREADS = 2  # one reads while the other's blocks are computed; each holds some of GPU memory
BLOCKS_AHEAD = 2  # computed before they are written, per thread
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
INDEX = ".safetensors.index.json"
ANY_WEIGHTS = "*.safetensors"
PICKLES = ("*model*.bin", "*model*.pt", "consolidated*.pth")  # no training_args.bin, optimizer.pt
# put into names by torch.compile, FSDP and activation checkpointing, anywhere; by DDP at the front
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
OUTER_WRAPPER = "module."
GENERATION_CONFIG = "generation_config.json"  # with the tokens that end an answer
OF_TOKENIZER = [  # data by their endings: a tokenizer.py is code
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.txt",
    "tekken.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "merges.txt",
    "chat_template*.jinja",
    "chat_template*.json",
    "*.model",
    "*.tiktoken",
]
LEGAL = [
    name + ending
    for name in ("LICEN[SC]E", "LICEN[SC]E[-_]*", "COPYING", "USE_POLICY", "NOTICE")
    for ending in ("", ".txt", ".md", ".rst", ".html")
]
COPIED_BESIDE_WEIGHTS = [
    "config.json",
    GENERATION_CONFIG,
    *OF_TOKENIZER,
    "*processor_config.json",
    *LEGAL,
]
OTHER = re.compile(r"LICEN[SC]E[-_].*\.(?!txt$|md$|rst$|html$)\w*[a-z]\w*", re.IGNORECASE)

LARGEST_HEADER = 2**25  # bytes; 100,000 tensors take 12 million
MOST_TENSORS = 100_000  # in one file
LONGEST_AXIS = 2**40  # more than any file holds: safetensors takes every shape of no elements

T = TypeVar("T")
# name -> dtype and shape of every tensor of a model, in the order they are written
Specs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


# -- reading ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies, and the state of its file when the header was read."""

    file: Path
    label: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int
    state: tuple[int, int]


class Checkpoint:
    """The tensors of a safetensors directory, single-file or sharded, read lazily."""

    def __init__(self, path: Path, prefix: str = "model") -> None:
        """Read the headers of `path`: PREFIX.safetensors, else the shards its index names, as
        transformers does; else every safetensors file.

        Raises ModelError for missing, damaged or pickled weights, and for an index and shards that
        disagree.
        """
        self.path = path
        self._stored: dict[str, _Stored] = {}
        index = path / f"{prefix}{INDEX}"
        sharded = index.exists() and not (path / f"{prefix}.safetensors").exists()
        weight_map = _read_index(index) if sharded else None
        for file in _weights_files(path, prefix, weight_map):
            for name, stored in _read_header(file).items():
                if name in self._stored:
                    raise ModelError(
                        f"{file}: tensor {name!r} is in two weights files. Remove the stale file."
                    )
                self._stored[name] = stored
        for name, file_name in (weight_map or {}).items():
            if name not in self._stored or self._stored[name].file.name != file_name:
                raise ModelError(
                    f"{path / file_name}: lacks tensor {name!r}, which {index.name} says is there. "
                    "Fetch both again."
                )
        for name in self._stored:
            if weight_map is not None and name not in weight_map:
                raise ModelError(
                    f"{self._stored[name].file}: holds tensor {name!r}, which {index.name} does "
                    "not know. Fetch both again."
                )
        self._unwrap()

    def _unwrap(self) -> None:
        """Take the names of wrappers out of those of the tensors, and say so once."""
        unwrapped = unwrapped_names(self._stored)
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
                    f"{self.path}: holds both {first[plain]!r} and {name!r}, which are one tensor "
                    f"without the prefix of a wrapper ({', '.join(self.wrappers)}). Remove the "
                    "stale one."
                )
            first[plain] = name
        self._stored = {plain: self._stored[name] for plain, name in first.items()}
        warn_once(
            logger,
            f"{self.path}: its tensor names have the prefix {', '.join(self.wrappers)} of a "
            "wrapper (torch.compile, DDP, FSDP), which is taken off",
        )

    def renamed(self, old_names: Mapping[str, str]) -> "Checkpoint":
        """Return the same tensors under other names, new name -> name here; others are left out."""
        found = copy.copy(self)
        found._stored = {new: self._stored[old] for new, old in old_names.items()}
        return found

    @property
    def names(self) -> list[str]:
        """Tensor names, sorted."""
        return sorted(self._stored)

    @property
    def state(self) -> frozenset[tuple[str, tuple[int, int]]]:
        """Name, size in bytes and time of change in ns of every file: what tells that the tensors
        are still the same.
        """
        return frozenset((stored.file.name, stored.state) for stored in self._stored.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return self._stored[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """dtype of a tensor, from the header; ModelError when it is none that can be merged."""
        label = self._stored[name].label
        if label not in TORCH_DTYPES:
            raise ModelError(
                f"{self.path}: tensor {name!r} has dtype {label}, which cannot be merged."
            )
        return TORCH_DTYPES[label]

    def n_bytes(self, names: Iterable[str]) -> int:
        """Size of some tensors in the dtype of the file."""
        return sum(math.prod(self.shape(name)) * self.dtype(name).itemsize for name in names)

    def read(self, name: str) -> torch.Tensor:
        """Return a whole tensor in the dtype of the file, as fresh memory."""
        shape = self.shape(name)
        n_rows = matrix_shape(shape)[0]
        return self.read_rows(name, slice(0, n_rows)).view(shape)

    def read_rows(self, name: str, rows: slice) -> torch.Tensor:
        """Return rows of the matrix form of a tensor, see `matrix_shape`."""
        stored, dtype = self._stored[name], self.dtype(name)
        _, *columns = matrix_shape(stored.shape)
        shape = (rows.stop - rows.start, *columns)
        row_bytes = math.prod(columns) * dtype.itemsize
        buffer = torch.empty(shape[0] * row_bytes, dtype=torch.uint8)
        _read_into(buffer, stored, stored.offset + rows.start * row_bytes)
        return buffer.view(dtype).view(shape)

    def are_equal(self, one: str, other: str) -> bool:
        """Whether two tensors hold the same numbers, whatever their dtypes."""
        shape, is_same = self.shape(one), self.dtype(one) == self.dtype(other)

        def rows_of(name: str, rows: slice) -> torch.Tensor:
            found = self.read_rows(name, rows)
            return found if is_same else found.double()

        return shape == self.shape(other) and all(
            torch.equal(rows_of(one, rows), rows_of(other, rows)) for rows in row_blocks(shape)
        )


class Loaded:
    """Tensors in memory, read as those of a checkpoint are; `path` says where they came from."""

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
        """Size of some tensors."""
        return sum(self._tensors[name].nbytes for name in names)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor itself, not a copy."""
        return self._tensors[name]

    def read_rows(self, name: str, rows: slice) -> torch.Tensor:
        """Return rows of the matrix form of a tensor, not a copy."""
        return matrix_rows(self._tensors[name], rows)


def unwrapped_names(names: Iterable[str]) -> dict[str, str]:
    """Return every tensor name without the parts that wrappers of a module put into it; `module.`
    belongs to one only where all names begin with it, those of an adapter after PEFT's own prefix.
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
    """Return the prefixes that `unwrapped_names` took off, each once."""
    inner = [f"{part}." for part in WRAPPERS if any(part in name.split(".") for name in unwrapped)]
    dropped = [set(name.split(".")) - set(plain.split(".")) for name, plain in unwrapped.items()]
    is_outer = any(OUTER_WRAPPER.rstrip(".") in parts for parts in dropped)
    return inner + [OUTER_WRAPPER] * is_outer


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a tensor as a matrix: its last axis, and all others as rows.

    Vectors stay vectors, whose rows are their elements; a scalar is a vector of one. Stacked expert
    weights become as many rows as their experts have together, so that a block of rows is small.
    """
    if len(shape) <= 1:
        return (math.prod(shape),)
    return math.prod(shape[:-1]), shape[-1]


def matrix_rows(tensor: torch.Tensor, rows: slice) -> torch.Tensor:
    """Return a view of rows of the matrix form of a tensor."""
    return tensor.view(matrix_shape(tuple(tensor.shape)))[rows]


def _weights_files(path: Path, prefix: str, weight_map: Mapping[str, str] | None) -> list[Path]:
    if weight_map is not None:
        return [path / file for file in sorted(set(weight_map.values()))]
    if (path / f"{prefix}.safetensors").exists():
        return [path / f"{prefix}.safetensors"]
    files = sorted(path.glob(ANY_WEIGHTS))
    if not files:
        refuse_pickled(str(path), sorted(file.name for file in path.glob("*")))
        raise ModelError(f"{path}: no safetensors weights in this directory.")
    return files


def refuse_pickled(where: str, names: Sequence[str]) -> None:
    """Raise ModelError when the files of a place without safetensors are pickled weights."""
    for name in names:
        if any(fnmatch(name, pattern) for pattern in PICKLES):
            raise ModelError(
                f"{where}: has no safetensors weights, only pickled ones ({name}), which can run "
                "code when they are read. If you trust them, load model and tokenizer with "
                "transformers (an adapter with PEFT), save both with `save_pretrained(DIRECTORY)`, "
                "which writes safetensors, and give DIRECTORY."
            )


def missing_shards(index: Path) -> list[str]:
    """Return the files beside an index that it names and that are not there."""
    return sorted(
        file
        for file in set(_weight_map(index).values())
        if not is_there(index.parent / file) or not (index.parent / file).is_file()
    )


def _read_index(index: Path) -> dict[str, str]:
    """Return tensor -> file of the shards beside an index."""
    files = _weight_map(index)
    missing = missing_shards(index)
    if missing:
        shown_names = ", ".join(missing[:5]) + (" ..." if missing[5:] else "")
        raise ModelError(
            f"{index.parent}: missing shard {shown_names} ({len(missing)} of "
            f"{len(set(files.values()))} that {index.name} names). Fetch it again."
        )
    return files


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = read_json(index)["weight_map"]
        files = {name: str(file) for name, file in weight_map.items()}
    except (ConfigError, KeyError, TypeError, AttributeError):
        raise ModelError(
            f"{index}: not an index of safetensors shards (no `weight_map`). Fetch it again."
        ) from None
    for file in files.values():
        if Path(file).name != file:
            raise ModelError(f"{index}: names {file!r}, which is not a file beside it.")
    return files


def _read_header(file: Path) -> dict[str, _Stored]:
    """Return the tensors of one file; the library checks the header, sizes and duplicates are ours
    to see.
    """
    try:
        with open(file, "rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            text = opened.read(min(size, LARGEST_HEADER + 1))
            status = os.fstat(opened.fileno())
        if len(text) > LARGEST_HEADER or text.count(b'"data_offsets"') > MOST_TENSORS:
            raise ValueError(
                f"its header names more than {MOST_TENSORS:,} tensors or has more than "
                f"{LARGEST_HEADER:,} bytes"
            )
        with safe_open(file, framework="pt"):
            pass
        entries = json.loads(text, object_pairs_hook=_without_duplicates)
        entries.pop("__metadata__", None)
        return {name: _stored(file, entry, 8 + size, status) for name, entry in entries.items()}
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # what safetensors lets pass may still be of any form
        raise ModelError(
            f"{file}: not a readable safetensors file ({first_line(error)}). Fetch it again."
        ) from None


def _stored(file: Path, entry: Any, start: int, status: os.stat_result) -> _Stored:
    """Return where a tensor lies, by its entry in a header that ends at byte `start`."""
    shape, (first, last) = tuple(map(int, entry["shape"])), entry["data_offsets"]
    if max(shape, default=0) > LONGEST_AXIS:
        raise ValueError(f"a tensor of shape {list(shape)}, expected axes up to {LONGEST_AXIS:,}")
    state = (status.st_size, status.st_mtime_ns)
    return _Stored(file, str(entry["dtype"]), shape, start + first, last - first, state)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"its header names {twice!r} twice")
    return found


def _read_into(buffer: torch.Tensor, stored: _Stored, offset: int) -> None:
    view = buffer.numpy().data
    try:
        with open(stored.file, "rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            if (status.st_size, status.st_mtime_ns) != stored.state:
                raise ModelError(f"{stored.file}: was changed while it was read. Run it again.")
            file.seek(offset)
            done = 0
            while done < len(view):
                n_read = file.readinto(view[done:])
                if not n_read:
                    raise ModelError(f"{stored.file}: ends too early. Fetch it again.")
                done += n_read
    except OSError as error:
        raise ModelError(f"{stored.file}: cannot be read ({error.strerror}).") from None


def row_blocks(shape: tuple[int, ...], device: str = "cpu") -> list[slice]:
    """Split the rows of a tensor's matrix form into blocks (>= 1 row) that suit a device."""
    n_rows, *columns = matrix_shape(shape)
    if 0 in columns:  # rows without elements need no blocks
        return [slice(0, n_rows)]
    n_elements = CHUNK_ELEMENTS if device.startswith("cpu") else GPU_CHUNK_ELEMENTS
    step = max(1, n_elements // max(1, math.prod(columns)))
    return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]


def weight_files(path: Path) -> dict[str, str]:
    """Return file name -> sha256 of the weights that are read of a directory: the identity of a
    model.

    Of an adapter its config counts, too: rank and alpha scale the weights.
    """
    return {file.name: sha256_file(file) for file in _identity(path)}


def weight_states(path: Path) -> dict[str, tuple[int, int]]:
    """Return file name -> size in bytes and time of change in ns of the weights in a directory:
    what tells that a model is still the same without reading it.
    """
    states = {file.name: file.stat() for file in _identity(path)}
    return {name: (state.st_size, state.st_mtime_ns) for name, state in states.items()}


def weights_fingerprint(path: Path) -> str:
    """Return a digest that tells the weights in a directory from others, see `fingerprint`."""
    return digest({file.name: fingerprint(file) for file in _identity(path)})


def tokenizer_files(path: Path) -> dict[str, str]:
    """Return file name -> sha256 of what comes with a tokenizer in a directory: its files, its chat
    template, and generation_config.json, which knows the tokens that end an answer.
    """
    return {file.name: sha256_file(file) for file in _of_tokenizer(path)}


def _of_tokenizer(path: Path) -> list[Path]:
    found = {file for pattern in (*OF_TOKENIZER, GENERATION_CONFIG) for file in path.glob(pattern)}
    return sorted(file for file in found if file.is_file())


def _identity(path: Path) -> list[Path]:
    if (path / "adapter_config.json").exists():
        return sorted([*path.glob(ANY_WEIGHTS), path / "adapter_config.json"])
    names = weight_names(path)
    if names == [ANY_WEIGHTS]:
        return sorted(path.glob(ANY_WEIGHTS))
    return [path / name for name in names if (path / name).is_file()]  # Checkpoint names the others


def weight_names(path: Path) -> list[str]:
    """Return the names of the weights files that `Checkpoint` reads of a model, here or still to be
    fetched, or ANY_WEIGHTS; others (Mistral's consolidated.safetensors) are copies of them.
    """
    whole, index = "model.safetensors", path / f"model{INDEX}"
    if (path / whole).exists():
        return [whole]
    return sorted(set(_weight_map(index).values())) if index.exists() else [ANY_WEIGHTS]


# -- computing -------------------------------------------------------------------------------------


def computed_ahead(
    function: Callable[[str, slice], T],
    arguments: Iterable[tuple[str, slice]],
    device: str = "cpu",
) -> Generator[T]:
    """Yield function(*argument) in order, computed a few ahead: by as many threads as torch uses
    where the CPU does it, else by two that read for the device.

    Every thread computes whole blocks alone. That is faster than all threads at one block, who wait
    for each other after every operation, and gives the same bits for any number of threads.
    """
    n_torch = torch.get_num_threads()
    n_threads = n_torch if device.startswith("cpu") else GPU_THREADS
    waiting: deque[Future[T]] = deque()
    executor = ThreadPoolExecutor(n_threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for argument in arguments:
            waiting.append(executor.submit(function, *argument))
            if len(waiting) > BLOCKS_AHEAD * n_threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(n_torch)  # threads that start later take the number set last


# -- writing ---------------------------------------------------------------------------------------


def write_safetensors(out: Path, specs: Specs, blocks: Iterable[torch.Tensor]) -> None:
    """Write one safetensors file from row blocks that come in the order of `specs`, holding one
    block at a time.
    """
    with open(out, "wb") as file:
        written, expected = _write_all(file, specs, blocks)
    if written != expected:
        raise OutputError(f"{out}: wrote {written:,} of {expected:,} bytes. The disk may be full.")


class _Sink(Protocol):
    def write(self, data: Any, /) -> int: ...


def _write_all(sink: _Sink, specs: Specs, blocks: Iterable[torch.Tensor]) -> tuple[int, int]:
    """Write header and row blocks; return the bytes of the blocks, and those expected."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in specs.items():
        n_bytes = math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + n_bytes],
        }
        offset += n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    sink.write(len(text).to_bytes(8, "little") + text)
    return sum(sink.write(_raw_bytes(block)) for block in blocks), offset


def _raw_bytes(block: torch.Tensor) -> Any:
    return block.contiguous().view(-1).view(torch.uint8).numpy().data


def write_sharded(
    out_dir: Path,
    prefix: str,
    specs: Specs,
    rows_of: Callable[[str, slice], torch.Tensor],
    max_shard_size: int,
    device: str = "cpu",
) -> None:
    """Write tensors as `prefix.safetensors`, or as shards of at most `max_shard_size` bytes with an
    index.

    `rows_of(name, rows)` computes a row block, of a size that suits `device`; several threads call
    it, ahead of the writing.
    """
    shards = _named_shards(prefix, specs, max_shard_size)
    weight_map: dict[str, str] = {}
    for file, shard in shards.items():
        blocks = [
            (name, rows) for name, (_, shape) in shard.items() for rows in row_blocks(shape, device)
        ]
        with closing(computed_ahead(rows_of, blocks, device)) as computed:
            write_safetensors(out_dir / file, shard, computed)
        weight_map.update(dict.fromkeys(shard, file))
    if len(shards) > 1:
        total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out_dir / f"{prefix}{INDEX}").write_text(json.dumps(index, indent=2), encoding="utf-8")


class _Hash:
    """A file that is not kept, only its sha256."""

    def __init__(self) -> None:
        self.sha256 = hashlib.sha256()

    def write(self, data: Any, /) -> int:
        self.sha256.update(data)
        return len(data)


def files_in_shards(path: Path, max_shard_size: int) -> dict[str, str]:
    """Return file name -> sha256 that the model in a directory has when `write_sharded` writes it
    in shards of at most `max_shard_size` bytes. Memory: a row block.
    """
    checkpoint, found = Checkpoint(path), {}
    specs = {name: (checkpoint.dtype(name), checkpoint.shape(name)) for name in checkpoint.names}
    for file, shard in _named_shards("model", specs, max_shard_size).items():
        sink = _Hash()
        blocks = (
            checkpoint.read_rows(name, rows)
            for name, (_, shape) in shard.items()
            for rows in row_blocks(shape)
        )
        _write_all(sink, shard, blocks)
        found[file] = sink.sha256.hexdigest()
    return found


def _named_shards(prefix: str, specs: Specs, max_shard_size: int) -> dict[str, Specs]:
    """Return file name -> what is in it."""
    shards = _shards(specs, max_shard_size)
    if len(shards) == 1:
        return {f"{prefix}.safetensors": shards[0]}
    return {
        f"{prefix}-{number:05d}-of-{len(shards):05d}.safetensors": shard
        for number, shard in enumerate(shards, start=1)
    }


def _shards(
    specs: Specs, max_shard_size: int
) -> list[dict[str, tuple[torch.dtype, tuple[int, ...]]]]:
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    size = 0
    for name, (dtype, shape) in specs.items():
        n_bytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and size + n_bytes > max_shard_size:
            shards.append({})
            size = 0
        shards[-1][name] = (dtype, shape)
        size += n_bytes
    return shards


def is_beside_weights(name: str, patterns: Sequence[str] = COPIED_BESIDE_WEIGHTS) -> bool:
    """Return whether a file of this name is copied with a model: its config, tokenizer and licence,
    and never code.
    """
    return (
        "/" not in name
        and OTHER.fullmatch(name) is None
        and any(fnmatch(name, pattern) for pattern in patterns)
    )


def files_beside_weights(source: Path, *, tokenizer: Path | None = None) -> list[Path]:
    """Return config, tokenizer, chat template and licence files of a model; with `tokenizer` the
    `tokenizer_files` come from there.
    """
    patterns = [
        pattern
        for pattern in COPIED_BESIDE_WEIGHTS
        if tokenizer is None or pattern not in OF_TOKENIZER
    ]
    found = [
        path
        for path in sorted(source.glob("*"))
        if path.is_file() and is_beside_weights(path.name, patterns)
    ]
    return found if tokenizer is None else [*found, *_of_tokenizer(tokenizer)]


def copy_beside_weights(source: Path, out: Path, *, tokenizer: Path | None = None) -> None:
    """Copy the `files_beside_weights` of a model."""
    for path in files_beside_weights(source, tokenizer=tokenizer):
        shutil.copyfile(path, out / path.name)
