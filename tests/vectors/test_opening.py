"""A vector is opened if it fits its base and refused by name otherwise, damaged or not."""

import json
import shutil
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PhiConfig, PhiForCausalLM

from optimer_hf.errors import ModelError, OptimerError
from optimer_hf.merging.resident import ResidentModel
from optimer_hf.merging.writer import write_merged
from optimer_hf.models import layout
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.models.resolve import resolve_base
from optimer_hf.vectors.delta import extract, extract_any_adapter, write_record
from optimer_hf.vectors.opening import open_vector
from tests.support.added_tokens import with_tokens
from tests.support.damage import TEXTS, damage
from tests.support.tiny import VOCABULARY, WIDE, tiny_model, whole_delta
from tests.support.weights import edit_weights


@pytest.fixture(scope="module")
def delta(tmp_path_factory, make_base, make_tuned):
    """A base, and a quantised delta of two shards beside it."""
    base = make_base("llama")
    folder = tmp_path_factory.mktemp("delta")
    source = open_vector("v", str(make_tuned(base, "llama", 1)), base)
    extract(source, base, folder / "v", dtype="int8", max_shard_size=20_000)
    return base, folder / "v"


@given(data=st.data())
@settings(
    max_examples=80, deadline=10_000, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_damaged_vector_is_opened_or_refused_by_an_error_of_ours(tmp_path_factory, delta, data):
    base, source = delta
    copy = tmp_path_factory.mktemp("damaged") / "v"
    shutil.copytree(source, copy)
    files = ["vector.json", "config.json", "vector.safetensors.index.json"]
    file = copy / data.draw(st.sampled_from([f for f in files if (copy / f).exists()]))
    if data.draw(st.booleans()):
        changed = damage(data.draw, json.loads(file.read_text()))
        text = json.dumps(changed) if not isinstance(changed, str) else changed
    else:
        whole = file.read_text()
        cut = data.draw(st.integers(0, len(whole)))
        text = whole[:cut] + data.draw(st.sampled_from([*TEXTS, ""]))
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    tracemalloc.start()
    try:
        vector = open_vector("v", str(copy), base)
        for name in sorted(vector.names)[:3]:
            assert isinstance(vector.delta(name, slice(0, 1), "cpu"), torch.Tensor)
    except OptimerError:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 2**28


@pytest.mark.parametrize("source", ["adapter", "tuned", "delta"])
def test_a_vector_of_another_base_is_refused_by_the_sha256_in_its_record(
    base, save_model, adapter, tuned, tmp_path, source
):
    copy = tmp_path / "ja"
    if source == "delta":
        extract(open_vector("ja", str(tuned), base), base, copy)
    else:
        shutil.copytree(adapter if source == "adapter" else tuned, copy)
        write_record(copy, base, name="ja", kind="adapter" if source == "adapter" else "checkpoint")
    open_vector("ja", str(copy), base)
    path = save_model(tiny_model("llama", seed=9, dtype=torch.bfloat16), "other")
    with pytest.raises(
        ModelError, match=rf"vector 'ja'.*trained from {base.reference}.*base_model other-9"
    ):
        open_vector("ja", str(copy), ResolvedModel(path, "other-9"))


SHARD, INDEX = "model-00001-of-00001.safetensors", "model.safetensors.index.json"
MIRROR = "unsloth/gemma-3-270m-it-unsloth-bnb-4bit"


def declaring(adapter: Path, declared: str, out: Path) -> Path:
    """Return a copy of an adapter that names a base."""
    shutil.copytree(adapter, out)
    config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = declared
    (out / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return out


@pytest.mark.parametrize("is_absolute", [True, False])
@pytest.mark.parametrize("published", [True, False], ids=["Hub base", "local base"])
def test_an_adapter_that_names_another_local_base_is_opened_with_one_warning(
    base, adapter, save_model, tmp_path, monkeypatch, caplog, published, is_absolute
):
    other = save_model(tiny_model("llama", seed=9, dtype=torch.bfloat16), "other-again")
    monkeypatch.chdir(other.parent)
    declared = str(other) if is_absolute else f"./{other.name}"
    given = ResolvedModel(base.path, "org/base", "0" * 40) if published else base
    copy = declaring(adapter, declared, tmp_path / "ja")
    for _ in range(2):
        open_vector("ja", str(copy), given)
    (record,) = caplog.records
    assert f"names {declared} as its base" in record.message and given.reference in record.message


@pytest.mark.parametrize("declared", ["the base", "a copy", "nothing there", "no model", ""])
def test_an_adapter_that_names_its_base_or_nothing_known_is_opened_without_a_word(
    base, adapter, tmp_path, caplog, declared
):
    copied = tmp_path / "a copy"
    shutil.copytree(base.path, copied)
    (tmp_path / "no model").mkdir()
    named = {"the base": str(base.path), "": ""}.get(declared, str(tmp_path / declared))
    open_vector("ja", str(declaring(adapter, named, tmp_path / "ja")), base)
    assert not caplog.records


@pytest.mark.parametrize("declared", ["/" + 300 * "x", "/null\0", "damaged", "in shards"])
def test_an_adapter_whose_named_base_cannot_be_compared_is_opened_without_a_word(
    base, adapter, tmp_path, caplog, declared
):
    for name in ("damaged", "in shards"):
        shutil.copytree(base.path, tmp_path / name)
        (tmp_path / name / "model.safetensors").rename(tmp_path / name / SHARD)
    weight_map = dict.fromkeys(load_file(base.path / "model.safetensors"), SHARD)
    (tmp_path / "in shards" / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "damaged" / INDEX).write_text("[]")
    named = str(tmp_path / declared)
    open_vector("ja", str(declaring(adapter, named, tmp_path / "ja")), base)
    assert not caplog.records


def test_the_base_is_read_once_for_all_adapters_that_name_another(
    adapter, base, save_model, tmp_path, monkeypatch
):
    other = save_model(tiny_model("llama", seed=9, dtype=torch.bfloat16), "the other")
    own = shutil.copytree(base.path, tmp_path / "own")
    read = []
    monkeypatch.setattr(layout, "fingerprint", lambda file: read.append(file.parent) or str(file))
    for name in ("a", "b"):
        copy = declaring(adapter, str(other), tmp_path / name)
        open_vector(name, str(copy), ResolvedModel(own, "own"))
    assert read.count(own) == 1


def test_an_adapter_that_names_another_base_and_fits_is_opened_with_one_warning(
    base, adapter, make_base, tmp_path, caplog
):
    published = ResolvedModel(base.path, "google/gemma-3-270m-it", "0" * 40)
    copy = declaring(adapter, MIRROR, tmp_path / "ja")
    for _ in range(2):
        opened = open_vector("ja", str(copy), published)
    assert opened.names == open_vector("ja", str(adapter), base).names
    (record,) = caplog.records
    assert MIRROR in record.message and published.reference in record.message
    assert "train the adapter again" in record.message
    extract_any_adapter("ja2", ResolvedModel(copy, "ja"), published, tmp_path / "delta")
    assert len(caplog.records) == 2
    gemma = ResolvedModel(make_base("gemma").path, published.reference, published.commit)
    with pytest.raises(ModelError, match="vector 'ja'"):
        open_vector("ja", str(copy), gemma)


@pytest.mark.parametrize("declared", ["google/gemma-3-270m-it", "/models/gemma", "./gemma", ""])
def test_an_adapter_that_names_this_base_or_a_local_one_has_no_warning(
    base, adapter, tmp_path, declared, caplog
):
    published = ResolvedModel(base.path, "google/gemma-3-270m-it", "0" * 40)
    open_vector("ja", str(declaring(adapter, declared, tmp_path / "ja")), published)
    assert caplog.records == []


def test_a_record_of_other_weights_is_refused_also_where_the_name_is_right(
    base, adapter, save_model, tmp_path
):
    copy = declaring(adapter, "google/gemma-3-270m-it", tmp_path / "ja")
    write_record(copy, base, name="ja", kind="adapter")
    path = save_model(tiny_model("llama", seed=9, dtype=torch.bfloat16), "other")
    with pytest.raises(ModelError, match=r"vector 'ja'.*whose weights differ"):
        open_vector("ja", str(copy), ResolvedModel(path, "google/gemma-3-270m-it", "0" * 40))


def test_a_checkpoint_of_another_architecture_is_refused(base, make_base):
    with pytest.raises(ModelError, match=r"vector 'it'.*same architecture"):
        open_vector("it", str(make_base("gemma").path), base)


def test_a_checkpoint_that_lacks_a_tensor_is_refused(base, tuned, tmp_path):
    broken = edit_weights(
        tuned, tmp_path / "broken", lambda tensors: tensors.pop("model.norm.weight")
    )
    with pytest.raises(
        ModelError, match=r"1 tensors are missing \(first: \['model\.norm\.weight'\]\)"
    ):
        open_vector("it", str(broken), base)


def test_whole_numbers_that_differ_from_the_base_are_refused(base, tuned, tmp_path):
    copies = {}
    for name, path, value in (("base", base.path, 1), ("same", tuned, 1), ("other", tuned, 2)):
        counts = torch.tensor([value])
        copies[name] = edit_weights(path, tmp_path / name, lambda t, c=counts: t.update(counts=c))
    counted = ResolvedModel(copies["base"], "base")
    assert "counts" not in open_vector("it", str(copies["same"]), counted).names
    with pytest.raises(ModelError, match=r"vector 'it'.*tensor 'counts'.*whole numbers cannot"):
        open_vector("it", str(copies["other"]), counted)


def test_a_quantised_model_is_refused_as_a_vector(base, tuned, tmp_path):
    def quantise(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)

    broken = edit_weights(tuned, tmp_path / "broken", quantise)
    with pytest.raises(ModelError, match=r"model\.norm\.weight' is torch\.int8.*full weights"):
        open_vector("it", str(broken), base)


def asking_to_be_quantised(model: Path, out: Path, part: str = "") -> Path:
    """Return a copy of a model of plain floats whose config.json has a quantization_config, in a
    part of it if one is given.
    """
    shutil.copytree(model, out)
    config = json.loads((out / "config.json").read_text())
    place = config.setdefault(part, {}) if part else config
    place["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (out / "config.json").write_text(json.dumps(config))
    return out


def test_floats_of_a_fine_tune_that_asks_to_be_quantised_are_merged_with_one_warning(
    base, tuned, tmp_path, caplog
):
    path = asking_to_be_quantised(tuned, tmp_path / "qlora")
    expected = open_vector("math", str(tuned), base)
    for _ in range(2):
        vector = open_vector("math", str(path), base)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(whole_delta(vector, base, name), whole_delta(expected, base, name))
    said = [message for message in caplog.messages if "quantization_config" in message]
    assert len(said) == 1 and "(bitsandbytes)" in said[0] and "the merge is not" in said[0]


@pytest.mark.parametrize("part", ["", "text_config"])
def test_a_base_of_floats_that_asks_to_be_quantised_is_refused(
    base, tuned, adapter, part, tmp_path
):
    path = asking_to_be_quantised(base.path, tmp_path / "base", part)
    for source in (tuned, adapter):
        with pytest.raises(
            ModelError, match=r"base_model b: its config\.json has a quantization_c"
        ):
            open_vector("math", str(source), ResolvedModel(path, "b"))


def test_a_tied_head_may_be_stored_on_one_side_only(make_base, make_tuned, tmp_path):
    base = make_base("gemma")
    tuned = make_tuned(base, "gemma", 1)
    assert "lm_head.weight" not in Checkpoint(tuned).names

    def store_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    vector = open_vector("it", str(edit_weights(tuned, tmp_path / "headed", store_head)), base)
    assert vector.names == frozenset(Checkpoint(base.path).names)


@pytest.mark.parametrize("headed", ["base", "tuned"])
def test_a_head_that_differs_from_what_it_is_tied_to_is_refused(
    make_base, make_tuned, tmp_path, headed
):
    base = make_base("gemma")
    tuned = make_tuned(base, "gemma", 1)

    def store_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 0.5

    changed = edit_weights(base.path if headed == "base" else tuned, tmp_path / "x", store_head)
    base = ResolvedModel(changed, "base") if headed == "base" else base
    with pytest.raises(
        ModelError, match=r"tensor 'lm_head.weight' differs from 'model.embed_tokens.weight'"
    ):
        open_vector("it", str(tuned if headed == "base" else changed), base)


def test_a_larger_vocabulary_is_refused_and_the_error_says_how_to_align_it(base, save_model):
    model = tiny_model("llama")
    model.resize_token_embeddings(VOCABULARY + 5)
    larger = save_model(model, "larger")
    with_tokens(base.path, ["<tool>"]).save_pretrained(larger)
    for _ in range(2):
        with pytest.raises(
            ModelError, match=r"(?s)vector 'it'.*\[264, 32\], the base has \[259, 32\].*tokenizer:"
        ):
            open_vector("it", str(larger), base)
        for file in larger.glob("tokenizer*"):  # nothing says that no row belongs to a token
            file.unlink()


@pytest.mark.parametrize("head", ["with a bias", "without"])
def test_rows_of_a_fine_tune_that_belong_to_no_token_are_left_out(
    head, save_model, tmp_path, caplog
):
    """As after `resize_token_embeddings` with `pad_to_multiple_of`."""
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(**WIDE)) if head == "with a bias" else tiny_model("llama")
    base = ResolvedModel(save_model(model, "base"), "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.resize_token_embeddings(pad_to_multiple_of=64, mean_resizing=False)
    source = save_model(model, "padded")
    vector = open_vector("it", str(source), base)
    assert sum("leaves out 61 rows of lm_head" in message for message in caplog.messages) == 1
    extract(vector, base, tmp_path / "delta", dtype="float32")
    ids = torch.tensor([[2, 70, 71, 9]])
    expected = model.eval()(ids).logits[..., :VOCABULARY]
    for number, each in enumerate((vector, open_vector("it", str(tmp_path / "delta"), base))):
        write_merged(base, [each], {"it": 1.0}, tmp_path / str(number))
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / str(number))
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-5)
    resident = ResidentModel(base, [vector], dtype="float32")
    resident.set_weights({"it": 1.0})
    torch.testing.assert_close(resident.model(ids).logits, expected, rtol=1e-4, atol=1e-5)


def emptied(source: Path, out: Path, file: str) -> Path:
    """Return a copy whose tensors are as ZeRO-3 leaves them in a process that does not gather."""
    shutil.copytree(source, out)
    empty = {name: torch.zeros(0) for name in load_file(out / file)}
    save_file(empty, out / file, metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("part", ["adapter", "tuned", "base"])
def test_tensors_that_were_saved_without_being_gathered_are_named(
    base, tuned, adapter, part, tmp_path
):
    source, named = {"adapter": adapter, "tuned": tuned, "base": tuned}[part], base
    if part == "base":
        named = ResolvedModel(emptied(base.path, tmp_path / "b", "model.safetensors"), "b")
    else:
        file = "adapter_model.safetensors" if part == "adapter" else "model.safetensors"
        source = emptied(source, tmp_path / "v", file)
    where = "base_model .*/b" if part == "base" else "vector 'it'.*/v"
    with pytest.raises(ModelError, match=rf"{where}.*is empty\. DeepSpeed ZeRO-3.*zero_to_fp32"):
        open_vector("it", str(source), named)


def test_an_adapter_beside_a_whole_model_is_never_mistaken_for_it(
    base, tuned, adapter, tmp_path, caplog
):
    """As in a directory into which a merged model was saved after the adapter."""
    both = tmp_path / "both"
    shutil.copytree(tuned, both)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / file, both)
    with pytest.raises(ModelError, match=r"both: has an adapter_config\.json beside the weigh"):
        resolve_base(str(both))
    found, expected = (open_vector("it", str(path), base) for path in (both, adapter))
    assert found.kind == "adapter"
    assert found.names == expected.names
    assert sum("The adapter is read" in message for message in caplog.messages) == 1
    (both / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"weights of a whole model and none of an adapter"):
        open_vector("it", str(both), base)


def test_an_adapter_whose_file_is_named_like_that_of_a_model_is_read(
    base, adapter, tmp_path, caplog
):
    copy = tmp_path / "renamed"
    shutil.copytree(adapter, copy)
    (copy / "adapter_model.safetensors").rename(copy / "model.safetensors")
    found, expected = (open_vector("ja", str(path), base) for path in (copy, adapter))
    assert found.kind == "adapter" and found.names == expected.names
    assert not caplog.records


def test_another_width_is_not_taken_for_another_vocabulary(base, save_model):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(base.path)
    config.hidden_size = 64
    wider = save_model(LlamaForCausalLM(config), "wider")
    with pytest.raises(ModelError, match=r"has shape .*Give a vector trained from this base"):
        open_vector("it", str(wider), base)


def test_a_delta_of_another_shape_is_refused(base, tuned, tmp_path):
    extract(open_vector("v", str(tuned), base), base, tmp_path / "delta")

    def transpose(tensors):
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name] = tensors[name].T.contiguous()

    broken = edit_weights(tmp_path / "delta", tmp_path / "broken", transpose)
    with pytest.raises(
        ModelError, match=r"mlp\.up_proj\.weight' has shape \[32, 48\], the base has \[48, 32\]"
    ):
        open_vector("v", str(broken), base)


