import json
import math
import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from optimer_hf.errors import ModelError, OptimerError, OutputError
from optimer_hf.models import blocks as blocks_module
from optimer_hf.models.blocks import compute_ahead, matrix_shape, row_blocks
from optimer_hf.models.checkpoint import Checkpoint, Loaded
from optimer_hf.models.layout import weight_files, weight_states, weights_fingerprint
from optimer_hf.models.shards import write_safetensors, write_sharded

# -- blocks ----------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.integers(1, 200))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_row_blocks_cover_every_row_once_and_stay_small(monkeypatch, shape, chunk):
    monkeypatch.setattr(blocks_module, "CHUNK_ELEMENTS", chunk)
    blocks = row_blocks(tuple(shape))
    n_rows, *columns_of = matrix_shape(tuple(shape))
    rows = [row for block in blocks for row in range(n_rows)[block]]
    assert rows == list(range(n_rows))
    columns = math.prod(columns_of)
    assert n_rows * columns == math.prod(shape)
    assert all((block.stop - block.start) * columns <= max(chunk, columns) for block in blocks)


def test_a_scalar_is_one_block():
    assert torch.tensor(3.0)[()] == 3.0
    assert row_blocks(()) == [slice(0, 1)]


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
    write_sharded(out, "model", specs, lambda name, rows: tensors[name][rows], max_shard_size)
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


@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (2, 3, 4), (2, 2, 2, 2)])
def test_row_blocks_of_a_file_and_of_memory_are_the_rows_of_the_matrix_form(
    monkeypatch, tmp_path, shape
):
    monkeypatch.setattr(blocks_module, "CHUNK_ELEMENTS", 5)
    tensor = torch.randn(shape).bfloat16()
    save_file({"x": tensor}, tmp_path / "model.safetensors")
    stored = Checkpoint(tmp_path)
    loaded = Loaded(tmp_path, {"x": stored.read("x")})
    matrix = tensor.reshape(matrix_shape(shape))
    for source in (stored, loaded):
        assert source.names == ["x"]
        assert (source.shape("x"), source.dtype("x")) == (shape, torch.bfloat16)
        assert source.n_bytes(["x"]) == 2 * tensor.numel()
        assert torch.equal(source.read("x"), tensor)
        for rows in row_blocks(shape):
            assert torch.equal(source.read_rows("x", rows), matrix[rows])


def test_blocks_are_computed_by_several_threads_and_come_in_order():
    seen: set[int] = set()
    both = threading.Barrier(2, timeout=30)  # two blocks are under way at the same time
    threads = torch.get_num_threads()
    torch.set_num_threads(2)

    def compute(name: str, rows: slice) -> str:
        seen.add(threading.get_ident())
        both.wait()
        assert torch.get_num_threads() == 1
        return f"{name}{rows.start}"

    try:
        arguments = [(name, slice(i, i + 1)) for name in "ab" for i in range(6)]
        found = list(compute_ahead(compute, arguments))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert found == [f"{name}{rows.start}" for name, rows in arguments]
    assert len(seen) == 2
    assert threading.get_ident() not in seen


def test_an_error_in_a_thread_stops_the_rest():
    started = []
    threads = torch.get_num_threads()

    def compute(name: str, rows: slice) -> None:
        started.append(rows.start)
        if rows.start == 3:
            raise ModelError("three")

    with pytest.raises(ModelError, match="three"):
        list(compute_ahead(compute, [("x", slice(i, i + 1)) for i in range(10_000)]))
    assert len(started) < 100 * threads
    assert torch.get_num_threads() == threads


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


def test_a_file_the_index_does_not_name_is_left_out_as_transformers_does(sharded):
    before = weight_files(sharded), weight_states(sharded), weights_fingerprint(sharded)
    assert len(before[0]) == 3
    save_file({"stale": torch.ones(1)}, sharded / "consolidated.safetensors")
    assert Checkpoint(sharded).names == ["t0", "t1", "t2"]
    assert (weight_files(sharded), weight_states(sharded), weights_fingerprint(sharded)) == before


def test_a_single_file_wins_over_a_stale_index_as_in_transformers(sharded):
    save_file({"whole": torch.ones(1)}, sharded / "model.safetensors")
    assert Checkpoint(sharded).names == ["whole"]
    assert weight_files(sharded).keys() == {"model.safetensors"}


def test_all_files_count_where_nothing_says_which_are_read_and_in_an_adapter(tmp_path):
    for name in ("consolidated", "b"):
        save_file({name: torch.ones(1)}, tmp_path / f"{name}.safetensors")
    both = {"b.safetensors", "consolidated.safetensors"}
    assert weight_files(tmp_path).keys() == both
    save_file({"c": torch.ones(1)}, tmp_path / "model.safetensors")
    assert weight_files(tmp_path).keys() == {"model.safetensors"}
    (tmp_path / "adapter_config.json").write_text("{}")
    assert weight_files(tmp_path).keys() == {*both, "model.safetensors", "adapter_config.json"}


@pytest.mark.parametrize("name", ["", "..", "gone.safetensors"])
def test_a_shard_that_is_not_there_has_no_part_in_the_identity(sharded, name):
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"t0": name}}), encoding="utf-8")
    assert weight_files(sharded) == {}
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


def test_a_directory_with_pickles_only_is_refused(tmp_path):
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


def test_a_name_that_stands_twice_in_a_header_is_refused(tmp_path):
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
def test_a_mutated_file_gives_tensors_or_our_error_and_nothing_else(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "mutated"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(data)
    try:
        checkpoint = Checkpoint(folder)
        for name in checkpoint.names:
            assert checkpoint.read(name).shape == checkpoint.shape(name)
    except OptimerError as error:
        assert str(folder) in str(error)
