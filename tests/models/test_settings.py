"""A fine-tune whose config changes the function of the same tensors is refused, and no other."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from optimer_hf.errors import ModelError
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.models.settings import compare_settings
from optimer_hf.vectors.opening import open_vector
from tests.support.tiny import VOCABULARY, tiny_model

IDS = torch.arange(3, 43)[None] * 7 % 250 + 3
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MAKERS = {
    "llama": lambda: tiny_model("llama"),
    "gemma": lambda: tiny_model("gemma"),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**COMMON)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**COMMON)),
    "experts": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**COMMON, num_local_experts=4)
    ),
    "granite": lambda: transformers.GraniteForCausalLM(transformers.GraniteConfig(**COMMON)),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2)
    ),
    "llama4": lambda: transformers.Llama4ForCausalLM(
        transformers.Llama4TextConfig(
            **COMMON,
            head_dim=8,
            intermediate_size_mlp=32,
            num_local_experts=2,
            no_rope_layers=[1, 0],
            attention_chunk_size=64,
        )
    ),
    "modernbert": lambda: transformers.ModernBertDecoderForCausalLM(
        transformers.ModernBertDecoderConfig(
            **{key: size for key, size in COMMON.items() if key != "num_key_value_heads"},
            **dict.fromkeys(("pad_token_id", "cls_token_id", "sep_token_id"), 0),
            **{"bos_token_id": 2, "eos_token_id": 1},
        )
    ),
    "mamba2": lambda: transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            state_size=8,
            num_hidden_layers=1,
            num_heads=4,
            head_dim=16,
            n_groups=1,
            chunk_size=64,
        )
    ),
    "mpt": lambda: transformers.MptForCausalLM(
        transformers.MptConfig(vocab_size=VOCABULARY, d_model=32, n_heads=4, n_layers=1)
    ),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a function kind -> directory of a model with weights that are not all alike."""
    made: dict[str, Path] = {}

    def model(kind: str) -> Path:
        if kind not in made:
            torch.manual_seed(0)
            model = MAKERS[kind]()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.2 * torch.randn_like(parameter))
            made[kind] = tmp_path_factory.mktemp(kind)
            model.save_pretrained(made[kind])
        return made[kind]

    return model


def changed(source: Path, out: Path, **changes) -> Path:
    """Copy a model with other lines in its config.json; ... takes one out."""
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not ...}
    (out / "config.json").write_text(json.dumps(kept))
    return out


def logits(path: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("llama", {"rope_parameters": ..., "rope_theta": 5e5}, "rope_parameters"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, "rope_parameters"),
        (
            "llama",
            {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 2.0}},
            "ro",
        ),
        ("llama", {"rms_norm_eps": 0.1}, "rms_norm_eps: 0.1, base 1e-06"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act"),
        (
            "llama",
            {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4},
            "num_attent",
        ),
        ("gemma", {"sliding_window": 8}, "sliding_window: 8, base 64"),
        ("gemma", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar"),
        ("gemma", {"layer_types": ["full_attention"] * 2, "sliding_window": 8}, "layer_types"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma", {"final_logit_softcapping": 1.0}, "final_logit_softcapping: 1.0, base None"),
        ("mistral", {"sliding_window": 8}, "sliding_window: 8"),
        (
            "qwen2",
            {
                "layer_types": ...,
                "use_sliding_window": True,
                "sliding_window": 8,
                "max_window_layers": 0,
            },
            "slid",
        ),
        ("experts", {"num_experts_per_tok": 1}, "num_experts_per_tok: 1, base 2"),
        ("granite", {"residual_multiplier": 0.5}, "residual_multiplier"),
        ("granite", {"attention_multiplier": 0.01}, "attention_multiplier"),
        ("gpt2", {"layer_norm_epsilon": 1.0}, "layer_norm_epsilon"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False}, "scale_"),
        ("mpt", {"attn_config": {"softmax_scale": 0.01}}, "attn_config"),
        ("llama4", {"attention_chunk_size": 8}, "attention_chunk_size: 8, base 64"),
        ("modernbert", {"classifier_activation": "relu"}, "classifier_activation: 'relu'"),
        ("llama", {"model_type": "gemma", "head_dim": 8}, "model_type: 'gemma', base 'llama'"),
    ],
)
def test_a_fine_tune_whose_config_changes_the_function_is_refused(
    models, tmp_path, kind, changes, named
):
    base = models(kind)
    tuned = changed(base, tmp_path / "tuned", **changes)
    assert not torch.allclose(logits(tuned), logits(base), rtol=1e-3, atol=1e-3)
    with pytest.raises(ModelError, match=named):
        open_vector("v", str(tuned), ResolvedModel(base, "base"))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"max_position_embeddings": 4096, "pretraining_tp": 2, "use_cache": False}),
        ("llama", {"attention_dropout": 0.1, "initializer_range": 0.5, "unsloth_fixed": True}),
        ("llama", {"bos_token_id": 5, "eos_token_id": [1, 7], "pad_token_id": None}),
        ("llama", {"rope_parameters": ..., "rope_theta": 10000}),
        ("llama", {"rope_parameters": ..., "rope_theta": 10000.0, "rope_scaling": None}),
        ("llama", {"head_dim": ..., "attention_bias": ..., "mlp_bias": ...}),
        ("llama", {"rms_norm_eps": 9.999999974752427e-07, "hidden_act": "swish"}),
        ("llama", {"model_type": "mistral", "sliding_window": None}),
        ("llama", {"architectures": ["LlamaForSequenceClassification"], "num_labels": 3}),
        (
            "gemma",
            {"layer_types": ..., "sliding_window_pattern": 6, "cache_implementation": "hybrid"},
        ),
        ("mistral", {"model_type": "llama", "sliding_window": ...}),
        ("qwen2", {"sliding_window": 4096, "max_window_layers": 1}),
        ("experts", {"router_aux_loss_coef": 0.5, "output_router_logits": True}),
        (
            "gpt2",
            {"n_ctx": 64, "attn_pdrop": 0.0, "summary_type": "mean", "task_specific_params": {}},
        ),
        ("mpt", {"attn_config": {"attn_pdrop": 1}}),
        ("mamba2", {"chunk_size": 128, "rescale_prenorm_residual": True}),
    ],
)
def test_a_fine_tune_whose_config_leaves_the_function_alone_is_accepted(
    models, tmp_path, kind, changes
):
    base = models(kind) if kind != "mistral" else no_window(models, tmp_path)
    tuned = changed(base, tmp_path / "tuned", **changes)
    assert torch.equal(logits(tuned), logits(base))
    assert compare_settings(tuned, base) == {}
    open_vector("v", str(tuned), ResolvedModel(base, "base"))


def no_window(models, folder: Path) -> Path:
    return changed(models("mistral"), folder / "base", sliding_window=None)


def test_the_longest_text_counts_only_if_rope_depends_on_it(models, tmp_path):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    base = changed(models("llama"), tmp_path / "base", rope_parameters=rope)
    tuned = changed(base, tmp_path / "tuned", max_position_embeddings=16)
    assert not torch.allclose(logits(tuned), logits(base))
    assert list(compare_settings(tuned, base)) == ["max_position_embeddings"]
