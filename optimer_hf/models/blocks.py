"""Tensors as blocks of rows: how many rows fit, and blocks computed ahead of their use."""

import math
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

CHUNK_ELEMENTS = 2**19  # of one row block: 2 MiB in float32, so that a sum stays in a CPU's cache
GPU_CHUNK_ELEMENTS = 2**24
GPU_THREADS = 2  # one reads while the other's blocks are computed; each holds some of GPU memory
BLOCKS_AHEAD = 2  # computed before they are written, per thread

T = TypeVar("T")


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


def row_blocks(shape: tuple[int, ...], device: str = "cpu") -> list[slice]:
    """Split the rows of a tensor's matrix form into blocks (>= 1 row) that suit a device."""
    n_rows, *columns = matrix_shape(shape)
    if 0 in columns:  # rows without elements need no blocks
        return [slice(0, n_rows)]
    n_elements = CHUNK_ELEMENTS if device.startswith("cpu") else GPU_CHUNK_ELEMENTS
    step = max(1, n_elements // max(1, math.prod(columns)))
    return [slice(start, min(start + step, n_rows)) for start in range(0, n_rows, step)]


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