def test_a_delta_with_an_unknown_tensor_is_refused(base, tuned, tmp_path):
    extract(open_vector("v", str(tuned), base), base, tmp_path / "delta")
    broken = edit_weights(
        tmp_path / "delta", tmp_path / "broken", lambda t: t.update(extra=torch.ones(2))
    )
    with pytest.raises(ModelError, match="tensor 'extra' is not in the base"):
        open_vector("v", str(broken), base)


def test_a_source_that_does_not_exist_is_refused(base, tmp_path):
    with pytest.raises(ModelError, match="nowhere: no such file or directory"):
        open_vector("v", str(tmp_path / "nowhere"), base)


QUANTISED = {  # how a program stores a linear layer as codes, and what config.json says
    "bitsandbytes": (
        lambda name, weight: {
            name: torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8),
            f"{name}.absmax": torch.ones(4),
        },
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    ),
    "gptq": (
        lambda name, weight: {
            name.replace("weight", "qweight"): torch.zeros(4, len(weight), dtype=torch.int32),
            name.replace("weight", "scales"): torch.ones(1, len(weight)),
        },
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    ),
    "fp8": (
        lambda name, weight: {
            name: weight.to(torch.float8_e4m3fn),
            f"{name}_scale_inv": torch.ones(1, 1),
        },
        {"quantization_config": {"quant_method": "fp8"}},
    ),
    "MLX": (
        lambda name, weight: {
            name: torch.zeros(len(weight), weight.shape[1] // 8, dtype=torch.int32),
            name.replace("weight", "scales"): torch.ones(len(weight), 1),
        },
        {"quantization": {"group_size": 64, "bits": 4}},
    ),
}


