import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from optimer_hf.errors import ModelError
from optimer_hf.merging import writer as merge
from optimer_hf.merging.geometry import (
    effective_rank,
    group_of,
    measure,
    measure_sources,
    open_pool,
    to_json,
    to_markdown,
)
from optimer_hf.merging.writer import surviving_share, write_merged
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.vectors.opening import open_vector
from tests.support.tiny import whole_delta


@pytest.fixture(scope="module")
def base(make_base):
    return make_base("llama", torch.float32)


@pytest.fixture(scope="module")
def sources(base, make_tuned, make_adapter):
    return {
        "ja": str(make_adapter(base, 0)),
        "math": str(make_tuned(base, "llama", 1, torch.float32, scale=0.001)),
        "it": str(make_tuned(base, "llama", 2, torch.float32)),
    }


def flat(vector, base) -> torch.Tensor:
    """Return the delta of a vector as one float64 vector over all tensors of the base."""
    stored = Checkpoint(base.path)
    parts = [
        whole_delta(vector, base, name).double().flatten()
        if name in vector.names
        else torch.zeros(math.prod(stored.shape(name)), dtype=torch.float64)
        for name in stored.names
    ]
    return torch.cat(parts)


def test_norms_and_cosines_are_those_of_the_flat_vectors(base, sources, monkeypatch):
    monkeypatch.setattr("optimer_hf.models.blocks.CHUNK_ELEMENTS", 300)
    pool, refusals = open_pool(sources, base)
    assert refusals == {}
    geometry = measure(pool, base, "bfloat16")
    whole = {vector.name: flat(vector, base) for vector in pool}
    for name, delta in whole.items():
        assert geometry.norms[name] == pytest.approx(delta.norm().item(), rel=1e-6)
        squares = sum(norms[name] ** 2 for norms in geometry.group_norms.values())
        assert squares == pytest.approx(geometry.norms[name] ** 2, rel=1e-6)
    for (a, b), value in geometry.cosines.items():
        expected = torch.cosine_similarity(whole[a], whole[b], dim=0).item()
        assert value == pytest.approx(expected, abs=1e-6)
    assert len(geometry.cosines) == 3
    assert geometry.group_norms.keys() == {"attention", "embedding", "head", "mlp", "norm"}
    assert geometry.effective_ranks.keys() == {"ja"}


def test_a_vector_of_an_unlikely_size_is_said(base, sources, make_tuned, caplog):
    huge = make_tuned(base, "llama", 3, torch.float32, scale=10.0)
    measure_sources([sources["math"], str(base.path), str(huge)], str(base.path), "bfloat16")
    one, other = (record.message for record in caplog.records)
    assert one.startswith(f"vector {base.path.name}: it is zero and moves nothing.")
    assert other.startswith(f"vector {huge.name}: its delta is larger than the base tensors it")


def test_a_vector_lies_along_itself_and_against_its_negative(base, sources, tmp_path):
    shutil.copytree(sources["math"], tmp_path / "mirrored")
    file = tmp_path / "mirrored" / "model.safetensors"
    before = load_file(base.path / "model.safetensors")
    tensors = {name: 2 * before[name] - tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    names = {"a": sources["math"], "b": sources["math"], "c": str(tmp_path / "mirrored")}
    pool, _ = open_pool(names, base)
    cosines = measure(pool, base, "float32").cosines
    assert cosines["b", "a"] == pytest.approx(1.0, abs=1e-6)
    assert cosines["c", "a"] == pytest.approx(-1.0, abs=1e-3)


def test_the_effective_rank_counts_directions_of_equal_size(base, make_adapter):
    vector = open_vector("v", str(make_adapter(base, 0)), base)
    rank = effective_rank(vector)
    ranks = []
    for part in vector.parts.values():
        values = torch.linalg.svdvals(part.to_dense().double())
        shares = values[values > 1e-9 * values[0]] / values.sum()
        ranks.append(math.exp(-(shares * shares.log()).sum().item()))
    assert rank == pytest.approx(sum(ranks) / len(ranks), rel=1e-3)
    assert 1 < rank <= 4


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("lm_head.weight", "head"),
        ("model.embed_tokens.weight", "embedding"),
        ("model.layers.0.self_attn.q_proj.weight", "attention"),
        ("model.layers.0.self_attn.q_norm.weight", "norm"),
        ("model.layers.0.mlp.experts.3.up_proj.weight", "mlp"),
        ("backbone.layers.0.mixer.in_proj.weight", "attention"),
        ("vision_tower.patch.weight", "other"),
    ],
)
def test_tensors_are_grouped_by_their_names(name, group):
    assert group_of(name) == group


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_surviving_share_is_what_a_written_merge_keeps(
    base, sources, dtype, tmp_path, monkeypatch
):
    monkeypatch.setattr(merge, "SURVIVAL_BLOCKS", 10**9)
    pool, _ = open_pool(sources, base)
    weights = {"ja": 0.0, "math": 0.7, "it": 0.05}
    write_merged(base, pool, weights, tmp_path / "out", out_dtype=dtype)
    before, merged = Checkpoint(base.path), Checkpoint(tmp_path / "out")
    exact = sum(weights[vector.name] * flat(vector, base) for vector in pool)
    stored = torch.cat(
        [(merged.read(n).double() - before.read(n).double()).flatten() for n in before.names]
    )
    expected = max(0.0, 1 - ((stored - exact).norm() / exact.norm()).item())
    share = surviving_share(before, pool, weights, dtype)
    assert share == pytest.approx(expected, abs=2e-4)


def test_small_deltas_survive_in_float32_only(base, sources):
    pool, _ = open_pool({"math": sources["math"]}, base)
    shares = {
        dtype: measure(pool, base, dtype).surviving["math"] for dtype in ("bfloat16", "float32")
    }
    assert shares["float32"] > 0.999
    assert shares["bfloat16"] < 0.97


def test_what_cannot_be_merged_is_named_beside_what_can(base, sources, make_base):
    pool, refusals = open_pool(sources | {"other": str(make_base("gemma").path)}, base)
    assert [vector.name for vector in pool] == list(sources)
    assert "same architecture" in refusals["other"]
    geometry = measure(pool, base, "bfloat16")
    text = to_markdown(geometry, refusals)
    assert (
        "* math: can be merged into this base (same tensors and vocabulary; no sha256 of its base"
        in text
    )
    assert "* other: cannot be merged: vector 'other'" in text
    assert "| cosine | ja | math |" in text
    data = json.loads(json.dumps(to_json(geometry, refusals)))
    assert data["norms"].keys() == sources.keys()
    assert data["refused"] == refusals


def test_a_vector_with_nan_is_named_with_its_tensor(base, sources, tmp_path):
    shutil.copytree(sources["it"], tmp_path / "broken")
    tensors = load_file(tmp_path / "broken" / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    pool, _ = open_pool(sources | {"it": str(tmp_path / "broken")}, base)
    with pytest.raises(ModelError, match=r"vector 'it'.*NaN.*model\.norm\.weight"):
        measure(pool, base, "bfloat16")
