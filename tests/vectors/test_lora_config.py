"""The fields of a LoRA: a decision for each, and numbers equal to PEFT's own forward."""

import dataclasses
import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from optimer_hf.errors import ConfigError, ModelError
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.vectors.delta import extract_any_adapter
from optimer_hf.vectors.lora_config import (
    FIELDS,
    HANDLED,
    HARMLESS,
    why_not_trained,
    why_not_weighted,
)
from optimer_hf.vectors.opening import open_vector
from tests.support.damage import HANGING
from tests.support.tiny import VOCABULARY, tiny_model, whole_delta

REFUSED = [field for field, decision in FIELDS.items() if decision not in (HANDLED, HARMLESS)]
SOMETHING = {  # a value of a refused field that says something
    "use_dora": True,
    "layer_replication": [[0, 1], [0, 2]],
    "target_parameters": ["mlp.up_proj.weight"],
    "trainable_token_indices": [3, 4],
    "alora_invocation_tokens": [5],
    "use_qalora": True,
}


@pytest.fixture(scope="module")
def base(save_model) -> ResolvedModel:
    """A Llama whose linear layers have biases, in float32."""
    model = tiny_model("llama")
    config = model.config
    config.attention_bias = config.mlp_bias = True
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return ResolvedModel(save_model(model, "biased"), "biased")


@pytest.fixture(scope="module")
def gpt2(save_model) -> ResolvedModel:
    """A GPT-2: its layers are stored input-first, and one of them is square."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    return ResolvedModel(save_model(GPT2LMHeadModel(config), "gpt2"), "gpt2")


@pytest.fixture(scope="module")
def make_lora(tmp_path_factory):
    """Return a function base, LoraConfig options -> directory of an adapter, all of it moved."""

    def lora(base: ResolvedModel, **options) -> Path:
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | options)
        model = get_peft_model(model, config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
        out = tmp_path_factory.mktemp("lora")
        model.save_pretrained(out)
        return out

    return lora


@pytest.fixture(scope="module")
def plain(base, make_lora) -> Path:
    return make_lora(base, target_modules=["q_proj", "v_proj"])


def changed(adapter: Path, out: Path, tensors=lambda found: found, **fields) -> Path:
    """Return a copy of an adapter with other tensors, or with other fields in its config."""
    shutil.copytree(adapter, out)
    file = out / "adapter_model.safetensors"
    save_file({k: v.clone() for k, v in tensors(load_file(file)).items()}, file)
    config = json.loads((out / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(config | fields))
    return out


def logits_of(model) -> torch.Tensor:
    ids = torch.arange(3, 35).unsqueeze(0)
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


def assert_is_function_of_peft(adapter: Path, base: ResolvedModel) -> None:
    """Compare logits at weight 1, in float64, with those of PEFT's own forward."""
    vector = open_vector("v", str(adapter), base)
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float64)
    stock = logits_of(model)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name in vector.names:
            delta = whole_delta(vector, base, name).double()
            named[name].add_(delta.view_as(named[name]))
    logits = logits_of(model)
    fresh = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    expected = logits_of(PeftModel.from_pretrained(fresh, adapter).double())
    assert (expected - stock).norm() > 1e-3 * stock.norm()
    assert (logits - expected).norm() < 1e-6 * expected.norm()


# -- the table -------------------------------------------------------------------------------------


def test_every_field_of_peft_has_a_decision():
    assert {item.name for item in dataclasses.fields(LoraConfig)} == set(FIELDS)


def test_the_defaults_of_peft_are_those_of_a_plain_lora():
    assert why_not_weighted(LoraConfig().to_dict()) is None
    assert why_not_trained(LoraConfig(task_type="CAUSAL_LM").to_dict()) is None


