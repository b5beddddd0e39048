import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from optimer_hf.errors import ModelError, OptimerError
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.vectors.delta import extract_any_adapter
from optimer_hf.vectors.forms import LowRank, to_dense
from optimer_hf.vectors.opening import open_vector
from optimer_hf.vectors.vector import AdapterVector
from tests.support.tiny import VOCABULARY, whole_delta

EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def base(make_base) -> ResolvedModel:
    return make_base("llama")


@pytest.fixture(scope="module")
def biased(save_model) -> ResolvedModel:
    """A Llama whose linear layers have biases."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        attention_bias=True,
        mlp_bias=True,
    )
    return ResolvedModel(save_model(LlamaForCausalLM(config), "biased"), "biased")


@pytest.fixture(scope="module")
def adapter(base, make_adapter) -> Path:
    return make_adapter(base, 1)


def merge_with_peft(base: ResolvedModel, adapter: Path):
    """Return the tensors before and after PEFT merged an adapter, in float32."""
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return before, PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


def assert_moves_as_peft(vector, base: ResolvedModel, adapter: Path) -> None:
    before, merged = merge_with_peft(base, adapter)
    tied = {"lm_head.weight"} - {name for name in before if name in vector.names}
    moved = {name for name in before if not torch.equal(before[name], merged[name])}
    assert vector.names == moved - tied
    for name in vector.names:
        expected = merged[name].reshape(whole_delta(vector, base, name).shape)
        after = before[name].reshape(expected.shape) + whole_delta(vector, base, name)
        torch.testing.assert_close(after, expected, rtol=0, atol=1e-6)


LORA_OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6}},
    "alpha_pattern": {"alpha_pattern": {"v_proj": 3, r"^model\.layers\.0\.mlp\.down_proj": 32}},
    "all of them": {
        "use_rslora": True,
        "rank_pattern": {"k_proj": 7},
        "alpha_pattern": {"k_proj": 5, "o_proj": 1},
    },
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "v_proj"]},
}


def train_a_step(base: ResolvedModel, out: Path, **options) -> Path:
    """Save a LoRA adapter after one large step of SGD, so that biases and saved modules moved."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.add_(0.01 * torch.randn_like(parameter))
    adapted.save_pretrained(out)
    return out


@pytest.mark.parametrize("options", LORA_OPTIONS.values(), ids=LORA_OPTIONS.keys())
def test_adapter_deltas_equal_what_peft_merges(base, make_adapter, options):
    adapter = make_adapter(base, 3, **options)
    vector = open_vector("v", str(adapter), base)
    assert isinstance(vector, AdapterVector)
    assert all(isinstance(part, LowRank) for part in vector.parts.values())
    assert_moves_as_peft(vector, base, adapter)


def test_a_patterned_adapter_is_not_the_plain_one(base, make_adapter):
    plain = open_vector("v", str(make_adapter(base, 3)), base)
    other = open_vector("v", str(make_adapter(base, 3, alpha_pattern={"v_proj": 16})), base)
    name = "model.layers.0.self_attn.v_proj.weight"
    torch.testing.assert_close(whole_delta(other, base, name), 2 * whole_delta(plain, base, name))


def test_a_low_rank_delta_is_its_scaled_product():
    delta = LowRank(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 5.0]]), 0.5)
    assert delta.to_dense().tolist() == [[1.5, 2.5], [3.0, 5.0]]
    moved = to_dense(delta.to(torch.device("cpu")), torch.zeros(2, 2))
    assert moved.tolist() == delta.to_dense().tolist()


@pytest.mark.filterwarnings("ignore:Adapter .default.:peft.utils.warning.PeftWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear", "bias": "lora_only"},
        {"target_modules": ["q_proj"], "bias": "all"},
        {"target_modules": ["q_proj", "up_proj"], "lora_bias": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]},
    ],
    ids=["biases of the layers", "all biases", "bias of B", "head saved", "embedding saved"],
)
def test_biases_and_saved_modules_equal_what_peft_merges(biased, tmp_path, options):
    adapter = train_a_step(biased, tmp_path / "adapter", **options)
    assert_moves_as_peft(open_vector("v", str(adapter), biased), biased, adapter)


# -- refusals --------------------------------------------------------------------------------------


def test_dora_is_refused_and_the_error_says_how_to_write_a_delta(base, make_adapter):
    with pytest.raises(ModelError, match=r"vector 'ja'.*DoRA.*optimer extract .*--from-adapter"):
        open_vector("ja", str(make_adapter(base, 4, use_dora=True)), base)


@pytest.mark.filterwarnings("ignore:Model (has|with) .tie_word_embeddings:UserWarning")
@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_a_saved_half_of_a_tied_pair_is_refused_with_the_reason(make_base, tmp_path, module):
    tied = make_base("gemma")
    options = {"target_modules": ["q_proj"], "modules_to_save": [module]}
    adapter = train_a_step(tied, tmp_path / "adapter", **options)
    with pytest.raises(
        ModelError,
        match=rf"vector 'ja'.*trains .*{module}.* leaves .*ties them.*with full parameters",
    ):
        open_vector("ja", str(adapter), tied)


