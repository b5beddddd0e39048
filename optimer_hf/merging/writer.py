"""Write a merged model from a base and vectors, streaming, with the sums of `kernel`.

Only a few row blocks of every input are in memory at a time. One sum over a block shows whether all
its values are finite; only if they are not does the writer look for the cause.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from optimer_hf.errors import ConfigError, ModelError
from optimer_hf.files.staging import staged_directory, write_text
from optimer_hf.files.text import first_line
from optimer_hf.merging.kernel import add_weighted
from optimer_hf.merging.tokenizer import complete_generation_config
from optimer_hf.models.blocks import compute_ahead, row_blocks
from optimer_hf.models.checkpoint import DTYPES, Checkpoint
from optimer_hf.models.layout import MAX_SHARD_SIZE, ResolvedModel, copy_beside_weights
from optimer_hf.models.names import names_kept_wide
from optimer_hf.models.shards import write_sharded
from optimer_hf.models.ties import ties_of
from optimer_hf.vectors.delta import not_finite_error
from optimer_hf.vectors.vector import DistributionVector, dense_rows

logger = logging.getLogger(__name__)


SURVIVAL_BLOCKS = 32
LOW_SURVIVAL = 0.5


def merge_rows(
    base_rows: torch.Tensor,
    name: str,
    rows: slice,
    vectors: Sequence[DistributionVector],
    weights: Mapping[str, float],
    dtype: torch.dtype,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return some rows of one merged tensor in `dtype`, written to `out` if given. Both the
    resident model and the writer use this.
    """
    used = [vector for vector in vectors if weights[vector.name] != 0 and name in vector.names]
    deltas = [vector.delta(name, rows, base_rows.device) for vector in used]
    used_weights = [weights[vector.name] for vector in used]
    return add_weighted(base_rows, deltas, used_weights, dtype, out=out)


# -- the streaming writer --------------------------------------------------------------------------


def write_merged(
    base: ResolvedModel,
    vectors: Sequence[DistributionVector],
    weights: Mapping[str, float],
    out: Path,
    *,
    out_dtype: str | None = None,
    tokenizer: ResolvedModel | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    device: str = "cpu",
    complete: Callable[[Path], None] | None = None,
    replace: bool = False,
) -> None:
    """Write base + sum_i w_i v_i as a model directory that `from_pretrained` loads.

    Every tensor keeps the dtype of the base unless `out_dtype` is given (see `merged_dtypes`).
    Config and licence files come from the base; tokenizer, chat template and generation config come
    from `tokenizer`, or from the base if it is None. `complete` may add files to the staging
    directory. `out` appears whole or not at all; with `replace` it takes the place of an existing
    directory. `device` does the arithmetic. Needs memory for a few row blocks, not for the model.

    Raises ModelError that names tensor and vector for values that are not finite.
    """
    _refuse_missing_device(device)
    checkpoint = Checkpoint(base.path)
    specs = _specs_of(checkpoint, out_dtype)
    used = [vector for vector in vectors if weights[vector.name] != 0]

    def rows_of(name: str, rows: slice) -> torch.Tensor:
        base_rows = checkpoint.read_rows(name, rows)
        if not base_rows.is_floating_point():
            return base_rows
        base_rows = base_rows.to(device)
        merged = merge_rows(base_rows, name, rows, vectors, weights, specs[name][0])
        if not math.isfinite(merged.sum().item()) and not bool(merged.isfinite().all()):
            raise _explain_not_finite(base_rows, name, rows, used, merged.dtype)
        return merged.cpu()

    with staged_directory(out, replace=replace) as staging:
        write_sharded(staging, "model", specs, rows_of, max_shard_size, device)
        copy_beside_weights(base.path, staging, tokenizer=tokenizer.path if tokenizer else None)
        if tokenizer is not None:
            complete_generation_config(staging, tokenizer.path)
        if out_dtype is not None:
            _set_config_dtype(staging / "config.json", out_dtype)
        if complete is not None:
            complete(staging)
    if used:
        _log_survival(surviving_share(checkpoint, vectors, weights, out_dtype), out_dtype)


