import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimer_hf.errors import ModelError, OutputError
from optimer_hf.models.checkpoint import DTYPES, Checkpoint
from optimer_hf.models.layout import ResolvedModel, weight_digests
from optimer_hf.vectors.delta import extract, extract_any_adapter, measure_norms, write_record
from optimer_hf.vectors.opening import open_vector
from optimer_hf.vectors.record import VectorFile, read_record
from optimer_hf.vectors.training_record import TRAINING_FILE
from optimer_hf.vectors.vector import AdapterVector, CheckpointVector, DeltaVector
from tests.support.records import RECORD
from tests.support.tiny import VOCABULARY, delta_rows, tiny_model, whole_delta


def edit_weights(source: Path, out: Path, edit) -> Path:
    """Copy a model directory, change its tensors with `edit`, and return the copy."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    edit(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.fixture(scope="module")
def base(make_base) -> ResolvedModel:
    return make_base("llama")


@pytest.fixture(scope="module")
def tuned(base, make_tuned) -> Path:
    return make_tuned(base, "llama", 1)


@pytest.fixture(scope="module")
def adapter(base, make_adapter) -> Path:
    return make_adapter(base, 1)


# -- deltas ----------------------------------------------------------------------------------------


def test_a_checkpoint_delta_is_tuned_minus_base_in_float32(base, tuned):
    vector = open_vector("v", str(tuned), base)
    assert isinstance(vector, CheckpointVector)
    before, after = (
        load_file(base.path / "model.safetensors"),
        load_file(tuned / "model.safetensors"),
    )
    assert vector.names == before.keys()
    for name in before:
        assert torch.equal(
            whole_delta(vector, base, name), after[name].float() - before[name].float()
        )


def test_rows_of_a_delta_are_rows_of_the_whole_for_every_kind(base, tuned, adapter, tmp_path):
    extract(open_vector("v", str(tuned), base), base, tmp_path / "delta")
    name, rows = "model.layers.0.mlp.up_proj.weight", slice(5, 17)
    for source in (tuned, adapter, tmp_path / "delta"):
        vector = open_vector("v", str(source), base)
        torch.testing.assert_close(
            delta_rows(vector, base, name, rows),
            whole_delta(vector, base, name)[rows],
            rtol=1e-6,
            atol=1e-9,
        )


@pytest.mark.parametrize(
    ("dtype", "loss"), [("float32", 0.0), ("bfloat16", 2.0**-8), ("float16", 2.0**-10)]
)
def test_an_extracted_delta_loses_only_what_its_dtype_loses(base, tuned, tmp_path, dtype, loss):
    source = open_vector("math", str(tuned), base)
    record = extract(source, base, tmp_path / "delta", dtype=dtype)
    stored = open_vector("math", str(tmp_path / "delta"), base)
    assert isinstance(stored, DeltaVector)
    assert read_record(tmp_path / "delta") == record
    assert (record.kind, record.dtype, record.base.files) == (
        "delta",
        dtype,
        weight_digests(base.path),
    )
    for name in source.names:
        assert stored.stored.dtype(name) == DTYPES[dtype]
        expected = whole_delta(source, base, name)
        assert (
            (whole_delta(stored, base, name) - expected).abs()
            <= loss * expected.abs() + 1e-7 * (loss > 0)
        ).all()


def test_an_extracted_adapter_has_a_tensor_for_every_one_of_the_base(base, adapter, tmp_path):
    source = open_vector("ja", str(adapter), base)
    extract(source, base, tmp_path / "delta", dtype="float32", max_shard_size=8_000)
    stored = open_vector("ja", str(tmp_path / "delta"), base)
    assert len(list((tmp_path / "delta").glob("*.safetensors"))) > 1
    assert stored.names == frozenset(Checkpoint(base.path).names)
    for name in stored.names:
        expected = whole_delta(source, base, name) if name in source.names else torch.zeros(())
        assert torch.equal(
            whole_delta(stored, base, name), expected.expand_as(whole_delta(stored, base, name))
        )


def test_extracting_into_a_directory_with_files_is_refused_and_leaves_them(base, tuned, tmp_path):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="not empty"):
        extract(open_vector("v", str(tuned), base), base, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


# -- size ------------------------------------------------------------------------------------------


def test_norms_equal_those_of_the_flat_vectors(base, tuned, adapter):
    stored = {
        name: tensor.double() for name, tensor in load_file(base.path / "model.safetensors").items()
    }
    for source in (tuned, adapter):
        vector = open_vector("v", str(source), base)
        delta = torch.cat(
            [whole_delta(vector, base, name).double().flatten() for name in sorted(vector.names)]
        )
        moved = torch.cat([stored[name].flatten() for name in sorted(vector.names)])
        norm, relative_norm = measure_norms(vector, Checkpoint(base.path))
        assert norm == pytest.approx(delta.norm().item(), rel=1e-9)
        assert relative_norm == pytest.approx((delta.norm() / moved.norm()).item(), rel=1e-9)


def test_the_record_of_a_vector_repeats_what_training_recorded(base, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "ja")
    RECORD.write(tmp_path / "ja" / TRAINING_FILE)
    record = write_record(tmp_path / "ja", base, name="ja", kind="adapter")
    assert read_record(tmp_path / "ja") == record
    assert (record.name, record.kind, record.base.files) == (
        "ja",
        "adapter",
        weight_digests(base.path),
    )
    assert record.corpus == RECORD.corpus
    assert record.training == RECORD.training
    assert record.versions == RECORD.versions == {"torch": "x"}
    assert record.norm > 0
    assert isinstance(open_vector("ja", str(tmp_path / "ja"), base), AdapterVector)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_vector_with_nan_is_named_whatever_is_done_with_it(base, tuned, tmp_path, value):
    def spoil(tensors):
        tensors["model.norm.weight"][3] = value

    broken = edit_weights(tuned, tmp_path / "broken", spoil)
    vector = open_vector("math", str(broken), base)
    with pytest.raises(ModelError, match="vector 'math': its delta holds NaN or infinite"):
        measure_norms(vector, Checkpoint(base.path))
    with pytest.raises(ModelError, match="vector 'math'"):
        write_record(broken, base, name="math", kind="checkpoint")
    assert not (broken / "vector.json").exists()
    with pytest.raises(ModelError, match="vector 'math'"):
        extract(vector, base, tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


# -- refusals --------------------------------------------------------------------------------------


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


MIRROR = "unsloth/gemma-3-270m-it-unsloth-bnb-4bit"


def declaring(adapter: Path, declared: str, out: Path) -> Path:
    """Return a copy of an adapter that names a base."""
    shutil.copytree(adapter, out)
    config = json.loads((out / "adapter_config.json").read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = declared
    (out / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return out


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


def asking_to_be_quantised(model: Path, out: Path) -> Path:
    """Return a copy of a model of plain floats whose config.json has a quantization_config."""
    shutil.copytree(model, out)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
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


def test_a_base_of_floats_that_asks_to_be_quantised_is_refused(base, tuned, adapter, tmp_path):
    path = asking_to_be_quantised(base.path, tmp_path / "base")
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


def test_a_larger_vocabulary_is_refused_with_the_way_to_align_it(base, save_model):
    model = tiny_model("llama")
    model.resize_token_embeddings(VOCABULARY + 5)
    with pytest.raises(
        ModelError, match=r"(?s)vector 'it'.*\[264, 32\], the base has \[259, 32\].*tokenizer:"
    ):
        open_vector("it", str(save_model(model, "larger")), base)


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


def test_a_damaged_record_is_refused_by_name(base, tuned, tmp_path):
    shutil.copytree(tuned, tmp_path / "v")
    (tmp_path / "v" / "vector.json").write_text(
        '{"format_version": 1, "name": "v"}', encoding="utf-8"
    )
    with pytest.raises(ModelError, match=r"vector\.json: not a vector\.json of format version 1"):
        open_vector("v", str(tmp_path / "v"), base)


def test_a_source_that_does_not_exist_is_refused(base, tmp_path):
    with pytest.raises(ModelError, match="nowhere: no such file or directory"):
        open_vector("v", str(tmp_path / "nowhere"), base)


def test_a_record_survives_a_round_trip(base, tmp_path):
    record = VectorFile.model_validate(
        {
            "name": "日本語",
            "kind": "delta",
            "base": {"reference": "b", "files": weight_digests(base.path)},
            "norm": 0.1,
            "relative_norm": 0.2,
        }
    )
    record.write(tmp_path / "vector.json")
    assert read_record(tmp_path) == record
    assert read_record(base.path) is None