def test_an_adapter_that_is_not_lora_is_refused(base, tmp_path):
    IA3Config(task_type="CAUSAL_LM").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"vector 'ja'.*IA3.*only LoRA"):
        open_vector("ja", str(tmp_path), base)


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_an_adapter_with_half_a_factor_is_refused(base, adapter, tmp_path, factor):
    shutil.copytree(adapter, tmp_path / "half")
    file = tmp_path / "half" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[f"base_model.model.model.layers.0.self_attn.q_proj.{factor}.weight"]
    save_file(tensors, file)
    with pytest.raises(ModelError, match=rf"vector 'ja'.*q_proj\.{factor}"):
        open_vector("ja", str(tmp_path / "half"), base)


def changed_adapter(adapter, out, change):
    """Return a copy of an adapter with its tensors changed."""
    shutil.copytree(adapter, out)
    file = out / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    return out


def test_an_adapter_without_tensors_is_refused(base, adapter, tmp_path):
    empty = changed_adapter(adapter, tmp_path / "empty", lambda _: {})
    with pytest.raises(ModelError, match=r"vector 'ja'.*holds no tensors"):
        open_vector("ja", str(empty), base)
    with pytest.raises(ModelError, match=r"empty: holds no tensors"):
        extract_any_adapter("v", ResolvedModel(empty, "v"), base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")  # of PEFT, which says it too
@pytest.mark.parametrize(
    ("gone", "options", "said"),
    [
        (".layers.1.", {}, r"7 layers that its config targets \(.*; of layer 1\)"),
        (".o_proj.", {}, r"2 layers .*self_attn\.o_proj\.weight; of layer 0, 1\)"),
        (".layers.1.", {"layers_to_transform": [0]}, None),
        ("nothing", {"target_modules": ["q_proj", "v_proj"]}, None),
        ("nothing", {"exclude_modules": ["o_proj"]}, None),
    ],
)
def test_layers_that_an_adapter_targets_and_lacks_are_named_once(
    base, make_adapter, tmp_path, caplog, gone, options, said
):
    """PEFT leaves them as they are, too: the delta is that of PEFT."""
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    whole = make_adapter(base, 1, **{"target_modules": linear} | options)
    path = changed_adapter(
        whole,
        tmp_path / "less",
        lambda tensors: {name: tensor for name, tensor in tensors.items() if gone not in name},
    )
    for _ in range(2):
        vector = open_vector("ja", str(path), base)
        assert_moves_as_peft(vector, base, path)
    warnings = [message for message in caplog.messages if "its config targets" in message]
    assert len(warnings) == (said is not None)
    if said is not None:
        assert re.search(said, warnings[0]), warnings[0]


@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_names_of_a_wrapper_that_peft_would_not_find_are_refused(base, adapter, tmp_path, prefix):
    def wrapped(tensors):
        return {
            f"{prefix}_orig_mod.{name.removeprefix(prefix)}": tensor
            for name, tensor in tensors.items()
        }

    path = changed_adapter(adapter, tmp_path / "wrapped", wrapped)
    with pytest.raises(ModelError, match=r"wrapped: its tensor names have the prefix _orig_mod"):
        extract_any_adapter("v", ResolvedModel(path, "v"), base, tmp_path / "out")
    assert open_vector("ja", str(path), base).names == open_vector("ja", str(adapter), base).names


def without_prefix(name: str) -> str:
    return name.removeprefix("base_model.model.")


def test_names_without_the_prefix_of_peft_are_applied_as_transformers_does_and_said_once(
    base, adapter, tmp_path, caplog
):
    def bare(tensors):
        return {without_prefix(name): tensor for name, tensor in tensors.items()}

    path = changed_adapter(adapter, tmp_path / "bare", bare)
    vectors = [open_vector("ja", str(path), base) for _ in range(2)]
    said = [message for message in caplog.messages if "lack the prefix" in message]
    assert len(said) == 1 and "PEFT's PeftModel would ignore them" in said[0]
    with pytest.warns(UserWarning, match="missing adapter keys"):
        before, merged = merge_with_peft(base, path)
    assert all(torch.equal(before[name], merged[name]) for name in before)  # PeftModel ignores it
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    model.load_adapter(str(path))
    layer = model.model.layers[0].self_attn.q_proj
    expected = layer.get_delta_weight("default")
    delta = whole_delta(vectors[0], base, "model.layers.0.self_attn.q_proj.weight")
    torch.testing.assert_close(delta, expected, rtol=0, atol=1e-6)
    whole = open_vector("ja", str(adapter), base)
    assert vectors[0].names == whole.names
    assert all(
        torch.equal(whole_delta(vectors[0], base, name), whole_delta(whole, base, name))
        for name in whole.names
    )
    with pytest.raises(ModelError, match="PEFT would leave them out"):
        extract_any_adapter("v", ResolvedModel(path, "v"), base, tmp_path / "out")


def test_a_file_in_which_only_some_names_lack_the_prefix_is_refused(base, adapter, tmp_path):
    def mixed(tensors):
        return {
            without_prefix(name) if "layers.1." in name else name: tensor
            for name, tensor in tensors.items()
        }

    path = changed_adapter(adapter, tmp_path / "mixed", mixed)
    expected = r"'model\.layers\.1\.mlp\.down_proj\.lora_A\.weight' lacks the prefix"
    with pytest.raises(ModelError, match=expected):
        open_vector("ja", str(path), base)


def test_factors_that_are_not_finite_are_not_taken_for_tensors_that_differ(base, adapter, tmp_path):
    def broken(tensors):
        return {name: tensor * float("nan") for name, tensor in tensors.items()}

    path = changed_adapter(adapter, tmp_path / "broken", broken)
    vector = open_vector("ja", str(path), base)
    assert whole_delta(vector, base, sorted(vector.names)[0]).isnan().all()


def test_an_embedding_that_was_trained_beside_its_factors_is_refused(base, make_adapter, tmp_path):
    adapter = make_adapter(base, 3, target_modules=["embed_tokens"])
    shutil.copytree(adapter, tmp_path / "v")
    file = tmp_path / "v" / "adapter_model.safetensors"
    tensors = load_file(file)
    (copy,) = (name for name in tensors if name.endswith("base_layer.weight"))
    tensors[copy] += 1
    save_file(tensors, file)
    with pytest.raises(ModelError, match=r"vector 'ja'.*differs from the base"):
        open_vector("ja", str(tmp_path / "v"), base)


def test_factors_of_another_rank_than_the_config_says_are_refused(base, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "v")
    file = tmp_path / "v" / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | {"r": 8}), encoding="utf-8")
    with pytest.raises(ModelError, match=r"vector 'ja'.*but rank 8 in adapter_config\.json"):
        open_vector("ja", str(tmp_path / "v"), base)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 20),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.text(max_size=3), max_size=2),
    st.dictionaries(st.sampled_from(["q_proj", "(", "up_proj"]), st.integers(-1, 3), max_size=2),
)
FIELDS = [
    "peft_type",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "use_dora",
    "fan_in_fan_out",
    "init_lora_weights",
    "target_modules",
    "no_such_field",
    "base_model_name_or_path",
]


