"""Token sequences -> log-likelihoods of their ends, without materialising the logits.

On a CPU every input is a row of its own, padded on the right. On a GPU short inputs share rows:
positions restart at each one, so that attention keeps them apart, and a few large launches compute
no padding. Batches stay on the device from trial to trial, and a trial waits for the device once.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache, partial
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np
import torch

from optimer_hf.errors import EvaluationError
from optimer_hf.models.activations import activation_bytes, recompute_layers
from optimer_hf.models.head_loss import differentiable_log_probabilities, log_probabilities
from optimer_hf.models.placement import devices_of, input_device
from optimer_hf.models.plain_head import plain_weight, softcap_of
from optimer_hf.models.probes import keeps_documents_apart
from optimer_hf.scoring.batching import (
    Budget,
    budget_for,
    gradient_budget,
    pack_rows,
    packed_batches,
    padded_batches,
)

logger = logging.getLogger(__name__)

ROW_LENGTH = 512  # of rows that inputs share
KEPT_BATCHES = 64

Tokens = tuple[int, ...]
Request = tuple[Any, list[int], list[int]]  # text, context, continuation
Row = tuple[Tokens, tuple[int, ...]]  # what the model reads, and for which requests
Probabilities = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, float | None], tuple[torch.Tensor, torch.Tensor]
]


class Input(NamedTuple):
    """Tokens that the model reads, and what may follow: the last tokens of each continuation but
    one are the last of `tokens`, too.
    """

    tokens: Tokens
    continuations: tuple[Tokens, ...]


class Item(NamedTuple):
    """Requests, by their places, and what is differentiated: the sum of `factor` times their
    log-likelihoods; or, where some of them are `right`, the log-probability of these among all.
    """

    requests: tuple[int, ...]
    right: tuple[int, ...] | None = None
    factor: float = 1.0


class Batch(NamedTuple):
    """Inputs on the device of a model.

    `ids` and `positions` (None: every row is one input) are [n, length]. `places` [m] are those of
    the hidden states, all rows in one line, that predict `targets` [m].
    """

    ids: torch.Tensor
    positions: torch.Tensor | None
    places: torch.Tensor
    targets: torch.Tensor


class Likelihoods:
    """Computes log-likelihoods with a live model whose head is a single matrix product."""

    def __init__(self, model: Any, max_length: int, *, shares_rows: bool) -> None:
        """Prepare for inputs of up to `max_length` tokens, several in a row if `shares_rows` and
        the model can keep them apart.
        """
        self._model, self._max_length = model, max_length
        self._device = input_device(model)
        packs = shares_rows and keeps_documents_apart(model)
        self._row_length = min(ROW_LENGTH, max_length) if packs else 0
        hidden_bytes = 8 * model.config.get_text_config().hidden_size
        self._budget = budget_for(self._hidden, devices_of(model), hidden_bytes)
        self._place = lru_cache(maxsize=KEPT_BATCHES)(self._place_batch)
        self._gradient_budget: Budget | None = None
        self.backward_seconds = 0.0

    @torch.no_grad()
    def of(self, requests: Sequence[Request]) -> tuple[list[tuple[float, bool]], int]:
        """Return the log-likelihood in nats of the continuation, and whether it is the greedy one,
        for each request; and how many tokens the model has read. Equal inputs run once.

        Raises EvaluationError for a continuation that is longer than the model's window.
        """
        asked = self._group(requests)
        in_order = sorted(asked, key=lambda tokens: (-len(tokens), tokens))
        inputs = [
            Input(tokens, tuple(tuple(requests[index][2]) for index in asked[tokens]))
            for tokens in in_order
        ]
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        if inputs:
            parts = self._budget.answer(inputs, self._cut, self._score)
            indices = [index for tokens in in_order for index in asked[tokens]]
            lengths = [len(requests[index][2]) for index in indices]
            values, greedy = (torch.cat(each) for each in zip(*parts, strict=True))
            for index, answer in zip(indices, _join(values, greedy, lengths), strict=True):
                answers[index] = answer
        return answers, sum(map(len, in_order))

    def differentiate(
        self,
        requests: Sequence[Request],
        items: Sequence[Item],
        take: Callable[[], torch.Tensor],
        pool_bytes: int = 0,
    ) -> tuple[dict[int, tuple[float, bool]], torch.Tensor, int]:
        """Return the answers to the requests of some items by their places; the derivatives of the
        sum over the items, of which `take` returns the parts after each backward pass; and how many
        tokens the model has read. The more `pool_bytes` the vectors take, the larger are batches.

        Values and derivatives come from one pass. Its batches are others than those of `of`, so
        that values may differ by rounding.
        """
        if self._gradient_budget is None:
            per_token = activation_bytes(self._model, self._hidden, self._max_length)
            self._gradient_budget = gradient_budget(
                self._model, devices_of(self._model), per_token, pool_bytes
            )
        budget = self._gradient_budget
        apart = [one for item in items for one in self._fit(requests, item, budget.n_tokens)]
        rows = {item: self._rows(requests, item) for item in apart}
        in_order = sorted(apart, key=lambda item: -len(rows[item][0][0]))
        run = partial(self._differentiate_batch, requests, rows, take)
        cut = partial(_cut_items, rows)
        answers: dict[int, tuple[float, bool]] = {}
        total = torch.zeros_like(take())
        for some, gradient in budget.answer(in_order, cut, run):
            answers |= some
            total += gradient
        return answers, total, sum(len(tokens) for own in rows.values() for tokens, _ in own)

    def _fit(self, requests: Sequence[Request], item: Item, n_tokens: int) -> list[Item]:
        """Return the item, or, where its choices do not fit into one batch, one item for each: the
        derivative of log sum_right p - log sum p needs the probabilities, which come first then.
        """
        rows = self._rows(requests, item)
        if item.right is None or len(rows) * len(rows[0][0]) <= n_tokens:
            return [item]
        own, _ = self.of([requests[index] for index in item.requests])
        values = torch.tensor([value for value, _ in own], requires_grad=True)
        _choice_value(values, item.right).backward()  # type: ignore[no-untyped-call]
        assert values.grad is not None
        factors = values.grad.tolist()
        return [
            Item((index,), factor=factor)
            for index, factor in zip(item.requests, factors, strict=True)
        ]

    def _rows(self, requests: Sequence[Request], item: Item) -> list[Row]:
        """Return what the model reads for an item, the longest first, and for which requests."""
        grouped = self._group([requests[index] for index in item.requests])
        rows = [
            (tokens, tuple(item.requests[place] for place in places))
            for tokens, places in grouped.items()
        ]
        return sorted(rows, key=lambda row: (-len(row[0]), row[0]))

    def _differentiate_batch(
        self,
        requests: Sequence[Request],
        rows_of: Mapping[Item, Sequence[Row]],
        take: Callable[[], torch.Tensor],
        items: list[Item],
    ) -> tuple[dict[int, tuple[float, bool]], torch.Tensor]:
        """Return the answers of a batch, and the derivatives of the sum over its items."""
        take()  # what a pass that ran out of memory has left
        rows = sorted((row for item in items for row in rows_of[item]), key=lambda r: -len(r[0]))
        indices = [index for _, own in rows for index in own]
        inputs = [
            Input(tokens, tuple(tuple(requests[index][2]) for index in own)) for tokens, own in rows
        ]
        assert self._gradient_budget is not None  # `differentiate` has set it
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            if len(rows) * len(rows[0][0]) > 2 * self._gradient_budget.n_tokens:
                stack.enter_context(recompute_layers(self._model))
            tokens, greedy = self._score(inputs, differentiable_log_probabilities)
            ends = torch.split(tokens, [len(requests[index][2]) for index in indices])
            values = dict(zip(indices, (each.sum() for each in ends), strict=True))
            total = torch.stack([_item_value(item, values) for item in items]).sum()
            total.item()  # waits for the device, for the clock
            started = perf_counter()
            if total.requires_grad:  # vectors may move nothing that the model computes with
                total.backward()  # type: ignore[no-untyped-call]
        gradient = take()
        self.backward_seconds += perf_counter() - started
        flags = torch.split(greedy, [len(each) for each in ends])
        return {
            index: (values[index].item(), bool(flag.all()))
            for index, flag in zip(indices, flags, strict=True)
        }, gradient

    def _group(self, requests: Sequence[Request]) -> dict[Tokens, list[int]]:
        """Return the indices of the requests by the tokens that the model reads for them."""
        indices: dict[Tokens, list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self._max_length:
                raise EvaluationError(
                    f"an item asks for the likelihood of {len(continuation)} tokens, but the "
                    f"model's window is {self._max_length}. Leave such items out, or score them "
                    "as a 'text' term."
                )
            tokens = tuple((context + continuation)[-(self._max_length + 1) : -1])
            indices.setdefault(tokens, []).append(index)
        return indices

    def _cut(self, inputs: Iterable[Input], n_tokens: int) -> Iterator[list[Input]]:
        if self._row_length:
            return packed_batches(inputs, n_tokens, _length, self._row_length)
        return padded_batches(inputs, n_tokens, _length)

    def _score(
        self, inputs: list[Input], compute: Probabilities = log_probabilities
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probability and greediness of every token of the continuations, in order."""
        weight = plain_weight(self._model)
        assert weight is not None  # only models with a plain head are scored here
        batch = self._place(tuple(inputs))
        hidden = self._hidden(batch.ids, batch.positions).flatten(0, 1)
        picked = hidden[batch.places.to(hidden.device)].to(weight.device, weight.dtype)
        targets = batch.targets.to(weight.device)
        return compute(picked, weight, targets, softcap_of(self._model))

    def _hidden(self, ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Return the last hidden states [n, length, width].

        In a causal model, padding on the right changes nothing to its left, so no mask is needed.
        """
        options = {} if positions is None else {"position_ids": positions}
        hidden: torch.Tensor = self._model.base_model(
            input_ids=ids, use_cache=False, **options
        ).last_hidden_state
        return hidden

    def _place_batch(self, inputs: tuple[Input, ...]) -> Batch:
        lengths = [len(each.tokens) for each in inputs]
        rows = [[index] for index in range(len(inputs))]
        if lengths[0] <= self._row_length:
            rows = pack_rows(lengths, self._row_length)
        starts, positions = _arrange(lengths, rows)
        ids = np.zeros(positions.shape, dtype=np.int64)
        places, targets = [], []
        for each, start in zip(inputs, starts, strict=True):
            end = start + len(each.tokens)
            ids.reshape(-1)[start:end] = each.tokens
            for continuation in each.continuations:
                places.append(np.arange(end - len(continuation), end))
                targets.append(np.array(continuation, dtype=np.int64))
        is_shared = len(rows) < len(inputs)
        device = self._device
        return Batch(
            torch.from_numpy(ids).to(device),
            torch.from_numpy(positions).to(device) if is_shared else None,
            torch.from_numpy(np.concatenate(places)).to(device),
            torch.from_numpy(np.concatenate(targets)).to(device),
        )


def _join(
    values: torch.Tensor, greedy: torch.Tensor, lengths: Sequence[int]
) -> list[tuple[float, bool]]:
    """Return the sum of the values and whether all are greedy for continuations of some lengths."""
    if values.device.type != "cpu":
        return _join_on_device(values, greedy, lengths)
    ends = zip(torch.split(values, [*lengths]), torch.split(greedy, [*lengths]), strict=True)
    return [(value.sum().item(), bool(flags.all())) for value, flags in ends]


def _join_on_device(
    values: torch.Tensor, greedy: torch.Tensor, lengths: Sequence[int]
) -> list[tuple[float, bool]]:
    """Do as `_join` with one kernel for all sums, so that the host waits once."""
    sizes = torch.tensor(lengths, device=values.device)
    sums = torch.segment_reduce(values, "sum", lengths=sizes)
    least = torch.segment_reduce(greedy.float(), "min", lengths=sizes)
    return list(zip(sums.tolist(), least.bool().tolist(), strict=True))


def _item_value(item: Item, values: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Return what is differentiated for an item, from the log-likelihoods of its requests."""
    own = torch.stack([values[index] for index in item.requests])
    return item.factor * own.sum() if item.right is None else _choice_value(own, item.right)


def _choice_value(values: torch.Tensor, right: Sequence[int]) -> torch.Tensor:
    """Return the log-probability of the right ones among choices of some log-likelihoods."""
    return values[list(right)].logsumexp(0) - values.logsumexp(0)


def _cut_items(
    rows_of: Mapping[Item, Sequence[Row]], items: Iterable[Item], n_tokens: int
) -> Iterator[list[Item]]:
    """Yield items, the longest of which comes first, in batches of at most n_tokens when all their
    rows are padded to the longest; at least one item in each.
    """
    batch: list[Item] = []
    n_rows = 0
    for item in items:
        n_more = len(rows_of[item])
        if batch and (n_rows + n_more) * len(rows_of[batch[0]][0][0]) > n_tokens:
            yield batch
            batch, n_rows = [], 0
        batch.append(item)
        n_rows += n_more
    if batch:
        yield batch


def _length(each: Input) -> int:
    return len(each.tokens)


def _arrange(lengths: Sequence[int], rows: Sequence[Sequence[int]]) -> tuple[list[int], Any]:
    """Return where each item starts, all rows in one line, and the positions [n, length], which
    restart at every item and at the padding.
    """
    width = max(sum(lengths[index] for index in row) for row in rows)
    starts, positions = [0] * len(lengths), np.zeros((len(rows), width), dtype=np.int64)
    for number, row in enumerate(rows):
        at = 0
        for index in row:
            starts[index] = number * width + at
            positions[number, at : at + lengths[index]] = np.arange(lengths[index])
            at += lengths[index]
        positions[number, at:] = np.arange(width - at)
    return starts, positions
