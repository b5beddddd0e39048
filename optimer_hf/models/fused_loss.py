"""Give a model a forward that computes its loss from hidden states, without storing logits."""

import logging
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch

from optimer_hf.models.head_loss import IGNORED_LABEL, Loss, blocked_loss
from optimer_hf.models.placement import resident_weight
from optimer_hf.models.plain_head import is_hooked, is_plain_head, plain_head, softcap_of
from optimer_hf.models.probes import PROBE_TOKENS, probe_ids, probe_loss
from optimer_hf.models.sharded import layer_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


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
    ids = probe_ids(model, 2 * PROBE_TOKENS, model.device).unsqueeze(0)
    expected = probe_loss(root, ids, ids)
    model._fused_loss = loss
    model.forward = MethodType(_fused_forward, model)
    if bool(torch.isclose(probe_loss(root, ids, ids), expected, rtol=1e-2, atol=1e-2)):
        return True
    del model.forward, model._fused_loss
    return False


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
    if not is_hooked(head):
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
