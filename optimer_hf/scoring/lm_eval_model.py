"""A live model + its tokenizer -> an lm-eval model, which scores without materialising logits.

lm-eval's stock class puts BOS twice before a rolling document, and takes the log-softmax in the
dtype of the model. This one does neither.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from optimer_hf.errors import EvaluationError
from optimer_hf.models.head_loss import is_plain_head, log_probabilities, plain_weight, softcap_of
from optimer_hf.printable import warn_once

logger = logging.getLogger(__name__)

TOKENS_PER_BATCH = 1024
GPU_TOKENS_PER_BATCH = 4096  # fewer do not fill a GPU, more need the memory of the vectors


@contextlib.contextmanager
def quiet_lm_eval() -> Iterator[None]:
    """Silence lm-eval, its progress bars and those of `datasets` for a while; our own progress bar
    shows the trials.
    """
    import datasets
    from lm_eval.api import task

    loggers = [
        logging.getLogger(name) for name in ("lm_eval", "lm-eval", "lm_eval.evaluator", "datasets")
    ]
    levels = [log.level for log in loggers]
    had_bars, bar = datasets.is_progress_bar_enabled(), task.tqdm
    datasets.disable_progress_bars()
    task.tqdm = partial(bar, disable=True)  # lm-eval has no switch for the bar of its prompts
    for log in loggers:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)
        task.tqdm = bar
        if had_bars:
            datasets.enable_progress_bars()


def make_lm_eval_model(model: Any, tokenizer: Any) -> Any:
    """Return an lm-eval model that scores with a live transformers model, without materialising
    logits.
    """
    from time import perf_counter

    from lm_eval import utils
    from lm_eval.models.huggingface import HFLM

    class HarnessModel(HFLM):
        """HFLM, but with scores in float32 from blocks of the vocabulary, batches of similar
        length, and one BOS before a document.
        """

        def __init__(self) -> None:
            super().__init__(
                pretrained=model, tokenizer=tokenizer, batch_size=8, trust_remote_code=False
            )
            self.forward_seconds = 0.0
            self.n_tokens = {"total": 0}
            self._is_plain = is_plain_head(model)
            self._encoded: dict[tuple[str, bool | None], list[int]] = {}

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
        ) -> list[int]:
            key = (string, add_special_tokens)
            if kwargs:
                return list(
                    super().tok_encode(string, add_special_tokens=add_special_tokens, **kwargs)
                )
            if key not in self._encoded:
                self._encoded[key] = list(
                    super().tok_encode(string, add_special_tokens=add_special_tokens)
                )
            return self._encoded[key]

        def loglikelihood(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[tuple[float, bool]]:
            return list(super().loglikelihood(requests, disable_tqdm=True))

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            _warn_of_cut_prompts(self, requests)
            return list(super().generate_until(requests, disable_tqdm=True))

        def loglikelihood_rolling(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[float]:
            windows: list[tuple[None, list[int], list[int]]] = []
            owners: list[int] = []
            for owner, request in enumerate(requests):
                # add_special_tokens=False: the rolling windows put BOS first themselves
                rolling = utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
                for window in map(utils.make_disjoint_window, rolling):
                    windows.append((None, *window))
                    owners.append(owner)
            totals = [0.0] * len(requests)
            for owner, (value, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
                totals[owner] += value
            return totals

        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = False, **kwargs: Any
        ) -> list[tuple[float, bool]]:
            started = perf_counter()
            if self._is_plain:
                answers = _score(self.model, requests, self.max_length, self.n_tokens)
            else:
                answers = super()._loglikelihood_tokens(requests, disable_tqdm=True, **kwargs)
                self.n_tokens["total"] += sum(len(a) + len(b) for _, a, b in requests)
            self.forward_seconds += perf_counter() - started
            return answers

        def _model_generate(self, context: Any, *args: Any, **kwargs: Any) -> Any:
            started = perf_counter()
            generated = super()._model_generate(context, *args, **kwargs)
            self.forward_seconds += perf_counter() - started
            self.n_tokens["total"] += generated.numel()
            return generated

    with quiet_lm_eval():
        return HarnessModel()


def _warn_of_cut_prompts(lm: Any, requests: Sequence[Any]) -> None:
    """Log a warning for each task with prompts whose beginning lm-eval cuts off, because the
    model's window does not hold the whole prompt and the answer.
    """
    from lm_eval.models.utils import normalize_gen_kwargs

    by_task: dict[str, list[Any]] = {}
    for request in requests:
        by_task.setdefault(request.task_name, []).append(request)
    for name, own in by_task.items():
        n_new = int(normalize_gen_kwargs(own[0].args[1], lm.max_gen_toks)["max_gen_toks"])
        room = lm.max_length - n_new
        n_cut = sum(len(lm.tok_encode(request.args[0])) > room for request in own)
        if n_cut:
            warn_once(
                logger,
                f"task {name!r}: {n_cut:,} of {len(own):,} prompts lose their beginning: the "
                f"model's window holds {lm.max_length:,} tokens, and {n_new:,} of them are for "
                "the answer. Lower max_gen_toks or num_fewshot, or use another model",
            )


@torch.no_grad()
def _score(
    model: Any,
    requests: Sequence[tuple[Any, list[int], list[int]]],
    max_length: int,
    n_tokens: dict[str, int],
) -> list[tuple[float, bool]]:
    """Return the log-likelihood in nats of the continuation, and whether it is the greedy one, for
    each request (text, context, continuation).

    Equal inputs run once. Batches hold inputs of similar length, and as many tokens as suit the
    device.
    """
    inputs: dict[tuple[int, ...], list[int]] = {}
    for index, (_, context, continuation) in enumerate(requests):
        if len(continuation) > max_length:
            raise EvaluationError(
                f"an item asks for the likelihood of {len(continuation)} tokens, but the model's "
                f"window is {max_length}. Leave such items out, or score them as a 'text' term."
            )
        tokens = tuple((context + continuation)[-(max_length + 1) : -1])
        inputs.setdefault(tokens, []).append(index)
    answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
    weight, softcap = plain_weight(model), softcap_of(model)
    assert weight is not None  # only models with a plain head are scored here
    in_order = sorted(inputs, key=lambda tokens: (-len(tokens), tokens))
    for batch in batches(in_order, model.device.type):
        hidden = _hidden(model, batch)
        asked = [(row, index) for row, tokens in enumerate(batch) for index in inputs[tokens]]
        continuations = [requests[index][2] for _, index in asked]
        rows = [
            hidden[row, len(batch[row]) - len(continuation) : len(batch[row])]
            for (row, _), continuation in zip(asked, continuations, strict=True)
        ]
        targets = torch.tensor(
            [token for continuation in continuations for token in continuation],
            device=model.device,
        )
        values, greedy = log_probabilities(
            torch.cat(rows).to(weight.dtype), weight, targets, softcap
        )
        lengths = [len(continuation) for continuation in continuations]
        # on the host: wait for the device once for each batch, not for each item
        parts = (torch.split(each.cpu(), lengths) for each in (values, greedy))
        for (_, index), value, is_greedy in zip(asked, *parts, strict=True):
            answers[index] = value.sum().item(), bool(is_greedy.all())
        n_tokens["total"] += sum(len(tokens) for tokens in batch)
    return answers


def _hidden(model: Any, batch: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """Return the last hidden states [n, length, width] of inputs, the longest of which comes first.

    In a causal model, padding on the right changes nothing to its left, so no mask is needed.
    """
    length = len(batch[0])
    padded = [[*tokens, *[0] * (length - len(tokens))] for tokens in batch]
    input_ids = torch.tensor(padded, device=model.device)
    hidden: torch.Tensor = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state
    return hidden


def batches(
    inputs: Sequence[tuple[int, ...]], device: str = "cpu"
) -> Iterator[list[tuple[int, ...]]]:
    """Yield inputs, the longest of which comes first, in batches of as many tokens, with padding,
    as suit a device; at least one input in each.
    """
    n_tokens = TOKENS_PER_BATCH if device == "cpu" else GPU_TOKENS_PER_BATCH
    batch: list[tuple[int, ...]] = []
    for tokens in inputs:
        if batch and (len(batch) + 1) * len(batch[0]) > n_tokens:
            yield batch
            batch = []
        batch.append(tokens)
    if batch:
        yield batch
