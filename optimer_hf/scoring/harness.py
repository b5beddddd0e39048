"""What our models of lm-eval share: silence, the windows of a document, a warning of cut prompts.

lm-eval takes seconds to import, so this module does it where a function needs it.
"""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from optimer_hf.printable import warn_once

logger = logging.getLogger(__name__)

Windows = list[tuple[None, list[int], list[int]]]


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
