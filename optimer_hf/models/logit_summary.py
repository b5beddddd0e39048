"""What scoring needs to know of a block of logits: the log of their sum, and the largest one."""

import logging
from collections.abc import Callable

import torch

from optimer_hf.files.text import first_line
from optimer_hf.models.memory import lacks_memory

logger = logging.getLogger(__name__)

WORTH_COMPILING = 2**28  # logits of a batch; compiling takes some seconds, once
LOGITS_AT_ONCE = 2**28  # on a GPU, 512 MiB in 16 bits

Summary = Callable[[torch.Tensor, float | None], tuple[torch.Tensor, torch.Tensor]]


def choose_summary(n_logits: int, device: str) -> Summary:
    """Return the way to summarize the blocks of a batch of logits on a device.

    It depends on the size of the batch alone, so that a batch gets the same bits in every run.
    """
    is_large = device == "cuda" and n_logits >= WORTH_COMPILING
    return summarize_in_one_pass if is_large else summarize


def columns_at_a_time(n: int, n_vocabulary: int) -> int:
    """Return how many columns a block of logits has for n hidden states: a power of two, because
    code is compiled for each width, and is fast only for rows that begin at aligned addresses.
    """
    room = max(1, LOGITS_AT_ONCE // max(1, n))
    return 1 << (min(room, n_vocabulary).bit_length() - 1)


def summarize(logits: torch.Tensor, softcap: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log of the sum of exponentials of the (capped) logits [n, v], and the largest
    logit before the cap, both float32 [n, 1].

    One kernel turns 16 bits into a log-softmax in float32; its value at the largest logit gives the
    sum without cancellation.
    """
    peak, place = logits.max(1, keepdim=True)
    scores = logits if softcap is None else torch.tanh(logits.float() / softcap) * softcap
    of_peak = torch.log_softmax(scores, 1, dtype=torch.float32).gather(1, place)
    return scores.gather(1, place) - of_peak, peak.float()


def compute_summary(
    logits: torch.Tensor, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `summarize` returns. A compiler makes one pass over the logits of it."""
    scores = logits.float()
    peak = scores.amax(1, keepdim=True)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    return torch.logsumexp(scores, 1, keepdim=True), peak


_COMPILED: list[Summary] = []


def summarize_in_one_pass(
    logits: torch.Tensor, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `summarize` returns, by compiled code: one for each width, whatever was scored
    before, and for any number of rows. Without a compiler, by `summarize`.
    """
    torch._dynamo.maybe_mark_dynamic(logits, 0)
    if not _COMPILED:
        compiled: Summary = torch.compile(compute_summary, dynamic=False)
        try:
            compiled(logits, softcap)
        except Exception as error:
            if lacks_memory(error):
                raise
            logger.info("scoring: the softmax is not compiled: %s", first_line(error))
            compiled = summarize
        _COMPILED.append(compiled)
    return _COMPILED[0](logits, softcap)