@pytest.mark.parametrize("field", REFUSED)
def test_a_field_that_changes_what_the_factors_mean_is_refused(field, plain, base, tmp_path):
    adapter = changed(plain, tmp_path / "v", **{field: SOMETHING.get(field, {})})
    if field == "megatron_config":  # {} says nothing
        adapter = changed(plain, tmp_path / "w", megatron_config={"a": 1})
    with pytest.raises(
        ModelError, match=r"(?i)vector 'ja'.*" + field.removeprefix("use_").split("_")[0]
    ):
        open_vector("ja", str(adapter), base)


@pytest.mark.parametrize("nothing", [None, False, []])
@pytest.mark.parametrize("field", REFUSED)
def test_a_refused_field_with_a_harmless_value_is_accepted(field, nothing, plain, base, tmp_path):
    open_vector("ja", str(changed(plain, tmp_path / "v", **{field: nothing})), base)


@pytest.mark.parametrize("value", [True, 16, "on", {"a": 1}, [0]])
def test_an_unknown_field_with_a_value_is_refused(value, plain, base, tmp_path):
    with pytest.raises(ModelError, match=r"vector 'ja'.*use_something_newer"):
        open_vector("ja", str(changed(plain, tmp_path / "v", use_something_newer=value)), base)


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_an_unknown_field_without_a_value_is_accepted(value, plain, base, tmp_path):
    open_vector("ja", str(changed(plain, tmp_path / "v", use_something_newer=value)), base)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_an_initialisation_that_rewrites_the_base_or_is_unknown_is_refused(
    start, plain, base, tmp_path
):
    for number, name in enumerate((start, start.upper(), f"{start}-2")):
        adapter = changed(plain, tmp_path / str(number), init_lora_weights=name)
        with pytest.raises(ModelError, match="init_lora_weights"):
            open_vector("ja", str(adapter), base)


def test_an_adapter_of_other_layers_than_its_base_is_refused_by_peft_too(base, make_lora, tmp_path):
    adapter = make_lora(base, target_modules=["q_proj"], layer_replication=[(0, 1), (0, 1)])
    with pytest.raises(ModelError, match="layer_replication gives the model other layers"):
        open_vector("ja", str(adapter), base)
    with pytest.raises(ModelError, match="layer_replication gives the model other layers"):
        extract_any_adapter("ja", ResolvedModel(adapter, "v"), base, tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


# -- the same function as PEFT ---------------------------------------------------------------------

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIONS = {
    "plain": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ALL, "use_rslora": True},
    "rank_pattern": {"target_modules": ALL, "rank_pattern": {"q_proj": 2, "0.mlp.up_proj": 6}},
    "nested names": {
        "target_modules": ALL,
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, r"^model\.layers\.0\.mlp\.up_proj": 3},
        "alpha_pattern": {"self_attn.q_proj": 5, "^model.layers.1.mlp.down_proj$": 32},
        "use_rslora": True,
    },
    "a key in another": {
        "target_modules": ALL,
        "alpha_pattern": {"1.mlp.up_proj": 3, "up_proj": 9},
    },
    "dots stand for any character": {"target_modules": ALL, "alpha_pattern": {"q.proj": 32}},
    "biases of the layers": {"target_modules": ALL, "bias": "lora_only"},
    "all biases": {"target_modules": ["q_proj"], "bias": "all"},
    "biases of B": {"target_modules": ALL, "lora_bias": True, "use_rslora": True},
    "saved modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "saved embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "embedding and head": {"target_modules": ["embed_tokens", "lm_head"], "use_rslora": True},
    "some layers": {"target_modules": ALL, "layers_to_transform": [1]},
    "one layer": {"target_modules": ALL, "layers_to_transform": 0, "layers_pattern": "layers"},
    "but not": {"target_modules": ALL, "exclude_modules": ["1.self_attn.q_proj", "up_proj"]},
    "a pattern": {"target_modules": r".*\.0\..*(q|v)_proj", "exclude_modules": r".*v_proj"},
    "dropout": {"target_modules": ALL, "lora_dropout": 0.5},
    **{
        f"init {start}": {"target_modules": ALL, "init_lora_weights": start}
        for start in (False, "gaussian", "orthogonal", "mica")
    },
}


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning", "ignore::UserWarning")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_vector_at_weight_one_is_the_function_of_peft(options, base, make_lora):
    assert_is_function_of_peft(make_lora(base, **options), base)


