"""Compute training loss and token scores over a large vocabulary without storing all logits.

Hidden states come in; the summed cross entropy (with its gradient) or the log-probability of given
tokens goes out. With a vocabulary of 262 k, the logits for one block of text are larger than the
model; here they exist for only a few thousand rows of the vocabulary at a time. The gradient of
the hidden states accumulates along with a running softmax, as flash attention does for its values
(Milakov & Gimelshein, arXiv 1805.02867). So a frozen head needs one pass over the vocabulary for
both loss and gradient.
"""

import logging
from collections.abc import Callable, Iterator
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch

from optimer_hf.models.logit_summary import choose_summary, columns_at_a_time
from optimer_hf.models.placement import input_device, is_only_placed, resident_weight
from optimer_hf.models.sharded import is_sharded, layer_class
from optimer_hf.models.token_loss import TokenBlockLoss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


IGNORED_LABEL = -100  # for tokens that are not trained on, as in PyTorch
VOCABULARY_BLOCK = 2048  # rows of the head at a time: a block of logits stays in the CPU cache
GPU_LOGITS = 2**27  # at a time on a GPU, 512 MiB in float32: few, large launches
PROBE_TOKENS = 8  # per document when a model is probed
TAIL = 2e-4  # of the probability that is not the labels', without a gradient in the head
LARGEST_CHANGE = 1e-4  # relative; masked tokens may change a hidden state by rounding only


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
        n, size = hidden.shape
        largest = hidden.new_full((n, 1), -torch.inf, dtype=torch.float32)
        total = hidden.new_zeros((n, 1), dtype=torch.float32)
        target = hidden.new_zeros((n, 1), dtype=torch.float32)
        gradient = hidden.new_zeros((n, size), dtype=torch.float32)
        for start, rows in _blocks(weight, hidden):
            logits, slope = _logits(hidden, rows, softcap)
            target = _pick(target, logits, labels, start)
            new_largest = torch.maximum(largest, logits.amax(1, keepdim=True))
            rescale = (largest - new_largest).exp_()
            largest = new_largest
            exponentials = logits.sub_(largest).exp_()
            total.mul_(rescale).add_(exponentials.sum(1, keepdim=True))
            if slope is not None:
                exponentials *= slope
            gradient.mul_(rescale).add_(exponentials.to(rows.dtype) @ rows)
        target_rows = weight[labels].float()
        if softcap is not None:
            target_rows *= 1 - (target / softcap).square()
        log_normaliser = largest + total.log()
        ctx.softcap = softcap
        ctx.save_for_backward(
            (gradient / total - target_rows).to(hidden.dtype),
            hidden,
            weight,
            labels,
            log_normaliser,
        )
        return (log_normaliser - target).sum()

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
        n = len(hidden)
        largest = hidden.new_full((n, 1), -torch.inf, dtype=torch.float32)
        total = hidden.new_zeros((n, 1), dtype=torch.float32)
        target = hidden.new_zeros((n, 1), dtype=torch.float32)
        others = torch.zeros_like(hidden, dtype=torch.float32)  # sum of exp(logit) * row
        tail = _Tail(hidden, weight, labels, softcap) if ctx.needs_input_grad[1] else None
        kept = [labels.new_empty(0)]
        for start, rows in _blocks(weight, hidden):
            logits, slope = _logits(hidden, rows, softcap)
            target = _pick(target, logits, labels, start)
            new_largest = torch.maximum(largest, logits.amax(1, keepdim=True))
            rescale = (largest - new_largest).exp_()
            largest = new_largest
            exponentials = logits.sub_(largest).exp_()
            total.mul_(rescale).add_(exponentials.sum(1, keepdim=True))
            if tail is not None:
                kept.append(tail.keep(start, exponentials, largest, total))
            columns, is_inside = _columns(labels, start, len(rows))
            without = exponentials.gather(1, columns).masked_fill_(is_inside, 0.0)
            exponentials.scatter_(1, columns, without)
            if slope is not None:
                exponentials *= slope
            others.mul_(rescale).add_(exponentials.to(rows.dtype) @ rows)
        value = target - largest - total.log()
        of_label = -torch.expm1(value)
        if softcap is not None:
            of_label = of_label * (1 - (target / softcap).square())
        gradient = weight[labels].to(hidden.dtype) * of_label - others / total
        ctx.softcap, is_greedy = softcap, (target >= largest)[:, 0]
        ctx.save_for_backward(
            gradient.to(hidden.dtype),
            hidden,
            weight,
            labels,
            largest + total.log(),
            torch.cat(kept),
        )
        ctx.mark_non_differentiable(is_greedy)
        return value[:, 0], is_greedy

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
        self,
        start: int,
        exponentials: torch.Tensor,
        largest: torch.Tensor,
        total: torch.Tensor,
    ) -> torch.Tensor:
        """Return which tokens of a block to keep, in order. `exponentials` [n, width] are those of
        the logits minus `largest` [n, 1]; `total` [n, 1] is their sum so far.
        """
        normaliser = torch.maximum(total, (self._floor - largest).exp_())
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
    n = hidden.shape[0]
    target = hidden.new_zeros((n, 1), dtype=torch.float32)
    largest = hidden.new_full((n, 1), -torch.inf, dtype=torch.float32)
    total = hidden.new_zeros((n, 1), dtype=torch.float32)
    for start, rows in _blocks(weight, hidden):
        logits, _ = _logits(hidden, rows, softcap)
        target = _pick(target, logits, labels, start)
        new_largest = torch.maximum(largest, logits.amax(1, keepdim=True))
        total.mul_((largest - new_largest).exp_()).add_(
            logits.sub_(new_largest).exp_().sum(1, keepdim=True)
        )
        largest = new_largest
    return (target - largest - total.log())[:, 0], (target >= largest)[:, 0]


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


