"""Damaged weights, and damaged files beside them: opened, or refused by name in a moment."""

import json
import shutil
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from optimer_hf.errors import ModelError, OptimerError
from optimer_hf.models.blocks import row_blocks
from optimer_hf.models.checkpoint import LARGEST_HEADER, MOST_TENSORS, Checkpoint
from optimer_hf.vectors.delta import extract
from optimer_hf.vectors.opening import open_vector
from optimer_hf.vectors.record import read_record

NUMBERS = st.sampled_from(
    [0, -1, 1, 2**31, 2**62, 2**63, 10**400, 1e18, 1e30, 0.5, "9" * 5000, None, True, "", [], {}]
)
TEXTS = ["\0", "\ud800", "../x", "/etc/passwd", "a" * 5000, "[" * 10_000, '{"a":' * 10_000, "NaN"]


def raw(path: Path, header: bytes, data: bytes = b"", size: int | None = None) -> Path:
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
def test_a_header_that_no_file_can_have_is_refused_at_once(tmp_path, header, message):
    raw(tmp_path / "model.safetensors", header.encode())
    started = time.process_time()
    with pytest.raises(ModelError, match=rf"model\.safetensors: .*{message}"):
        Checkpoint(tmp_path)
    assert time.process_time() - started < 5


def test_a_header_that_says_it_is_huge_is_not_read(tmp_path):
    raw(tmp_path / "model.safetensors", b"{}", size=2**62)
    with pytest.raises(ModelError, match="not a readable safetensors file"):
        Checkpoint(tmp_path)
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 2 * LARGEST_HEADER))
        file.truncate(3 * LARGEST_HEADER)
    with pytest.raises(ModelError, match="its header names more than"):
        Checkpoint(tmp_path)


def test_a_tensor_without_elements_is_one_block_and_read_as_it_is(tmp_path):
    for shape in ([3, 0], [0, 3], [0], [2**40, 0]):
        raw(tmp_path / "model.safetensors", json.dumps({"a": entry(shape)}).encode())
        stored = Checkpoint(tmp_path)
        assert len(row_blocks(stored.shape("a"))) <= 1
        assert list(stored.read("a").shape) == shape


def damaged(draw, value):
    """Return a JSON value with something in it replaced."""
    if isinstance(value, dict) and value and draw(st.integers(0, 3)):
        key = draw(st.sampled_from(sorted(value)))
        if not draw(st.integers(0, 5)):
            return {name: item for name, item in value.items() if name != key}
        return value | {key: damaged(draw, value[key])}
    if isinstance(value, list) and value and draw(st.integers(0, 1)):
        index = draw(st.integers(0, len(value) - 1))
        return [*value[:index], damaged(draw, value[index]), *value[index + 1 :]]
    return draw(NUMBERS | st.sampled_from(TEXTS))


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
        changed = damaged(data.draw, json.loads(file.read_text()))
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


@given(data=st.data())
@settings(max_examples=80, deadline=10_000)
def test_a_damaged_weights_file_is_read_or_refused_by_an_error_of_ours(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("weights")
    file = folder / "model.safetensors"
    save_file({"a": torch.ones(4, 4), "b": torch.ones(3, dtype=torch.bfloat16)}, file)
    whole = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        size = int.from_bytes(whole[:8], "little")
        header = damaged(data.draw, json.loads(whole[8 : 8 + size]))
        text = header if isinstance(header, str) else json.dumps(header)
        raw(file, text.encode("utf-8", "surrogatepass"), bytes(whole[8 + size :]))
    else:
        for _ in range(data.draw(st.integers(1, 5))):
            place = data.draw(st.integers(0, len(whole) - 1))
            whole[place] = data.draw(st.integers(0, 255))
        file.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        stored = Checkpoint(folder)
        for name in stored.names:
            stored.dtype(name)
            stored.read(name)
    except OptimerError as error:
        assert str(folder) in str(error)


@pytest.mark.parametrize("text", [*TEXTS, "[]", "{}", "null", '{"format_version": 1e400}'])
def test_a_vector_json_of_another_form_is_refused(tmp_path, text):
    (tmp_path / "vector.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(ModelError, match=r"vector\.json: not a vector\.json"):
        read_record(tmp_path)
