"""probes.py: whether packed documents and padding stay apart, and whether a model reads ahead."""

import pytest
import torch
import transformers

from optimer_hf.errors import ModelError
from optimer_hf.models.probes import keeps_documents_apart, reads_ahead, refuse_reading_ahead
from tests.support.tiny import GROUPED, VOCABULARY, WIDE, tiny_model


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


ENCODER = {key: value for key, value in WIDE.items() if key != "bos_token_id"}
EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2}
MODELS = {  # and whether they read ahead
    "an encoder": (lambda: transformers.BertConfig(**ENCODER), True),
    "a decoder of its family": (lambda: transformers.BertConfig(**ENCODER, is_decoder=True), False),
    "another encoder": (lambda: transformers.RobertaConfig(**WIDE), True),
    "an embedding model": (
        lambda: transformers.Gemma3TextConfig(
            **GROUPED, head_dim=16, use_bidirectional_attention=True
        ),
        True,
    ),
    "experts": (lambda: transformers.MixtralConfig(**GROUPED, **EXPERTS), False),
    "a state": (
        lambda: transformers.MambaConfig(
            vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2
        ),
        False,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_reads_what_it_predicts_is_noticed(kind, dtype):
    make, ahead = MODELS[kind]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(make()).to(dtype)
    assert reads_ahead(model.eval()) is ahead
    if ahead:
        with pytest.raises(ModelError, match="is not causal: it reads the tokens that come after"):
            refuse_reading_ahead(model)


@pytest.mark.parametrize("kind", ["nan", "overflow"])
def test_a_model_that_overflows_is_not_said_to_read_ahead(kind):
    model = tiny_model("llama", dtype=torch.float16 if kind == "overflow" else torch.float32).eval()
    with torch.no_grad():
        weight = model.model.layers[0].mlp.down_proj.weight
        weight[0, 0] = torch.nan if kind == "nan" else 6e4
        weight.mul_(1 if kind == "nan" else 6e4)
    assert not reads_ahead(model)


def test_rounding_that_depends_on_later_tokens_is_not_reading_ahead():
    """As where experts multiply together the tokens that the router gives them."""
    model = tiny_model("llama").eval()
    layer = model.model.layers[0].mlp

    def shift(_, __, output):
        return output + 1e-3 * output.detach()[:, -1:].sign()

    hook = layer.register_forward_hook(shift)
    ids = torch.tensor([[3, 4, 5], [3, 4, 6]])
    one, other = model.base_model(input_ids=ids).last_hidden_state[:, 0].detach()
    assert not torch.equal(one, other)
    assert not reads_ahead(model)
    hook.remove()
