"""Names: bases and fine-tunes whose files call one tensor by two names, or have tensors that the
model class does not load. The reference is the tuned model as transformers or PEFT runs it.
"""

import shutil
from collections.abc import Callable

import pytest
import torch
import transformers
from conftest import BOS, EOS, PAD, VOCABULARY
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from optimer_hf.checkpoint import Checkpoint, unwrapped_names
from optimer_hf.convert import ResolvedModel, loaded_model
from optimer_hf.errors import ModelError
from optimer_hf.growth import full_norm
from optimer_hf.merge import write_merged
from optimer_hf.resident import ResidentModel
from optimer_hf.ties import ties_of
from optimer_hf.vector import extract, open_vector

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
WIDE = COMMON | {"intermediate_size": 48}
GROUPED = WIDE | {"num_key_value_heads": 2}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "vision_use_head": False,
}
CLASSES = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=64, **COMMON)),
    "bloom": lambda: transformers.BloomForCausalLM(transformers.BloomConfig(**COMMON)),
    "falcon": lambda: transformers.FalconForCausalLM(transformers.FalconConfig(**COMMON)),
    "mpt": lambda: transformers.MptForCausalLM(
        transformers.MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4)
    ),
    "neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**WIDE)),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**COMMON, word_embed_proj_dim=32, ffn_dim=48)
    ),
    "phi": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**WIDE)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)),
    "mixtral": lambda: transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**GROUPED, num_local_experts=3)
    ),
    "qwen3 moe": lambda: transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            **GROUPED, head_dim=8, moe_intermediate_size=16, num_experts=3, num_experts_per_tok=2
        )
    ),
    "gemma3": lambda: transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config=GROUPED | {"head_dim": 8}, vision_config=VISION, mm_tokens_per_image=1
        )
    ),
    "qwen3.5": lambda: transformers.Qwen3_5ForConditionalGeneration(
        transformers.Qwen3_5Config(
            text_config=GROUPED | {"head_dim": 8, "layer_types": ["full_attention"] * 2},
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_heads": 2,
                "out_hidden_size": 32,
                "patch_size": 4,
            },
        )
    ),
}
IDS = torch.tensor([[2, 70, 71, 72, 90]])
Edit = Callable[[dict], dict]


def without(*prefixes: str) -> Edit:
    """Return an edit that takes the first prefix that fits off every name."""

    def edit(tensors):
        for prefix in prefixes:
            tensors = {name.removeprefix(prefix): value for name, value in tensors.items()}
        return tensors

    return edit


def under(prefix: str) -> Edit:
    return lambda tensors: {prefix + name: value for name, value in tensors.items()}


def inside(place: str, part: str) -> Edit:
    return lambda tensors: {
        name.replace(place, place + part): value for name, value in tensors.items()
    }


def adding(**more: torch.Tensor) -> Edit:
    return lambda tensors: tensors | {key.replace("__", "."): v for key, v in more.items()}


def same(tensors):
    return tensors


