"""Llamas with heads that PEFT, hooks, a bias or a parametrisation change."""

import torch
from peft import LoraConfig, get_peft_model

from optimer_hf.models.fused_loss import fuse_loss
from tests.support.tiny import VOCABULARY, tiny_model


def adapt_with_bias(model):
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCABULARY))


def adapt_with_hook(model):
    model.lm_head.register_forward_hook(lambda layer, given, logits: 2 * logits)


def adapt_with_pre_hook(model):
    model.lm_head.register_forward_pre_hook(lambda layer, given: (2 * given[0],))


def adapt_with_another_forward(model):
    stock = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 2 * stock(hidden)


def adapt_with_parametrisation(model):
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)


HEADS = {  # ways to adapt a head: options of LoraConfig, or a function
    "lora": {"target_modules": ["q_proj", "lm_head"]},
    "rslora": {"target_modules": ["lm_head"], "use_rslora": True, "rank_pattern": {"lm_head": 2}},
    "dora": {"target_modules": ["lm_head"], "use_dora": True},
    "lora with a bias": {"target_modules": ["lm_head"], "lora_bias": True},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [5, 6, 7]}},
    "tokens of both": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [5, 9]},
    },
    "bias": adapt_with_bias,
    "hook": adapt_with_hook,
    "pre-hook": adapt_with_pre_hook,
    "another forward": adapt_with_another_forward,
    "parametrisation": adapt_with_parametrisation,
}


def adapted(way, fused: bool):
    """Return a Llama whose head is adapted after its loss was fused, every factor moved."""
    model = tiny_model("llama")
    if fused:
        assert fuse_loss(model)
    torch.manual_seed(3)
    if not isinstance(way, dict):
        way(model)
        return model
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **way)
    whole = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in whole.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return whole
