"""How many tokens go through a model at once: a budget that follows the free memory of its device.

On a CPU the budget is fixed. On a GPU a probe measures the memory that a token takes. If memory
runs out all the same, the batch is tried again, then half of it, down to a single item.
"""

import logging
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch

from optimer_hf.models.memory import collect_memory, free_memory, lacks_memory

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Answer = TypeVar("Answer")

CPU_TOKENS = 1024
MOST_TOKENS = 2**16  # on a GPU; more do not make it faster
SHARE = 0.5  # of the free memory
SHARE_OF_ALL = 0.25  # of parameters and vectors
PROBE_ROWS, PROBE_LENGTH = 4, 256
LEAST_ACTIVATIONS = 2**26  # bytes that a backward pass on a CPU may always keep
GPU_WORK = 1.5  # what a backward pass takes, next to what it keeps


class Budget:
    """A number of tokens for one batch, which is halved when memory runs out."""

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens

    def answer(
        self,
        items: Sequence[Item],
        cut: Callable[[Iterable[Item], int], Iterator[list[Item]]],
        answer: Callable[[list[Item]], Answer],
    ) -> list[Answer]:
        """Return the answer to every batch, in the order of the items. `cut` splits items into
        batches of a number of tokens.

        Raises what `answer` raises; for lack of memory, only when one item alone does not fit.
        """
        answers: list[Answer] = []
        waiting = deque(cut(items, self.n_tokens))
        while waiting:
            batch = waiting.popleft()
            try:
                answers.append(_try_twice(answer, batch))
            except Exception as error:
                if not lacks_memory(error) or len(batch) == 1:
                    raise
                while len(next(cut(batch, self.n_tokens))) > (len(batch) + 1) // 2:
                    self.n_tokens //= 2
                logger.warning(
                    "a batch of %d items does not fit into memory, going on with %d tokens at once",
                    len(batch),
                    self.n_tokens,
                )
                rest = [item for each in (batch, *waiting) for item in each]
                waiting = deque(cut(rest, self.n_tokens))
        return answers


def _try_twice(answer: Callable[[list[Item]], Answer], batch: list[Item]) -> Answer:
    """Answer a batch; if memory runs out, free what can be freed and try once more."""
    try:
        return answer(batch)
    except Exception as error:
        if not lacks_memory(error):
            raise
    collect_memory()  # the frames that failed, and what they held, are gone by now
    return answer(batch)


def budget_for(
    run: Callable[[torch.Tensor], Any], devices: Sequence[torch.device], per_token: int = 0
) -> Budget:
    """Return the budget for a function that runs a model on token ids [n, length]. The model may be
    spread over several `devices`.

    `per_token` is how many bytes are needed for each token beyond what running it takes. On a GPU
    the number is a power of two, so that it is the same in every run of a study as long as about as
    much memory is free.
    """
    devices = [device for device in devices if device.type == "cuda"]
    if not devices:
        return Budget(CPU_TOKENS)
    ids = torch.zeros((PROBE_ROWS, PROBE_LENGTH), dtype=torch.long, device=devices[0])
    with torch.no_grad():
        run(ids)  # the first call also allocates what libraries keep
        for device in devices:
            torch.cuda.reset_peak_memory_stats(device)
        before = [torch.cuda.memory_allocated(device) for device in devices]
        run(ids)
    peaks = [torch.cuda.max_memory_allocated(device) for device in devices]
    taken = [(peak - held) / ids.numel() for peak, held in zip(peaks, before, strict=True)]
    return Budget(
        min(
            tokens_that_fit(SHARE * free_memory(str(device)), each + per_token)
            for device, each in zip(devices, taken, strict=True)
        )
    )


def gradient_budget(
    model: torch.nn.Module,
    devices: Sequence[torch.device],
    per_token: float,
    pool_bytes: int = 0,
) -> Budget:
    """Return the budget for backward passes through a model that keep `per_token` bytes for each.
    On a CPU the batches get smaller, rather than that a trial takes much more memory with gradients
    than without: what is kept takes half as much as the parameters, or a quarter of what they and
    the vectors of the pool take.
    """
    devices = [device for device in devices if device.type == "cuda"]
    if not devices:
        held = sum(parameter.nbytes for parameter in model.parameters())
        room = max(LEAST_ACTIVATIONS, SHARE * held, SHARE_OF_ALL * (held + pool_bytes))
        return Budget(min(CPU_TOKENS, tokens_that_fit(room, per_token)))
    room = SHARE * min(free_memory(str(device)) for device in devices)
    return Budget(tokens_that_fit(room, GPU_WORK * per_token))


def tokens_that_fit(n_bytes: float, per_token: float) -> int:
    """Return the largest power of two of tokens that fit into memory, from 1 to MOST_TOKENS."""
    n_tokens = MOST_TOKENS
    while n_tokens > 1 and n_tokens * per_token > n_bytes:
        n_tokens //= 2
    return n_tokens


# -- batches ---------------------------------------------------------------------------------------


def padded_batches(
    items: Iterable[Item], n_tokens: int, length: Callable[[Item], int]
) -> Iterator[list[Item]]:
    """Yield items, the longest of which comes first, in batches of at most n_tokens when all are
    padded to the longest; at least one item in each.
    """
    batch: list[Item] = []
    for item in items:
        if batch and (len(batch) + 1) * length(batch[0]) > n_tokens:
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def packed_batches(
    items: Iterable[Item], n_tokens: int, length: Callable[[Item], int], row_length: int
) -> Iterator[list[Item]]:
    """Yield items, the longest of which comes first, in batches of at most n_tokens, without those
    that fill up rows. Items that share rows of `row_length` share no batch with longer ones, which
    are padded.
    """
    every = list(items)
    n_long = bisect_left(every, -row_length, key=lambda item: -length(item))
    yield from padded_batches(every[:n_long], n_tokens, length)
    batch: list[Item] = []
    n_taken = 0
    for item in every[n_long:]:
        if batch and n_taken + length(item) > n_tokens:
            yield batch
            batch, n_taken = [], 0
        batch.append(item)
        n_taken += length(item)
    if batch:
        yield batch


def pack_rows(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """Put items of some lengths, the longest of which comes first, into rows, each into the fullest
    row that has room for it; return the places of the items by row.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free places, row), sorted
    for index, length in enumerate(lengths):
        at = bisect_left(room, (length, -1))
        if at == len(room):
            free, row = row_length, len(rows)
            rows.append([])
        else:
            free, row = room.pop(at)
        rows[row].append(index)
        insort(room, (free - length, row))
    return rows