MASK = {"transformer__h__0__attn__bias": torch.ones(1, 1, 8, 8, dtype=torch.uint8)}
WIDER = {"transformer__h__0__attn__bias": torch.ones(1, 1, 16, 16, dtype=torch.bool)}
BARE = {"h__0__attn__bias": torch.ones(1, 1, 8, 8), "h__1__attn__masked_bias": torch.tensor(-1e4)}
FREQUENCIES = {"model__layers__0__self_attn__rotary_emb__inv_freq": torch.rand(4)}
OTHERS = {"model__layers__0__self_attn__rotary_emb__inv_freq": torch.rand(4).bfloat16()}
POSITIONS = {"model__embeddings__position_ids": torch.arange(9)}
MTP = {"mtp__fc__weight": torch.randn(32, 64), "mtp__norm__weight": torch.ones(32)}
NEOX = {
    "gpt_neox__layers__0__attention__bias": torch.ones(1, 1, 8, 8),
    "gpt_neox__layers__0__attention__rotary_emb__inv_freq": torch.rand(4),
}
# model class, what is done to the file of the base, to that of the fine-tune
PAIRS: dict[str, tuple[str, Edit, Edit]] = {
    "GPT-2 without prefix": ("gpt2", without("transformer."), same),
    "GPT-2 without prefix, tuned": ("gpt2", same, without("transformer.")),
    "GPT-2 without prefix, buffers": (
        "gpt2",
        lambda tensors: without("transformer.")(tensors) | adding(**BARE)({}),
        adding(**WIDER),
    ),
    "GPT-2, buffers of two lengths": ("gpt2", adding(**MASK), adding(**WIDER)),
    "GPT-2, everything twice": (
        "gpt2",
        lambda tensors: tensors | without("transformer.")(tensors),
        same,
    ),
    "BLOOM without prefix": ("bloom", without("transformer."), same),
    "Falcon without prefix": ("falcon", without("transformer."), same),
    "MPT without prefix": ("mpt", without("transformer."), same),
    "GPT-NeoX, buffers": ("neox", adding(**NEOX), same),
    "GPT-NeoX, buffers of the fine-tune": ("neox", without("gpt_neox."), adding(**NEOX)),
    "OPT without prefix": ("opt", without("model."), same),
    "Phi": ("phi", adding(**FREQUENCIES), adding(**POSITIONS)),
    "Llama, frequencies of the base": ("llama", adding(**FREQUENCIES, **MTP), same),
    "Llama, frequencies of the fine-tune": ("llama", same, adding(**FREQUENCIES, **MTP)),
    "Llama, frequencies of both": ("llama", adding(**FREQUENCIES), adding(**OTHERS)),
    "compiled": ("llama", same, under("_orig_mod.")),
    "DDP": ("llama", same, under("module.")),
    "compiled in DDP": ("llama", same, under("module._orig_mod.")),
    "DDP in compiled": ("llama", same, under("_orig_mod.module.")),
    "compiled inside": ("llama", same, inside("model.", "_orig_mod.")),
    "compiled layers of the base": ("mixtral", inside("layers.0.", "_orig_mod."), same),
    "compiled base in DDP": ("llama", under("module._orig_mod."), same),
    "compiled bare GPT-2": (
        "gpt2",
        same,
        lambda t: under("_orig_mod.")(without("transformer.")(t)),
    ),
    "Mixtral without prefix": ("mixtral", without("model."), same),
    "Qwen3 MoE without prefix": ("qwen3 moe", without("model."), same),
    "Gemma 3, its text": ("gemma3", same, same),
    "Qwen3.5, its text": ("qwen3.5", adding(**MTP), same),
    "Qwen3.5, its text by its own names": ("qwen3.5", same, inside("model.", "")),
}
TEXT_ONLY = ("gemma3", "qwen3.5")


def noisy(model, scale: float = 0.02):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return model


