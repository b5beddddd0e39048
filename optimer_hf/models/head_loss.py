"""Compute training loss and token scores over a large vocabulary without storing all logits.

Hidden states come in; the summed cross entropy (with its gradient) or the log-probability of given
tokens goes out. With a vocabulary of 262 k, the logits for one block of text are larger than the
model; here they exist for only a few thousand rows of the vocabulary at a time. The gradient of
the hidden states accumulates along with a running softmax, as flash attention does for its values
(Milakov & Gimelshein, arXiv 1805.02867). So a frozen head needs one pass over the vocabulary for
both loss and gradient.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from optimer_hf.models.logit_summary import choose_summary, columns_at_a_time
from optimer_hf.models.token_loss import TokenBlockLoss

IGNORED_LABEL = -100  # for tokens that are not trained on, as in PyTorch
VOCABULARY_BLOCK = 2048  # rows of the head at a time: a block of logits stays in the CPU cache
GPU_LOGITS = 2**27  # at a time on a GPU, 512 MiB in float32: few, large launches
TAIL = 2e-4  # of the probability that is not the labels', without a gradient in the head

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float | None], torch.Tensor]


class _RunningSoftmax:
    """The softmax of logits that come in blocks of the vocabulary, in float32.

    `largest` is the largest logit of each hidden state so far, `total` the sum of exp(logit -
    largest), and `target` the logit of the label, each [n, 1].
    """

    def __init__(self, hidden: torch.Tensor, labels: torch.Tensor) -> None:
        shape = (len(hidden), 1)
        self._labels = labels
        self.largest = hidden.new_full(shape, -torch.inf, dtype=torch.float32)
        self.total = hidden.new_zeros(shape, dtype=torch.float32)
        self.target = hidden.new_zeros(shape, dtype=torch.float32)

    def add(self, start: int, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return exp(logits - largest) [n, width], in place of the logits, and the factor [n, 1]
        that rescales sums of the exponentials of earlier blocks to the new `largest`.
        """
        self.target = _pick(self.target, logits, self._labels, start)
        largest = torch.maximum(self.largest, logits.amax(1, keepdim=True))
        rescale = (self.largest - largest).exp_()
        self.largest = largest
        exponentials = logits.sub_(largest).exp_()
        self.total.mul_(rescale).add_(exponentials.sum(1, keepdim=True))
        return exponentials, rescale

    def log_normaliser(self) -> torch.Tensor:
        """Return the logarithm of the sum of exp(logit), [n, 1]."""
        return self.largest + self.total.log()

    def scores(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-probability of each label and whether none is more likely, both [n]."""
        values = self.target - self.largest - self.total.log()
        return values[:, 0], (self.target >= self.largest)[:, 0]


class HeadLoss(torch.autograd.Function):
    """Summed cross entropy of `softcap(hidden @ weight.T)` against labels, in nats."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        softcap: float | None,
    ) -> torch.Tensor:
        """Return a float32 scalar from hidden [n, d], weight [v, d], labels [n] (none ignored)."""
        softmax = _RunningSoftmax(hidden, labels)
        sums = torch.zeros_like(hidden, dtype=torch.float32)  # of exp(logit) * row
        for start, rows in _blocks(weight, hidden):
            logits, slope = _logits(hidden, rows, softcap)
            exponentials, rescale = softmax.add(start, logits)
            sums.mul_(rescale).add_(_weigh(rows, exponentials, slope))
        target_rows = weight[labels].float()
        if softcap is not None:
            target_rows *= 1 - (softmax.target / softcap).square()
        gradient = (sums / softmax.total - target_rows).to(hidden.dtype)
        log_normaliser = softmax.log_normaliser()
        ctx.softcap = softcap
        ctx.save_for_backward(gradient, hidden, weight, labels, log_normaliser)
        return (log_normaliser - softmax.target).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[torch.Tensor | None, ...]:
        """Scale the stored gradient; a trainable head needs a second pass over the vocabulary."""
        (scale,) = grad_outputs
        gradient, hidden, weight, labels, log_normaliser = ctx.saved_tensors
        weight_gradient = None
        if ctx.needs_input_grad[1]:
            weight_gradient = _weight_gradient(
                hidden, weight, labels, log_normaliser, ctx.softcap
            ).mul_(scale)
        return gradient * scale, weight_gradient, None, None


