import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from optimer_hf.errors import ModelError
from optimer_hf.merging import resident as resident_module
from optimer_hf.merging.resident import ResidentModel
from optimer_hf.merging.writer import write_merged
from optimer_hf.models import blocks as blocks_module
from optimer_hf.models.checkpoint import DTYPES, Checkpoint
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.models.placement import Placement
from optimer_hf.vectors.delta import extract
from optimer_hf.vectors.opening import open_vector

INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
WEIGHTS = {"ja": 0.8, "math": -0.35, "it": 1.0}
POOLS = {
    "checkpoint": ("checkpoint", "checkpoint", "checkpoint"),
    "adapter": ("adapter", "adapter", "adapter"),
    "delta": ("delta", "delta", "delta"),
    "mixed": ("adapter", "delta", "checkpoint"),
    "quantised": ("int8", "int8", "adapter with a saved norm"),
}


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        integer = INTEGERS[tensor.dtype]
        assert torch.equal(
            found[name].contiguous().view(integer), tensor.contiguous().view(integer)
        ), name


def state(resident: ResidentModel) -> dict[str, torch.Tensor]:
    """The parameters in the dtype asked for; held in float32 or not, they are numbers of it."""
    state = {}
    for name, tensor in resident.model.state_dict().items():
        state[name] = tensor.to(resident.dtype, copy=True)
        assert torch.equal(state[name].to(tensor.dtype), tensor), name
    return state


def written(path: Path) -> dict[str, torch.Tensor]:
    """Load a written model in the dtype of its files."""
    (dtype,) = {Checkpoint(path).dtype(name) for name in Checkpoint(path).names}
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).state_dict()


@pytest.fixture(scope="module")
def open_pool(make_base, make_tuned, make_adapter, tmp_path_factory):
    """Return a function architecture, stored dtype, kinds of the three vectors -> base and open
    vectors.
    """
    made: dict[tuple[str, torch.dtype, int, str], Path] = {}

    def source(base: ResolvedModel, kind: str, dtype: torch.dtype, seed: int, vector: str) -> Path:
        key = (kind, dtype, seed, vector)
        if key not in made and vector == "adapter":
            made[key] = make_adapter(base, seed)
        elif key not in made and vector == "adapter with a saved norm":
            made[key] = make_adapter(base, seed, modules_to_save=["norm"])
            file = made[key] / "adapter_model.safetensors"
            tensors = load_file(file)
            tensors["base_model.model.model.norm.weight"] += 0.1
            save_file(tensors, file)
        elif key not in made and vector == "checkpoint":
            made[key] = make_tuned(base, kind, seed, dtype)
        elif key not in made:
            tuned = source(base, kind, dtype, seed, "checkpoint")
            made[key] = tmp_path_factory.mktemp("deltas") / "delta"
            stored = "int8" if vector == "int8" else "bfloat16"
            extract(open_vector("x", str(tuned), base), base, made[key], dtype=stored)
        return made[key]

    def pool(kind: str, stored: str, vectors: tuple[str, ...]) -> tuple[ResolvedModel, list]:
        base = make_base(kind, DTYPES[stored])
        paths = [
            source(base, kind, DTYPES[stored], seed, vector) for seed, vector in enumerate(vectors)
        ]
        return base, [
            open_vector(name, str(path), base) for name, path in zip(WEIGHTS, paths, strict=False)
        ]

    return pool


