"""batching.py: batches within a budget of tokens, rows that inputs share, and too little memory."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optimer_hf.scoring import batching
from optimer_hf.scoring.batching import (
    MOST_TOKENS,
    Budget,
    budget_for,
    pack_rows,
    packed_batches,
    padded_batches,
    tokens_that_fit,
)

NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    MemoryError("Unable to allocate 2.00 GiB"),
]


def cut(items, n_tokens):
    return padded_batches(items, n_tokens, lambda item: item)


class Scarce:
    """Answers batches of up to `most` tokens, and only from the call `first_free` on."""

    def __init__(self, error: Exception, *, most: int = 10**9, first_free: int = 0) -> None:
        self.error, self.most, self.first_free = error, most, first_free
        self.batches: list[list[int]] = []

    def __call__(self, batch: list[int]) -> list[int]:
        self.batches.append(list(batch))
        if len(self.batches) <= self.first_free or len(batch) * batch[0] > self.most:
            raise self.error
        return [-item for item in batch]


@pytest.mark.parametrize(("n_tokens", "sizes"), [(1024, [1, 2, 3]), (4096, [6])])
def test_a_batch_holds_as_many_tokens_as_are_given(n_tokens, sizes):
    lengths = [600, 500, 400, 300, 200, 100]
    batches = list(cut(lengths, n_tokens))
    assert [len(batch) for batch in batches] == sizes
    assert [length for batch in batches for length in batch] == lengths


def test_an_input_longer_than_a_batch_is_a_batch_of_its_own():
    assert [len(batch) for batch in cut([5000, 2000, 10], 1024)] == [1, 1, 1]
    assert list(cut([], 1024)) == []


def test_inputs_that_share_rows_share_no_batch_with_longer_ones():
    lengths = [900, 513, 512, 512, 300, 200, 100, 100]
    batches = packed_batches(lengths, 1024, lambda length: length, 512)
    assert list(batches) == [[900], [513], [512, 512], [300, 200, 100, 100]]


@given(st.lists(st.integers(1, 64), max_size=200))
def test_every_item_gets_a_place_of_its_own_and_few_places_stay_free(lengths):
    lengths = sorted(lengths, reverse=True)
    rows = pack_rows(lengths, 64)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    fills = [sum(lengths[index] for index in row) for row in rows]
    assert all(fill <= 64 for fill in fills)
    # best fit: at most one row is at most half full
    assert sum(fill <= 32 for fill in fills) <= 1


def test_tokens_fit_by_powers_of_two():
    assert tokens_that_fit(1e12, 1) == MOST_TOKENS
    assert tokens_that_fit(5000, 1) == 4096
    assert tokens_that_fit(0, 1) == 1


def test_a_cpu_needs_no_probe():
    assert budget_for(pytest.fail, [torch.device("cpu")]).n_tokens == batching.CPU_TOKENS


@pytest.mark.parametrize("error", NO_MEMORY, ids=lambda error: type(error).__name__)
def test_a_batch_without_memory_is_tried_once_more_after_freeing(error, monkeypatch):
    freed = []
    monkeypatch.setattr(batching, "collect_memory", lambda: freed.append(True))
    run, budget = Scarce(error, first_free=1), Budget(100)
    assert budget.answer([30, 20, 10], cut, run) == [[-30, -20, -10]]
    assert run.batches == [[30, 20, 10], [30, 20, 10]] and freed == [True]
    assert budget.n_tokens == 100


def test_then_half_the_budget_is_used_and_stays_in_use(caplog):
    run, budget = Scarce(NO_MEMORY[0], most=60), Budget(100)
    assert budget.answer([30, 20, 10], cut, run) == [[-30], [-20, -10]]
    assert run.batches == [[30, 20, 10], [30, 20, 10], [30], [20, 10]]
    assert budget.n_tokens == 50
    assert "a batch of 3 items does not fit into memory, going on with 50 tokens" in caplog.text
    budget.answer([30, 20, 10], cut, run)
    assert run.batches[4:] == [[30], [20, 10]]


@pytest.mark.parametrize("n_halvings", [1, 2, 3])
def test_answers_stay_in_order_however_often_the_budget_is_halved(n_halvings):
    items = list(range(8, 0, -1))
    run, budget = Scarce(NO_MEMORY[0], most=64 >> n_halvings), Budget(64)
    parts = budget.answer(items, cut, run)
    assert [answer for part in parts for answer in part] == [-item for item in items]
    assert budget.n_tokens == 64 >> n_halvings


def test_one_item_that_does_not_fit_raises_what_was_raised():
    run = Scarce(NO_MEMORY[0], most=5)
    with pytest.raises(torch.OutOfMemoryError):
        Budget(64).answer([8, 4], cut, run)
    assert run.batches[-2:] == [[8], [8]]


def test_any_other_failure_passes_at_once():
    run = Scarce(RuntimeError("shapes do not match"), most=0)
    with pytest.raises(RuntimeError, match="shapes"):
        Budget(64).answer([8, 4], cut, run)
    assert len(run.batches) == 1
