"""GGUF files of many architectures: the decoded model gives the logits of the original, or the file
is refused with the key or tensor that transformers does not read.
"""

import math
from typing import Any

import pytest
import torch
import transformers

from optimer_hf.errors import ModelError
from optimer_hf.models.gguf_conversion import decode_gguf
from optimer_hf.models.gguf_header import read_header
from tests.support.gguf import Tensors, interleave_heads, keep, write_gguf

TOKENS, WIDTH, LAYERS, HEADS, GROUPS, CONTEXT = 96, 64, 2, 4, 2, 256
HEAD = WIDTH // HEADS
SIZES = {
    "vocab_size": TOKENS,
    "hidden_size": WIDTH,
    "intermediate_size": 80,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def random_model(config: Any) -> Any:
    """Return a model in which every parameter matters."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.tie_weights()
    return model


# -- what llama.cpp's converter does to tensors ----------------------------------------------------


def shift_norms(model: Any, name: str, tensor: torch.Tensor) -> Tensors:
    return {name: tensor + 1 if name.endswith("norm.weight") else tensor}


def transpose_conv1d(model: Any, name: str, tensor: torch.Tensor) -> Tensors:
    is_conv1d = any(part in name for part in ("c_attn", "c_proj", "c_fc"))
    return {name: tensor.T if is_conv1d and tensor.dim() == 2 else tensor}


def split_experts(model: Any, name: str, tensor: torch.Tensor) -> Tensors:
    stem = name.removesuffix("gate_up_proj")
    if stem != name:
        gate, up = tensor.chunk(2, dim=1)
        return {f"{stem}gate_proj.weight": gate, f"{stem}up_proj.weight": up}
    if name.endswith("experts.down_proj"):
        return {f"{name}.weight": tensor}
    return {name: tensor[0] if name.endswith("shared_expert_gate.weight") else tensor}


def group_by_part(model: Any, name: str, tensor: torch.Tensor) -> Tensors:
    """Put BLOOM's queries, keys and values of all heads together, not those of a head."""
    if "query_key_value" in name:
        parts = tensor.reshape(HEADS, 3, HEAD, *tensor.shape[1:])
        tensor = parts.swapaxes(0, 1).reshape(tensor.shape)
    return {name.removeprefix("transformer."): tensor}


def keys_of(**more: Any) -> dict[str, Any]:
    """Return the keys that every converter writes; a double underscore stands for a dot."""
    keys: dict[str, Any] = {
        "context_length": CONTEXT,
        "embedding_length": WIDTH,
        "feed_forward_length": 80,
        "block_count": LAYERS,
        "attention.head_count": HEADS,
        "attention.head_count_kv": GROUPS,
    }
    keys |= {key.replace("__", "."): value for key, value in more.items()}
    return {key: value for key, value in keys.items() if value is not None}


def rms_keys(eps: float = 1e-5, base: float = 10000.0, **more: Any) -> dict[str, Any]:
    return keys_of(attention__layer_norm_rms_epsilon=eps, rope__freq_base=base, **more)


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 3 + 200).remainder(TOKENS - 3).add(3).unsqueeze(0)
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def assert_same_function(found: Any, expected: Any) -> None:
    a, b = logits(found), logits(expected)
    assert (a - b).norm() / b.norm() < 1e-4
    assert b.std() > 0.1


LLAMA = {"rope_theta": 10000.0, "rms_norm_eps": 1e-5}


def llama3_factors(base: float, factor: float, original: int, low: float, high: float):
    """Return the divisors of Llama 3.x's frequencies as llama.cpp stores them."""
    frequencies = base ** -(torch.arange(0, HEAD, 2) / HEAD)
    wavelengths = 2 * math.pi / frequencies
    smooth = ((original / wavelengths - low) / (high - low)).clamp(0, 1)
    return {"rope_freqs.weight": (1 / ((1 - smooth) / factor + smooth)).float()}


def llama(**more: Any) -> Any:
    return transformers.LlamaConfig(**SIZES | {"rms_norm_eps": 1e-5} | more)