# -- models ----------------------------------------------------------------------------------------


def softcap_of(model: "PreTrainedModel") -> float | None:
    """Return the soft cap of the logits (Gemma 2); None for most models."""
    return getattr(model.config.get_text_config(), "final_logit_softcapping", None)


def plain_weight(model: "PreTrainedModel") -> torch.Tensor | None:
    """Return the weight [v, d] of a head that is a single matrix product, else None.

    It is None for layers that replace the head (LoRA, DoRA, trained tokens, quantised weights), and
    for a bias, hooks and parametrisations, since their logits differ from those of the weight. A
    head that is trained and saved as a whole (`modules_to_save`) is a plain head.
    """
    head = plain_head(model)
    return None if head is None else resident_weight(head)


def plain_head(model: "PreTrainedModel") -> torch.nn.Linear | None:
    """Return the layer whose weight `plain_weight` returns.

    The hooks of a sharded head only gather its weight, so it may have them.
    """
    head: Any = model.get_output_embeddings()
    if type(head).__name__ == "ModulesToSaveWrapper" and not _is_hooked(head):  # from PEFT
        head = _head_in_use(head)
    if head is None or layer_class(head) is not torch.nn.Linear or head.bias is not None:
        return None
    return None if _is_hooked(head) and not is_sharded(head) else head


def _is_hooked(layer: torch.nn.Module) -> bool:
    """Whether calling a layer runs other code, too."""
    is_replaced = "forward" in vars(layer) and not is_only_placed(layer)
    return bool(is_replaced or layer._forward_hooks or layer._forward_pre_hooks)


def _head_in_use(wrapper: Any) -> Any:
    """Return the head that PEFT's wrapper computes with; None if there are several."""
    if wrapper.disable_adapters or not wrapper.active_adapters:
        return wrapper.original_module
    (name, *others) = wrapper.active_adapters
    return None if others else wrapper.modules_to_save[name]


def is_plain_head(model: "PreTrainedModel") -> bool:
    """Whether the logits are just `softcap(hidden @ weight.T)`.

    The layer must be plain, and the result for a few probe tokens must agree. Models with a bias,
    an adapter, scaled logits or a multimodal wrapper use the stock code instead.
    """
    weight = plain_weight(model)
    if weight is None:
        return False
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(PROBE_TOKENS, device=input_device(model)).unsqueeze(0) % vocabulary
    with torch.no_grad():
        try:
            hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        except (AttributeError, TypeError):
            return False
        expected = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0].float(), -1)
        labels = ids[0].to(weight.device)
        computed, _ = log_probabilities(hidden.to(weight.device), weight, labels, softcap_of(model))
    picked = expected.to(weight.device).gather(1, labels.unsqueeze(1))[:, 0]
    return torch.allclose(computed, picked, rtol=1e-2, atol=1e-2)


def keeps_documents_apart(model: "PreTrainedModel") -> bool:
    """Whether a model reads a second document in a block as if it stood alone.

    Attention masks respect positions that restart, but the state of recurrent and convolutional
    layers carries over. A few probe tokens decide.
    """
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.arange(3 * PROBE_TOKENS, device=input_device(model)) % vocabulary
    one, another, second = ids.split(PROBE_TOKENS)
    blocks = torch.stack([torch.cat([first, second]) for first in (one, another)])
    positions = torch.arange(PROBE_TOKENS, device=ids.device).repeat(2, 2)
    with torch.no_grad():
        try:
            hidden = model.base_model(
                input_ids=blocks, position_ids=positions, use_cache=False
            ).last_hidden_state
        except (AttributeError, TypeError):  # the model takes no positions
            return False
    after_one, after_another = hidden[:, PROBE_TOKENS:].float()
    change = (after_one - after_another).abs().max()
    return bool(change <= LARGEST_CHANGE * after_one.abs().mean())


Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float | None], torch.Tensor]


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


def fuse_loss(model: "PreTrainedModel", loss: Loss | None = None) -> bool:
    """Make `model(labels=...)` compute its loss from hidden states if the head is plain.

    `loss` is the blocked loss for the device of the model unless it is given; calling this again
    replaces it. Returns whether the head is plain. If an adapter is put on the head later, the
    stock loss is used, since it includes the adapter.
    """
    chosen = blocked_loss(model.device.type) if loss is None else loss
    if is_fused(model):
        model._fused_loss = chosen
        return True
    if "forward" in vars(model) or not is_plain_head(model):
        logger.info("%s: the fused loss does not apply, using the stock one", type(model).__name__)
        return False
    model._fused_loss = chosen
    model.forward = MethodType(_fused_forward, model)
    return True


