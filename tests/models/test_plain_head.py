"""plain_head.py: only a head that is one matrix product passes for one."""

import pytest
import torch

from optimer_hf.models.plain_head import is_plain_head
from tests.support.heads import HEADS, adapted
from tests.support.tiny import EOS, VOCABULARY


@pytest.mark.parametrize("way", HEADS.values(), ids=HEADS)
@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed:peft.utils.warning.PeftWarning")
def test_an_adapted_head_is_scored_through_its_adapter(way):
    model = adapted(way, fused=False)
    inner = model.get_base_model() if isinstance(way, dict) else model
    assert is_plain_head(inner) == (way is HEADS["saved"])


def test_scaled_logits_are_noticed():
    from transformers import GraniteConfig, GraniteForCausalLM

    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "eos_token_id": EOS,
    }
    torch.manual_seed(0)
    config = GraniteConfig(**options, logits_scaling=8.0, initializer_range=1.0)
    assert not is_plain_head(GraniteForCausalLM(config))
    config.logits_scaling = 1.0
    assert is_plain_head(GraniteForCausalLM(config))
