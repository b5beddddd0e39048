"""The gradients of scores: which sums of log-likelihoods they come from, and their derivatives.

lm-eval stays in charge of prompts, requests and scores. While it evaluates, its model hands the
requests of differentiable terms over to a Differentiation, which answers them and adds up the
derivatives. Differentiable are bits per byte and perplexities, whose items are log-likelihoods, and
CHOICE_METRIC, the log-probability of the right answer among the choices.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from optimer_hf.scoring.likelihood import Item, Likelihoods, Request
from optimer_hf.scoring.objective import Term
from optimer_hf.scoring.scores import TermScore
from optimer_hf.scoring.tasks import (
    CHOICE_METRIC,
    LIKELIHOOD_AGGREGATIONS,
    aggregation_of,
    right_choices,
)

Answer = tuple[float, bool]


class Derivatives(Protocol):
    """What takes the derivative of a backward pass in the weights of a merge."""

    @property
    def names(self) -> Sequence[str]:
        """The names of the vectors."""
        ...

    @property
    def pool_bytes(self) -> int:
        """What the vectors take in memory."""
        ...

    def active(self) -> AbstractContextManager[None]:
        """Return a context in which backward passes are followed."""
        ...

    def take(self) -> torch.Tensor:
        """Return the derivatives [vectors], float64, since the last call."""
        ...


@dataclass(frozen=True)
class Sum:
    """A sum over items of a task: of their log-likelihoods, or of the log-probabilities of their
    right choices.
    """

    task_key: str
    items: frozenset[int]
    is_of_choices: bool


def sum_of(term: Term, task: Any, items: Sequence[int]) -> Sum | None:
    """Return the sum from which the score of a term follows; None if it has no derivative."""
    kind = str(task.OUTPUT_TYPE)
    is_of_choices = kind == "multiple_choice" and term.metric_name == CHOICE_METRIC
    is_likelihood = kind in ("loglikelihood", "loglikelihood_rolling")
    if is_likelihood:
        is_likelihood = aggregation_of(term, task) in LIKELIHOOD_AGGREGATIONS
    is_differentiable = is_likelihood or is_of_choices
    return Sum(term.task_key, frozenset(items), is_of_choices) if is_differentiable else None


def slope_of(score: TermScore, total: Sum) -> float:
    """Return the derivative of a score in the sum, in nats, that it follows from."""
    n = sum(bottom for _, bottom in score.items)
    if total.is_of_choices:
        return 1 / n
    slope = -1 / math.log(2) / n  # the items are in bits
    return slope * math.log(2) * score.score if score.is_perplexity else slope


class Differentiation:
    """Answers the requests of one evaluation, and adds up the derivatives of sums."""

    def __init__(
        self,
        derivatives: Derivatives,
        sums: Sequence[Sum],
        tasks: Mapping[str, Any],
        samples: Mapping[str, Sequence[int]],
    ) -> None:
        """Prepare for tasks of which lm-eval evaluates the items `samples`."""
        self._derivatives, self._tasks, self._samples = derivatives, tasks, samples
        zero = torch.zeros(len(derivatives.names), dtype=torch.float64)
        self._gradients = {total: zero.clone() for total in sums}
        self._values: dict[tuple[str, int], float] = {}

    def gradient_of(self, total: Sum, score: TermScore) -> dict[str, float] | None:
        """Return the derivative of a score in each weight, by the name of the vector; None if the
        task makes something else of the log-likelihoods than their sum.
        """
        if not total.is_of_choices:
            values = [self._values.get((total.task_key, item)) for item in sorted(total.items)]
            for value, (top, _) in zip(values, score.items, strict=True):
                if value is None or not math.isclose(-value / math.log(2), top, rel_tol=1e-6):
                    return None
        gradient = (self._gradients[total] * slope_of(score, total)).tolist()
        return dict(zip(self._derivatives.names, gradient, strict=True))

    def answer(
        self, likelihoods: Likelihoods, requests: Sequence[Request], instances: Sequence[Any]
    ) -> tuple[list[Answer], int]:
        """Answer the requests that come from lm-eval's instances, as `Likelihoods.of` does. An item
        may have several; None stands for a request that is there once more.
        """
        answers: dict[int, Answer] = {}
        n_read = 0
        for sums, items in self._group(instances).items():
            some, gradient, n_tokens = likelihoods.differentiate(
                requests, items, self._derivatives.take, self._derivatives.pool_bytes
            )
            answers |= some
            n_read += n_tokens
            for total in sums:
                self._gradients[total] += gradient
        rest = [index for index in range(len(requests)) if index not in answers]
        others, n_tokens = likelihoods.of([requests[index] for index in rest])
        answers |= zip(rest, others, strict=True)
        self._remember(instances, answers)
        return [answers[index] for index in range(len(requests))], n_read + n_tokens

    def _group(self, instances: Sequence[Any]) -> dict[tuple[Sum, ...], list[Item]]:
        """Return the items by the sums that they belong to, so that one backward pass serves all
        sums of an item; requests that belong to none are left out.
        """
        groups: dict[tuple[Sum, ...], list[Item]] = {}
        choices: dict[tuple[str, int], list[int]] = {}
        for index, (key, item) in enumerate(self._places_of(instances)):
            if not key:
                continue
            if self._tasks[key].OUTPUT_TYPE == "multiple_choice":
                choices.setdefault((key, item), []).append(index)
            elif sums := self._sums_with(key, item):
                groups.setdefault(sums, []).append(Item((index,)))
        for (key, item), indices in choices.items():
            if sums := self._sums_with(key, item):
                group = _choice_item(self._tasks[key], instances, indices)
                groups.setdefault(sums, []).append(group)
        return groups

    def _sums_with(self, key: str, item: int) -> tuple[Sum, ...]:
        return tuple(
            each for each in self._gradients if each.task_key == key and item in each.items
        )

    def _places_of(self, instances: Sequence[Any]) -> list[tuple[str, int]]:
        """Return the task and the item of each instance; no task for those that do not count."""
        keys = {
            id(instance): key for key in self._samples for instance in self._tasks[key].instances
        }
        places = []
        for instance in instances:
            key = keys.get(id(instance), "")
            places.append((key, self._samples[key][instance.doc_id] if key else -1))
        return places

    def _remember(self, instances: Sequence[Any], answers: Mapping[int, Answer]) -> None:
        """Keep the log-likelihood of each item, the sum of its parts."""
        for index, place in enumerate(self._places_of(instances)):
            self._values[place] = self._values.get(place, 0.0) + answers[index][0]


def _choice_item(task: Any, instances: Sequence[Any], indices: Sequence[int]) -> Item:
    """Return the choices of an item, without the requests of other metrics."""
    doc = instances[indices[0]].doc
    n_choices = len(task.doc_to_choice(doc))
    own = tuple(index for index in indices if instances[index].idx < n_choices)
    in_order = tuple(sorted(own, key=lambda index: instances[index].idx))
    return Item(in_order, right=tuple(right_choices(task, doc)))
