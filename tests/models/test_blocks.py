"""Blocks of rows: they cover every tensor, and are computed ahead in order."""

import math
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optimer_hf.errors import ModelError
from optimer_hf.models import blocks as blocks_module
from optimer_hf.models.blocks import compute_ahead, matrix_shape, row_blocks


@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(1, 200))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_row_blocks_cover_every_row_once_and_stay_small(monkeypatch, shape, chunk):
    monkeypatch.setattr(blocks_module, "CHUNK_ELEMENTS", chunk)
    blocks = row_blocks(tuple(shape))
    n_rows, *columns_of = matrix_shape(tuple(shape))
    rows = [row for block in blocks for row in range(n_rows)[block]]
    assert rows == list(range(n_rows))
    columns = math.prod(columns_of)
    assert n_rows * columns == math.prod(shape)
    assert all((block.stop - block.start) * columns <= max(chunk, columns) for block in blocks)


def test_a_scalar_is_one_block():
    assert torch.tensor(3.0)[()] == 3.0
    assert row_blocks(()) == [slice(0, 1)]


def test_blocks_are_computed_by_several_threads_and_come_in_order():
    seen: set[int] = set()
    both = threading.Barrier(2, timeout=30)  # two blocks are under way at the same time
    threads = torch.get_num_threads()
    torch.set_num_threads(2)

    def compute(name: str, rows: slice) -> str:
        seen.add(threading.get_ident())
        both.wait()
        assert torch.get_num_threads() == 1
        return f"{name}{rows.start}"

    try:
        arguments = [(name, slice(i, i + 1)) for name in "ab" for i in range(6)]
        results = list(compute_ahead(compute, arguments))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert results == [f"{name}{rows.start}" for name, rows in arguments]
    assert len(seen) == 2
    assert threading.get_ident() not in seen


def test_an_error_in_a_thread_stops_the_rest():
    started = []
    threads = torch.get_num_threads()

    def compute(name: str, rows: slice) -> None:
        started.append(rows.start)
        if rows.start == 3:
            raise ModelError("three")

    with pytest.raises(ModelError, match="three"):
        list(compute_ahead(compute, [("x", slice(i, i + 1)) for i in range(10_000)]))
    assert len(started) < 100 * threads
    assert torch.get_num_threads() == threads
