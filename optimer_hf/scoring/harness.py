"""What our models of lm-eval share: silence, the tokens of prompts and choices, the windows of a
document, a warning of cut prompts.

lm-eval takes seconds to import, so this module does it where a function needs it.
"""

import contextlib
import copy
import logging
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import Any

from optimer_hf.errors import EvaluationError
from optimer_hf.files.text import quote
from optimer_hf.printable import warn_once

logger = logging.getLogger(__name__)

Windows = list[tuple[None, list[int], list[int]]]
Encoded = tuple[list[int], list[int]]  # tokens of a context and of its continuation


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


# -- tokens ----------------------------------------------------------------------------------------


def open_ended(tokenizer: Any) -> Any:
    """Return a tokenizer that puts nothing after a text.

    One that was saved with `add_eos_token` ends every prompt, and the choices after it would be
    scored as the beginning of another document. Raises EvaluationError if that cannot be undone.
    """
    before, after = _special_tokens_around(tokenizer)
    if not after:
        return tokenizer
    from tokenizers.processors import TemplateProcessing

    opened = copy.deepcopy(tokenizer)
    names = opened.convert_ids_to_tokens(before)
    if getattr(opened, "backend_tokenizer", None) is not None:
        opened.backend_tokenizer.post_processor = TemplateProcessing(
            single=[*names, "$A"], special_tokens=[*zip(names, before, strict=True)]
        )
    if _special_tokens_around(opened)[1]:
        end = tokenizer.decode(after)
        raise EvaluationError(
            f"the tokenizer puts {end!r} after every text, so every prompt would be a document "
            "that has ended. Save it with add_eos_token=False, or use another if it has no such "
            "option."
        )
    return opened


def _special_tokens_around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the tokens that a tokenizer puts before and after every text."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    whole = list(tokenizer("a")["input_ids"])
    starts = [s for s in range(len(whole)) if whole[s : s + len(plain)] == plain]
    if not plain or not starts:
        return [], []
    return whole[: starts[0]], whole[starts[0] + len(plain) :]


class Tokens:
    """The tokens of texts, remembered, and of pairs of texts: to be put before a class of lm-eval
    among the bases of ours.
    """

    @cached_property
    def _encoded(self) -> dict[tuple[str, bool | None], list[int]]:
        return {}

    def tok_encode(self, string: Any, add_special_tokens: bool | None = None, **kwargs: Any) -> Any:
        of_lm_eval: Any = super()
        if kwargs or not isinstance(string, str):
            return of_lm_eval.tok_encode(string, add_special_tokens, **kwargs)
        key = (string, add_special_tokens)
        if key not in self._encoded:
            self._encoded[key] = list(of_lm_eval.tok_encode(string, add_special_tokens))
        return self._encoded[key]

    def _encode_pair(self, context: str, continuation: str) -> Encoded:
        """Return the tokens of a prompt and of what follows it.

        lm-eval cuts the tokens of both together after as many as the prompt alone has. Where one
        token reaches over the join, as `:A` does in "Answer:A", the continuation loses its text. If
        nothing is left, lm-eval stops with an AssertionError; it is encoded alone then. Else the
        tokens are those of lm-eval, so that scores are those that others measure.
        """
        of_lm_eval: Any = super()
        first, rest = of_lm_eval._encode_pair(context, continuation)
        if not rest:
            cut = len(context.rstrip())  # lm-eval moves the spaces after it to the continuation
            rest = self.tok_encode(context[cut:] + continuation, add_special_tokens=False)
        return first, rest


def refuse_empty_continuations(requests: Sequence[Any]) -> None:
    """Raise EvaluationError for an item that asks for the likelihood of an empty text."""
    for request in requests:
        if not request.args[1]:
            raise EvaluationError(
                f"task {request.task_name!r}: an item asks for the likelihood of an empty text "
                f"after {quote(request.args[0][-40:])}, which every model gives 1. Leave empty "
                "choices out."
            )


def rolling_windows(lm: Any, text: str, max_seq_len: int) -> Windows:
    """Return the windows (None, context, continuation) of a document, each of which asks for at
    most `max_seq_len` tokens after one of context.
    """
    from lm_eval import utils

    # add_special_tokens=False: the rolling windows put BOS first themselves
    rolling = utils.get_rolling_token_windows(
        token_list=lm.tok_encode(text, add_special_tokens=False),
        prefix_token=lm.prefix_token_id,
        max_seq_len=max_seq_len,
        context_len=1,
    )
    return [(None, *window) for window in map(utils.make_disjoint_window, rolling)]


def warn_of_cut_prompts(lm: Any, requests: Sequence[Any]) -> None:
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