GPT2_OPTIONS = {
    "square": {"target_modules": ["attn.c_proj"]},
    "all": {"target_modules": ["c_attn", "c_proj", "c_fc"], "rank_pattern": {"mlp.c_proj": 2}},
    "biases": {"target_modules": ["c_attn"], "bias": "lora_only", "lora_bias": True},
    "saved": {"target_modules": ["c_fc"], "modules_to_save": ["ln_f"]},
    "saved layer": {"target_modules": ["c_fc"], "modules_to_save": ["attn.c_proj"]},
    "positions": {"target_modules": ["wpe"]},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("declared", [None, True, False])
@pytest.mark.parametrize("options", GPT2_OPTIONS.values(), ids=GPT2_OPTIONS)
def test_the_layer_and_not_the_config_says_how_a_weight_is_stored(
    options, declared, gpt2, make_lora, tmp_path
):
    adapter = make_lora(gpt2, **options)
    if declared is not None:
        adapter = changed(adapter, tmp_path / "v", fan_in_fan_out=declared)
    assert_is_function_of_peft(adapter, gpt2)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_linear_layer_whose_config_says_conv1d_is_read_as_it_is(base, plain, tmp_path):
    assert_is_function_of_peft(changed(plain, tmp_path / "v", fan_in_fan_out=True), base)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_names_without_the_prefix_of_the_class_are_found(gpt2, make_lora, tmp_path):
    adapter = make_lora(gpt2, target_modules=["attn.c_proj"])
    whole = open_vector("v", str(adapter), gpt2)
    bare = tmp_path / "bare"
    shutil.copytree(gpt2.path, bare)
    file = bare / "model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    vector = open_vector("v", str(adapter), ResolvedModel(bare, "bare"))
    assert {f"transformer.{name}" for name in vector.names} == whole.names
    for name in vector.names:
        expected = whole_delta(whole, gpt2, f"transformer.{name}")
        assert torch.equal(whole_delta(vector, ResolvedModel(bare, "bare"), name), expected)


# -- every tensor is used --------------------------------------------------------------------------


def renamed(old: str, new: str):
    return lambda tensors: {key.replace(old, new): value for key, value in tensors.items()}


def with_tensor(key: str, *shape: int):
    return lambda tensors: tensors | {f"base_model.model.{key}": torch.ones(shape)}


def without(part: str):
    return lambda tensors: {key: value for key, value in tensors.items() if part not in key}


LAYER = "model.layers.0.self_attn"
MISFITS = {
    "another prefix": renamed("model.layers", "model.blocks"),
    "none of its layers": renamed("self_attn", "attention"),
    "a layer too many": renamed("layers.1.", "layers.7."),
    "the name of the adapter": renamed("lora_A.weight", "lora_A.default.weight"),
    "a half": without("layers.1.self_attn.q_proj.lora_B"),
    "the other half": without("layers.1.self_attn.q_proj.lora_A"),
    "a layer that is no target": lambda tensors: (
        tensors
        | {
            key.replace("q_proj", "k_proj"): value[: 16 if "lora_B" in key else None]
            for key, value in tensors.items()
            if "q_proj" in key
        }
    ),
    "a magnitude": with_tensor(f"{LAYER}.q_proj.lora_magnitude_vector", 32),
    "a diagonal": with_tensor(f"{LAYER}.q_proj.lora_diag", 4),
    "tokens": with_tensor("model.embed_tokens.token_adapter.trainable_tokens_delta", 2, 32),
    "an unknown tensor": with_tensor("model.layers.0.gate.weight", 2, 32),
    "a bias of B without its factors": with_tensor(f"{LAYER}.o_proj.lora_B.bias", 32),
    "factors of an embedding on a linear layer": lambda tensors: {
        key.replace("lora_A.weight", "lora_embedding_A").replace(
            "lora_B.weight", "lora_embedding_B"
        ): value
        for key, value in tensors.items()
    },
    "another width": lambda tensors: {
        key: value[:, :16] if "lora_A" in key else value for key, value in tensors.items()
    },
    "another rank": lambda tensors: {
        key: value[:2] if "lora_A" in key else value[:, :2] for key, value in tensors.items()
    },
    "three dimensions": lambda tensors: {k: v.unsqueeze(-1) for k, v in tensors.items()},
}


@pytest.mark.parametrize("change", MISFITS.values(), ids=MISFITS)
def test_a_tensor_that_would_be_left_out_is_refused_by_name(change, plain, base, tmp_path):
    adapter = changed(plain, tmp_path / "v", change)
    told = r"(?s)tensor|has factors of shape|lora_"
    with pytest.raises(ModelError, match=told):
        open_vector("ja", str(adapter), base)
    with pytest.raises(ModelError, match=told):
        extract_any_adapter("ja", ResolvedModel(adapter, "v"), base, tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj"]},
        {"exclude_modules": ["v_proj"]},
        {"layers_to_transform": [0]},
        {"layers_to_transform": 1},
        {"target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"]},
    ],
    ids=str,
)
def test_a_layer_that_the_config_leaves_out_is_refused(fields, plain, base, tmp_path):
    adapter = changed(plain, tmp_path / "v", **fields)
    with pytest.raises(ModelError, match="PEFT would ignore it"):
        open_vector("ja", str(adapter), base)
    with pytest.raises(ModelError, match="PEFT would leave them out"):
        extract_any_adapter("ja", ResolvedModel(adapter, "v"), base, tmp_path / "delta")


