"""Write safetensors shards from blocks of rows, without holding whole tensors in memory."""

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from optimer_hf.errors import OutputError
from optimer_hf.models.blocks import compute_ahead, row_blocks
from optimer_hf.models.checkpoint import SAFETENSORS_DTYPES, Checkpoint
from optimer_hf.models.layout import INDEX

# name -> dtype and shape of every tensor of a model, in the order they are written
Specs = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


# -- writing ---------------------------------------------------------------------------------------


def write_safetensors(out: Path, specs: Specs, blocks: Iterable[torch.Tensor]) -> None:
    """Write one safetensors file from row blocks in the order of `specs`, one block at a time.

    Raises OutputError if the file is shorter than expected.
    """
    expected = len(_header(specs)) + _n_bytes(specs)
    with open(out, "wb") as file:
        written = sum(file.write(piece) for piece in _pieces(specs, blocks))
    if written != expected:
        raise OutputError(f"{out}: wrote {written:,} of {expected:,} bytes. The disk may be full.")


def _pieces(specs: Specs, blocks: Iterable[torch.Tensor]) -> Iterator[Any]:
    """Yield the bytes of a safetensors file: its header, then each row block."""
    yield _header(specs)
    yield from map(_raw_bytes, blocks)


def _header(specs: Specs) -> bytes:
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
    return len(text).to_bytes(8, "little") + text


def _n_bytes(specs: Specs) -> int:
    return sum(math.prod(shape) * dtype.itemsize for dtype, shape in specs.values())


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
    """Write tensors as `prefix.safetensors`, or as indexed shards of up to `max_shard_size` bytes.

    `rows_of(name, rows)` computes a row block sized for `device`. Several threads call it, ahead of
    the writing.
    """
    shards = _named_shards(prefix, specs, max_shard_size)
    for file, shard in shards.items():
        blocks = [
            (name, rows) for name, (_, shape) in shard.items() for rows in row_blocks(shape, device)
        ]
        with closing(compute_ahead(rows_of, blocks, device)) as computed:
            write_safetensors(out_dir / file, shard, computed)
    _write_index(out_dir, prefix, shards)


def write_whole_tensors(
    out_dir: Path, specs: Specs, tensors: Iterator[torch.Tensor], max_shard_size: int
) -> None:
    """Write the tensors of a model as `write_sharded` does, one at a time, as `tensors` yields them
    in the order of `specs`.
    """
    shards = _named_shards("model", specs, max_shard_size)
    for file, shard in shards.items():
        write_safetensors(out_dir / file, shard, itertools.islice(tensors, len(shard)))
    _write_index(out_dir, "model", shards)


def _write_index(out_dir: Path, prefix: str, shards: Mapping[str, Specs]) -> None:
    """Write the index of several shards, by file name; one file needs none."""
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(map(_n_bytes, shards.values()))},
            "weight_map": {name: file for file, shard in shards.items() for name in shard},
        }
        (out_dir / f"{prefix}{INDEX}").write_text(json.dumps(index, indent=2), encoding="utf-8")


def files_in_shards(path: Path, max_shard_size: int) -> dict[str, str]:
    """Return the sha256 of each file (name -> digest) that `write_sharded` would write for a model.

    The shards have at most `max_shard_size` bytes. Only one row block is in memory at a time.
    """
    checkpoint, digests = Checkpoint(path), {}
    specs = {name: (checkpoint.dtype(name), checkpoint.shape(name)) for name in checkpoint.names}
    for file, shard in _named_shards("model", specs, max_shard_size).items():
        sha256 = hashlib.sha256()
        blocks = (
            checkpoint.read_rows(name, rows)
            for name, (_, shape) in shard.items()
            for rows in row_blocks(shape)
        )
        for piece in _pieces(shard, blocks):
            sha256.update(piece)
        digests[file] = sha256.hexdigest()
    return digests


def _named_shards(prefix: str, specs: Specs, max_shard_size: int) -> dict[str, Specs]:
    """Return the tensors in each shard, by file name."""
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
