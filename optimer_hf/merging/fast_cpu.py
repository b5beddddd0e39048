"""The kernel as one compiled pass over memory, for CPUs, with the same bits as `add_in_steps`.

numba earns its place: torch operations, one after the other, read and write every block each time,
which slows both `set_weights` and a merge from disk to disk.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
import torch
from numba.extending import intrinsic

from optimer_hf.vectors.forms import Delta, LowRank, Trained

TILE = 1024  # three float32 tiles take 12 KiB


# -- one pass on a CPU -----------------------------------------------------------------------------


def add_in_one_pass(
    base: torch.Tensor, deltas: Sequence[Delta], weights: Sequence[float], out: torch.Tensor
) -> torch.Tensor:
    """Write the sum of `add_weighted` to `out` (contiguous, bfloat16 or float32) and return it."""
    inputs = [
        _as_float(delta.tensor if isinstance(delta, Trained) else delta)
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


def _as_float(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in a form that the pass reads: contiguous, bfloat16 or float32."""
    wide = tensor if tensor.dtype in (torch.bfloat16, torch.float32) else tensor.float()
    return wide.contiguous()


@intrinsic  # type: ignore[untyped-decorator]
def _at(_context: Any, _address: Any, number: Any) -> Any:
    """Return a typed pointer to an address; numba has no cast for this."""
    pointer = numba.types.CPointer(number.dtype)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return pointer(numba.types.intp, number), generate


@intrinsic  # type: ignore[untyped-decorator]
def _as_float32(_context: Any, bits: Any) -> Any:
    """Reinterpret 32 bits as a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))

    return numba.types.float32(numba.types.uint32), generate


@intrinsic  # type: ignore[untyped-decorator]
def _as_bits(_context: Any, number: Any) -> Any:
    """Reinterpret a float32 as 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(signature.return_type))

    return numba.types.uint32(numba.types.float32), generate


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function for this CPU when it is first called; it runs without the GIL."""
    try:
        return numba.njit(nogil=True, cache=True)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # no writable cache: compiling takes two seconds in every process
        return numba.njit(nogil=True)(function)  # type: ignore[no-any-return]


@_compile
def _one_pass(
    addresses: np.ndarray[Any, Any],
    is_bfloat16: np.ndarray[Any, Any],
    is_trained: np.ndarray[Any, Any],
    weights: np.ndarray[Any, Any],
    n: int,
) -> None:  # pragma: no cover
    """Merge n numbers. Addresses and dtypes belong to the output, the base and the deltas."""
    base, total = np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    zero = np.zeros(TILE, np.float32)
    for start in range(0, n, TILE):
        m = min(TILE, n - start)
        total[:] = np.float32(-0.0)  # the only number that changes no other when added
        base[:] = np.float32(-0.0)
        _add(addresses[1], is_bfloat16[1], start, m, zero, np.float32(1), base)
        for i in range(len(weights)):
            origin = base if is_trained[i] else zero
            _add(addresses[2 + i], is_bfloat16[2 + i], start, m, origin, weights[i], total)
        _write(base, total, addresses[0], is_bfloat16[0], start, m)


@_compile
def _add(
    address: int,
    is_bfloat16: bool,
    start: int,
    n: int,
    origin: np.ndarray[Any, Any],
    weight: float,
    total: np.ndarray[Any, Any],
) -> None:  # pragma: no cover
    """Add weight * (numbers - origin) to a tile; the numbers start at `address` + `start`."""
    if is_bfloat16:  # the upper half of a float32
        halves = numba.carray(_at(address + 2 * start, np.uint16), TILE)
        for j in range(n):
            number = _as_float32(np.uint32(halves[j]) << np.uint32(16))
            total[j] += (number - origin[j]) * weight
    else:
        wholes = numba.carray(_at(address + 4 * start, np.float32), TILE)
        for j in range(n):
            total[j] += (wholes[j] - origin[j]) * weight


@_compile
def _write(
    base: np.ndarray[Any, Any],
    total: np.ndarray[Any, Any],
    address: int,
    is_bfloat16: bool,
    start: int,
    n: int,
) -> None:  # pragma: no cover
    """Write base + total. bfloat16 is rounded to nearest, ties to even."""
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