def test_a_saved_module_without_its_tensor_is_refused(base, make_lora, tmp_path):
    options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    adapter = changed(make_lora(base, **options), tmp_path / "v", without("lm_head"))
    with pytest.raises(ModelError, match="modules_to_save names 'lm_head'"):
        open_vector("ja", str(adapter), base)
    with pytest.raises(ModelError, match="lm_head"):
        extract_any_adapter("ja", ResolvedModel(adapter, "v"), base, tmp_path / "delta")


# -- the config as a boundary ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"r": 10**9},
        {"r": 10**400},
        {"r": 0},
        {"r": True},
        {"r": "4"},
        {"r": None},
        {"r": 4.0},
        {"lora_alpha": 10**400},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"lora_alpha": "8"},
        {"lora_alpha": [8]},
        {"use_rslora": "no"},
        {"rank_pattern": [["q_proj", 4]]},
        {"rank_pattern": {"q_proj": "4"}},
        {"alpha_pattern": {"q_proj": None}},
        {"peft_type": None},
        {"peft_type": {"LORA": 1}},
        {"peft_type": ["LORA"]},
        {"init_lora_weights": {"pissa": 1}},
    ],
    ids=lambda fields: str(fields)[:40],
)
def test_absurd_fields_of_an_adapter_are_named(fields, plain, base, tmp_path):
    with pytest.raises(ModelError, match="vector 'ja'") as caught:
        open_vector("ja", str(changed(plain, tmp_path / "v", **fields)), base)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '"LORA"',
        "{",
        "[" * 100_000,
        '{"r": 1' + "0" * 5000 + "}",
        "\x00",
        "\ud800",
    ],
    ids=lambda text: text[:8],
)
def test_a_config_that_cannot_be_read_is_named(text, plain, base, tmp_path):
    adapter = changed(plain, tmp_path / "v")
    (adapter / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ModelError, match=r"'ja'.*adapter_config"):
        open_vector("ja", str(adapter), base)
    with pytest.raises(ModelError, match="adapter_config"):
        extract_any_adapter("ja", ResolvedModel(adapter, "v"), base, tmp_path / "delta")