class LogProbabilities(torch.autograd.Function):
    """The log-probability of each label, in nats, and whether it is the most likely one. On a CPU
    the bits are those of `log_probabilities`.

    The gradient in the weight is a sparse tensor without the tokens at the tail of the vocabulary.
    They have at most TAIL of the probability that the labels leave to others, see `_Tail`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return float32 [n] and bool [n] from hidden [n, d], weight [v, d], labels [n].

        Each row's gradient accumulates along with its softmax, without the label, whose share is
        added last: as p - 1 in 16 bits, little would be left of it where the model is sure.
        """
        softmax = _RunningSoftmax(hidden, labels)
        others = torch.zeros_like(hidden, dtype=torch.float32)  # sum of exp(logit) * row
        tail = _Tail(hidden, weight, labels, softcap) if ctx.needs_input_grad[1] else None
        kept = [labels.new_empty(0)]
        for start, rows in _blocks(weight, hidden):
            logits, slope = _logits(hidden, rows, softcap)
            exponentials, rescale = softmax.add(start, logits)
            if tail is not None:
                kept.append(tail.keep(start, exponentials, softmax))
            columns, is_inside = _columns(labels, start, len(rows))
            without = exponentials.gather(1, columns).masked_fill_(is_inside, 0.0)
            exponentials.scatter_(1, columns, without)
            others.mul_(rescale).add_(_weigh(rows, exponentials, slope))
        value, is_greedy = softmax.scores()
        of_label = -torch.expm1(value).unsqueeze(1)
        if softcap is not None:
            of_label = of_label * (1 - (softmax.target / softcap).square())
        gradient = weight[labels].to(hidden.dtype) * of_label - others / softmax.total
        ctx.softcap = softcap
        ctx.save_for_backward(
            gradient.to(hidden.dtype),
            hidden,
            weight,
            labels,
            softmax.log_normaliser(),
            torch.cat(kept),
        )
        ctx.mark_non_differentiable(is_greedy)
        return value, is_greedy

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[torch.Tensor | None, ...]:
        """Scale each row's gradient; a head that moves needs a second pass over the rows kept."""
        scale = grad_outputs[0].unsqueeze(1)
        gradient, hidden, weight, labels, log_normaliser, kept = ctx.saved_tensors
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = _sparse_weight_gradient(
                hidden, weight, labels, log_normaliser, ctx.softcap, kept, scale.neg()
            )
        return (gradient * scale).to(gradient.dtype), of_weight, None, None


class _Tail:
    """Tells the tokens of a block of the vocabulary whose gradients count from those at the tail.

    At the tail is a token if even a bound of its probability is small, summed over the positions.
    The bound divides by what is known of the normaliser so far: the blocks before, and the labels
    of all positions, which are likely tokens of such a text. No label is at the tail.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        softcap: float | None,
    ) -> None:
        step = rows_at_a_time(len(hidden), hidden.device.type)
        self._labels: torch.Tensor = labels.unique()  # type: ignore[no-untyped-call]
        some = self._labels[:step]
        logits, _ = _logits(hidden, weight[some].to(hidden.dtype), softcap)
        self._floor = logits.logsumexp(1, keepdim=True)
        places = torch.searchsorted(some, labels).clamp_(max=len(some) - 1).unsqueeze(1)
        doubt = -torch.expm1(logits.gather(1, places) - self._floor)[
            some[places] == labels[:, None]
        ]
        self._per_row = TAIL * doubt.sum() / len(weight)
        self._allowance = torch.zeros_like(self._per_row)

    def keep(
        self, start: int, exponentials: torch.Tensor, softmax: _RunningSoftmax
    ) -> torch.Tensor:
        """Return which tokens of a block to keep, in order. `exponentials` [n, width] are those
        that `softmax` returned last.
        """
        normaliser = torch.maximum(softmax.total, (self._floor - softmax.largest).exp_())
        mass = (normaliser.reciprocal_().T @ exponentials)[0]
        inside = self._labels[(self._labels >= start) & (self._labels < start + len(mass))]
        ascending, order = mass.index_fill_(0, inside - start, torch.inf).sort()
        self._allowance = self._allowance + self._per_row * len(mass)
        sums = ascending.cumsum(0)
        n_at_tail = int((sums <= self._allowance).sum())
        if n_at_tail:
            self._allowance = self._allowance - sums[n_at_tail - 1]
        return order[n_at_tail:].sort().values + start


def differentiable_log_probabilities(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `log_probabilities` returns, with a gradient in hidden and, if it requires one,
    in weight.
    """
    values: tuple[torch.Tensor, torch.Tensor] = LogProbabilities.apply(  # type: ignore[no-untyped-call]
        hidden, weight, labels, softcap
    )
    return values


