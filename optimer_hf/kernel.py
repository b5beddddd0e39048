"""The one kernel, and the three forms a delta has while it is merged.

    theta(w) = theta_base + sum_i  w_i * v_i

Rows of the base and of every delta come in, rows of the merge go out. A delta is a tensor (any
dtype), a trained tensor whose delta is itself minus the base (`Trained`), or a product of two
factors (`LowRank`). What a reader would not guess: on a CPU a sum of dense deltas is one pass over
memory, compiled at first use, in tiles that stay in the first-level cache; torch, one pass for
every operation, needs 4 to 8 times as long. `add_in_steps` is the plain form of the same sum, for
everything else, and the reference that the tests compare the pass with, bit for bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from numba.extending import intrinsic

from optimer_hf.errors import ModelError

TILE = 1024  # numbers: three float32 tiles take 12 KiB


@dataclass(frozen=True)
class LowRank:
    """Rows of a delta as a product: scale * (b @ a), with b [rows, r] and a [r, columns] in
    float32.
    """

    b: torch.Tensor
    a: torch.Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the product."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def n_bytes(self) -> int:
        """Size of the factors."""
        return self.b.nbytes + self.a.nbytes

    def dense(self) -> torch.Tensor:
        """Return the rows as one float32 tensor."""
        return (self.b @ self.a) * self.scale

    def to(self, device: torch.device | str) -> "LowRank":
        """Return the factors on a device."""
        return LowRank(self.b.to(device), self.a.to(device), self.scale)


@dataclass(frozen=True)
class Trained:
    """Rows of a tensor as they are after training, in the dtype of the file; their delta is
    themselves minus the base.
    """

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(self.tensor.shape)

    @property
    def n_bytes(self) -> int:
        """Size of the tensor."""
        return self.tensor.nbytes

    def to(self, device: torch.device | str) -> "Trained":
        """Return the tensor on a device."""
        return Trained(self.tensor.to(device))


Delta = torch.Tensor | Trained | LowRank


def dense(delta: Delta, base: torch.Tensor) -> torch.Tensor:
    """Return a delta as a float32 tensor, whatever its form; `base` holds the same rows of the
    base.
    """
    if isinstance(delta, LowRank):
        return delta.dense()
    if isinstance(delta, Trained):
        return delta.tensor.float() - base.float()
    return delta.float()


def add_weighted(
    base: torch.Tensor,
    deltas: Sequence[Delta],
    weights: Sequence[float],
    dtype: torch.dtype | None = None,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return base + sum_i weights[i] * deltas[i] in float32, rounded once to dtype (None:
    base.dtype), or to `out` and its dtype.

    The weighted deltas are summed in order, then added to the base: deltas are small beside it.
    Dense ones are multiplied, then added (no fused multiply-add), so that every device gives the
    same bits, and those of mergekit's float32 task_arithmetic. A low-rank delta is multiplied
    straight into the sum, which never holds it. A weight of 0 skips its delta: adding 0 * v would
    turn -0.0 into 0.0, and w = 0 would not be the base bit for bit. Raises ModelError for shapes
    that differ. Source: arXiv 2603.28858.
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
        return _add_in_one_pass(base, kept, factors, out)
    else:
        wide = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        fresh = torch.empty(base.shape, dtype=wide)
        merged = _add_in_one_pass(base, kept, factors, fresh).to(dtype)
    return merged if out is None else out.copy_(merged)


def add_in_steps(
    base: torch.Tensor, deltas: Sequence[Delta], weights: Sequence[float], dtype: torch.dtype
) -> torch.Tensor:
    """Return the sum of `add_weighted`, one torch operation after the other, on any device."""
    wide = base.float()
    total: torch.Tensor | None = None
    for delta, weight in zip(deltas, weights, strict=True):
        if isinstance(delta, LowRank):
            if total is None:
                total = torch.zeros(base.shape, dtype=torch.float32, device=base.device)
            total.addmm_(delta.b, delta.a, alpha=weight * delta.scale)
        elif total is None:
            total = dense(delta, wide) * weight
        else:
            total += dense(delta, wide) * weight
    merged = wide if total is None else total.add_(wide)
    return merged.to(dtype)


# -- one pass on a CPU -----------------------------------------------------------------------------


def _add_in_one_pass(
    base: torch.Tensor, deltas: Sequence[Delta], weights: Sequence[float], out: torch.Tensor
) -> torch.Tensor:
    """Write the sum to `out`, contiguous, bfloat16 or float32, and return it."""
    inputs = [
        _readable(delta.tensor if isinstance(delta, Trained) else delta)
        for delta in (base, *deltas)
        if not isinstance(delta, LowRank)
    ]
    _one_pass(
        np.array([tensor.data_ptr() for tensor in (out, *inputs)], dtype=np.intp),
        np.array([tensor.dtype == torch.bfloat16 for tensor in (out, *inputs)]),
        np.array([isinstance(delta, Trained) for delta in deltas]),
        np.array(weights, dtype=np.float32),
        base.numel(),
    )
    return out


def _readable(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor as the pass reads it: contiguous, bfloat16 or float32."""
    wide = tensor if tensor.dtype in (torch.bfloat16, torch.float32) else tensor.float()
    return wide.contiguous()


