import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import VOCABULARY, tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import IA3Config, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from optimer_hf import vector as vector_module
from optimer_hf.convert import ResolvedModel
from optimer_hf.errors import ModelError, OutputError
from optimer_hf.vector import (
    DTYPES,
    AdapterVector,
    Checkpoint,
    CheckpointVector,
    DeltaVector,
    LowRank,
    VectorFile,
    dense,
    describe,
    extract,
    norms,
    open_vector,
    read_record,
    row_blocks,
    weight_files,
    write_safetensors,
    write_sharded,
)

ALL = slice(None)


def whole_delta(vector, name: str) -> torch.Tensor:
    return dense(vector.delta(name, ALL))


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


# -- blocks and files ------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(1, 200))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_row_blocks_cover_every_row_once_and_stay_small(monkeypatch, shape, chunk):
    monkeypatch.setattr(vector_module, "CHUNK_ELEMENTS", chunk)
    blocks = row_blocks(tuple(shape))
    rows = [row for block in blocks for row in range(shape[0])[block]]
    assert rows == list(range(shape[0]))
    columns = math.prod(shape[1:])
    assert all((block.stop - block.start) * columns <= max(chunk, columns) for block in blocks)


def test_a_scalar_is_one_block():
    assert torch.tensor(3.0)[()] == 3.0
    assert row_blocks(()) == [slice(None)]


def test_files_of_every_dtype_and_shape_are_read_back_by_safetensors(tmp_path):
    torch.manual_seed(0)
    tensors = {
        "matrix": torch.randn(7, 5).bfloat16(),
        "half": torch.randn(3).half(),
        "cube": torch.randn(2, 3, 4),
        "double": torch.randn(3, 2).double(),
        "scalar": torch.tensor(2.5),
        "counts": torch.arange(6).reshape(2, 3),
        "flags": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
    }
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_safetensors(tmp_path / "x.safetensors", specs, tensors.values())
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_a_file_with_too_few_bytes_is_an_error(tmp_path):
    with pytest.raises(OutputError, match=r"wrote 16 of 24 bytes"):
        write_safetensors(
            tmp_path / "x.safetensors", {"a": (torch.float32, (6,))}, [torch.zeros(4)]
        )


