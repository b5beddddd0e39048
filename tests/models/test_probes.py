"""probes.py: whether packed documents stay apart, of attention and of recurrent layers."""

import pytest
import torch
import transformers

from optimer_hf.models.probes import keeps_documents_apart
from tests.support.tiny import VOCABULARY, tiny_model


def test_attention_keeps_packed_documents_apart(kind):
    assert keeps_documents_apart(tiny_model(kind))
    assert keeps_documents_apart(tiny_model(kind, dtype=torch.bfloat16))


@pytest.mark.parametrize("architecture", ["Qwen3NextForCausalLM", "Lfm2ForCausalLM"])
def test_recurrent_and_convolutional_layers_are_noticed(architecture):
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    configs = {
        "Qwen3NextForCausalLM": lambda: transformers.Qwen3NextConfig(
            **options,
            head_dim=8,
            linear_num_value_heads=2,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            num_experts=0,
            mlp_only_layers=[0, 1, 2, 3],
        ),
        "Lfm2ForCausalLM": lambda: transformers.Lfm2Config(**options, full_attn_idxs=[1, 3]),
    }
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(configs[architecture]()).eval()
    assert not keeps_documents_apart(model)