@intrinsic  # type: ignore[untyped-decorator]
def _at(_context: Any, _address: Any, number: Any) -> Any:
    """Return a pointer to numbers of a type at an address; numba has no cast for it."""
    pointer = numba.types.CPointer(number.dtype)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return pointer(numba.types.intp, number), generate


@intrinsic  # type: ignore[untyped-decorator]
def _as_float32(_context: Any, bits: Any) -> Any:
    """Return the float32 that 32 bits stand for."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))

    return numba.types.float32(numba.types.uint32), generate


@intrinsic  # type: ignore[untyped-decorator]
def _as_bits(_context: Any, number: Any) -> Any:
    """Return the 32 bits of a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))

    return numba.types.uint32(numba.types.float32), generate


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function at its first call, outside the interpreter lock, for this CPU."""
    try:
        return numba.njit(nogil=True, cache=True)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # nowhere to keep what was compiled: two seconds in every process
        return numba.njit(nogil=True)(function)  # type: ignore[no-any-return]


@_compiled
def _one_pass(
    addresses: np.ndarray[Any, Any],
    is_bfloat16: np.ndarray[Any, Any],
    is_trained: np.ndarray[Any, Any],
    weights: np.ndarray[Any, Any],
    n: int,
) -> None:  # pragma: no cover
    """Merge n numbers; addresses and dtypes are those of output, base and deltas, in this order."""
    base, total = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    zero = np.zeros(TILE, np.float32)
    for start in range(0, n, TILE):
        m = min(TILE, n - start)
        total[:] = np.float32(-0.0)  # the one number that changes no other when it is added
        base[:] = np.float32(-0.0)
        _add(addresses[1], is_bfloat16[1], start, m, zero, np.float32(1), base)
        for i in range(len(weights)):
            origin = base if is_trained[i] else zero
            _add(addresses[2 + i], is_bfloat16[2 + i], start, m, origin, weights[i], total)
        _write(base, total, addresses[0], is_bfloat16[0], start, m)


@_compiled
def _add(
    address: int,
    is_bfloat16: bool,
    start: int,
    n: int,
    origin: np.ndarray[Any, Any],
    weight: float,
    total: np.ndarray[Any, Any],
) -> None:  # pragma: no cover
    """Add weight * (numbers - origin) to a tile; the numbers lie at an address, from `start` on."""
    if is_bfloat16:  # the upper half of a float32
        halves = numba.carray(_at(address + 2 * start, np.uint16), TILE)
        for j in range(n):
            number = _as_float32(np.uint32(halves[j]) << np.uint32(16))
            total[j] += (number - origin[j]) * weight
    else:
        wholes = numba.carray(_at(address + 4 * start, np.float32), TILE)
        for j in range(n):
            total[j] += (wholes[j] - origin[j]) * weight


@_compiled
def _write(
    base: np.ndarray[Any, Any],
    total: np.ndarray[Any, Any],
    address: int,
    is_bfloat16: bool,
    start: int,
    n: int,
) -> None:  # pragma: no cover
    """Write base + total; as bfloat16, rounded to nearest, ties to even."""
    if is_bfloat16:
        halves = numba.carray(_at(address + 2 * start, np.uint16), TILE)
        for j in range(n):
            bits = _as_bits(total[j] + base[j])
            odd = (bits >> np.uint32(16)) & np.uint32(1)
            is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
            rounded = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
            halves[j] = np.uint16(0x7FC0) if is_nan else np.uint16(rounded)
    else:
        wholes = numba.carray(_at(address + 4 * start, np.float32), TILE)
        for j in range(n):
            wholes[j] = total[j] + base[j]
