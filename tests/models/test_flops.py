"""flops.py and sizes.py: counted FLOPs against those that PyTorch counts while models run."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DeepseekV3Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from optimer_hf.models.flops import (
    Attention,
    ModelSizes,
    activation_bytes,
    cache_bytes,
    forward_flops,
    generation_bytes,
    read_attention,
    read_experts,
    training_flops,
)
from optimer_hf.models.sizes import measure_sizes
from tests.support.tiny import GROUPED, SIZES, VOCABULARY, gemma3_multimodal, tiny_model

N_TEXTS, LENGTH = 3, 24
MOE = GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
CONFIGS = {
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=1
    ),
    "mixtral": lambda: MixtralConfig(**MOE),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **GROUPED, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20
    ),
    "gemma4": lambda: Gemma4TextConfig(
        **GROUPED | {"num_hidden_layers": 6},
        head_dim=8,
        global_head_dim=16,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
    ),
    "deepseek_v3": lambda: DeepseekV3Config(
        **SIZES,
        intermediate_size=48,
        num_key_value_heads=4,
        moe_intermediate_size=20,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=12,
        q_lora_rank=12,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=6,
    ),
}
KINDS = ["gemma", "llama", *CONFIGS]


def build(kind: str):
    if kind in ("gemma", "llama"):
        model = tiny_model(kind)
    else:
        model = AutoModelForCausalLM.from_config(CONFIGS[kind]())
    model.set_attn_implementation("eager")  # the counter does not know every fused kernel
    if read_experts(model.config.to_dict()):
        model.set_experts_implementation("eager")
    return model.train()


def count(model, *, backward: bool) -> float:
    """Return the FLOPs per token that PyTorch counts."""
    ids = torch.randint(3, VOCABULARY, (N_TEXTS, LENGTH))
    counter = FlopCounterMode(display=False)
    with counter, torch.set_grad_enabled(backward):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        if backward:
            loss.backward()
    return counter.get_total_flops() / ids.numel()


@pytest.mark.parametrize("kind", KINDS)
def test_training_all_parameters_takes_the_flops_that_pytorch_counts(kind: str):
    model = build(kind)
    sizes = measure_sizes(model)
    assert sizes.total == sizes.trained == sum(each.numel() for each in model.parameters())
    assert training_flops(sizes, LENGTH) == pytest.approx(count(model, backward=True), rel=1e-3)
    assert forward_flops(sizes, LENGTH) == pytest.approx(count(model, backward=False), rel=1e-3)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
@pytest.mark.parametrize("kind", ["gemma", "llama", "gemma4"])
def test_training_a_lora_leaves_out_the_gradients_of_frozen_weights(kind: str, targets):
    bare = measure_sizes(build(kind))
    model = get_peft_model(build(kind), LoraConfig(r=4, target_modules=targets))
    model.enable_input_require_grads()  # the formula has the gradients of the first layer's input
    sizes = measure_sizes(model)
    assert training_flops(sizes, LENGTH) == pytest.approx(count(model, backward=True), rel=1e-3)
    adapter = sizes.total - bare.total
    assert sizes.trained == adapter == sum(e.numel() for e in model.parameters() if e.requires_grad)
    attention = training_flops(bare, LENGTH) - 6 * bare.multiplied
    expected = 4 * bare.multiplied + 6 * adapter + attention
    assert training_flops(sizes, LENGTH) == expected


def count_kept(model, length: int) -> int:
    """Return the bytes of the tensors that the decoder keeps for its backward pass."""
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage, storage.nbytes()
        return tensor

    ids = torch.randint(3, VOCABULARY, (1, length))
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    assert states.requires_grad
    return sum(n_bytes for _, n_bytes in kept.values())


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", [LlamaConfig, Gemma3TextConfig, Qwen3Config])
def test_the_bytes_kept_for_the_backward_pass_are_about_those_that_pytorch_keeps(kind, lora):
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "head_dim": 32}
    model = AutoModelForCausalLM.from_config(kind(**GROUPED | sizes)).train()
    if lora:
        model = model.to(torch.bfloat16)
        model = get_peft_model(
            model, LoraConfig(r=16, target_modules="all-linear")
        ).base_model.model
        model.enable_input_require_grads()
    per_token = (count_kept(model, 256) - count_kept(model, 128)) / 128
    assert measure_sizes(model).kept_bytes == pytest.approx(per_token, rel=0.25)


def test_checkpointing_keeps_the_inputs_of_all_layers_and_one_layer():
    sizes = ModelSizes(0, 0, 0, 0, (), n_layers=4, width=32, kept_bytes=4000)
    assert activation_bytes(sizes, 10, checkpointing=False) == 10 * 4000
    assert activation_bytes(sizes, 10, checkpointing=True) == 10 * (2 * 32 * 4 + 1000)


def test_a_module_that_is_trained_whole_counts_once():
    bare = measure_sizes(build("llama"))
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    sizes = measure_sizes(get_peft_model(build("llama"), config))
    head, adapter = 32 * VOCABULARY, 2 * 4 * (32 + 32)
    assert sizes.multiplied == bare.multiplied + adapter
    assert sizes.trained_multiplied == head + adapter


def test_the_vision_part_of_a_model_meets_no_text():
    whole = AutoModelForImageTextToText.from_config(gemma3_multimodal())
    text = AutoModelForCausalLM.from_config(whole.config.get_text_config())
    assert measure_sizes(whole).multiplied == measure_sizes(text).multiplied
    assert measure_sizes(whole).total > measure_sizes(text).total


def test_a_window_limits_attention_and_what_is_kept_for_it():
    config = tiny_model("gemma").config.to_dict()  # 64 tokens in a window, 16 numbers a head
    layers = read_attention(config | {"layer_types": ["sliding_attention", "full_attention"]})
    assert layers == (Attention(4 * 16, 2 * 2 * 16, 64), Attention(4 * 16, 2 * 2 * 16))
    sizes = ModelSizes(1000, 0, 900, 0, layers)
    assert forward_flops(sizes, 100) == 2 * 900 + 4 * 64 * (64 + 100)
    assert cache_bytes(sizes, 100) == 2 * 64 * (64 + 100)
    assert generation_bytes(sizes, 100, 8) == 2 * 1000 + 8 * cache_bytes(sizes, 100)


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (MistralConfig(num_hidden_layers=2, sliding_window=4096), [4096, 4096]),
        (MistralConfig(num_hidden_layers=2, sliding_window=None), [None, None]),
        (Qwen2Config(num_hidden_layers=2, sliding_window=4096), [None, None]),
        (Gemma3TextConfig(num_hidden_layers=6, sliding_window=512), [512] * 5 + [None]),
        (Qwen3_5TextConfig(num_hidden_layers=8), [None] * 2),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_windows_are_read_as_transformers_uses_them(config, windows: list[int | None]):
    assert [layer.window for layer in read_attention(config.to_dict())] == windows