@pytest.mark.parametrize("vectors", POOLS.values(), ids=POOLS.keys())
@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        ("bfloat16", "bfloat16"),
        ("float32", "float32"),
        ("float32", "bfloat16"),
        ("bfloat16", "float32"),
    ],
)
def test_the_resident_model_equals_the_written_one_bit_for_bit(
    open_pool, kind, vectors, stored, dtype, tmp_path
):
    base, pool = open_pool(kind, stored, vectors)
    resident = ResidentModel(base, pool, dtype=dtype)
    resident.set_weights(WEIGHTS)
    write_merged(base, pool, WEIGHTS, tmp_path / "out", out_dtype=dtype)
    assert_same_bits(state(resident), written(tmp_path / "out"))
    resident.set_weights({})
    assert any(
        not torch.equal(tensor, state(resident)[name])
        for name, tensor in written(tmp_path / "out").items()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("held", ["as asked", "float32"])
def test_a_device_without_16_bit_products_holds_the_same_numbers_in_float32(
    open_pool, dtype, held, tmp_path, monkeypatch
):
    chosen = dtype if held == "as asked" else torch.float32
    monkeypatch.setattr(resident_module, "compute_dtype", lambda dtype, device: chosen)
    base, pool = open_pool("tied", "float32", POOLS["mixed"])
    name = str(dtype).removeprefix("torch.")
    resident = ResidentModel(base, pool, dtype=name)
    assert {tensor.dtype for tensor in resident.model.parameters()} == {chosen}
    resident.set_weights(WEIGHTS)
    write_merged(base, pool, WEIGHTS, tmp_path / "out", out_dtype=name)
    assert_same_bits(state(resident), written(tmp_path / "out"))


def test_rotary_frequencies_are_never_rounded(open_pool, monkeypatch):
    """A buffer that transformers keeps in float32 stays what it was, whatever is multiplied."""
    monkeypatch.setattr(resident_module, "compute_dtype", lambda dtype, device: torch.float32)
    base, pool = open_pool("tied", "bfloat16", POOLS["adapter"])
    asked, wide = (ResidentModel(base, pool, dtype=name) for name in ("bfloat16", "float32"))
    buffers = dict(wide.model.named_buffers())
    assert buffers
    for name, buffer in asked.model.named_buffers():
        if buffer.dtype == torch.float32 and "scale" not in name:
            assert torch.equal(buffer, buffers[name]), name


@pytest.mark.parametrize("vectors", POOLS.values(), ids=POOLS.keys())
def test_both_ways_agree_when_tensors_take_many_row_blocks(
    open_pool, kind, vectors, tmp_path, monkeypatch
):
    monkeypatch.setattr(blocks_module, "CHUNK_ELEMENTS", 200)
    base, pool = open_pool(kind, "bfloat16", vectors)
    resident = ResidentModel(base, pool, dtype="bfloat16")
    resident.set_weights(WEIGHTS)
    write_merged(base, pool, WEIGHTS, tmp_path / "out")
    assert_same_bits(state(resident), written(tmp_path / "out"))


def test_the_resident_model_answers_as_the_written_one(open_pool, kind, tmp_path):
    base, pool = open_pool(kind, "bfloat16", POOLS["mixed"])
    resident = ResidentModel(base, pool, dtype="bfloat16")
    resident.set_weights(WEIGHTS)
    write_merged(base, pool, WEIGHTS, tmp_path / "out")
    tokens = torch.tensor([[2, 70, 71, 72, 100]])
    with torch.no_grad():
        expected = (
            AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=resident.model.dtype)
            .eval()(tokens)
            .logits
        )
        assert torch.equal(resident.model(tokens).logits, expected)


def test_embeddings_stay_tied_when_a_vector_moves_them(open_pool):
    base, pool = open_pool("gemma", "bfloat16", POOLS["checkpoint"])
    resident = ResidentModel(base, pool, dtype="bfloat16")
    before = resident.model.get_input_embeddings().weight.clone()
    resident.set_weights(WEIGHTS)
    assert not torch.equal(resident.model.get_input_embeddings().weight, before)
    assert (
        resident.model.get_output_embeddings().weight
        is resident.model.get_input_embeddings().weight
    )


@pytest.mark.parametrize("vectors", POOLS.values(), ids=POOLS.keys())
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_weights_of_zero_give_the_base_bit_for_bit(open_pool, kind, vectors, dtype):
    base, pool = open_pool(kind, dtype, vectors)
    expected = AutoModelForCausalLM.from_pretrained(base.path, dtype=DTYPES[dtype]).state_dict()
    resident = ResidentModel(base, pool, dtype=dtype)
    assert_same_bits(state(resident), expected)
    resident.set_weights(WEIGHTS)
    resident.set_weights(dict.fromkeys(WEIGHTS, 0.0))
    assert_same_bits(state(resident), expected)


