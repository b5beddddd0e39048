"""Find the output layer of a model whose logits are just `softcap(hidden @ weight.T)`.

Losses and scores of such a model can be computed from hidden states and that weight, without its
logits. PEFT's layers, hooks, a bias or scaled logits rule that out.
"""

from typing import TYPE_CHECKING, Any

import torch

from optimer_hf.models.head_loss import log_probabilities
from optimer_hf.models.placement import input_device, is_only_placed, resident_weight
from optimer_hf.models.probes import PROBE_TOKENS, probe_ids
from optimer_hf.models.sharded import is_sharded, layer_class

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
    if type(head).__name__ == "ModulesToSaveWrapper" and not is_hooked(head):  # from PEFT
        head = _head_in_use(head)
    if head is None or layer_class(head) is not torch.nn.Linear or head.bias is not None:
        return None
    return None if is_hooked(head) and not is_sharded(head) else head


def is_hooked(layer: torch.nn.Module) -> bool:
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
    ids = probe_ids(model, PROBE_TOKENS, input_device(model)).unsqueeze(0)
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