@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.integers(1, 200))
@settings(deadline=None, max_examples=25)
def test_shards_hold_every_tensor_once_and_keep_the_size_limit(
    tmp_path_factory, lengths, max_shard_size
):
    out = tmp_path_factory.mktemp("shards")
    tensors = {f"t{i}": torch.arange(n, dtype=torch.float32) + i for i, n in enumerate(lengths)}
    specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_sharded(out, "model", specs, lambda name: [tensors[name]], max_shard_size)
    checkpoint = Checkpoint(out)
    assert checkpoint.names == sorted(tensors)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in tensors.items())
    for file in out.glob("*.safetensors"):
        shard = load_file(file)
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= max_shard_size
    index = out / "model.safetensors.index.json"
    assert index.exists() == (len(list(out.glob("*.safetensors"))) > 1)
    if index.exists():
        data = json.loads(index.read_text(encoding="utf-8"))
        assert data["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
        assert all(name in load_file(out / file) for name, file in data["weight_map"].items())


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
        assert torch.equal(whole_delta(vector, name), after[name].float() - before[name].float())


def test_rows_of_a_delta_are_rows_of_the_whole_for_every_kind(base, tuned, adapter, tmp_path):
    extract(open_vector("v", str(tuned), base), base, tmp_path / "delta")
    name, rows = "model.layers.0.mlp.up_proj.weight", slice(5, 17)
    for source in (tuned, adapter, tmp_path / "delta"):
        vector = open_vector("v", str(source), base)
        torch.testing.assert_close(
            dense(vector.delta(name, rows)), whole_delta(vector, name)[rows], rtol=1e-6, atol=1e-9
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
        weight_files(base.path),
    )
    for name in source.names:
        assert stored.stored.dtype(name) == DTYPES[dtype]
        expected = whole_delta(source, name)
        assert (
            (whole_delta(stored, name) - expected).abs()
            <= loss * expected.abs() + 1e-7 * (loss > 0)
        ).all()


def test_an_extracted_adapter_has_a_tensor_for_every_one_of_the_base(base, adapter, tmp_path):
    source = open_vector("ja", str(adapter), base)
    extract(source, base, tmp_path / "delta", dtype="float32", max_shard_size=8_000)
    stored = open_vector("ja", str(tmp_path / "delta"), base)
    assert len(list((tmp_path / "delta").glob("*.safetensors"))) > 1
    assert stored.names == frozenset(Checkpoint(base.path).names)
    for name in stored.names:
        expected = whole_delta(source, name) if name in source.names else torch.zeros(())
        assert torch.equal(whole_delta(stored, name), expected.expand_as(whole_delta(stored, name)))


def test_extracting_into_a_directory_with_files_is_refused_and_leaves_them(base, tuned, tmp_path):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(OutputError, match="not empty"):
        extract(open_vector("v", str(tuned), base), base, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


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
}


@pytest.mark.parametrize("options", LORA_OPTIONS.values(), ids=LORA_OPTIONS.keys())
def test_adapter_deltas_equal_what_peft_merges(base, make_adapter, options):
    adapter = make_adapter(base, 3, **options)
    vector = open_vector("v", str(adapter), base)
    assert isinstance(vector, AdapterVector)
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    assert vector.names == {name for name in before if not torch.equal(before[name], merged[name])}
    assert len(vector.names) == 14
    for name in vector.names:
        torch.testing.assert_close(
            before[name] + whole_delta(vector, name), merged[name], rtol=0, atol=1e-6
        )


def test_a_patterned_adapter_is_not_the_plain_one(base, make_adapter):
    plain = open_vector("v", str(make_adapter(base, 3)), base)
    other = open_vector("v", str(make_adapter(base, 3, alpha_pattern={"v_proj": 16})), base)
    name = "model.layers.0.self_attn.v_proj.weight"
    torch.testing.assert_close(whole_delta(other, name), 2 * whole_delta(plain, name))


def test_a_low_rank_delta_is_its_scaled_product():
    delta = LowRank(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 5.0]]), 0.5)
    assert delta.dense().tolist() == [[1.5, 2.5], [3.0, 5.0]]
    assert dense(delta.to(torch.device("cpu"))).tolist() == delta.dense().tolist()


# -- size ------------------------------------------------------------------------------------------


def test_norms_equal_those_of_the_flat_vectors(base, tuned, adapter):
    stored = {
        name: tensor.double() for name, tensor in load_file(base.path / "model.safetensors").items()
    }
    for source in (tuned, adapter):
        vector = open_vector("v", str(source), base)
        delta = torch.cat(
            [whole_delta(vector, name).double().flatten() for name in sorted(vector.names)]
        )
        moved = torch.cat([stored[name].flatten() for name in sorted(vector.names)])
        norm, relative_norm = norms(vector, Checkpoint(base.path))
        assert norm == pytest.approx(delta.norm().item(), rel=1e-9)
        assert relative_norm == pytest.approx((delta.norm() / moved.norm()).item(), rel=1e-9)


def test_describe_writes_what_training_recorded(base, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "ja")
    training = {"corpus": {"tokens": 7}, "training": {"seed": 0}, "versions": {"torch": "x"}}
    (tmp_path / "ja" / "training.json").write_text(json.dumps(training), encoding="utf-8")
    record = describe(tmp_path / "ja", base, name="ja", kind="adapter")
    assert read_record(tmp_path / "ja") == record
    assert (record.name, record.kind, record.base.files) == (
        "ja",
        "adapter",
        weight_files(base.path),
    )
    assert (record.corpus, record.training, record.versions) == (
        {"tokens": 7},
        {"seed": 0},
        {"torch": "x"},
    )
    assert record.norm > 0
    assert isinstance(open_vector("ja", str(tmp_path / "ja"), base), AdapterVector)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_vector_with_nan_is_named_by_norms_and_describe_and_extract(base, tuned, tmp_path, value):
    def spoil(tensors):
        tensors["model.norm.weight"][3] = value

    broken = edit_weights(tuned, tmp_path / "broken", spoil)
    vector = open_vector("math", str(broken), base)
    with pytest.raises(ModelError, match="vector 'math': its delta holds NaN or infinite"):
        norms(vector, Checkpoint(base.path))
    with pytest.raises(ModelError, match="vector 'math'"):
        describe(broken, base, name="math", kind="checkpoint")
    assert not (broken / "vector.json").exists()
    with pytest.raises(ModelError, match="vector 'math'"):
        extract(vector, base, tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "biases"),
        ({"target_modules": ["embed_tokens"]}, r"embed_tokens\S* is not a LoRA factor"),
    ],
)
def test_adapters_that_are_not_a_sum_of_products_are_refused(base, make_adapter, options, reason):
    with pytest.raises(ModelError, match=f"vector 'ja'.*{reason}"):
        open_vector("ja", str(make_adapter(base, 4, **options)), base)


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