@pytest.mark.parametrize("role", ["base_model", "vector"])
@pytest.mark.parametrize("method", QUANTISED)
def test_an_error_of_a_quantised_model_says_that_it_is_quantised(
    make_base, make_adapter, tmp_path, method, role
):
    store, settings = QUANTISED[method]
    base = make_base("llama")

    def quantise(tensors):
        for name in [name for name in tensors if "_proj" in name]:
            tensors |= store(name, tensors.pop(name))

    codes = edit_weights(base.path, tmp_path / "codes", quantise)
    config = json.loads((codes / "config.json").read_text()) | settings
    (codes / "config.json").write_text(json.dumps(config))
    of_codes = ResolvedModel(codes, "codes")
    pair = (of_codes, make_adapter(base, 0)) if role == "base_model" else (base, codes)
    what = "base_model codes" if role == "base_model" else "vector 'v'"
    with pytest.raises(ModelError, match=rf"Besides, {what} is quantised \({method}\)"):
        open_vector("v", str(pair[1]), pair[0])


def test_an_adapter_of_another_program_is_named(make_base, tmp_path):
    (tmp_path / "mlx").mkdir()
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 20.0}}
    (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {"model.layers.0.self_attn.q_proj.lora_a": torch.ones(32, 4)},
        tmp_path / "mlx" / "adapters.safetensors",
    )
    with pytest.raises(ModelError, match="has no peft_type, so it is not one of PEFT's"):
        open_vector("v", str(tmp_path / "mlx"), make_base("llama"))
