"""Read the sizes of a model, with its adapter if it has one: a model goes in, `ModelSizes` come
out. Its weights are not touched, so it may be on the device `meta`.
"""

import re
from collections import Counter
from typing import Any

import torch

from optimer_hf.models.flops import ModelSizes, read_attention, read_experts

OUTSIDE = ("vision", "visual", "audio", "multi_modal_projector")
UNUSED = "original_module."  # PEFT's frozen copy of a module that is trained whole
LAYER = re.compile(r"^.*?\.\d+(?=\.)")


def measure_sizes(model: Any) -> ModelSizes:
    """Return the sizes of a transformers or PEFT model that is not sharded.

    Of a multimodal model only the language part is multiplied with tokens of text.
    """
    config = model.config.get_text_config(decoder=True)
    settings = config.to_dict()
    seen, counts, layers = set(), Counter[str](), Counter[str]()
    for name, module, weight in _weights_of(model):
        if weight not in seen:
            counts["total"] += weight.numel()
            counts["trained"] += weight.numel() * weight.requires_grad
            layers[_layer_of(name)] += weight.numel()
            seen.add(weight)
        if not _meets_text(name, module):
            continue
        share = _share_of_tokens(name, settings)
        if weight.dim() > 1:
            counts["multiplied"] += int(weight.numel() * share)
            counts["trained_multiplied"] += int(weight.numel() * share) * weight.requires_grad
        if _layer_of(name) != name and "lora_" not in name:
            counts["kept_bytes"] += int(_kept_bytes(weight) * share)
    return ModelSizes(
        **{key: counts[key] for key in ("total", "trained", "multiplied", "trained_multiplied")},
        attention=read_attention(settings),
        largest_layer=max(layers.values()),
        n_layers=config.num_hidden_layers,
        width=config.hidden_size,
        kept_bytes=counts["kept_bytes"],
    )


def _weights_of(model: Any) -> Any:
    """Yield (name, module, weight) for each weight of each module."""
    for path, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            yield f"{path}.{name}", module, weight


def _layer_of(name: str) -> str:
    """Return the name of the layer that a weight is in, up to its number, or that of the weight."""
    match = LAYER.match(name)
    return name if match is None else match[0]


def _meets_text(name: str, module: Any) -> bool:
    """Whether every token is multiplied with a weight, unless it belongs to an expert."""
    is_lookup = isinstance(module, torch.nn.Embedding)
    return not is_lookup and not any(part in name for part in (*OUTSIDE, UNUSED))


def _share_of_tokens(name: str, settings: dict[str, Any]) -> float:
    """Return the share of the tokens that meet a weight, which is 1 outside of experts."""
    experts = read_experts(settings)
    return 1.0 if experts is None or ".experts." not in name else experts[1] / experts[0]


def _kept_bytes(weight: torch.Tensor) -> int:
    """Return the bytes kept of a token around a weight: input and output of a product in 16 bits,
    and those of a norm in float32.
    """
    if weight.dim() == 1:
        return 8 * weight.numel()
    n_copies = weight.shape[0] if weight.dim() == 3 else 1  # experts
    return 2 * n_copies * (weight.shape[-1] + weight.shape[-2])
