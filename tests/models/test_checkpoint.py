"""Safetensors directories as they are read: every tensor once, or an error that names the file."""

import json
import os
import struct
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from optimer_hf.errors import ModelError, OptimerError
from optimer_hf.models import blocks as blocks_module
from optimer_hf.models.blocks import matrix_shape, row_blocks
from optimer_hf.models.checkpoint import MOST_TENSORS, Checkpoint, LoadedTensors
from optimer_hf.models.headers import LARGEST_HEADER
from optimer_hf.models.layout import weight_digests, weight_states, weights_fingerprint
from optimer_hf.models.shards import write_sharded
from tests.support.damage import damage


@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (2, 3, 4), (2, 2, 2, 2)])
def test_row_blocks_of_a_file_and_of_memory_are_the_rows_of_the_matrix_form(
    monkeypatch, tmp_path, shape
):
    monkeypatch.setattr(blocks_module, "CHUNK_ELEMENTS", 5)
    tensor = torch.randn(shape).bfloat16()
    save_file({"x": tensor}, tmp_path / "model.safetensors")
    stored = Checkpoint(tmp_path)
    loaded = LoadedTensors(tmp_path, {"x": stored.read("x")})
    matrix = tensor.reshape(matrix_shape(shape))
    for source in (stored, loaded):
        assert source.names == ["x"]
        assert (source.shape("x"), source.dtype("x")) == (shape, torch.bfloat16)
        assert source.n_bytes(["x"]) == 2 * tensor.numel()
        assert torch.equal(source.read("x"), tensor)
        for rows in row_blocks(shape):
            assert torch.equal(source.read_rows("x", rows), matrix[rows])


# -- damaged directories ---------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path) -> Path:
    """A directory of three shards with their index, under tmp_path/model."""
    out = tmp_path / "model"
    out.mkdir()
    specs = {f"t{i}": (torch.float32, (4,)) for i in range(3)}
    write_sharded(out, "model", specs, lambda name, rows: torch.full((4,), float(name[1]))[rows], 1)
    assert len(list(out.glob("*.safetensors"))) == 3
    return out


def test_a_directory_of_shards_is_read_through_its_index(sharded):
    assert [Checkpoint(sharded).read(f"t{i}").tolist() for i in range(3)] == [
        [float(i)] * 4 for i in range(3)
    ]


def test_a_file_that_the_index_does_not_name_is_left_out_as_in_transformers(sharded):
    before = weight_digests(sharded), weight_states(sharded), weights_fingerprint(sharded)
    assert len(before[0]) == 3
    save_file({"stale": torch.ones(1)}, sharded / "consolidated.safetensors")
    assert Checkpoint(sharded).names == ["t0", "t1", "t2"]
    assert (weight_digests(sharded), weight_states(sharded), weights_fingerprint(sharded)) == before


def test_a_single_file_wins_over_a_stale_index_as_in_transformers(sharded):
    save_file({"whole": torch.ones(1)}, sharded / "model.safetensors")
    assert Checkpoint(sharded).names == ["whole"]
    assert weight_digests(sharded).keys() == {"model.safetensors"}


@pytest.mark.parametrize("name", ["", "..", "gone.safetensors"])
def test_a_missing_shard_is_not_part_of_the_digests(sharded, name):
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"t0": name}}), encoding="utf-8")
    assert weight_digests(sharded) == {}
    with pytest.raises(ModelError):
        Checkpoint(sharded)


def test_a_missing_shard_is_named(sharded):
    lost = sharded / "model-00002-of-00003.safetensors"
    lost.unlink()
    with pytest.raises(ModelError, match=rf"missing shard {lost.name} \(1 of 3"):
        Checkpoint(sharded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m | {"t9": m["t0"]}, "lacks tensor 't9'"),
        (lambda m: m | {"t0": m["t1"]}, "lacks tensor 't0'|does not know|missing"),
        (lambda m: {k: v for k, v in m.items() if k != "t0"} | {"t8": m["t0"]}, "'t8'|'t0'"),
        (lambda m: m | {"t0": "../elsewhere.safetensors"}, "the name of a file beside it"),
        (lambda m: m | {"t0": 7}, "missing shard"),
        (lambda m: ["t0"], "not an index"),
        (lambda m: None, "not an index"),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(sharded, change, message):
    index = sharded / "model.safetensors.index.json"
    data = json.loads(index.read_text(encoding="utf-8"))
    data["weight_map"] = change(data["weight_map"])
    index.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ModelError, match=message):
        Checkpoint(sharded)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"weight_map": 3}', "\x00"])
def test_a_damaged_index_is_refused_by_name(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelError, match=r"index\.json: not an index of safetensors shards"):
        Checkpoint(sharded)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    for name in ("a", "b"):
        save_file({"x": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelError, match=r"b\.safetensors: tensor 'x' is in two weights files"):
        Checkpoint(tmp_path)


def test_a_directory_whose_weights_are_in_a_folder_below_says_where(tmp_path):
    """As PEFT saves adapters that have names, and trainers their checkpoints."""
    (tmp_path / "math").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "math" / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"no safetensors weights.*Give the folder.*: math\."):
        Checkpoint(tmp_path)


def test_a_directory_of_pickles_alone_is_refused(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    message = r"no safetensors weights.*pytorch_model\.bin.*`save_pretrained\(DIRECTORY\)`"
    with pytest.raises(ModelError, match=message):
        Checkpoint(tmp_path)
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "optimizer.pt")
    with pytest.raises(ModelError, match=r"found no safetensors weights in this directory\.$"):
        Checkpoint(tmp_path)


