"""Write vectors as deltas (trained minus base), and measure their norms and rounding errors."""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch

from optimer_hf.errors import ModelError
from optimer_hf.files.staging import staged_directory
from optimer_hf.files.versions import versions
from optimer_hf.models.blocks import matrix_shape, row_blocks
from optimer_hf.models.checkpoint import DTYPES, Checkpoint
from optimer_hf.models.layout import (
    VECTOR_FILE,
    ResolvedModel,
    copy_beside_weights,
    copy_tokenizer,
    weight_digests,
)
from optimer_hf.models.shards import write_sharded
from optimer_hf.models.ties import ties_of
from optimer_hf.models.union import UnionRecord
from optimer_hf.models.vocabulary import write_vocabulary_size
from optimer_hf.printable import warn_once
from optimer_hf.vectors.alignment import rows_of_base, subtract_from, token_tensors
from optimer_hf.vectors.int8 import BLOCK_SIZE, SCALES, n_blocks, quantize
from optimer_hf.vectors.opening import open_vector, read_record_for_base, warn_of_another_base
from optimer_hf.vectors.peft import merge_with_peft
from optimer_hf.vectors.record import QUANTISED, BaseRecord, VectorFile
from optimer_hf.vectors.tokens import TokensOfVector, open_with_tokens
from optimer_hf.vectors.training_record import read_training
from optimer_hf.vectors.vector import DeltaVector, DistributionVector, Tensors, dense_rows

logger = logging.getLogger(__name__)

N_SAMPLED = 8  # row blocks that tell the size of a vector well enough for a warning


# -- size and storage ------------------------------------------------------------------------------


