"""Split tensors into blocks of rows, and compute blocks ahead of their use."""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

CHUNK_ELEMENTS = 2**19  # per row block: 2 MiB in float32, so a sum stays in the CPU cache
GPU_CHUNK_ELEMENTS = 2**24
GPU_THREADS = 2  # one reads while the other's blocks are computed; each takes GPU memory
BLOCKS_AHEAD = 2  # per thread: blocks that are computed before they are written

T = TypeVar("T")


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a tensor as a matrix: the last axis are its columns, all others its rows.

    A vector stays a vector whose rows are its elements, and a scalar is a vector of one element.
    Stacked expert weights get one row for every row of every expert, so a block of rows is small.
    """
    if len(shape) <= 1:
        return (math.prod(shape),)
    return math.prod(shape[:-1]), shape[-1]


def matrix_rows(tensor: torch.Tensor, rows: slice) -> torch.Tensor:
    """Return a view of some rows of a tensor's matrix form."""
    return tensor.view(matrix_shape(tuple(tensor.shape)))[rows]


def row_blocks(shape: tuple[int, ...], device: str = "cpu") -> list[slice]:
    """Split the rows of a tensor's matrix form into blocks (>= 1 row) sized for a device."""
    n_rows, *columns = matrix_shape(shape)
    if 0 in columns:  # rows without elements need no blocks
        return [slice(0, n_rows)]
    n_elements = CHUNK_ELEMENTS if device.startswith("cpu") else GPU_CHUNK_ELEMENTS
    step = max(1, n_elements // max(1, math.prod(columns)))
    return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]


# -- computing -------------------------------------------------------------------------------------


def compute_ahead(
    function: Callable[[str, slice], T],
    arguments: Iterable[tuple[str, slice]],
    device: str = "cpu",
) -> Generator[T]:
    """Yield function(*argument) in order, computing a few results ahead.

    A CPU uses as many threads as torch does; for a GPU, two threads read. Every thread computes
    whole blocks alone. That is faster than sharing a block, where threads wait for each other after
    every operation, and gives the same bits for any number of threads.
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
        torch.set_num_threads(n_torch)  # threads that start later use the latest number
