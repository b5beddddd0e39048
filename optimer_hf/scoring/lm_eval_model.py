"""A live model + its tokenizer -> an lm-eval model, which scores without materialising logits.

lm-eval's stock class puts BOS twice before a rolling document, stops at an answer whose whole text
is in the last token of its prompt, and takes the log-softmax in the dtype of the model. This one
does none of these. The module takes seconds to import.
"""

import logging
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs

from optimer_hf.models.placement import devices_of, input_device
from optimer_hf.models.plain_head import is_plain_head
from optimer_hf.models.probes import keeps_padding_out, refuse_reading_ahead
from optimer_hf.printable import warn_once
from optimer_hf.scoring.batching import Budget, budget_for, padded_batches
from optimer_hf.scoring.harness import (
    Tokens,
    Windows,
    open_ended,
    quiet_lm_eval,
    refuse_empty_continuations,
    rolling_windows,
    warn_of_cut_prompts,
)
from optimer_hf.scoring.likelihood import Likelihoods

if TYPE_CHECKING:
    from optimer_hf.scoring.gradients import Differentiation

logger = logging.getLogger(__name__)

N_AT_ONCE = 8  # prompts, where batches do not follow the memory
Answer = TypeVar("Answer")


def make_lm_eval_model(model: Any, tokenizer: Any) -> "HarnessModel":
    """Return an lm-eval model that scores with a live transformers model, without materialising
    logits.

    Raises ModelError for a model that reads ahead, and EvaluationError for a tokenizer that ends
    every text and cannot be kept from it.
    """
    refuse_reading_ahead(model)
    with quiet_lm_eval():
        return HarnessModel(model, open_ended(tokenizer))


