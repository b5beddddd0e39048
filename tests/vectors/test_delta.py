"""Deltas as files: what extraction writes, loses and records."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

from optimer_hf.errors import ModelError, OutputError
from optimer_hf.models import blocks
from optimer_hf.models.checkpoint import DTYPES, Checkpoint
from optimer_hf.models.layout import weight_digests
from optimer_hf.vectors import delta as delta_module
from optimer_hf.vectors.delta import (
    N_SAMPLED,
    delta_blocks,
    extract,
    measure_norms,
    warn_of_norms,
    write_record,
)
from optimer_hf.vectors.opening import open_vector
from optimer_hf.vectors.record import read_record
from optimer_hf.vectors.training_record import TRAINING_FILE
from optimer_hf.vectors.vector import AdapterVector, DeltaVector
from tests.support.records import RECORD
from tests.support.tiny import whole_delta
from tests.support.weights import edit_weights


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


def test_a_vector_that_moves_nothing_is_said(base, caplog):
    vector = open_vector("math", str(base.path), base)
    assert measure_norms(vector, Checkpoint(base.path)) == (0, 0)
    assert "vector math: it is zero and moves nothing" in caplog.text


@pytest.mark.parametrize("moved", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", ""])
def test_a_mostly_frozen_vector_is_read_until_a_number_has_moved(
    base, tmp_path, monkeypatch, caplog, moved
):
    def move(tensors):
        if moved:
            tensors[moved] = tensors[moved] + 1

    monkeypatch.setattr(blocks, "CHUNK_ELEMENTS", 32)  # one row each
    read = []

    def counted(vector, base, name):
        for block in delta_blocks(vector, base, name):
            read.append(name)
            yield block

    monkeypatch.setattr(delta_module, "delta_blocks", counted)
    path = edit_weights(base.path, tmp_path / "frozen", move)
    stored = Checkpoint(base.path)
    vector = open_vector(f"frozen {moved}", str(path), base)
    warn_of_norms([vector], stored)
    assert len(read) <= N_SAMPLED + len(vector.names) if moved else len(read) > 500
    assert all(len(stored.shape(name)) > 1 for name in read[:N_SAMPLED])
    assert ["it is zero" in message for message in caplog.messages] == [True] * (not moved)


def test_the_share_of_a_sample_is_not_taken_for_that_of_the_vector(base, tmp_path, caplog):
    def move(tensors):
        for name, tensor in tensors.items():
            tensors[name] = 8 * tensor  # without rounding

    vector = open_vector("far off", str(edit_weights(base.path, tmp_path / "huge", move)), base)
    stored = Checkpoint(base.path)
    warn_of_norms([vector], stored)
    measure_norms(vector, stored)
    sampled, whole = caplog.messages
    assert "(700 % in a sample of them)" in sampled and "(700 %)" in whole


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