def delta_blocks(
    vector: DistributionVector, base: Tensors, name: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the delta and the base of one tensor in float32, one row block at a time."""
    for rows in row_blocks(base.shape(name)):
        base_rows = base.read_rows(name, rows).float()
        yield dense_rows(vector, name, rows, base_rows), base_rows


def measure_norms(vector: DistributionVector, base: Tensors) -> tuple[float, float]:
    """Return the Frobenius norm of the delta, and its ratio to the norm of the base.

    The ratio counts only the base tensors that the delta moves; an adapter moves few of them.
    Raises a ModelError that names the tensor if the delta or the base is not finite.
    """
    squares = base_squares = 0.0
    for name in sorted(vector.names):
        here = 0.0
        for delta, base_rows in delta_blocks(vector, base, name):
            here += _sum_of_squares(delta)
            base_squares += _sum_of_squares(base_rows)
        if not math.isfinite(base_squares):
            raise ModelError(f"base model: tensor {name!r} holds NaN or infinite values.")
        if not math.isfinite(here):
            raise not_finite_error(vector, name)
        squares += here
    relative = math.sqrt(squares / max(base_squares, 1e-30))
    warn_of_norm(vector.name, math.sqrt(squares), relative)
    return math.sqrt(squares), relative


_warns: ContextVar[bool] = ContextVar("warns", default=True)


@contextmanager
def allow_any_norm() -> Iterator[None]:
    """Give no warning of `warn_of_norm` inside a `with` statement: for vectors that nobody trained,
    whose size is no mistake.
    """
    token = _warns.set(False)
    try:
        yield
    finally:
        _warns.reset(token)


def warn_of_norm(name: str, norm: float, relative: float, *, sample: str = "") -> None:
    """Warn of a vector that is larger than the base tensors it moves, and of one that is zero.
    `sample` says which part of it was read, if not all of it.
    """
    if not _warns.get():
        return
    if relative > 1:
        warn_once(
            logger,
            f"vector {name}: its delta is larger than the base tensors it moves "
            f"({100 * relative:.0f} %{sample}). Check that this is its base, and that the learning "
            "rate was not too high.",
        )
    if norm == 0:
        warn_once(
            logger,
            f"vector {name}: it is zero and moves nothing. Check that it was trained: a run of "
            "very few steps can end before its learning rate has risen above zero.",
        )


def warn_of_norms(vectors: Sequence[DistributionVector], base: Tensors) -> None:
    """Warn of vectors as `warn_of_norm` does, judging each by N_SAMPLED pieces that are spread over
    its matrices, so only of one that is at least twice as large there. One that is zero there is
    read on until a number is not.
    """
    for vector in vectors:
        matrices = sorted(name for name in vector.names if len(base.shape(name)) > 1)
        others = sorted(vector.names.difference(matrices))
        names = matrices or others
        step = -(-len(names) // N_SAMPLED) or 1
        squares = base_squares = 0.0
        for name in names[::step]:
            for delta, base_rows in islice(delta_blocks(vector, base, name), 1):
                squares += _sum_of_squares(delta)
                base_squares += _sum_of_squares(base_rows)
        if squares == 0:
            if _is_zero(vector, base, matrices + others):
                warn_of_norm(vector.name, 0.0, 0.0)
        elif math.isfinite(squares) and math.isfinite(base_squares):
            relative = math.sqrt(squares / max(base_squares, 1e-30))
            norm, shown = math.sqrt(squares), relative if relative > 2 else 0.0
            warn_of_norm(vector.name, norm, shown, sample=" in a sample of them")


def _is_zero(vector: DistributionVector, base: Tensors, names: Sequence[str]) -> bool:
    """Whether a vector moves none of some tensors. The first piece of each is read before the rest,
    since whole tensors can be frozen.
    """
    first = (islice(delta_blocks(vector, base, name), 1) for name in names)
    rest = (islice(delta_blocks(vector, base, name), 1, None) for name in names)
    return not any(delta.any() for blocks in (*first, *rest) for delta, _ in blocks)


def _sum_of_squares(tensor: torch.Tensor) -> float:
    return tensor.double().square().sum().item()


def not_finite_error(vector: DistributionVector, name: str) -> ModelError:
    """Return the error for a vector with NaN or infinite values in a tensor."""
    return ModelError(
        f"vector {vector.name!r}: its delta holds NaN or infinite values (tensor {name!r}). "
        "Retrain it, or drop it."
    )


def write_record(
    path: Path, base: ResolvedModel, *, name: str, kind: Literal["adapter", "checkpoint"]
) -> VectorFile:
    """Write vector.json beside a trained adapter or checkpoint, and return it."""
    (path / VECTOR_FILE).unlink(missing_ok=True)
    record = describe_vector(path, base, name=name, kind=kind)
    record.write(path / VECTOR_FILE)
    return record


def describe_vector(
    path: Path, base: ResolvedModel, *, name: str, kind: Literal["adapter", "checkpoint"]
) -> VectorFile:
    """Return the vector.json of an adapter or checkpoint that has none. Its weights are read once.

    It includes the corpus, settings and versions from training.json, if there is one. If the base
    is a copy with added tokens, it names the model that was copied, and the norm is that of the
    difference to the copy.
    """
    trained = read_training(path)
    vector = open_vector(name, str(path.resolve()), base)
    union, origin = UnionRecord.of(base.path), BaseRecord.of(base)
    if union is not None:
        origin = origin.model_copy(update={"files": union.base})
    norm, relative_norm = measure_norms(vector, Checkpoint(base.path))
    return VectorFile(
        name=name,
        kind=kind,
        base=origin,
        norm=norm,
        relative_norm=relative_norm,
        corpus=trained.corpus if trained else None,
        training=trained.training if trained else None,
        versions=trained.versions if trained else {},
    )


def extract(
    vector: DistributionVector,
    base: ResolvedModel,
    out: Path,
    *,
    dtype: str = "bfloat16",
    block_size: int = BLOCK_SIZE,
    max_shard_size: int = 5 * 10**9,
    source: Path | None = None,
    replace: bool = False,
    tokens: TokensOfVector | None = None,
) -> VectorFile:
    """Write a vector as a delta directory; return its record, with the relative rounding error.

    In a floating-point dtype, it has every tensor of the base (zeros if nothing moved), so mergekit
    can read it as a model. In `int8`, it has only tensors that moved, with one scale per
    `block_size` numbers. A delta keeps its own exponent, so bfloat16 changes each number by at most
    a factor of 2^-8. The record names the weights in `source` (None: those of the vector). With
    `replace`, `out` is overwritten. With the `tokens` of an unaligned vector, the delta has their
    rows in their order, and their tokenizer; rows that the base lacks are stored whole. Memory: a
    few row blocks.
    """
    checkpoint: Tensors = Checkpoint(base.path)
    weights = weight_digests(vector.path if source is None else source)
    if tokens is not None:
        checkpoint = rows_of_base(vector, tokens.ids, Checkpoint(base.path))
        vector = subtract_from(vector, checkpoint)
    norm, relative_norm = measure_norms(vector, checkpoint)
    with staged_directory(out, replace=replace) as staging:
        if dtype == QUANTISED:
            stored = _write_quantised(vector, checkpoint, staging, block_size, max_shard_size)
        else:
            stored = _write_dense(vector, checkpoint, staging, DTYPES[dtype], max_shard_size)
        _copy_files(vector.path, base.path, staging, is_model=dtype != QUANTISED, tokens=tokens)
        total, errors = relative_errors(vector, stored, checkpoint)
        record = VectorFile(
            name=vector.name,
            kind="delta",
            base=BaseRecord.of(base),
            source_files=weights,
            dtype=dtype,
            block_size=block_size if dtype == QUANTISED else None,
            added_tokens=None if tokens is None else tokens.without_row_in(base),
            norm=norm,
            relative_norm=relative_norm,
            relative_error=total,
            relative_errors=errors,
            versions=versions(),
        )
        record.write(staging / VECTOR_FILE)
    return record


def _copy_files(
    vector: Path, base: Path, out: Path, *, is_model: bool, tokens: TokensOfVector | None
) -> None:
    """Copy what belongs beside a delta: the files of a model if it can be read as one, and the
    tokenizer of the vector if its rows are in its order.
    """
    if is_model:
        copy_beside_weights(base, out, tokenizer=None if tokens is None else vector)
    elif tokens is not None:
        copy_tokenizer(vector, out)
    if is_model and tokens is not None:
        stored = Checkpoint(out)
        write_vocabulary_size(out, max(stored.shape(n)[0] for n in token_tensors(Checkpoint(base))))


def extract_any_adapter(
    name: str, adapter: ResolvedModel, base: ResolvedModel, out: Path, **options: Any
) -> VectorFile:
    """Write any adapter that PEFT can merge (DoRA, IA3, ...) as a delta directory.

    The whole model is in memory, in float32. `options` go to `extract`.
    """
    recorded = read_record_for_base(name, str(adapter.path), adapter.path, base)
    with merge_with_peft(adapter.path, base.path) as merged:
        if recorded is None:
            warn_of_another_base(name, adapter.path, base)
        vector, tokens = open_with_tokens(name, str(merged), base)
        return extract(vector, base, out, source=adapter.path, tokens=tokens, **options)


def _write_dense(
    vector: DistributionVector,
    base: Tensors,
    out: Path,
    dtype: torch.dtype,
    max_shard_size: int,
) -> DeltaVector:
    """Write a delta in a floating-point dtype, and return it as it is stored."""
    moved, ties = vector.names, ties_of(Checkpoint(base.path))

    def rows_of(key: str, rows: slice) -> torch.Tensor:
        name = ties.source_of(key)  # copies get the same delta, so they stay equal in mergekit
        base_rows = base.read_rows(name, rows)
        if name not in moved:
            return torch.zeros(base_rows.shape, dtype=dtype)
        return dense_rows(vector, name, rows, base_rows).to(dtype)

    specs = {name: (dtype, base.shape(name)) for name in base.names}
    write_sharded(out, "model", specs, rows_of, max_shard_size)
    return DeltaVector(vector.name, Checkpoint(out))


def _write_quantised(
    vector: DistributionVector, base: Tensors, out: Path, block_size: int, max_shard_size: int
) -> DeltaVector:
    """Write a delta as int8 numbers and scales, and return it as it is stored.

    One-dimensional tensors (norms, biases) stay in float32.
    """
    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name in sorted(vector.names):
        shape = base.shape(name)
        if len(shape) < 2:
            specs[name] = (torch.float32, shape)
            continue
        specs[name] = (torch.int8, shape)
        scales_shape = (*shape[:-1], n_blocks(shape[-1], block_size))
        specs[f"{name}{SCALES}"] = (torch.bfloat16, scales_shape)

    def delta_rows(name: str, rows: slice) -> torch.Tensor:
        return dense_rows(vector, name, rows, base.read_rows(name, rows))

    def rows_of(key: str, rows: slice) -> torch.Tensor:
        if not key.endswith(SCALES):
            delta = delta_rows(key, rows)
            return delta if delta.dim() < 2 else quantize(delta, block_size)[0]
        name = key.removesuffix(SCALES)
        _, columns = matrix_shape(base.shape(name))
        parts = [  # a block of scales covers many blocks of the delta
            slice(rows.start + part.start, rows.start + part.stop)
            for part in row_blocks((rows.stop - rows.start, columns))
        ]
        return torch.cat([quantize(delta_rows(name, part), block_size)[1] for part in parts])

    write_sharded(out, "vector", specs, rows_of, max_shard_size)
    return DeltaVector(vector.name, Checkpoint(out, "vector"), block_size)


def relative_errors(
    vector: DistributionVector, stored: DistributionVector, base: Tensors
) -> tuple[float, dict[str, float]]:
    """Return |stored - vector| / |vector| in total and by tensor (0 if nothing moved)."""
    squares = error_squares = 0.0
    by_tensor = {}
    for name in sorted(vector.names):
        here = error_here = 0.0
        for rows in row_blocks(base.shape(name)):
            base_rows = base.read_rows(name, rows).float()
            exact = dense_rows(vector, name, rows, base_rows)
            here += _sum_of_squares(exact)
            error_here += _sum_of_squares(dense_rows(stored, name, rows, base_rows) - exact)
        by_tensor[name] = math.sqrt(error_here / here) if here else 0.0
        squares += here
        error_squares += error_here
    return math.sqrt(error_squares / squares) if squares else 0.0, by_tensor