@torch.no_grad()
def log_probabilities(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log p(label) in nats, float32 [n], and whether the label is most likely, bool [n].

    Takes hidden [n, d], weight [v, d] and labels [n]. The softmax always runs in float32; in
    bfloat16, which the stock harness uses for bfloat16 models, log-softmax loses 0.01 to 0.1 nats
    per token.
    """
    if hidden.device.type != "cpu":
        return log_probabilities_in_few_passes(hidden, weight, labels, softcap)
    softmax = _RunningSoftmax(hidden, labels)
    for start, rows in _blocks(weight, hidden):
        softmax.add(start, _logits(hidden, rows, softcap)[0])
    return softmax.scores()


@torch.no_grad()
def log_probabilities_in_few_passes(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `log_probabilities` returns, for devices on which passes over memory take longer
    than arithmetic: logits stay in 16 bits, and are read as few times as possible.
    """
    n = hidden.shape[0]
    target = hidden.new_zeros((n, 1), dtype=torch.float32)
    largest = hidden.new_full((n, 1), -torch.inf, dtype=torch.float32)
    total = largest
    summarize = choose_summary(n * len(weight), hidden.device.type)
    step = columns_at_a_time(n, len(weight))
    for start in range(0, len(weight), step):
        logits = hidden @ weight[start : start + step].to(hidden.dtype).T
        target = _pick(target, logits, labels, start)
        normaliser, peak = summarize(logits, softcap)
        total = torch.logaddexp(total, normaliser)
        largest = torch.maximum(largest, peak)
    is_greedy = (target >= largest)[:, 0]  # a cap keeps the order
    if softcap is not None:
        target = torch.tanh(target / softcap) * softcap
    return (target - total)[:, 0], is_greedy


def _blocks(weight: torch.Tensor, hidden: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (first row, rows of the head in the dtype of hidden) in blocks sized for the device."""
    step = rows_at_a_time(len(hidden), hidden.device.type)
    for start in range(0, weight.shape[0], step):
        yield start, weight[start : start + step].to(hidden.dtype)


def rows_at_a_time(n: int, device: str) -> int:
    """Return how many rows of a head to process at once on a device, for n hidden states."""
    if device == "cpu":
        return VOCABULARY_BLOCK
    # a multiple, since products with an odd number of columns take several times as long
    return max(1, GPU_LOGITS // max(1, n) // VOCABULARY_BLOCK) * VOCABULARY_BLOCK


def _logits(
    hidden: torch.Tensor, rows: torch.Tensor, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the (softcapped) logits in float32 and d capped / d logits (None without a cap)."""
    logits = (hidden @ rows.T).float()
    if softcap is None:
        return logits, None
    bounded = torch.tanh(logits / softcap)
    return bounded * softcap, 1 - bounded.square()


def _weigh(
    rows: torch.Tensor, exponentials: torch.Tensor, slope: torch.Tensor | None
) -> torch.Tensor:
    """Return the sums of rows [width, d] weighted by exponentials [n, width] times the slope of
    the cap, which changes them in place.
    """
    if slope is not None:
        exponentials *= slope
    return exponentials.to(rows.dtype) @ rows


def _pick(
    target: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor, start: int
) -> torch.Tensor:
    """Fill target [n, 1] with the logits of the labels in this block."""
    columns, is_inside = _columns(labels, start, logits.shape[1])
    return torch.where(is_inside, logits.gather(1, columns), target)


def _columns(labels: torch.Tensor, start: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the columns of the labels in a block of logits, and whether they lie in it.

    Both are [n, 1]. Selecting the labels that lie in the block would have to wait for the device.
    """
    columns = (labels - start).unsqueeze(1)
    return columns.clamp(0, width - 1), (columns >= 0) & (columns < width)


def _weight_gradient(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    log_normaliser: torch.Tensor,
    softcap: float | None,
) -> torch.Tensor:
    """Return d loss / d weight [v, d] in the dtype of weight."""
    result = torch.empty_like(weight)
    for start, rows in _blocks(weight, hidden):
        columns, is_inside = _columns(labels, start, len(rows))
        result[start : start + len(rows)] = _rows_gradient(
            hidden, rows, columns, is_inside, log_normaliser, softcap
        )
    return result


def _rows_gradient(
    hidden: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    is_inside: torch.Tensor,
    log_normaliser: torch.Tensor,
    softcap: float | None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the gradient of some rows of the head, in which the labels that are inside have these
    columns; `scale` [n, 1] is a factor of the loss of each position.
    """
    logits, slope = _logits(hidden, rows, softcap)
    probabilities = logits.sub_(log_normaliser).exp_()
    probabilities.scatter_add_(1, columns, -is_inside.to(probabilities.dtype))
    if slope is not None:
        probabilities *= slope
    if scale is not None:
        probabilities *= scale
    return probabilities.to(hidden.dtype).T @ hidden


def _sparse_weight_gradient(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    log_normaliser: torch.Tensor,
    softcap: float | None,
    kept: torch.Tensor,
    scale: torch.Tensor,
) -> torch.Tensor:
    """Return d loss / d weight [v, d] as a sparse tensor with the rows `kept`, which are in order
    and hold all labels.
    """
    values = weight.new_empty((len(kept), weight.shape[1]))
    places = torch.searchsorted(kept, labels)
    step = rows_at_a_time(len(hidden), hidden.device.type)
    for start in range(0, len(kept), step):
        rows = weight[kept[start : start + step]].to(hidden.dtype)
        columns, is_inside = _columns(places, start, len(rows))
        values[start : start + step] = _rows_gradient(
            hidden, rows, columns, is_inside, log_normaliser, softcap, scale
        )
    return torch.sparse_coo_tensor(
        kept.unsqueeze(0), values, weight.shape, is_coalesced=True, check_invariants=False
    )


def loss_by_vocabulary(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, softcap: float | None
) -> torch.Tensor:
    """Return the summed cross entropy, a block of the vocabulary at a time, for CPUs.

    Takes hidden [n, d], weight [v, d] and labels [n], of which those below 0 do not count.
    """
    places = (labels != IGNORED_LABEL).nonzero()[:, 0]  # only once: the host waits for it
    loss: torch.Tensor = HeadLoss.apply(hidden[places], weight, labels[places], softcap)  # type: ignore[no-untyped-call]
    return loss


def loss_by_tokens(is_compiled: bool) -> Loss:
    """Return the summed cross entropy, a block of tokens at a time, for GPUs."""

    def compute(
        hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, softcap: float | None
    ) -> torch.Tensor:
        loss: torch.Tensor = TokenBlockLoss.apply(hidden, weight, labels, softcap, is_compiled)  # type: ignore[no-untyped-call]
        return loss

    return compute


def blocked_loss(device: str, *, is_compiled: bool = False) -> Loss:
    """Return the blocked loss for a device."""
    return loss_by_vocabulary if device == "cpu" else loss_by_tokens(is_compiled)