def _specs_of(
    base: Checkpoint, out_dtype: str | None
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and shape of every tensor of a merge, by name."""
    left_out = ties_of(base).copies  # tied heads, which the model class fills in
    return {
        name: (dtype, base.shape(name))
        for name, dtype in merged_dtypes(base, DTYPES[out_dtype] if out_dtype else None).items()
        if name not in left_out
    }


def merged_dtypes(base: Checkpoint, wanted: torch.dtype | None) -> dict[str, torch.dtype]:
    """Return the dtype of every tensor of a merge, by name: `wanted`, or that of the base if None.

    Whole numbers keep theirs, and so does what the class computes with in float32 whatever the
    dtype of the model, such as the bias that chooses the experts of DeepSeek-V3 and GLM-4.5.
    """
    stored = {name: base.dtype(name) for name in base.names}
    if wanted is None or set(stored.values()) == {wanted}:
        return stored
    kept = names_kept_wide(base, wanted)
    return {
        name: wanted if dtype.is_floating_point and name not in kept else dtype
        for name, dtype in stored.items()
    }


def _log_survival(share: float, out_dtype: str | None) -> None:
    if out_dtype == "float32" and share >= LOW_SURVIVAL:
        return  # there is no wider dtype, and nothing to decide
    logger.info(
        "rounding to %s keeps %.0f %% of the merged change%s",
        out_dtype or "the dtype of the base",
        100 * share,
        "" if share >= LOW_SURVIVAL else "; --out-dtype float32 keeps all of it",
    )


def _refuse_missing_device(device: str) -> None:
    """Raise ConfigError for a device that torch cannot use on this machine."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the second: torch without CUDA
        raise ConfigError(
            f"--device: found {device!r}, which torch cannot use here ({first_line(error)}). Give "
            "cpu."
        ) from None


def surviving_share(
    base: Checkpoint,
    vectors: Sequence[DistributionVector],
    weights: Mapping[str, float],
    out_dtype: str | None,
) -> float:
    """Return the share of sum_i w_i v_i that is left after rounding the merge to its output dtype.

    It is 1 - |stored - exact| / |exact|, where stored is the rounded merge minus the base, or 0 if
    the rounding error is larger than the delta. Measured on SURVIVAL_BLOCKS row blocks that are
    spread evenly over the tensors that move.
    """
    used = [vector for vector in vectors if weights[vector.name] != 0]
    names = sorted(frozenset[str]().union(*(vector.names for vector in used)))
    blocks = [(name, rows) for name in names for rows in row_blocks(base.shape(name))]
    dtypes = merged_dtypes(base, DTYPES[out_dtype] if out_dtype else None)

    def squares_of(name: str, rows: slice) -> tuple[float, float]:
        base_rows = base.read_rows(name, rows).float()
        merged = merge_rows(base_rows, name, rows, used, weights, torch.float32)
        lost = merged.to(dtypes[name]).float() - merged
        return (merged - base_rows).square().sum().item(), lost.square().sum().item()

    sample = blocks[:: -(-len(blocks) // SURVIVAL_BLOCKS)] if blocks else []
    sums = list(compute_ahead(squares_of, sample))
    exact = sum(squares for squares, _ in sums)
    lost = sum(squares for _, squares in sums)
    return max(0.0, 1 - math.sqrt(lost / exact)) if exact else 1.0


def _explain_not_finite(
    base_rows: torch.Tensor,
    name: str,
    rows: slice,
    vectors: Sequence[DistributionVector],
    dtype: torch.dtype,
) -> ModelError:
    """Return an error that names the input which made the values of a merge not finite."""
    base = base_rows.float()
    if not bool(base.isfinite().all()):
        return ModelError(f"base model: tensor {name!r} holds NaN or infinite values.")
    for vector in vectors:
        if name not in vector.names:
            continue
        if not bool(dense_rows(vector, name, rows, base).isfinite().all()):
            return not_finite_error(vector, name)
    return ModelError(
        f"tensor {name!r}: the merged values are too large for {dtype}. Use smaller weights or "
        "another --out-dtype."
    )


def _set_config_dtype(path: Path, dtype: str) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = dtype
    _replace_dtypes(config, dtype)
    write_text(path, json.dumps(config, indent=2))


def _replace_dtypes(config: dict[str, Any], dtype: str) -> None:
    """Replace the dtype of a config, and of its parts (the language model, say) at any depth."""
    if {"dtype", "torch_dtype"} & config.keys():
        config.pop("torch_dtype", None)
        config["dtype"] = dtype
    for name, part in config.items():
        if isinstance(part, dict) and name.endswith("_config") and name != "quantization_config":
            _replace_dtypes(part, dtype)