# -- patterns of others ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern", [HANGING, "(.*.*)*!", "(a|aa)+$", "(", "q_proj|v_proj", "[qv]_proj", "q_proj\n"]
)
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_among_ranks_is_refused_and_never_matched(field, pattern, plain, base, tmp_path):
    adapter = changed(plain, tmp_path / "v", **{field: {pattern: 4}})
    started = time.perf_counter()
    with pytest.raises(ModelError, match=rf"{field} .*expected the end of a name"):
        open_vector("ja", str(adapter), base)
    assert time.perf_counter() - started < 5


def test_a_pattern_among_ranks_can_be_written_out_or_left_to_peft(plain, base, tmp_path):
    def with_ranks(name: str, pattern: str) -> Path:
        return changed(plain, tmp_path / name, r=9, rank_pattern={pattern: 4})

    adapter = with_ranks("v", "[qkvo]_proj")
    with pytest.raises(ModelError, match=r"Write the names out, .*--from-adapter --base BASE OUT"):
        open_vector("ja", str(adapter), base)
    extract_any_adapter(
        "ja", ResolvedModel(adapter, "v"), base, tmp_path / "delta", dtype="float32"
    )
    written_out = changed(plain, tmp_path / "w", r=9, rank_pattern={"q_proj": 4, "v_proj": 4})
    vector = open_vector("ja", str(written_out), base)
    delta = open_vector("ja", str(tmp_path / "delta"), base)
    for name in vector.names:
        torch.testing.assert_close(
            whole_delta(delta, base, name), whole_delta(vector, base, name), rtol=1e-3, atol=1e-6
        )


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        (".weight", ".default.weight", "default"),
        ("lora_B.weight", "lora_B.math.weight", "math"),
        ("v_proj.lora_A.weight", "v_proj.modules_to_save.default.weight", "default"),
    ],
)
def test_tensor_names_that_contain_the_name_of_the_adapter_are_refused(
    old, new, name, plain, base, tmp_path
):
    adapter = changed(plain, tmp_path / "v", renamed(old, new))
    told = rf"`save_pretrained`, or take '\.{name}' out"
    with pytest.raises(ModelError, match=told):
        open_vector("ja", str(adapter), base)
    with pytest.raises(ModelError, match=told):
        extract_any_adapter("ja", ResolvedModel(adapter, "v"), base, tmp_path / "delta")


@pytest.mark.parametrize("pattern", [HANGING, "(", "(.*.*)*!"])
def test_a_pattern_in_target_modules_is_not_compiled(pattern, plain, base, tmp_path):
    adapter = changed(plain, tmp_path / "v", target_modules=pattern, exclude_modules=pattern)
    expected = open_vector("ja", str(plain), base)
    assert open_vector("ja", str(adapter), base).names == expected.names


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": HANGING},
        {"exclude_modules": HANGING},
        {"modules_to_save": [HANGING]},
        {"rank_pattern": {HANGING: 4}},
        {"layers_pattern": [HANGING], "layers_to_transform": [0]},
        {"target_modules": "("},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_patterns_that_peft_would_hang_on_are_stopped(fields, plain, base, tmp_path, monkeypatch):
    monkeypatch.setattr("optimer_hf.files.patterns.SECONDS", 0.3)
    adapter = changed(plain, tmp_path / "v", **fields)
    with pytest.raises(
        (ConfigError, ModelError), match=r"patterns take longer|not a usable regular"
    ):
        extract_any_adapter("ja", ResolvedModel(adapter, "v"), base, tmp_path / "delta")


def test_fields_that_ms_swift_writes_beside_those_of_peft_are_known():
    fields = LoraConfig().to_dict() | {"lora_dtype": None, "lorap_emb_lr": 1e-06}
    assert why_not_weighted(fields) is None
    assert "bogus" in str(why_not_weighted(fields | {"bogus": 1}))
