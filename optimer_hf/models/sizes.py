"""Read the sizes of a model, with its adapter if it has one: a model goes in, `ModelSizes` come
out. Its weights are not touched, so it may be on the device `meta`.
"""

from typing import Any

import torch

from optimer_hf.models.flops import ModelSizes, read_attention, read_experts

UNUSED = "original_module."  # PEFT's frozen copy of a module that is trained whole


def measure_sizes(model: Any) -> ModelSizes:
    """Return the sizes of a transformers or PEFT model that is not sharded.

    Of a multimodal model only the language part is multiplied with tokens of text.
    """
    config = model.config.get_text_config(decoder=True).to_dict()
    experts, seen = read_experts(config), set()
    counts = dict.fromkeys(("total", "trained", "multiplied", "trained_multiplied"), 0)
    for path, module in model.named_modules():
        for name, weight in module.named_parameters(recurse=False):
            counts["total"] += weight.numel() * (weight not in seen)
            counts["trained"] += weight.numel() * (weight not in seen) * weight.requires_grad
            seen.add(weight)
            if isinstance(module, torch.nn.Embedding) or not _meets_text(f"{path}.{name}", weight):
                continue
            n_multiplied = weight.numel()
            if ".experts." in f"{path}.{name}" and experts is not None:
                n_multiplied = n_multiplied * experts[1] // experts[0]
            counts["multiplied"] += n_multiplied
            counts["trained_multiplied"] += n_multiplied * weight.requires_grad
    return ModelSizes(**counts, attention=read_attention(config))


def _meets_text(name: str, weight: torch.Tensor) -> bool:
    """Whether every token is multiplied with a weight, unless it belongs to an expert."""
    outside = ("vision", "visual", "audio", "multi_modal_projector", UNUSED)
    return weight.dim() > 1 and not any(part in name for part in outside)