def test_a_truncated_file_is_refused_by_name(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(100)}, file)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors: not a readable safetensors file"):
        Checkpoint(tmp_path)


def test_a_git_lfs_pointer_in_place_of_weights_is_named(tmp_path):
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 536223056\n"
    (tmp_path / "model.safetensors").write_text(text)
    with pytest.raises(ModelError, match=r"model\.safetensors: is a Git LFS pointer.*git lfs pull"):
        Checkpoint(tmp_path)


def test_a_file_that_changes_after_its_header_was_read_is_an_error(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(100)}, file)
    checkpoint = Checkpoint(tmp_path)
    os.truncate(file, file.stat().st_size - 100)
    with pytest.raises(ModelError, match=r"model\.safetensors: changed while it was being read"):
        checkpoint.read("x")
    file.unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read"):
        checkpoint.read("x")


def test_a_name_that_occurs_twice_in_a_header_is_refused(tmp_path):
    entry = '"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = f"{{{entry},{entry}}}".encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ModelError, match=r"model\.safetensors: not a readable .*x"):
        Checkpoint(tmp_path)


def test_a_dtype_that_cannot_be_merged_is_named(tmp_path):
    save_file({"x": torch.zeros(4, dtype=torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    with pytest.raises(ModelError, match=r"tensor 'x' has dtype F8_E4M3, which cannot be merged"):
        checkpoint.dtype("x")


@st.composite
def mutations(draw):
    """Bytes of a small file, some of them changed, cut off or added, mostly in its header."""
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}
    from safetensors.torch import save

    data = bytearray(save(tensors, metadata={"format": "pt"}))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(data) - 1))
        kind = draw(st.sampled_from(["change", "flip", "delete", "insert", "cut", "digit"]))
        if kind == "change":
            data[at] = draw(st.integers(0, 255))
        elif kind == "flip":
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "delete":
            del data[at : at + draw(st.integers(1, 9))]
        elif kind == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=9))
        elif kind == "digit":
            digits = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
            data[draw(st.sampled_from(digits)) if digits else at] = draw(st.integers(48, 57))
        else:
            del data[at:]
        if not data:
            return b""
    return bytes(data)


@given(mutations())
@settings(
    deadline=None, max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_file_with_other_bytes_is_read_or_refused_by_an_error_of_ours(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "mutated"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(data)
    try:
        checkpoint = Checkpoint(folder)
        for name in checkpoint.names:
            assert checkpoint.read(name).shape == checkpoint.shape(name)
    except OptimerError as error:
        assert str(folder) in str(error)


def write_raw(path: Path, header: bytes, data: bytes = b"", size: int | None = None) -> Path:
    """Write a safetensors file with a header as it is."""
    path.write_bytes(struct.pack("<Q", len(header) if size is None else size) + header + data)
    return path


def entry(shape: list, offsets: tuple = (0, 0), dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (json.dumps({"a": entry([2**62, 0])}), r"a tensor of shape \[4611686018427387904, 0\]"),
        (json.dumps({"a": entry([0, 2**45])}), "a tensor of shape"),
        (json.dumps({f"t{n}": entry([0]) for n in range(MOST_TENSORS + 1)}), "names more than"),
        ("[" * 1_000, "not a readable safetensors file"),
        ('{"__metadata__": ' + "[" * 100_000, "not a readable safetensors file"),
        (json.dumps({"a": entry([1])}), "not a readable safetensors file"),
        (json.dumps({"a": entry(["x"])}), "not a readable safetensors file"),
        (json.dumps({"a": entry([-1])}), "not a readable safetensors file"),
        (json.dumps([]), "not a readable safetensors file"),
        ("", "not a readable safetensors file"),
    ],
)
def test_an_impossible_header_is_refused_at_once(tmp_path, header, message):
    write_raw(tmp_path / "model.safetensors", header.encode())
    started = time.process_time()
    with pytest.raises(ModelError, match=rf"model\.safetensors: .*{message}"):
        Checkpoint(tmp_path)
    assert time.process_time() - started < 5


def test_a_header_of_an_enormous_declared_size_is_not_read(tmp_path):
    write_raw(tmp_path / "model.safetensors", b"{}", size=2**62)
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        Checkpoint(tmp_path)
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 2 * LARGEST_HEADER))
        file.truncate(3 * LARGEST_HEADER)
    with pytest.raises(ModelError, match="its header names more than"):
        Checkpoint(tmp_path)


def test_a_tensor_without_elements_is_read_as_one_block(tmp_path):
    for shape in ([3, 0], [0, 3], [0], [2**40, 0]):
        write_raw(tmp_path / "model.safetensors", json.dumps({"a": entry(shape)}).encode())
        stored = Checkpoint(tmp_path)
        assert len(row_blocks(stored.shape("a"))) <= 1
        assert list(stored.read("a").shape) == shape


@given(data=st.data())
@settings(max_examples=80, deadline=10_000)
def test_a_header_with_other_values_is_read_or_refused_by_an_error_of_ours(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("weights")
    file = folder / "model.safetensors"
    save_file({"a": torch.ones(4, 4), "b": torch.ones(3, dtype=torch.bfloat16)}, file)
    whole = file.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = damage(data.draw, json.loads(whole[8 : 8 + size]))
    text = header if isinstance(header, str) else json.dumps(header)
    write_raw(file, text.encode("utf-8", "surrogatepass"), whole[8 + size :])
    try:
        stored = Checkpoint(folder)
        for name in stored.names:
            stored.dtype(name)
            stored.read(name)
    except OptimerError as error:
        assert str(folder) in str(error)
