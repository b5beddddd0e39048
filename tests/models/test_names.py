"""Names: bases and fine-tunes whose files call one tensor by two names, or have tensors that the
model class does not load. The reference is the tuned model as transformers or PEFT runs it.
"""

import copy
import json
import shutil
from collections.abc import Callable

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from optimer_hf.errors import ModelError, VocabularyError
from optimer_hf.files.reading import yaml_text
from optimer_hf.files.staging import write_text
from optimer_hf.merging.engines import merge
from optimer_hf.merging.resident import ResidentModel
from optimer_hf.merging.writer import write_merged
from optimer_hf.models.checkpoint import Checkpoint, unwrap_names
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.models.live import load_model
from optimer_hf.models.ties import ties_of
from optimer_hf.training.growth import full_norm
from optimer_hf.vectors.delta import extract, extract_any_adapter
from optimer_hf.vectors.opening import open_vector
from tests.support.merges import assert_same_bits, read_all
from tests.support.tiny import (
    GROUPED,
    QWEN_VISION,
    SIZES,
    VISION,
    VOCABULARY,
    WIDE,
    deepseek_v3,
    gemma3_multimodal,
    qwen35_multimodal,
)
from tests.support.weights import edit_weights

CLASSES = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_positions=64, **SIZES)),
    "bloom": lambda: transformers.BloomForCausalLM(transformers.BloomConfig(**SIZES)),
    "falcon": lambda: transformers.FalconForCausalLM(transformers.FalconConfig(**SIZES)),
    "mpt": lambda: transformers.MptForCausalLM(
        transformers.MptConfig(vocab_size=VOCABULARY, d_model=32, n_layers=2, n_heads=4)
    ),
    "neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**WIDE)),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**SIZES, word_embed_proj_dim=32, ffn_dim=48)
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
    "gemma3": lambda: transformers.Gemma3ForConditionalGeneration(gemma3_multimodal()),
    "qwen3.5": lambda: transformers.Qwen3_5ForConditionalGeneration(qwen35_multimodal()),
}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
CLASSES |= {
    "qwen2.5-vl": lambda: transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config=GROUPED | {"rope_parameters": MROPE},
            vision_config=QWEN_VISION | {"fullatt_block_indexes": [0]},
        )
    ),
    "qwen3-vl moe": lambda: transformers.Qwen3VLMoeForConditionalGeneration(
        transformers.Qwen3VLMoeConfig(
            text_config=GROUPED | EXPERTS | {"head_dim": 8, "rope_parameters": MROPE},
            vision_config=QWEN_VISION
            | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        )
    ),
    "deepseek v3": lambda: transformers.DeepseekV3ForCausalLM(deepseek_v3()),
    "llama 4": lambda: transformers.Llama4ForConditionalGeneration(
        transformers.Llama4Config(
            text_config=GROUPED
            | {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2},
            vision_config=VISION
            | {
                "vision_output_dim": 16,
                "projector_input_dim": 16,
                "projector_output_dim": 16,
                "pixel_shuffle_ratio": 0.5,
            },
        )
    ),
    "gemma 4": lambda: transformers.Gemma4ForConditionalGeneration(
        transformers.Gemma4Config(
            text_config=GROUPED
            | {
                "head_dim": 8,
                "global_head_dim": 8,
                "layer_types": ["sliding_attention", "full_attention"],
                "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": VOCABULARY,
                "num_kv_shared_layers": 0,
            },
            vision_config=VISION
            | {"head_dim": 8, "global_head_dim": 8, "num_key_value_heads": 2}
            | {"position_embedding_size": 16, "pooling_kernel_size": 1},
            audio_config=None,
        )
    ),
    "gpt-oss": lambda: transformers.GptOssForCausalLM(
        transformers.GptOssConfig(**GROUPED, head_dim=8, num_local_experts=3, num_experts_per_tok=2)
    ),
    "mistral 3": lambda: transformers.Mistral3ForConditionalGeneration(
        transformers.Mistral3Config(
            text_config=GROUPED | {"model_type": "mistral", "head_dim": 8},
            vision_config=VISION | {"model_type": "pixtral", "head_dim": 8},
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


def newer(tensors):
    """Name the tensors of a Qwen2.5-VL as the classes of transformers 5 do."""
    places = {"model.": "model.language_model.", "visual.": "model.visual."}
    renamed = {}
    for name, value in tensors.items():
        front = next((front for front in places if name.startswith(front)), "")
        renamed[places.get(front, "") + name.removeprefix(front)] = value
    return renamed


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
    "Qwen2.5-VL": ("qwen2.5-vl", same, same),
    "Qwen2.5-VL by newer names": ("qwen2.5-vl", same, newer),
    "Qwen2.5-VL, the base by newer names": ("qwen2.5-vl", newer, same),
    "Qwen3-VL MoE": ("qwen3-vl moe", same, same),
    "DeepSeek V3, saved buffers": ("deepseek v3", same, same),
    "Llama 4, its text": ("llama 4", same, same),
    "Gemma 4, its text, saved buffers": ("gemma 4", same, same),
    "gpt-oss": ("gpt-oss", same, same),
    "Mistral 3, its text": ("mistral 3", same, same),
}
WITH_IMAGES = ("gemma3", "gemma 4", "mistral 3")  # a fine-tune of the text is a model of its own


def noisy(model, scale: float = 0.02):
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():  # buffers, too
            if tensor.is_floating_point():
                tensor.add_(scale * torch.randn_like(tensor))
    return model


def text_of(whole):
    """Return the text model of one with images, in the class that it has alone."""
    text = transformers.AutoModelForCausalLM.from_config(whole.config.get_text_config())
    text.get_decoder().load_state_dict(whole.get_decoder().state_dict())
    text.get_output_embeddings().load_state_dict(whole.get_output_embeddings().state_dict())
    return text


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
    tuned = noisy(in_transformers(folder / "base"))
    (text_of(tuned) if kind in WITH_IMAGES else tuned).save_pretrained(folder / "tuned")
    if request.param.endswith("own names"):
        rewrite(folder / "tuned", lambda t: {k.replace("language_model.", ""): t[k] for k in t})
    expected = logits(tuned)
    rewrite(folder / "base", of_base)
    rewrite(folder / "tuned", of_tuned)
    return ResolvedModel(folder / "base", "base"), folder / "tuned", expected


def in_transformers(path):
    config = transformers.AutoConfig.from_pretrained(path)
    is_listed = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    auto = "AutoModelForCausalLM" if is_listed else "AutoModelForImageTextToText"
    model, report = getattr(transformers, auto).from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    return model


def test_weight_one_gives_the_tuned_model_in_every_form_of_a_merge(pair, tmp_path):
    base, tuned, expected = pair
    vector = open_vector("v", str(tuned), base)
    extract(vector, base, tmp_path / "delta", dtype="float32")
    delta = open_vector("v", str(tmp_path / "delta"), base)
    write_merged(base, [vector], {"v": 1.0}, tmp_path / "out")
    write_merged(base, [delta], {"v": 1.0}, tmp_path / "of-delta")
    merged, again = Checkpoint(tmp_path / "out"), Checkpoint(tmp_path / "of-delta")
    stored = unwrap_names(load_file(base.path / "model.safetensors"))
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
    model = load_model(base, torch.float32)
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
        "Qwen2.5-VL by newer names",
        "Llama 4, its text",
        "Mistral 3, its text",
        "gpt-oss",
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


@pytest.fixture
def saved_pair(tmp_path):
    """Return a function class, edits or options of `save_pretrained` -> base and fine-tune."""

    def save(kind, of_base=same, of_tuned=same, base=None, tuned=None):
        torch.manual_seed(0)
        model = CLASSES[kind]()
        model.save_pretrained(tmp_path / "base", **base or {})
        noisy(model).save_pretrained(tmp_path / "tuned", **tuned or {})
        rewrite(tmp_path / "base", of_base)
        rewrite(tmp_path / "tuned", of_tuned)
        return ResolvedModel(tmp_path / "base", "base"), tmp_path / "tuned"

    return save


def input_first(tensors):
    """Store experts as programs before transformers 5 did."""
    return {
        name: value.transpose(1, 2).contiguous() if "mlp.experts" in name else value
        for name, value in tensors.items()
    }


TOGETHER = {"save_original_format": False}


@pytest.mark.parametrize(
    ("kind", "edits", "options", "told"),
    [
        ("mixtral", {}, {"tuned": TOGETHER}, r"experts\.down_proj'.*block_sparse_moe.experts\.\d"),
        ("mixtral", {}, {"base": TOGETHER}, r"block_sparse_moe\.experts.*experts\.down_proj'"),
        ("deepseek v3", {}, {"tuned": TOGETHER}, r"experts\.down_proj'.*experts\.\d+\.down"),
        ("qwen3-vl moe", {"of_base": input_first}, {}, r"experts\.down_proj' has shape"),
        ("qwen3-vl moe", {"of_tuned": input_first}, {}, r"experts\.down_proj' has shape"),
    ],
)
def test_weights_in_two_forms_are_refused_with_advice_on_how_to_store_them_alike(
    saved_pair, tmp_path, kind, edits, options, told
):
    base, tuned = saved_pair(kind, **edits, **options)
    with pytest.raises(ModelError, match=rf"{told}.*save_original_format=False"):
        open_vector("v", str(tuned), base)
    for path in (base.path, tuned):
        in_transformers(path).save_pretrained(tmp_path / f"{path.name}-alike", **TOGETHER)
    alike = ResolvedModel(tmp_path / "base-alike", "base")
    vector = open_vector("v", str(tmp_path / "tuned-alike"), alike)
    resident = ResidentModel(alike, [vector], dtype="float32")
    resident.set_weights({"v": 1.0})
    assert close(logits(resident.model), logits(in_transformers(tuned)))


def test_a_form_that_the_loaded_model_lacks_is_merged_but_refused_by_a_search(saved_pair, tmp_path):
    base, tuned = saved_pair("qwen3-vl moe", input_first, input_first)
    vector = open_vector("v", str(tuned), base)
    write_merged(base, [vector], {"v": 1.0}, tmp_path / "out")
    expected = logits(in_transformers(tuned))
    assert close(logits(in_transformers(tmp_path / "out")), expected)
    with pytest.raises(ModelError, match=r"the vectors move tensor '\S*experts\.down_proj', which"):
        ResidentModel(base, [vector], dtype="float32")


@pytest.mark.parametrize("kind", ["mixtral", "gpt-oss", "deepseek v3"])
def test_an_adapter_of_stacked_experts_is_refused_but_merged_as_a_delta(kind, tmp_path):
    torch.manual_seed(0)
    CLASSES[kind]().save_pretrained(tmp_path / "base")
    base = ResolvedModel(tmp_path / "base", "base")
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = lora(base, tmp_path / "a", target_modules=[], target_parameters=experts)
    with pytest.raises(ModelError, match=r"target_parameters.*--from-adapter"):
        open_vector("v", str(tmp_path / "a"), base)
    adapter = ResolvedModel(tmp_path / "a", "a")
    extract_any_adapter("v", adapter, base, tmp_path / "delta", dtype="float32")
    delta = open_vector("v", str(tmp_path / "delta"), base)
    write_merged(base, [delta], {"v": 1.0}, tmp_path / "out")
    assert close(logits(in_transformers(tmp_path / "out")), logits(adapted))
    assert not close(logits(in_transformers(base.path)), logits(adapted))


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
def test_an_adapter_of_a_wrapped_model_is_read_as_one_of_the_model(llama, edit, tmp_path, caplog):
    base, _ = llama
    lora(base, tmp_path / "adapter")
    plain = open_vector("v", str(tmp_path / "adapter"), base)
    tensors = edit(load_file(tmp_path / "adapter/adapter_model.safetensors"))
    save_file(tensors, tmp_path / "adapter/adapter_model.safetensors")
    vectors = [open_vector("v", str(tmp_path / "adapter"), base) for _ in range(2)]
    assert len([r for r in caplog.records if "ignoring the wrapper prefix" in r.message]) == 1
    assert vectors[0].names == plain.names
    for name in plain.names:
        assert torch.equal(vectors[0].parts[name].b, plain.parts[name].b)


@pytest.mark.parametrize("front", ["policy.", "base_model.model.", "_forward_module.", "a.b.c."])
def test_a_fine_tune_with_a_prefix_before_all_names_is_read_as_one_without(
    llama, front, tmp_path, caplog
):
    base, tuned = llama
    edited = edit_weights(tuned, tmp_path / "tuned", lambda tensors: None)
    tensors = load_file(edited / "model.safetensors")
    save_file(
        {front + name: tensor for name, tensor in tensors.items()}, edited / "model.safetensors"
    )
    vectors = [open_vector("v", str(edited), base) for _ in range(2)]
    assert len([r for r in caplog.records if f"the prefix {front!r} of all" in r.message]) == 1
    plain = open_vector("v", str(tuned), base)
    write_merged(base, [vectors[0]], {"v": 0.7}, tmp_path / "ours")
    write_merged(base, [plain], {"v": 0.7}, tmp_path / "theirs")
    assert_same_bits(read_all(tmp_path / "ours"), read_all(tmp_path / "theirs"))


def test_a_fine_tune_with_a_prefix_before_some_names_is_refused(llama, tmp_path):
    base, tuned = llama
    edited = edit_weights(tuned, tmp_path / "tuned", lambda tensors: None)
    tensors = load_file(edited / "model.safetensors")
    renamed = {("policy." if "layers.1" in key else "") + key: tensors[key] for key in tensors}
    save_file(renamed, edited / "model.safetensors")
    with pytest.raises(ModelError, match="is not a fine-tune of the base"):
        open_vector("v", str(edited), base)


def test_tensors_that_a_fine_tune_lacks_or_adds_are_reported_once(llama, tmp_path, caplog):
    base, tuned = llama
    copies = [ResolvedModel(tmp_path / "base", "base"), tmp_path / "tuned"]
    for source, out, more in ((base.path, copies[0].path, MTP), (tuned, copies[1], FREQUENCIES)):
        shutil.copytree(source, out)
        rewrite(out, adding(**more))
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
            r"both.*the same tensor once",
        ),
        (
            "gpt2",
            adding(ln_f__weight=torch.ones(32) * 3),
            same,
            r"'ln_f\.weight' and 'transformer\.ln_f\.weight' are the same parameter",
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


@pytest.mark.parametrize(
    ("of_base", "of_tuned", "told"),
    [
        (without("model."), same, r"calls 'model\.embed_tokens\.weight' what .* calls 'embed_to"),
        (same, without("model."), r"calls 'embed_tokens\.weight' what .* calls 'model\.embed_to"),
        (same, under("_orig_mod."), r"have the prefix _orig_mod\. of a wrapper"),
        (under("module."), same, r"have the prefix module\. of a wrapper"),
    ],
)
def test_two_names_of_one_tensor_are_never_passed_to_mergekit(
    llama, tokenizer, of_base, of_tuned, told, tmp_path
):
    paths = {"base": llama[0].path, "tuned": llama[1]}
    for (name, source), edit in zip(paths.items(), (of_base, of_tuned), strict=True):
        shutil.copytree(source, tmp_path / name)
        rewrite(tmp_path / name, edit)
        tokenizer.save_pretrained(tmp_path / name)
    config = {
        "merge_method": "optimer",
        "base_model": "base",
        "models": [{"model": "tuned", "parameters": {"weight": 1.0}}],
    }
    write_text(tmp_path / "merge.yml", yaml_text(config))
    with pytest.raises(ModelError, match=told):
        merge(tmp_path / "merge.yml", tmp_path / "out", engine="mergekit")
    assert merge(tmp_path / "merge.yml", tmp_path / "out") == "native"


def test_tensors_that_mergekit_leaves_out_of_a_base_are_reported(
    llama, tokenizer, tmp_path, caplog
):
    shutil.copytree(llama[0].path, tmp_path / "base")
    rewrite(tmp_path / "base", adding(**MTP))
    tokenizer.save_pretrained(tmp_path / "base")
    config = {
        "merge_method": "optimer",
        "base_model": "base",
        "models": [{"model": str(llama[1]), "parameters": {"weight": 1.0}}],
    }
    write_text(tmp_path / "merge.yml", yaml_text(config))
    merge(tmp_path / "merge.yml", tmp_path / "out", engine="mergekit")
    told = "mergekit left out 2 tensors of the base (mtp.fc.weight, mtp.norm.weight)"
    assert any(told in record.message for record in caplog.records)


# -- a padded base and a fine-tune that is cut to its tokens ---------------------------------------

PADDED = VOCABULARY + 13


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def padded(request, save_model):
    """A base with more rows than tokens, in bfloat16, and a fine-tune that is cut to its tokens."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **GROUPED | {"vocab_size": PADDED}, tie_word_embeddings=request.param
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    base = save_model(model)
    cut = noisy(model.float())
    cut.resize_token_embeddings(VOCABULARY)
    return ResolvedModel(base, "base"), save_model(cut)


@pytest.mark.parametrize("engine", ["native", "mergekit"])
def test_a_fine_tune_that_is_cut_to_its_tokens_is_merged_as_in_mergekit(padded, engine, tmp_path):
    base, tuned = padded
    config = {
        "merge_method": "optimer",
        "base_model": str(base.path),
        "models": [{"model": str(tuned), "parameters": {"weight": 0.7}}],
        "dtype": "float32",
        "out_dtype": "float32",
        "tokenizer_source": "base",
    }
    write_text(tmp_path / "merge.yml", yaml_text(config))
    assert merge(tmp_path / "merge.yml", tmp_path / "out", engine=engine) == engine
    merged, before, after = (Checkpoint(path) for path in (tmp_path / "out", base.path, tuned))
    assert set(merged.names) == set(before.names)
    for name in merged.names:
        m, b, t = (each.read(name).double() for each in (merged, before, after))
        n = len(t)
        torch.testing.assert_close(m[:n], b[:n] + 0.7 * (t - b[:n]), rtol=0, atol=1e-6)
        if engine == "native":
            assert torch.equal(m[n:], b[n:]), "padding stays, and the shape of the base"


def test_a_merge_at_weight_one_gives_the_logits_of_the_cut_fine_tune_in_every_form(
    padded, tmp_path
):
    base, tuned = padded
    expected = logits(in_transformers(tuned))
    vector = open_vector("v", str(tuned), base)
    resident = ResidentModel(base, [vector], dtype="float32")
    resident.set_weights({"v": 1.0})
    assert close(logits(resident.model)[..., :VOCABULARY], expected)
    for dtype, error in (("float32", 1e-5), ("int8", 2e-2)):
        extract(vector, base, tmp_path / dtype, dtype=dtype)
        delta = open_vector("v", str(tmp_path / dtype), base)
        write_merged(base, [delta], {"v": 1.0}, tmp_path / f"of-{dtype}", out_dtype="float32")
        shown = logits(in_transformers(tmp_path / f"of-{dtype}"))[..., :VOCABULARY]
        assert float((shown - expected).norm() / expected.norm()) < error


@pytest.mark.parametrize("case", ["too short", "other ids", "no tokenizer"])
def test_missing_rows_that_are_tokens_are_refused(padded, tokenizer, case, tmp_path):
    base, tuned = (
        shutil.copytree(path, tmp_path / path.name) for path in (padded[0].path, padded[1])
    )
    if case == "too short":
        model = in_transformers(tuned)
        model.resize_token_embeddings(VOCABULARY - 4)
        model.save_pretrained(tuned)
        told = r"255 rows, the base has 272, of which .* is a token.*`tokenizer:`"
    elif case == "other ids":
        file = tuned / "tokenizer.json"
        content = json.loads(file.read_text())
        vocabulary = content["model"]["vocab"]
        vocabulary["!"], vocabulary["A"] = vocabulary["A"], vocabulary["!"]
        file.write_text(json.dumps(content))
        told = r"its token '!' has the id \d+, that of the base \d+"
    else:
        for file in base.glob("tokenizer*"):
            file.unlink()
        told = "whether those are tokens cannot be told"
    with pytest.raises(VocabularyError, match=told):
        open_vector("v", str(tuned), ResolvedModel(base, "base"))


def test_tokens_that_a_fine_tune_added_are_left_to_mergekit_on_request(padded, tokenizer, tmp_path):
    base, tuned = padded
    model = in_transformers(tuned)
    model.resize_token_embeddings(PADDED + 1)
    model.save_pretrained(tmp_path / "tuned")
    longer = copy.deepcopy(tokenizer)
    longer.add_tokens([f"<new {number}>" for number in range(PADDED + 1 - VOCABULARY)])
    longer.save_pretrained(tmp_path / "tuned")
    config = {
        "merge_method": "optimer",
        "base_model": str(base.path),
        "models": [{"model": "tuned", "parameters": {"weight": 1.0}}],
        "dtype": "float32",
    }
    write_text(tmp_path / "plain.yml", yaml_text(config))
    write_text(tmp_path / "merge.yml", yaml_text(config | {"tokenizer_source": "base"}))
    for file, engine in (("plain.yml", None), ("merge.yml", "native")):
        with pytest.raises(VocabularyError, match="added, removed or moved tokens"):
            merge(tmp_path / file, tmp_path / "out", engine=engine)
    assert merge(tmp_path / "merge.yml", tmp_path / "out") == "mergekit"
    shown = logits(in_transformers(tmp_path / "out"))
    assert close(shown, logits(model)[..., :VOCABULARY])