def test_weights_of_zero_keep_the_sign_of_negative_zeros(make_base, make_tuned, tmp_path):
    tensors = load_file(make_base("llama").path / "model.safetensors")
    for tensor in tensors.values():
        tensor.view(-1)[::3] = -0.0
    AutoModelForCausalLM.from_pretrained(make_base("llama").path).config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    base = ResolvedModel(tmp_path, "base")
    pool = [open_vector("v", str(make_tuned(base, "llama", 1)), base)]
    resident = ResidentModel(base, pool, dtype="bfloat16")
    resident.set_weights({"v": 0.9})
    resident.set_weights({"v": 0.0})
    assert_same_bits(state(resident), tensors)


def test_a_thousand_settings_leave_no_drift(open_pool):
    base, pool = open_pool("llama", "bfloat16", ("adapter", "checkpoint"))
    resident = ResidentModel(base, pool, dtype="bfloat16")
    expected_base = state(resident)
    resident.set_weights({"ja": 0.7, "math": 0.3})
    expected = state(resident)
    rng = random.Random(0)
    for _ in range(1000):
        resident.set_weights({"ja": rng.uniform(-3, 3), "math": rng.uniform(-3, 3)})
    resident.set_weights({"ja": 0.7, "math": 0.3})
    assert_same_bits(state(resident), expected)
    resident.set_weights({})
    assert_same_bits(state(resident), expected_base)


@given(
    st.lists(
        st.fixed_dictionaries({}, optional={name: st.floats(-2, 2) for name in WEIGHTS}),
        min_size=1,
        max_size=4,
    )
)
@settings(deadline=None, max_examples=15)
def test_the_model_depends_on_the_last_weights_only(open_pool, history):
    base, pool = open_pool("gemma", "bfloat16", POOLS["mixed"])
    walked, fresh = (ResidentModel(base, pool, dtype="bfloat16") for _ in range(2))
    for weights in history:
        walked.set_weights(weights)
    fresh.set_weights(history[-1])
    assert walked.weights == {name: history[-1].get(name, 0.0) for name in WEIGHTS}
    assert_same_bits(state(walked), state(fresh))


def test_one_adapter_at_weight_one_equals_what_peft_merges(make_base, make_adapter):
    base = make_base("llama", torch.float32)
    adapter = make_adapter(base, 5, use_rslora=True)
    resident = ResidentModel(base, [open_vector("ja", str(adapter), base)], dtype="float32")
    resident.set_weights({"ja": 1.0})
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    for name, tensor in (
        PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict().items()
    ):
        torch.testing.assert_close(state(resident)[name], tensor, rtol=0, atol=1e-6)


def test_a_vector_that_is_not_in_the_pool_is_an_error_and_changes_nothing(open_pool):
    base, pool = open_pool("llama", "bfloat16", ("checkpoint",))
    resident = ResidentModel(base, pool, dtype="bfloat16")
    resident.set_weights({"ja": 0.5})
    before = state(resident)
    with pytest.raises(ModelError, match=r"no vector named 'code' in the pool; known: ja"):
        resident.set_weights({"ja": 0.1, "code": 1.0})
    assert resident.weights == {"ja": 0.5}
    assert_same_bits(state(resident), before)


# -- where a pool lies -----------------------------------------------------------------------------