def restore_stock_loss(model: "PreTrainedModel") -> None:
    """Undo `fuse_loss`."""
    if is_fused(model):
        del model.forward, model._fused_loss


def is_fused(model: "PreTrainedModel") -> bool:
    """Whether `fuse_loss` has given a model another loss."""
    return "_fused_loss" in vars(model)


@torch.no_grad()
def fuse_sharded_loss(model: "PreTrainedModel", root: torch.nn.Module, loss: Loss) -> bool:
    """Do as `fuse_loss` for a model whose parameters are spread over processes; collective.

    Only `root`, the module that was sharded, can gather them. It computes the loss of a few probe
    tokens in both ways, which have to agree.
    """
    if "forward" in vars(model) or plain_head(model) is None:
        logger.info(
            "%s: the fused loss does not apply, using the stock one", layer_class(model).__name__
        )
        return False
    ids = _probe_ids(model, 2 * PROBE_TOKENS).unsqueeze(0)
    expected = _loss_of(root, ids, ids)
    model._fused_loss = loss
    model.forward = MethodType(_fused_forward, model)
    if bool(torch.isclose(_loss_of(root, ids, ids), expected, rtol=1e-2, atol=1e-2)):
        return True
    del model.forward, model._fused_loss
    return False


@torch.no_grad()
def sharded_keeps_documents_apart(model: "PreTrainedModel", root: torch.nn.Module) -> bool:
    """Do as `keeps_documents_apart` for a model whose parameters are spread over processes."""
    one, another, second = _probe_ids(model, 3 * PROBE_TOKENS).view(3, -1)
    positions = torch.arange(PROBE_TOKENS, device=second.device).repeat(1, 2)
    losses = []
    for first in (one, another):
        ids = torch.cat([first, second]).unsqueeze(0)
        labels = ids.clone()
        labels[:, : PROBE_TOKENS + 1] = IGNORED_LABEL
        losses.append(_loss_of(root, ids, labels, positions))
    return bool(torch.isclose(losses[0], losses[1], rtol=LARGEST_CHANGE))


def _probe_ids(model: "PreTrainedModel", n: int) -> torch.Tensor:
    """Return n token ids that every process gives to a probe."""
    vocabulary: int = model.config.get_text_config().vocab_size
    return torch.arange(n, device=model.device).remainder(vocabulary)


def _loss_of(
    root: torch.nn.Module,
    ids: torch.Tensor,
    labels: torch.Tensor,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the loss of one block, with dropout off."""
    was_training = root.training
    root.eval()
    output = root(input_ids=ids, labels=labels, position_ids=positions, use_cache=False)
    root.train(was_training)
    loss: torch.Tensor = output.loss.float()
    return loss


def _fused_forward(
    self: "PreTrainedModel",
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    num_items_in_batch: torch.Tensor | int | None = None,
    **_: Any,
) -> Any:
    """Return the same loss as the stock forward: sum / num_items_in_batch, or the mean."""
    from transformers.modeling_outputs import CausalLMOutput

    head = plain_head(self)
    if head is None:  # an adapter was added after `fuse_loss`
        return _stock_forward(
            self, input_ids, labels, position_ids, attention_mask, num_items_in_batch
        )
    # use_cache=False: with a cache, transformers does not look for packed documents in position_ids
    hidden = self.base_model(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=attention_mask,
        use_cache=False,
    ).last_hidden_state
    device = hidden.device.type
    mixed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    # each token predicts the next one, and the last of a row none
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL).flatten()

    def sum_loss(states: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        dtype = mixed or weight.dtype
        loss: torch.Tensor = self._fused_loss(states.to(dtype), weight, targets, softcap_of(self))
        return loss

    with torch.autocast(device, enabled=False):
        loss = _call_head(head, hidden.flatten(0, 1), sum_loss)
    n_items = (targets != IGNORED_LABEL).sum() if num_items_in_batch is None else num_items_in_batch
    return CausalLMOutput(loss=loss / n_items)


def _call_head(
    head: torch.nn.Linear,
    hidden: torch.Tensor,
    compute: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Return compute(hidden, weight of the head).

    The weight of a sharded head is whole only while the layer runs, between its hooks.
    """
    if not _is_hooked(head):
        return compute(hidden, resident_weight(head))
    vars(head)["forward"] = lambda given: compute(given, head.weight)
    try:
        result: torch.Tensor = head(hidden)
    finally:
        del vars(head)["forward"]
    return result


def _stock_forward(
    self: "PreTrainedModel",
    input_ids: torch.Tensor,
    labels: torch.Tensor,
    position_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None,
) -> Any:
    """Return what the model class itself computes, including any layer that replaces the head."""
    counted = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
    return type(self).forward(
        self,
        input_ids=input_ids,
        labels=labels,
        position_ids=position_ids,
        attention_mask=attention_mask,
        use_cache=False,
        **counted,
    )
