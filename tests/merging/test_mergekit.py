"""Merges that only mergekit can run."""

import shutil

import pytest
import torch

from optimer_hf.merging.mergekit_pool import (
    optimer_config,
)
from tests.support.merges import (
    assert_same_bits,
    expected_merge,
    merged_by,
    optimer_models,
    optimer_yaml,
)
from tests.support.tiny import bits


def test_filtered_weights_reach_their_tensors(pool, kind, tmp_path):
    base, sources = pool(kind, "checkpoint", torch.bfloat16)
    filtered = [{"filter": "mlp", "value": 0.5}, {"filter": "self_attn", "value": 0.25}]
    models = optimer_models(
        sources, ja={"weight": [*filtered, {"value": 0.0}]}, math={"weight": 0.125}
    )
    config = optimer_yaml(base_model=str(base.path), models=models, dtype="float32")
    merged = merged_by(config | {"out_dtype": "bfloat16"}, tmp_path / "out")

    def weight_of(vector: str, name: str) -> float:
        if vector == "math":
            return 0.125
        return 0.5 if "mlp" in name else 0.25 if "self_attn" in name else 0.0

    assert_same_bits(merged, expected_merge(base.path, sources, weight_of))


def test_a_gradient_list_runs_from_the_first_layer_to_the_last(pool, kind, tmp_path):
    base, sources = pool(kind, "checkpoint", torch.bfloat16)
    models = optimer_models(sources, ja={"weight": [0.0, 1.0]}, math={"weight": 0.0})
    config = optimer_yaml(base_model=str(base.path), models=models, dtype="float32")
    merged = merged_by(config | {"out_dtype": "bfloat16"}, tmp_path / "out")
    expected = expected_merge(
        base.path, sources, lambda vector, name: float(vector == "ja" and ".layers.1." in name)
    )
    inside = {name: tensor for name, tensor in expected.items() if ".layers." in name}
    assert_same_bits({name: merged[name] for name in inside}, inside)


def test_slices_take_layers_from_their_models(pool, tmp_path):
    base, sources = pool("llama", "checkpoint", torch.bfloat16)
    layer = [
        {"model": str(base.path), "layer_range": [1, 2]},
        {
            "model": str(sources["ja"]),
            "layer_range": [1, 2],
            "parameters": {"weight": 0.5},
        },
    ]
    config = {
        "merge_method": "optimer",
        "base_model": str(base.path),
        "slices": [{"sources": layer}],
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }
    merged = merged_by(config, tmp_path / "out", "mergekit")
    whole = expected_merge(base.path, {"ja": sources["ja"]}, lambda vector, name: 0.5)
    name = "model.layers.{}.mlp.up_proj.weight"
    assert_same_bits({"x": merged[name.format(0)]}, {"x": whole[name.format(1)]})
    assert name.format(1) not in merged


@pytest.mark.parametrize("declared", [True, False])
def test_a_delta_directory_of_another_program_is_declared_in_the_config(pool, declared, tmp_path):
    base, sources = pool("llama", "delta", torch.bfloat16)
    shutil.copytree(sources["ja"], tmp_path / "delta")
    (tmp_path / "delta" / "vector.json").unlink()
    models = optimer_models({"ja": tmp_path / "delta"}, ja={"weight": 0.5, "delta": declared})
    config = optimer_yaml(base_model=str(base.path), models=models, dtype="float32")
    merged = merged_by(config | {"out_dtype": "bfloat16"}, tmp_path / "out")
    ours = optimer_config(str(base.path), {"ja": str(sources["ja"])}, {"ja": 0.5}, "bfloat16")
    same = merged_by(ours, tmp_path / "ours", "native")
    assert all(torch.equal(bits(merged[name]), bits(same[name])) for name in same) == declared
