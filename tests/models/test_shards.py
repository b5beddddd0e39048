"""Shards as they are written: safetensors reads them back."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from optimer_hf.errors import OutputError
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.shards import write_safetensors, write_sharded


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
    state = load_file(tmp_path / "x.safetensors")
    assert state.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor)


def test_a_file_with_too_few_bytes_is_an_error(tmp_path):
    with pytest.raises(OutputError, match=r"wrote 112 of 120 bytes"):
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
