import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from optimer_hf.errors import ModelError
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.vectors.delta import extract, measure_norms
from optimer_hf.vectors.int8 import SCALES, dequantize, n_blocks, quantize
from optimer_hf.vectors.opening import open_vector
from optimer_hf.vectors.record import read_record
from tests.support.tiny import delta_rows, whole_delta

ROWS = st.integers(1, 5)
COLUMNS = st.integers(1, 70)
BLOCK_SIZES = st.sampled_from([1, 2, 7, 32, 64])


@given(st.integers(0, 2**31), ROWS, COLUMNS, BLOCK_SIZES, st.sampled_from([1e-6, 1.0, 1e4]))
@settings(deadline=None)
def test_every_number_is_off_by_less_than_a_step_of_its_block(seed, n_rows, n, block_size, scale):
    rows = scale * torch.randn(n_rows, n, generator=torch.Generator().manual_seed(seed))
    numbers, scales = quantize(rows, block_size)
    assert (numbers.dtype, numbers.shape) == (torch.int8, rows.shape)
    assert (scales.dtype, scales.shape) == (torch.bfloat16, (n_rows, n_blocks(n, block_size)))
    restored = dequantize(numbers, scales, block_size)
    step = scales.float().repeat_interleave(block_size, dim=1)[:, :n]
    # half a step, and what the largest of a block loses where its scale was rounded down
    bound = 0.5 * step + 2.0**-8 * rows.abs()
    assert ((restored - rows).abs() <= bound * 1.0001).all()


def test_zeros_stay_zeros_and_the_largest_of_a_block_stays_within_half_a_percent():
    rows = torch.tensor([[0.0, 0.0, 3.0, -1.0]])
    restored = dequantize(*quantize(rows, 2), 2)
    assert restored[0, :2].tolist() == [0.0, 0.0]
    assert restored[0, 2].item() == pytest.approx(3.0, rel=5e-3)


def test_rows_can_be_quantised_without_their_neighbours():
    rows = torch.randn(6, 70)
    numbers, scales = quantize(rows, 64)
    part, part_scales = quantize(rows[2:4], 64)
    assert torch.equal(part, numbers[2:4])
    assert torch.equal(part_scales, scales[2:4])


@pytest.fixture(scope="module")
def base(make_base):
    return make_base("llama")


@pytest.fixture(scope="module")
def tuned(base, make_tuned):
    return make_tuned(base, "llama", 1)


@pytest.mark.parametrize("block_size", [16, 64])
def test_a_quantised_delta_records_the_error_that_it_has(base, tuned, tmp_path, block_size):
    source = open_vector("math", str(tuned), base)
    record = extract(source, base, tmp_path / "delta", dtype="int8", block_size=block_size)
    assert read_record(tmp_path / "delta") == record
    assert (record.dtype, record.block_size) == ("int8", block_size)
    stored = open_vector("math", str(tmp_path / "delta"), base)
    assert stored.names == source.names
    squares = errors = 0.0
    for name in source.names:
        exact = whole_delta(source, base, name).double()
        error = (whole_delta(stored, base, name).double() - exact).square().sum().item()
        squares += exact.square().sum().item()
        errors += error
        relative = (error / exact.square().sum().item()) ** 0.5
        assert record.relative_errors[name] == pytest.approx(relative, rel=1e-6, abs=1e-12)
    assert record.relative_error == pytest.approx((errors / squares) ** 0.5, rel=1e-6)
    assert 1e-4 < record.relative_error < 0.01
    assert measure_norms(stored, Checkpoint(base.path))[0] == pytest.approx(record.norm, rel=1e-3)


def test_a_quantised_delta_takes_half_the_bytes_of_bfloat16(base, tuned, tmp_path):
    source = open_vector("math", str(tuned), base)
    sizes = {}
    for dtype in ("bfloat16", "int8"):
        extract(source, base, tmp_path / dtype, dtype=dtype)
        names = Checkpoint(tmp_path / dtype, "vector" if dtype == "int8" else "model")
        sizes[dtype] = names.n_bytes(names.names)
    assert sizes["int8"] < 0.6 * sizes["bfloat16"]


def test_rows_of_a_quantised_delta_are_rows_of_the_whole(base, tuned, tmp_path, monkeypatch):
    monkeypatch.setattr("optimer_hf.models.blocks.CHUNK_ELEMENTS", 100)
    extract(open_vector("v", str(tuned), base), base, tmp_path / "delta", dtype="int8")
    vector = open_vector("v", str(tmp_path / "delta"), base)
    name = "model.layers.0.mlp.down_proj.weight"
    whole = whole_delta(vector, base, name)
    assert torch.equal(delta_rows(vector, base, name, slice(3, 9)), whole[3:9])
    monkeypatch.undo()
    extract(open_vector("v", str(tuned), base), base, tmp_path / "again", dtype="int8")
    again = open_vector("v", str(tmp_path / "again"), base)
    assert torch.equal(whole_delta(again, base, name), whole)


@pytest.mark.parametrize("damage", ["block size", "no block size", "scales", "no scales"])
def test_a_quantised_delta_whose_scales_do_not_fit_is_refused(base, tuned, tmp_path, damage):
    out = tmp_path / "delta"
    record = extract(open_vector("v", str(tuned), base), base, out, dtype="int8", block_size=16)
    if "block size" in damage:
        wrong = 8 if damage == "block size" else None
        record.model_copy(update={"block_size": wrong}).write(out / "vector.json")
    else:
        file = out / "vector.safetensors"
        tensors = load_file(file)
        name = next(name for name in sorted(tensors) if name.endswith(SCALES))
        if damage == "scales":
            tensors[name] = tensors[name][..., :-1].contiguous()
        else:
            del tensors[name]
        save_file(tensors, file)
    with pytest.raises(ModelError, match=r"vector 'v'.*has scales of shape"):
        open_vector("v", str(out), base)