class HarnessModel(Tokens, HFLM):
    """HFLM, but with scores in float32 from blocks of the vocabulary, batches of similar
    length, and one BOS before a document.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__(
            pretrained=model, tokenizer=tokenizer, batch_size=N_AT_ONCE, trust_remote_code=False
        )
        self._live = model
        self._device = input_device(model)  # HFLM takes that of the first parameter
        self.forward_seconds = 0.0
        self.n_tokens = 0
        self.follows_memory = self.device.type == "cuda"  # on a CPU, batches of eight
        self._likelihoods = (
            Likelihoods(model, self.max_length, shares_rows=self.follows_memory)
            if is_plain_head(model)
            else None
        )
        self.differentiation: Differentiation | None = None  # of the evaluation that runs
        self._instances: list[Any] = []  # those behind the requests for tokens
        self._windows: dict[str, Windows] = {}

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        refuse_empty_continuations(requests)
        self._instances = _once_each(requests)
        return list(super().loglikelihood(requests, disable_tqdm=True))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        warn_of_cut_prompts(self, requests)
        if not self._keeps_padding_out:
            return self._generate_one_by_one(requests)
        if not self.follows_memory:
            return list(super().generate_until(requests, disable_tqdm=True))
        answers: dict[int, str] = {}
        for indices in _indices_by_settings(requests):
            own = [requests[index] for index in indices]
            run = partial(HFLM.generate_until, self, disable_tqdm=True)
            lengths = [_generated_length(self, request) for request in own]
            texts = _answer_in_batches(self, own, lengths, self._generation_budget, run)
            answers |= zip(indices, texts, strict=True)
        return [answers[index] for index in range(len(requests))]

    def _generate_one_by_one(self, requests: list[Any]) -> list[str]:
        """Answer without padding, which would change the state of the model."""
        warn_once(
            logger,
            f"{type(self._live).__name__}: its answers depend on the padding of a batch, so it "
            "answers one prompt at a time",
        )
        try:
            self.batch_size_per_gpu = 1
            return list(super().generate_until(requests, disable_tqdm=True))
        finally:
            self.batch_size_per_gpu = N_AT_ONCE

    @cached_property
    def _keeps_padding_out(self) -> bool:
        return keeps_padding_out(self._live)

    @cached_property
    def _generation_budget(self) -> Budget:
        settings = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
        return budget_for(lambda ids: self._live.generate(ids, **settings), devices_of(self._live))

    @cached_property
    def _logits_budget(self) -> Budget:
        return budget_for(
            lambda ids: torch.log_softmax(self._live(input_ids=ids).logits, -1),
            devices_of(self._live),
        )

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        windows = [self._windows_of(request.args[0]) for request in requests]
        pairs = zip(_once_each(requests), windows, strict=True)
        self._instances = [instance for instance, own in pairs for _ in own]
        values = iter(self._loglikelihood_tokens([each for own in windows for each in own]))
        return [sum(next(values)[0] for _ in own) for own in windows]

    def _windows_of(self, text: str) -> Windows:
        if text not in self._windows:
            self._windows[text] = rolling_windows(self, text, self.max_length)
        return self._windows[text]

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        started = perf_counter()
        before = self.backward_seconds
        if self._likelihoods is not None and self.differentiation is not None:
            answers, n_tokens = self.differentiation.answer(
                self._likelihoods, requests, self._instances
            )
        elif self._likelihoods is not None:
            answers, n_tokens = self._likelihoods.of(requests)
        else:
            n_tokens = sum(len(a) + len(b) for _, a, b in requests)
            run = partial(HFLM._loglikelihood_tokens, self, disable_tqdm=True, **kwargs)
            answers = self._likelihoods_of_logits(requests, run)
        self.n_tokens += n_tokens
        passed = perf_counter() - started
        self.forward_seconds += passed - (self.backward_seconds - before)
        return answers

    @property
    def can_differentiate(self) -> bool:
        """Whether log-likelihoods have gradients: only if the head is a single product."""
        return self._likelihoods is not None

    @property
    def backward_seconds(self) -> float:
        """Seconds spent in backward passes so far."""
        return 0.0 if self._likelihoods is None else self._likelihoods.backward_seconds

    def _likelihoods_of_logits(self, requests: list[Any], run: Any) -> list[Any]:
        if not self.follows_memory:
            return list(run(requests))
        lengths = [min(len(a) + len(b), self.max_length) for _, a, b in requests]
        return _answer_in_batches(self, requests, lengths, self._logits_budget, run)

    def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
        started = perf_counter()
        generated = super()._model_generate(context, *args, **kwargs)
        self.forward_seconds += perf_counter() - started
        self.n_tokens += generated.numel()
        return generated


def _once_each(requests: Sequence[Any]) -> list[Any]:
    """Return lm-eval's instances, with None for those that are there once more (repeats)."""
    first = {id(each): index for index, each in reversed(list(enumerate(requests)))}
    return [each if first[id(each)] == index else None for index, each in enumerate(requests)]


def _answer_in_batches(
    lm: Any,
    requests: Sequence[Any],
    lengths: Sequence[int],
    budget: Budget,
    run: Callable[[list[Any]], Sequence[Answer]],
) -> list[Answer]:
    """Return what HFLM answers to requests of some lengths in tokens, in batches of a budget."""

    def answer(batch: Sequence[int]) -> Sequence[Answer]:
        lm.batch_size_per_gpu = len(batch)
        return run([requests[index] for index in batch])

    in_order = sorted(range(len(requests)), key=lambda index: -lengths[index])
    cut = partial(padded_batches, length=lengths.__getitem__)
    parts = budget.answer(in_order, cut, answer)
    answers = dict(zip(in_order, (each for part in parts for each in part), strict=True))
    return [answers[index] for index in range(len(requests))]


def _indices_by_settings(requests: Sequence[Any]) -> list[list[int]]:
    """Return the indices of requests that generate with the same settings, group by group."""
    groups: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(repr(request.args[1]), []).append(index)
    return list(groups.values())


def _generated_length(lm: Any, request: Any) -> int:
    """Return how many tokens of the cache a request takes: prompt and answer, for every beam."""
    settings = normalize_gen_kwargs(request.args[1], lm.max_gen_toks)
    n_tokens = len(lm.tok_encode(request.args[0])) + int(settings["max_gen_toks"])
    return min(n_tokens, int(lm.max_length)) * int(settings.get("num_beams") or 1)