@pytest.mark.parametrize("vectors", POOLS.values(), ids=POOLS.keys())
@pytest.mark.parametrize("room", ["all", "as stored", "none"])
def test_a_pool_gives_the_same_bits_wherever_it_has_room(open_pool, monkeypatch, vectors, room):
    base, pool = open_pool("llama", "bfloat16", vectors)
    largest = max(vector.n_bytes for vector in pool)
    free = {"all": 10**12, "as stored": 2 * largest, "none": 0}[room]
    monkeypatch.setattr(resident_module, "free_memory", lambda device: free)
    resident = ResidentModel(base, pool, dtype="bfloat16")
    resident.set_weights(WEIGHTS)
    tensors = state(resident)
    monkeypatch.setattr(resident_module, "free_memory", lambda device: 10**12)
    reference = ResidentModel(base, pool, dtype="bfloat16")
    reference.set_weights(WEIGHTS)
    assert_same_bits(tensors, state(reference))
    in_memory = [
        not isinstance(getattr(v, "stored", None) or getattr(v, "tuned", None), Checkpoint)
        for v in resident.vectors
    ]
    assert all(in_memory) == (room != "none" or vectors == POOLS["adapter"])
    held = Checkpoint(base.path).n_bytes(resident._base)
    (source,) = set(resident._base.values())
    assert isinstance(source, Checkpoint) == (held > 0.75 * free)


def test_low_rank_vectors_stay_factors_in_memory(open_pool):
    base, pool = open_pool("llama", "bfloat16", POOLS["adapter"])
    dense_base, dense_pool = open_pool("llama", "bfloat16", POOLS["checkpoint"])
    lora = ResidentModel(base, pool, dtype="bfloat16")
    dense = ResidentModel(dense_base, dense_pool, dtype="bfloat16")
    assert [vector.kind for vector in lora.vectors] == ["adapter"] * 3
    factors, whole = (sum(v.n_bytes for v in model.vectors) for model in (lora, dense))
    assert factors < whole


# -- models larger than one device -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("vectors", [("adapter", "checkpoint"), ("int8", "delta")])
def test_weights_are_set_where_each_tensor_lies(open_pool, kind, vectors, dtype):
    base, pool = open_pool(kind, "float32", vectors)
    layers = {"model.layers.0": "cpu", "model.layers.1": "disk"}
    rest = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm"), "cpu")
    for device_map in ({"": "disk"}, layers | rest | {"lm_head": "cpu"}):
        whole = ResidentModel(base, pool, dtype=dtype)
        spread = ResidentModel(base, pool, dtype=dtype, placement=Placement(device_map))
        ids = torch.tensor([[5, 6, 7, 8]])
        for weights in ([0.7, -0.3], [0.0, 0.0], [0.2, 1.1]):
            chosen = dict(zip((vector.name for vector in pool), weights, strict=True))
            for resident in (whole, spread):
                resident.set_weights(chosen)
            with torch.no_grad():
                assert torch.equal(spread.model(ids).logits, whole.model(ids).logits)


def test_every_tensor_of_a_vector_goes_to_the_device_of_its_parameter(open_pool):
    """`meta` stands for a second device: tensors there have no values, but a place."""
    _, pool = open_pool("gemma", "float32", ("adapter", "int8"))
    for vector in pool:
        name, *others = sorted(vector.names)
        devices = {name: "meta"} | dict.fromkeys(others, "cpu")
        loaded = vector.load_to(devices)
        for each in (name, others[0]):
            tensors = vars(loaded.delta(each, slice(0, 1), devices[each]))
            kinds = {t.device.type for t in tensors.values() if isinstance(t, torch.Tensor)}
            assert kinds <= {devices[each]}


def test_a_vector_is_placed_by_what_each_device_has_to_take(open_pool, monkeypatch):
    base, pool = open_pool("gemma", "float32", ("checkpoint",))
    views = {name: torch.empty(Checkpoint(base.path).shape(name)) for name in sorted(pool[0].names)}
    devices = {name: "meta" if "layers.1" in name else "cpu" for name in views}
    on_meta = sum(view.nbytes for name, view in views.items() if devices[name] == "meta")
    part = on_meta / sum(view.nbytes for view in views.values())
    for room, place in ((1.01, devices), (0.99, "cpu")):
        free = {"meta": int(2 * room * part * pool[0].n_bytes), "cpu": 10**12}
        monkeypatch.setattr(resident_module, "free_memory", free.__getitem__)
        placed = resident_module._place(pool[0], devices, views)
        assert placed.tuned.read(max(views)).device.type == (
            place if isinstance(place, str) else place[max(views)]
        )