@pytest.mark.parametrize("source", ["adapter", "tuned", "delta"])
def test_a_vector_of_another_base_is_refused_by_the_sha256_in_its_record(
    base, save_model, adapter, tuned, tmp_path, source
):
    copy = tmp_path / "ja"
    if source == "delta":
        extract(open_vector("ja", str(tuned), base), base, copy)
    else:
        shutil.copytree(adapter if source == "adapter" else tuned, copy)
        describe(copy, base, name="ja", kind="adapter" if source == "adapter" else "checkpoint")
    open_vector("ja", str(copy), base)
    path = save_model(tiny_model("llama", seed=9, dtype=torch.bfloat16), "other")
    with pytest.raises(
        ModelError, match=rf"vector 'ja'.*trained from {base.reference}.*base_model other-9"
    ):
        open_vector("ja", str(copy), ResolvedModel(path, "other-9"))


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


def test_a_tied_head_may_be_stored_on_one_side_only(make_base, make_tuned, tmp_path):
    base = make_base("gemma")
    tuned = make_tuned(base, "gemma", 1)
    assert "lm_head.weight" not in Checkpoint(tuned).names

    def store_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    vector = open_vector("it", str(edit_weights(tuned, tmp_path / "headed", store_head)), base)
    assert vector.names == frozenset(Checkpoint(base.path).names)


def test_a_larger_vocabulary_is_refused_with_the_way_to_align_it(base, save_model):
    model = tiny_model("llama")
    model.resize_token_embeddings(VOCABULARY + 5)
    with pytest.raises(
        ModelError, match=r"(?s)vector 'it'.*\[264, 32\], the base has \[259, 32\].*tokenizer:"
    ):
        open_vector("it", str(save_model(model, "larger")), base)


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


def test_a_directory_without_one_of_its_shards_is_refused(base, tuned, tmp_path):
    extract(open_vector("v", str(tuned), base), base, tmp_path / "delta", max_shard_size=8_000)
    lost = sorted((tmp_path / "delta").glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ModelError, match=lost.name):
        open_vector("v", str(tmp_path / "delta"), base)


def test_a_directory_with_pickles_only_is_refused(base, tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no safetensors weights.*pickled"):
        open_vector("it", str(tmp_path), base)


def test_a_truncated_file_is_refused_by_name(base, tuned, tmp_path):
    shutil.copytree(tuned, tmp_path / "short")
    file = tmp_path / "short" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors: not a readable safetensors file"):
        open_vector("it", str(tmp_path / "short"), base)


def test_a_tensor_in_two_files_is_refused(base, tuned, tmp_path):
    shutil.copytree(tuned, tmp_path / "double")
    shutil.copyfile(tuned / "model.safetensors", tmp_path / "double" / "stale.safetensors")
    with pytest.raises(ModelError, match=r"stale\.safetensors: tensor .* is in two weights files"):
        open_vector("it", str(tmp_path / "double"), base)


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
            "base": {"reference": "b", "files": weight_files(base.path)},
            "norm": 0.1,
            "relative_norm": 0.2,
        }
    )
    record.write(tmp_path / "vector.json")
    assert read_record(tmp_path) == record
    assert read_record(base.path) is None