def rewrite(path, edit: Edit) -> None:
    tensors = {name: t.clone() for name, t in edit(load_file(path / "model.safetensors")).items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits.double()


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((found - expected).norm() / expected.norm()) < 1e-5


@pytest.fixture(scope="module", params=PAIRS, ids=lambda name: name)
def pair(request, tmp_path_factory):
    """A base, a fine-tune, what the fine-tune computes, and what an adapter on the base does."""
    kind, of_base, of_tuned = PAIRS[request.param]
    folder = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    CLASSES[kind]().save_pretrained(folder / "base")
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    tuned = noisy(plain)
    if kind == "gemma3":
        text = transformers.Gemma3ForCausalLM(tuned.config.text_config)
        text.load_state_dict(
            {
                name.replace("model.language_model.", "model."): value
                for name, value in tuned.state_dict().items()
                if "vision" not in name and "projector" not in name
            }
        )
        text.save_pretrained(folder / "tuned")
    else:
        tuned.save_pretrained(folder / "tuned")
    if request.param.endswith("own names"):
        rewrite(folder / "tuned", lambda t: {k.replace("language_model.", ""): t[k] for k in t})
    expected = logits(tuned)
    rewrite(folder / "base", of_base)
    rewrite(folder / "tuned", of_tuned)
    return ResolvedModel(folder / "base", "base"), folder / "tuned", expected


def in_transformers(path):
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    return model


def test_weight_one_is_the_tuned_model_in_every_form_a_merge_has(pair, tmp_path):
    base, tuned, expected = pair
    vector = open_vector("v", str(tuned), base)
    extract(vector, base, tmp_path / "delta", dtype="float32")
    delta = open_vector("v", str(tmp_path / "delta"), base)
    write_merged(base, [vector], {"v": 1.0}, tmp_path / "out")
    write_merged(base, [delta], {"v": 1.0}, tmp_path / "of-delta")
    merged, again = Checkpoint(tmp_path / "out"), Checkpoint(tmp_path / "of-delta")
    stored = unwrapped_names(load_file(base.path / "model.safetensors"))
    kept = set(stored.values()) - ties_of(Checkpoint(base.path)).copies
    assert set(merged.names) == set(again.names) == kept
    for name in merged.names:
        torch.testing.assert_close(merged.read(name), again.read(name), rtol=0, atol=1e-6)
    assert close(logits(in_transformers(tmp_path / "out")), expected)
    resident = ResidentModel(base, [vector], dtype="float32")
    before = {name: p.detach().clone() for name, p in resident.model.named_parameters()}
    assert not close(logits(resident.model), expected)
    resident.set_weights({"v": 1.0})
    assert close(logits(resident.model), expected)
    squares = [
        (parameter.detach() - before[name]).double().square().sum()
        for name, parameter in resident.model.named_parameters()
    ]
    norm = float(torch.stack(squares).sum().sqrt())
    assert full_norm(resident.model, base.path) == pytest.approx(norm, rel=1e-5)


def lora(base: ResolvedModel, out, **options):
    """Save an adapter on a base and return the model that has it."""
    model = loaded_model(base, torch.float32)
    layers = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    wanted = sorted(layers.intersection({"c_attn", "query_key_value", "q_proj", "v_proj"}))
    options = {"target_modules": wanted, "fan_in_fan_out": "c_attn" in layers} | options
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    adapted.save_pretrained(out, save_embedding_layers=False)
    return adapted


@pytest.mark.parametrize(
    "pair",
    [
        "GPT-2 without prefix, buffers",
        "GPT-2, everything twice",
        "BLOOM without prefix",
        "OPT without prefix",
        "compiled base in DDP",
        "Mixtral without prefix",
        "Gemma 3, its text",
        "Qwen3.5, its text",
    ],
    indirect=True,
)
def test_an_adapter_is_merged_as_peft_merges_it(pair, tmp_path):
    base, _, _ = pair
    expected = logits(lora(base, tmp_path / "adapter"))
    vector = open_vector("v", str(tmp_path / "adapter"), base)
    write_merged(base, [vector], {"v": 1.0}, tmp_path / "out")
    assert close(logits(in_transformers(tmp_path / "out")), expected)
    resident = ResidentModel(base, [vector], dtype="float32")
    resident.set_weights({"v": 1.0})
    assert close(logits(resident.model), expected)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tiny Llama and a fine-tune of it."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    model = CLASSES["llama"]()
    model.save_pretrained(folder / "base")
    noisy(model).save_pretrained(folder / "tuned")
    return ResolvedModel(folder / "base", "base"), folder / "tuned"


@pytest.mark.parametrize(
    "edit",
    [
        under("_orig_mod."),
        under("module."),
        lambda tensors: {
            name.replace("base_model.model.", "base_model.model.module._orig_mod."): value
            for name, value in tensors.items()
        },
        inside("layers.1.", "_orig_mod."),
    ],
    ids=["compiled", "DDP", "both, inside", "a layer"],
)
def test_an_adapter_of_a_wrapped_model_is_that_of_the_model(llama, edit, tmp_path, caplog):
    base, _ = llama
    lora(base, tmp_path / "adapter")
    plain = open_vector("v", str(tmp_path / "adapter"), base)
    tensors = edit(load_file(tmp_path / "adapter/adapter_model.safetensors"))
    save_file(tensors, tmp_path / "adapter/adapter_model.safetensors")
    vectors = [open_vector("v", str(tmp_path / "adapter"), base) for _ in range(2)]
    assert len([r for r in caplog.records if "of a wrapper" in r.message]) == 1
    assert vectors[0].names == plain.names
    for name in plain.names:
        assert torch.equal(vectors[0].parts[name].b, plain.parts[name].b)


def test_what_a_fine_tune_does_without_and_has_more_is_said_once(llama, tmp_path, caplog):
    base, tuned = llama
    copies = [ResolvedModel(tmp_path / "base", "base"), tmp_path / "tuned"]
    for source, copy, more in ((base.path, copies[0].path, MTP), (tuned, copies[1], FREQUENCIES)):
        shutil.copytree(source, copy)
        rewrite(copy, adding(**more))
    for _ in range(2):
        vector = open_vector("v", str(copies[1]), copies[0])
    told = [record.message for record in caplog.records]
    assert len(told) == 2
    assert "2 tensors of the base (mtp.fc.weight, mtp.norm.weight)" in told[0]
    assert "1 tensors that the base does not have" in told[1] and "rotary_emb" in told[1]
    assert vector.names == frozenset(Checkpoint(base.path).names)


def lacking(*parts: str) -> Edit:
    return lambda tensors: {
        name: value for name, value in tensors.items() if not any(part in name for part in parts)
    }


@pytest.mark.parametrize(
    ("kind", "of_base", "of_tuned", "told"),
    [
        ("llama", same, lacking("layers.1."), r"9 tensors are missing.*model\.layers\.1\."),
        ("llama", same, lacking("model.norm."), r"missing \(first: \['model\.norm\.weight"),
        ("llama", same, lacking("embed_tokens"), r"missing.*'model\.embed_tokens\.weight"),
        ("gpt2", without("transformer."), lacking("h.1.mlp."), r"4 tensors.*'h\.1\.mlp\.c_fc"),
        ("gpt2", lacking("transformer.h.1.ln_1"), same, r"unknown.*'transformer\.h\.1\.ln_1\."),
        ("gemma3", same, lacking("language_model.model.layers.0.mlp"), r"missing.*layers\.0\.mlp"),
        ("gemma3", same, lacking("vision_tower.encoder"), r"missing.*vision_tower\.encoder"),
        ("llama", same, adding(model__layers__7__mlp__up_proj__weight=torch.ones(2, 2)), "unknown"),
        ("llama", same, adding(model__layers__0__mlp__gate__weight=torch.ones(2, 2)), "unknown"),
        ("llama", same, adding(surprise__weight=torch.ones(2)), r"unknown.*'surprise\.weight"),
        (
            "llama",
            same,
            adding(_orig_mod__model__norm__weight=torch.ones(32)),
            r"both.*one tensor without the prefix",
        ),
        (
            "gpt2",
            adding(ln_f__weight=torch.ones(32) * 3),
            same,
            r"'ln_f\.weight' and 'transformer\.ln_f\.weight' are one parameter",
        ),
        (
            "gpt2",
            same,
            adding(ln_f__weight=torch.ones(32) * 3),
            r"1 are unknown \(first: \['ln_f\.weight",
        ),
    ],
)
def test_a_damaged_fine_tune_or_another_model_is_refused_by_name(
    kind, of_base, of_tuned, told, tmp_path
):
    torch.manual_seed(0)
    model = CLASSES[kind]()
    for name, edit in (("base", of_base), ("tuned", of_tuned)):
        model.save_pretrained(tmp_path / name)
        rewrite(tmp_path / name, edit)
    with pytest.raises(ModelError, match=told):
        open_vector("v", str(tmp_path / "tuned"), ResolvedModel(tmp_path / "base", "base"))