@given(st.dictionaries(st.sampled_from(FIELDS), VALUES, min_size=1, max_size=3))
@settings(
    deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
def test_a_mutated_config_gives_a_vector_or_our_error_and_nothing_else(
    base, adapter, tmp_path_factory, changes
):
    out = tmp_path_factory.getbasetemp() / "mutated-adapter"
    shutil.copytree(adapter, out, dirs_exist_ok=True)
    file = out / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(config | changes), encoding="utf-8")
    try:
        open_vector("ja", str(out), base)
    except OptimerError as error:
        assert "'ja'" in str(error)


# -- through PEFT ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("kind", ["dora", "ia3", "lora"])
def test_any_adapter_becomes_the_delta_that_peft_merges(base, make_adapter, tmp_path, kind, dtype):
    if kind == "ia3":
        model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
        config = IA3Config(
            task_type="CAUSAL_LM",
            target_modules=["k_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            init_ia3_weights=False,
        )
        torch.manual_seed(1)
        get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
        adapter = tmp_path / "adapter"
    else:
        adapter = make_adapter(base, 4, use_dora=kind == "dora")
    source = ResolvedModel(adapter, adapter.name)
    record = extract_any_adapter("v", source, base, tmp_path / "delta", dtype=dtype)
    vector = open_vector("v", str(tmp_path / "delta"), base)
    before, merged = merge_with_peft(base, adapter)
    loss = {"float32": 1e-6, "bfloat16": 2.0**-8, "int8": 0.01}[dtype]
    squares = errors = 0.0
    for name in vector.names:
        exact = merged[name] - before[name]
        delta = whole_delta(vector, base, name).reshape(exact.shape)
        squares += exact.square().sum().item()
        errors += (delta - exact).square().sum().item()
    assert squares > 0
    assert errors <= loss**2 * squares + 1e-9
    assert record.relative_error <= loss
    assert record.source_files.keys() == {"adapter_config.json", "adapter_model.safetensors"}


def test_an_adapter_peft_cannot_merge_is_refused_and_leaves_nothing(base, tmp_path):
    from peft import PromptTuningConfig

    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    source = ResolvedModel(tmp_path / "adapter", "adapter")
    with pytest.raises(ModelError, match="PEFT cannot merge this adapter"):
        extract_any_adapter("v", source, base, tmp_path / "delta")
    assert not (tmp_path / "delta").exists()
