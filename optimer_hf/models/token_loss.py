"""Compute training loss over a large vocabulary on a GPU: all logits, for some tokens at a time.

A GPU is fastest with few large products. So the logits of a block of tokens exist as a whole, in
the dtype of the hidden states. One pass over them finds the loss, another turns them into their
gradient in place, and the gradients of the hidden states and of the head follow at once: three
products in all, two if the head is frozen. Nothing waits for the device, so a CUDA graph can hold
it. `head_loss.HeadLoss` is the counterpart for CPUs.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from optimer_hf.models.memory import free_memory

LARGEST_LOGITS = 2**31  # bytes of a block of logits
LARGEST_SHARE = 0.125  # of the memory that is free
PLAIN_BYTES = 8  # per logit in separate passes, which need a copy in float32
ALIGNED = 128  # tokens; matrix units are several times slower for sizes that 8 does not divide

Pass = Callable[[torch.Tensor, torch.Tensor, float | None], tuple[torch.Tensor, torch.Tensor]]


class TokenBlockLoss(torch.autograd.Function):
    """Summed cross entropy of `softcap(hidden @ weight.T)` against labels, in nats.

    Labels below 0 do not count.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        softcap: float | None,
        is_compiled: bool,
    ) -> torch.Tensor:
        """Return a float32 scalar from hidden [n, d], weight [v, d] and labels [n]."""
        run = _compiled_pass() if is_compiled else differentiate
        needs_weight = ctx.needs_input_grad[1]
        rows = weight.to(hidden.dtype)
        gradient = torch.empty_like(hidden)
        weight_gradient: torch.Tensor | None = None
        losses = []
        for block in _blocks(hidden, len(weight), is_compiled):
            logits = hidden[block] @ rows.T
            loss, slopes = _loss_of_block(run, logits, labels[block], softcap)
            losses.append(loss)
            torch.mm(slopes, rows, out=gradient[block])
            if needs_weight:
                weight_gradient = _add_product(weight_gradient, slopes, hidden[block], weight.dtype)
            del logits, slopes
        ctx.save_for_backward(gradient, weight_gradient)
        return torch.stack(losses).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[torch.Tensor | None, ...]:
        """Scale the stored gradients."""
        (scale,) = grad_outputs
        gradient, weight_gradient = ctx.saved_tensors
        scaled = None if weight_gradient is None else weight_gradient * scale
        return gradient * scale, scaled, None, None, None


_SIZES: dict[tuple[int, int, torch.dtype, bool], int] = {}  # of the last blocks of each shape


def _blocks(hidden: torch.Tensor, n_vocabulary: int, is_compiled: bool) -> list[slice]:
    """Return slices of about the same number of tokens, as large as memory allows."""
    n, key = len(hidden), (len(hidden), n_vocabulary, hidden.dtype, is_compiled)
    if not (hidden.device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        n_bytes = n_vocabulary * (hidden.element_size() if is_compiled else PLAIN_BYTES)
        n_blocks = max(1, math.ceil(n * n_bytes / largest_block(hidden.device)))
        _SIZES[key] = max(1, math.ceil(n / n_blocks / ALIGNED)) * ALIGNED
    size = _SIZES[key]  # a capture takes that of the steps before it
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def largest_block(device: torch.device) -> int:
    """Return how many bytes one block of logits may take on a device."""
    if device.type != "cuda":
        return LARGEST_LOGITS
    return max(2**26, min(LARGEST_LOGITS, int(free_memory(str(device)) * LARGEST_SHARE)))


def _loss_of_block(
    run: Pass, logits: torch.Tensor, labels: torch.Tensor, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the summed loss of a block and the gradient of its logits [n, v], which replaces them.

    The gradient at a label is the probability minus one. It is taken in float32, as rounding the
    probability first would leave little of it where the model is sure.
    """
    columns = labels.clamp(min=0).unsqueeze(1)
    counts = (labels >= 0).unsqueeze(1)
    target = logits.gather(1, columns).float()
    slope = counts.float()
    if softcap is not None:
        bounded = torch.tanh(target / softcap)
        target, slope = bounded * softcap, slope * (1 - bounded.square())
    normaliser, slopes = run(logits, counts, softcap)
    at_label = ((target - normaliser).exp() - 1) * slope
    slopes.scatter_(1, columns, at_label.to(slopes.dtype))
    return ((normaliser - target) * counts).sum(), slopes


def differentiate(
    logits: torch.Tensor, counts: torch.Tensor, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log of the sum of exponentials of logits [n, v], float32 [n, 1], and its gradient
    [n, v] in place of the logits; rows that do not count get zeros.
    """
    if softcap is None and not torch.compiler.is_compiling():
        return _differentiate_in_place(logits, counts)
    scores = logits.float()
    if softcap is not None:
        bounded = torch.tanh(scores / softcap)
        scores = bounded * softcap
    normaliser = torch.logsumexp(scores, 1, keepdim=True)
    slopes = (scores - normaliser).exp()
    if softcap is not None:
        slopes = slopes * (1 - bounded.square())
    logits.copy_(slopes * counts)
    return normaliser, logits


def _differentiate_in_place(
    logits: torch.Tensor, counts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Do as `differentiate` in few passes without the compiler: PyTorch has a kernel for the
    logarithm of the softmax that reads 16 bits and writes 32.
    """
    log_probabilities = torch.log_softmax(logits, 1, dtype=torch.float32)
    normaliser = logits[:, :1].float() - log_probabilities[:, :1]
    logits.copy_(log_probabilities.exp_().mul_(counts))
    return normaliser, logits


_COMPILED: list[Pass] = []


def _compiled_pass() -> Pass:
    """Return `differentiate`, compiled: it reads the logits twice and writes them once."""
    if not _COMPILED:
        _COMPILED.append(torch.compile(differentiate, dynamic=False))
    return _COMPILED[0]


def _add_product(
    total: torch.Tensor | None, slopes: torch.Tensor, hidden: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Return total + slopes.T @ hidden [v, d] in a dtype."""
    product = slopes.T @ hidden
    return product.to(dtype) if total is None else total.add_(product)


def stock_loss(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    """Return the summed cross entropy as the model classes of transformers compute it, with all
    logits in float32.
    """
    logits = hidden @ weight.to(hidden.dtype).T
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum")


def liger_loss(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    """Return the summed cross entropy as Liger computes it. Raises ImportError without Liger."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    run = LigerFusedLinearCrossEntropyLoss(ignore_index=-100, reduction="sum", softcap=softcap)
    loss: torch.Tensor = run(weight.to(hidden.dtype), hidden, labels)
    return loss
