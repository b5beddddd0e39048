"""The kernel of every merge: base plus weighted deltas."""

from collections.abc import Sequence

import torch

from optimer_hf.errors import ModelError
from optimer_hf.merging.fast_cpu import add_in_one_pass
from optimer_hf.vectors.forms import Delta, LowRank, to_dense


def add_weighted(
    base: torch.Tensor,
    deltas: Sequence[Delta],
    weights: Sequence[float],
    dtype: torch.dtype | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return base + sum_i weights[i] * deltas[i], accumulated in float32 and rounded once to
    `dtype` (default: base.dtype), or into `out` and its dtype.

    The weighted deltas are summed in order before the base is added, because they are small beside
    it. Dense deltas are multiplied, then added (no fused multiply-add), so every device gives the
    same bits as mergekit's float32 task_arithmetic. Low-rank deltas are multiplied straight into
    the sum and never materialised. A weight of 0 skips its delta, because adding 0 * v would turn
    -0.0 into 0.0, and the result would not equal the base bit for bit.

    Raises ModelError when shapes differ. Source: arXiv 2603.28858.
    """
    dtype = out.dtype if out is not None else dtype or base.dtype
    used = [pair for pair in zip(deltas, weights, strict=True) if pair[1] != 0]
    for delta, _ in used:
        if tuple(delta.shape) != tuple(base.shape):
            raise ModelError(
                f"a delta of shape {list(delta.shape)} cannot be added to a base tensor of shape "
                f"{list(base.shape)}. Use a model of the same architecture and vocabulary."
            )
    kept, factors = [delta for delta, _ in used], [weight for _, weight in used]
    if not used:
        merged = base.to(dtype)
    elif base.device.type != "cpu" or any(isinstance(delta, LowRank) for delta in kept):
        merged = add_in_steps(base, kept, factors, dtype)
    elif out is not None and out.is_contiguous() and dtype in (torch.bfloat16, torch.float32):
        return add_in_one_pass(base, kept, factors, out)
    else:
        wide = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        fresh = torch.empty(base.shape, dtype=wide)
        merged = add_in_one_pass(base, kept, factors, fresh).to(dtype)
    return merged if out is None else out.copy_(merged)


def add_in_steps(
    base: torch.Tensor, deltas: Sequence[Delta], weights: Sequence[float], dtype: torch.dtype
) -> torch.Tensor:
    """Return the sum of `add_weighted`, computed with plain torch operations on any device."""
    wide = base.float()
    total: torch.Tensor | None = None
    for delta, weight in zip(deltas, weights, strict=True):
        if isinstance(delta, LowRank):
            if total is None:
                total = torch.zeros(base.shape, dtype=torch.float32, device=base.device)
            total.addmm_(delta.b, delta.a, alpha=weight * delta.scale)
        elif total is None:
            total = to_dense(delta, wide) * weight
        else:
            total += to_dense(delta, wide) * weight
    merged = wide if total is None else total.add_(wide)
    return merged.to(dtype)