LONG = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500.0}
SHORT_FACTORS = [1.0 + 0.1 * i for i in range(HEAD // 2)]
LONG_FACTORS = [2.0 + 0.5 * i for i in range(HEAD // 2)]

CASES: dict[str, tuple] = {
    "llama": (
        "llama",
        llama(),
        rms_keys(rope__dimension_count=HEAD),
        interleave_heads,
    ),
    "llama with another base, tied": (
        "llama",
        llama(rope_theta=500000.0, tie_word_embeddings=True),
        rms_keys(base=500000.0, rope__dimension_count=HEAD),
        interleave_heads,
    ),
    "llama with wide heads": (
        "llama",
        llama(head_dim=32),
        rms_keys(rope__dimension_count=32, attention__key_length=32, attention__value_length=32),
        interleave_heads,
    ),
    "llama with biases": (
        "llama",
        llama(attention_bias=True, mlp_bias=True),
        rms_keys(rope__dimension_count=HEAD),
        interleave_heads,
    ),
    "llama 3 as it is": (
        "llama",
        llama(
            rope_scaling={
                "rope_type": "llama3",
                "factor": 8.0,
                "original_max_position_embeddings": 8192,
                **LONG | {"rope_theta": 500000.0},
            }
        ),
        rms_keys(base=500000.0, rope__dimension_count=HEAD),
        interleave_heads,
        llama3_factors(500000.0, 8.0, 8192, 1.0, 4.0),
    ),
    "llama 3 with other numbers": (
        "llama",
        llama(
            rope_scaling={
                "rope_type": "llama3",
                "factor": 16.0,
                "original_max_position_embeddings": 64,
                **LONG,
            }
        ),
        rms_keys(base=500.0, rope__dimension_count=HEAD),
        interleave_heads,
        llama3_factors(500.0, 16.0, 64, 1.0, 4.0),
    ),
    "llama with linear scaling": (
        "llama",
        llama(rope_scaling={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}),
        rms_keys(
            rope__dimension_count=HEAD, rope__scaling__type="linear", rope__scaling__factor=4.0
        ),
        interleave_heads,
    ),
    "llama with linear scaling, old key": (
        "llama",
        llama(rope_scaling={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}),
        rms_keys(rope__dimension_count=HEAD, rope__scale_linear=4.0),
        interleave_heads,
    ),
    "qwen2": (
        "qwen2",
        transformers.Qwen2Config(**SIZES, rms_norm_eps=1e-6, rope_theta=1e6),
        rms_keys(1e-6, 1e6),
    ),
    "qwen2 with yarn": (
        "qwen2",
        transformers.Qwen2Config(
            **SIZES,
            rms_norm_eps=1e-6,
            rope_scaling={
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 1e4,
            },
        ),
        rms_keys(
            1e-6,
            1e4,
            rope__scaling__type="yarn",
            rope__scaling__factor=4.0,
            rope__scaling__original_context_length=64,
        ),
    ),
    "qwen3": (
        "qwen3",
        transformers.Qwen3Config(**SIZES, rms_norm_eps=1e-6, rope_theta=1e6, head_dim=32),
        rms_keys(1e-6, 1e6, attention__key_length=32, attention__value_length=32),
    ),
    "qwen2moe": (
        "qwen2moe",
        transformers.Qwen2MoeConfig(
            **SIZES,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=40,
        ),
        rms_keys(
            1e-6,
            1e6,
            expert_count=4,
            expert_used_count=2,
            expert_feed_forward_length=24,
            expert_shared_feed_forward_length=40,
        ),
        split_experts,
    ),
    "qwen3moe": (
        "qwen3moe",
        transformers.Qwen3MoeConfig(
            **SIZES,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            head_dim=32,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            norm_topk_prob=True,
        ),
        rms_keys(
            1e-6,
            1e6,
            attention__key_length=32,
            attention__value_length=32,
            expert_count=4,
            expert_used_count=2,
            expert_feed_forward_length=24,
        ),
        split_experts,
    ),
    "gemma2": (
        "gemma2",
        transformers.Gemma2Config(
            **SIZES,
            head_dim=32,
            query_pre_attn_scalar=32,
            sliding_window=24,
            attn_logit_softcapping=7.0,
            final_logit_softcapping=5.0,
        ),
        rms_keys(
            1e-6,
            attention__key_length=32,
            attention__value_length=32,
            attention__sliding_window=24,
            attn_logit_softcapping=7.0,
            final_logit_softcapping=5.0,
        ),
        shift_norms,
    ),
    "gemma3": (
        "gemma3",
        transformers.Gemma3TextConfig(
            **SIZES,
            head_dim=32,
            query_pre_attn_scalar=32,
            sliding_window=24,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters={
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20000.0},
            },
        ),
        rms_keys(
            1e-6,
            1e6,
            attention__key_length=32,
            attention__value_length=32,
            attention__sliding_window=24,
            attention__sliding_window_pattern=2,
            rope__freq_base_swa=20000.0,
            rope__scaling__type="linear",
            rope__scaling__factor=8.0,
        ),
        shift_norms,
    ),
    "phi3 with a window": (
        "phi3",
        transformers.Phi3Config(**SIZES, rms_norm_eps=1e-5, sliding_window=24),
        rms_keys(rope__dimension_count=HEAD, attention__sliding_window=24),
    ),
    "phi3, long and partial": (
        "phi3",
        transformers.Phi3Config(
            **SIZES | {"num_attention_heads": 2, "num_key_value_heads": 1},
            rms_norm_eps=1e-5,
            original_max_position_embeddings=128,
            partial_rotary_factor=0.5,
            rope_scaling={
                "rope_type": "longrope",
                "short_factor": SHORT_FACTORS,
                "long_factor": LONG_FACTORS,
            },
        ),
        rms_keys(
            rope__dimension_count=HEAD,
            rope__scaling__attn_factor=math.sqrt(1 + math.log(2) / math.log(128)),
            rope__scaling__original_context_length=128,
        )
        | {"attention.head_count": 2, "attention.head_count_kv": 1},
        keep,
        {
            "rope_factors_long.weight": torch.tensor(LONG_FACTORS),
            "rope_factors_short.weight": torch.tensor(SHORT_FACTORS),
        },
    ),
    "gpt2": (
        "gpt2",
        transformers.GPT2Config(
            vocab_size=TOKENS,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            n_positions=CONTEXT,
            layer_norm_epsilon=1e-3,
        ),
        keys_of(
            attention__head_count_kv=None,
            feed_forward_length=4 * WIDTH,
            attention__layer_norm_epsilon=1e-3,
        ),
        transpose_conv1d,
    ),
    "starcoder2": (
        "starcoder2",
        transformers.Starcoder2Config(
            **SIZES, norm_epsilon=1e-3, rope_theta=100000.0, sliding_window=None
        ),
        keys_of(attention__layer_norm_epsilon=1e-3, rope__freq_base=100000.0),
    ),
    "stablelm": (
        "stablelm",
        transformers.StableLmConfig(
            **SIZES,
            layer_norm_eps=1e-3,
            partial_rotary_factor=0.5,
            use_qkv_bias=True,
            rope_theta=20000.0,
        ),
        keys_of(
            attention__layer_norm_epsilon=1e-3,
            rope__dimension_count=HEAD // 2,
            rope__freq_base=20000.0,
            use_parallel_residual=False,
        ),
    ),
    "nemotron": (
        "nemotron",
        transformers.NemotronConfig(
            **SIZES, norm_eps=1e-3, partial_rotary_factor=0.25, rope_theta=20000.0, head_dim=HEAD
        ),
        keys_of(
            attention__layer_norm_epsilon=1e-3,
            rope__dimension_count=HEAD // 4,
            rope__freq_base=20000.0,
        ),
        shift_norms,
    ),
    "falcon": (
        "falcon",
        transformers.FalconConfig(
            vocab_size=TOKENS,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            layer_norm_epsilon=1e-3,
            rope_theta=20000.0,
            bias=False,
        ),
        keys_of(
            feed_forward_length=4 * WIDTH,
            attention__head_count_kv=1,
            attention__layer_norm_epsilon=1e-3,
            rope__freq_base=20000.0,
            tensor_data_layout="jploski",
        ),
    ),
    "bloom": (
        "bloom",
        transformers.BloomConfig(
            vocab_size=TOKENS,
            hidden_size=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            layer_norm_epsilon=1e-3,
        ),
        keys_of(
            feed_forward_length=4 * WIDTH,
            attention__head_count_kv=HEADS,
            attention__layer_norm_epsilon=1e-3,
        ),
        group_by_part,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_model_from_gguf_gives_the_logits_of_the_original(tmp_path, case):
    architecture, config, keys, *rest = case
    model = random_model(config)
    file = write_gguf(tmp_path / "model.gguf", architecture, model, keys, *rest)
    assert_same_function(decode_gguf(read_header(file), torch.float32), model)


def test_the_scaling_of_llama_3_is_recognised_as_its_four_numbers(tmp_path):
    architecture, config, keys, *rest = CASES["llama 3 as it is"]
    file = write_gguf(tmp_path / "m.gguf", architecture, random_model(config), keys, *rest)
    rope = decode_gguf(read_header(file), torch.float32).config.rope_parameters
    assert rope == config.rope_parameters


def test_a_head_that_copies_the_embedding_is_accepted_and_another_is_refused(tmp_path):
    architecture, config, keys, stored = CASES["bloom"]
    model = random_model(config)
    embedding = model.transformer.word_embeddings.weight.detach()
    for name, head in (("copy", embedding * 1.001), ("other", embedding.flip(0))):
        more = {"output.weight": head}
        file = write_gguf(tmp_path / f"{name}.gguf", architecture, model, keys, stored, more)
        if name == "other":
            with pytest.raises(ModelError, match=r"output\.weight differs from"):
                decode_gguf(read_header(file), torch.float32)
        else:
            shown, expected = (
                logits(each) for each in (decode_gguf(read_header(file), torch.float32), model)
            )
            assert (shown - expected).norm() / expected.norm() < 0.02


# -- keys and tensors that transformers does not read ----------------------------------------------


@pytest.mark.parametrize(
    ("case", "key", "value"),
    [
        ("llama", "attn_logit_softcapping", 50.0),
        ("llama", "final_logit_softcapping", 30.0),
        ("llama", "logit_scale", 0.1),
        ("llama", "residual_scale", 0.2),
        ("llama", "embedding_scale", 12.0),
        ("llama", "attention.scale", 0.5),
        ("llama", "attention.sliding_window", 24),
        ("llama", "attention.clamp_kqv", 8.0),
        ("llama", "attention.causal", False),
        ("llama", "attention.max_alibi_bias", 8.0),
        ("llama", "attention.value_length", 8),
        ("llama", "attention.something_new", 8),
        ("llama", "expert_count", 8),
        ("llama", "rope.freq_base_swa", 500.0),
        ("llama", "rope.dimension_sections", [8, 8, 0, 0]),
        ("llama", "rope.scaling.type", "longrope"),
        ("llama", "rope.scaling.attn_factor", 1.3),
        ("llama", "rope.scaling.yarn_log_multiplier", 0.1),
        ("llama", "rope.scaling.something_new", 0.1),
        ("llama", "nextn_predict_layers", 1),
        ("llama", "pooling_type", 1),
        ("qwen2", "attention.sliding_window", 24),
        ("qwen2", "attention.key_length", 32),
        ("qwen3moe", "expert_gating_func", 2),
        ("qwen3moe", "expert_weights_scale", 2.5),
        ("qwen3moe", "leading_dense_block_count", 1),
        ("gpt2", "rope.freq_base", 10000.0),
        ("stablelm", "use_parallel_residual", True),
    ],
)
def test_a_key_that_changes_the_function_and_has_no_place_in_the_config_is_refused(
    tmp_path, case, key, value
):
    architecture, config, keys, *rest = CASES[case]
    keys = keys | {key: value}
    if key == "rope.scaling.type":
        keys["rope.scaling.factor"] = 4.0
    file = write_gguf(tmp_path / "m.gguf", architecture, random_model(config), keys, *rest)
    with pytest.raises(ModelError, match=rf"m\.gguf: {architecture}\.{key} = .* may change"):
        decode_gguf(read_header(file), torch.float32)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.sliding_window", CONTEXT),
        ("attention.scale", HEAD**-0.5),
        ("logit_scale", 1.0),
        ("expert_count", 0),
        ("attention.causal", True),
        ("rope.scaling.type", "none"),
        ("rope.scaling.finetuned", True),
        ("rope.scaling.factor", 1.0),
        ("tensor_data_layout", "Meta AI original pth"),
        ("attention.key_length", HEAD),
        ("/general.license", "mit"),
        ("/somebody.note", "hello"),
    ],
)
def test_a_key_whose_value_changes_nothing_is_accepted(tmp_path, key, value):
    architecture, config, keys, *rest = CASES["llama"]
    model = random_model(config)
    file = write_gguf(tmp_path / "m.gguf", architecture, model, keys | {key: value}, *rest)
    assert_same_function(decode_gguf(read_header(file), torch.float32), model)


@pytest.mark.parametrize(
    "name", ["blk.0.attn_q_norm.weight", "blk.0.attn_output.bias", "blk.2.attn_q.weight", "extra"]
)
def test_a_tensor_without_a_parameter_is_refused(tmp_path, name):
    architecture, config, keys, *rest = CASES["llama"]
    more = {name: torch.ones(WIDTH)}
    file = write_gguf(tmp_path / "m.gguf", architecture, random_model(config), keys, *rest, more)
    with pytest.raises(ModelError, match=rf"no place for the tensor '{name}' \(1 in all\)"):
        decode_gguf(read_header(file), torch.float32)


def test_a_tensor_that_is_missing_is_named(tmp_path):
    architecture, config, keys, stored = CASES["llama"]

    def without(model: Any, name: str, tensor: torch.Tensor) -> Tensors:
        return {} if "layers.1.mlp.up_proj" in name else stored(model, name, tensor)

    file = write_gguf(tmp_path / "m.gguf", architecture, random_model(config), keys, without)
    with pytest.raises(ModelError, match=r"describes a model with|lacks the tensor"):
        decode_gguf(read_header(file), torch.float32)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("/general.type", "adapter", "contains a 'adapter', expected a model"),
        ("/split.count", 3, "is one of 3 parts"),
    ],
)
def test_a_file_that_is_not_a_whole_model_is_refused(tmp_path, key, value, message):
    architecture, config, keys, *rest = CASES["llama"]
    file = write_gguf(
        tmp_path / "m.gguf", architecture, random_model(config), keys | {key: value}, *rest
    )
    with pytest.raises(ModelError, match=message):
        decode_gguf(read_header(file), torch.float32)
