"""shared_pool.py: what several processes merge together, against the streaming writer."""

import pytest
import torch

from optimer_hf.merging import shared_pool, writer
from optimer_hf.merging.shared_pool import SharedPool, names_with_neighbours
from optimer_hf.merging.writer import write_merged
from optimer_hf.models.blocks import matrix_shape
from optimer_hf.models.checkpoint import Checkpoint
from tests.support.merges import open_pool, read_all
from tests.support.tiny import bits

WEIGHTS = [{}, {"lora": 0.7}, {"lora": 0.3, "tuned": -0.5}, {"tuned": 1.0}]


@pytest.fixture(params=["bfloat16", "float32"])
def dtype(request) -> str:
    return request.param


@pytest.fixture
def pool(kind, make_base, make_tuned, make_adapter):
    base = make_base(kind, torch.bfloat16)
    sources = {"lora": make_adapter(base, 1), "tuned": make_tuned(base, kind, 1)}
    return base, open_pool(base, sources)


def merge_together(base, vectors, weights, dtype: str, n_ranks: int) -> dict[str, torch.Tensor]:
    """Merge in `n_ranks` pools, which exchange their parts as processes would."""
    parts: list[list[torch.Tensor]] = [[] for _ in range(n_ranks)]

    def shared(rank: int, gather) -> SharedPool:
        options = {"dtype": dtype, "device": "cpu", "rank": rank, "n_ranks": n_ranks}
        return SharedPool(base, vectors, **options, gather=gather)

    def keep(rank: int):
        def gather(part: torch.Tensor) -> torch.Tensor:
            parts[rank].append(part)
            return part.repeat(n_ranks, *[1] * (part.dim() - 1))  # right shape, wrong rows

        return gather

    for rank in range(n_ranks):
        list(shared(rank, keep(rank)).merged_tensors(weights))
    wholes = iter([torch.cat(each) for each in zip(*parts, strict=True)])
    return dict(shared(0, lambda part: next(wholes)).merged_tensors(weights))


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_what_processes_merge_together_is_what_the_writer_writes(
    pool, weights, n_ranks, dtype, tmp_path, monkeypatch
):
    base, vectors = pool
    monkeypatch.setattr("optimer_hf.models.blocks.CHUNK_ELEMENTS", 32 * 5)  # many blocks a tensor
    merged = merge_together(base, vectors, weights, dtype, n_ranks)
    full = {vector.name: weights.get(vector.name, 0.0) for vector in vectors}
    write_merged(base, vectors, full, tmp_path / "out", out_dtype=dtype)
    expected = read_all(tmp_path / "out")
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        assert torch.equal(bits(tensor), bits(expected[name])), name


def test_a_pool_that_does_not_fit_into_memory_reads_the_base_from_disk(pool, monkeypatch):
    base, vectors = pool
    expected = merge_together(base, vectors, WEIGHTS[2], "bfloat16", 2)
    monkeypatch.setattr(shared_pool, "free_memory", lambda device: 0)
    found = merge_together(base, vectors, WEIGHTS[2], "bfloat16", 2)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("n_ranks", [1, 3])
def test_setting_weights_adds_up_every_block_once_and_reads_no_file(pool, n_ranks, monkeypatch):
    base, vectors = pool
    added = []

    def merge_rows(rows_of_base, name, rows, *arguments, **options) -> torch.Tensor:
        added.append((name, rows.start, rows.stop))
        return writer.merge_rows(rows_of_base, name, rows, *arguments, **options)

    monkeypatch.setattr("optimer_hf.models.blocks.CHUNK_ELEMENTS", 32 * 5)
    monkeypatch.setattr(shared_pool, "merge_rows", merge_rows)
    options = {"dtype": "bfloat16", "device": "cpu", "n_ranks": n_ranks}
    loaded = [vector.load_to("cpu") for vector in vectors]
    pools = [
        SharedPool(
            base, loaded, **options, rank=rank, gather=lambda part: torch.cat([part] * n_ranks)
        )
        for rank in range(n_ranks)
    ]
    monkeypatch.setattr(Checkpoint, "read_rows", None)
    for each in pools:
        list(each.merged_tensors({"lora": 0.7, "tuned": 0.1}))
    assert added and len(set(added)) == len(added)
    shapes = {name: Checkpoint(base.path).shape(name) for name in pools[0].names}
    for name, shape in shapes.items():
        n_rows = sum(stop - start for other, start, stop in added if other == name)
        assert n_rows == matrix_shape(shape)[0], name


@pytest.mark.parametrize("place", [0, 3, -1], ids=["first", "fourth", "last"])
def test_a_process_that_fails_exchanges_the_rest_before_it_raises(pool, monkeypatch, place):
    base, vectors = pool
    n_exchanged = 0

    def gather(part: torch.Tensor) -> torch.Tensor:
        nonlocal n_exchanged
        n_exchanged += 1
        return part.repeat(2, *[1] * (part.dim() - 1))

    options = {"dtype": "bfloat16", "device": "cpu", "rank": 0, "n_ranks": 2}
    shared = SharedPool(base, vectors, **options, gather=gather)
    failing = shared.names[place]
    merge_rows = shared_pool.merge_rows

    def merge_or_fail(base_rows, name, *rest, **kept):
        if name == failing:
            raise MemoryError("of this process")
        return merge_rows(base_rows, name, *rest, **kept)

    monkeypatch.setattr(shared_pool, "merge_rows", merge_or_fail)
    with pytest.raises(MemoryError, match="of this process"):
        list(shared.merged_tensors({"lora": 1.0}))
    assert n_exchanged == len(shared.names)  # as many as the other processes wait for


def test_only_the_layers_that_vectors_move_are_merged_and_those_whole(make_base, make_adapter):
    base = make_base("llama", torch.bfloat16)
    lora = make_adapter(base, 1, target_modules=["q_proj"], layers_to_transform=[1])
    shared = SharedPool(base, open_pool(base, {"lora": lora}), dtype="bfloat16", device="cpu")
    every = Checkpoint(base.path).names
    assert shared.names == [name for name in every if name.startswith("model.layers.1.")]


def test_neighbours_are_the_tensors_of_a_layer_or_of_a_module():
    stored = ["lm_head.weight", "h.0.a.weight", "h.0.a.bias", "h.0.e.1.w", "h.1.a.weight", "e.w"]
    assert names_with_neighbours(stored, ["h.0.e.1.w"]) == [
        "h.0.a.bias",
        "h.0.a.weight",
        "h.0.e.1.w",
    ]
    assert names_with_neighbours(stored, ["lm_head.weight"]) == ["lm_head.weight"]
    assert names_with_neighbours(stored, []) == []
