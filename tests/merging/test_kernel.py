"""The one sum: right, the same bits on every path, and in every form a delta comes in."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimer_hf.errors import ModelError
from optimer_hf.merging import kernel
from optimer_hf.merging.kernel import add_in_steps, add_weighted
from optimer_hf.vectors.forms import LowRank, Trained, to_dense
from tests.support.tiny import bits, ulps_apart


@given(
    st.integers(0, 2**31),
    st.lists(st.floats(-1.5, 1.5, allow_subnormal=False), min_size=1, max_size=5),
    st.sampled_from([1e-3, 1e-1, 1.0]),
    st.sampled_from([torch.bfloat16, torch.float32]),
)
@settings(deadline=None, max_examples=40)
def test_999_of_1000_outputs_are_the_float64_sum_correctly_rounded(seed, weights, scale, dtype):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(200, 200, generator=generator).to(dtype)
    deltas = [scale * torch.randn(200, 200, generator=generator) for _ in weights]
    exact = base.double() + sum(
        weight * delta.double() for weight, delta in zip(weights, deltas, strict=True)
    )
    merged = add_weighted(base, deltas, weights, torch.bfloat16)
    assert merged.dtype == torch.bfloat16
    assert (merged == exact.to(torch.bfloat16)).double().mean().item() >= 0.999
    assert int(ulps_apart(merged, exact.to(torch.bfloat16))[exact.abs() > 1e-3].max()) <= 1


@given(
    st.integers(0, 2**31),
    st.lists(st.sampled_from([0.0, -0.0, 0.7, -1.25]), min_size=1, max_size=5),
)
@settings(deadline=None, max_examples=40)
def test_a_vector_of_weight_zero_drops_out_bit_for_bit(seed, weights):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(8, 8, generator=generator)
    base[0] = -0.0
    deltas = [torch.randn(8, 8, generator=generator) for _ in weights]
    kept = [(delta, weight) for delta, weight in zip(deltas, weights, strict=True) if weight != 0]
    merged = add_weighted(base, deltas, weights)
    assert torch.equal(
        bits(merged), bits(add_weighted(base, [d for d, _ in kept], [w for _, w in kept]))
    )
    if not kept:
        assert torch.equal(bits(merged), bits(base))


@given(st.integers(0, 2**31), st.integers(1, 8), st.floats(-2, 2), st.floats(0.1, 4))
@settings(deadline=None, max_examples=40)
def test_a_low_rank_delta_adds_what_its_dense_form_adds(seed, rank, weight, scale):
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(12, 20, generator=generator)
    delta = LowRank(
        torch.randn(12, rank, generator=generator),
        torch.randn(rank, 20, generator=generator),
        scale,
    )
    exact = base.double() + weight * scale * (delta.b.double() @ delta.a.double())
    torch.testing.assert_close(
        add_weighted(base, [delta], [weight]).double(), exact, rtol=1e-5, atol=1e-4
    )


def test_the_kernel_leaves_its_inputs_alone():
    base, delta = torch.ones(3), torch.full((3,), 2.0)
    assert add_weighted(base, [delta], [0.5]).tolist() == [2.0] * 3
    assert base.tolist() == [1.0] * 3
    assert delta.tolist() == [2.0] * 3


def test_the_kernel_rounds_once_and_not_after_every_vector():
    base = torch.ones(1, dtype=torch.bfloat16)
    small = torch.full(
        (1,), 2.0**-9
    )  # a quarter of the spacing of bfloat16 above 1: four make a step, one makes none
    assert add_weighted(base, [small] * 4, [1.0] * 4).item() == 1 + 2.0**-7
    assert add_weighted(base, [small], [1.0]).item() == 1.0


def test_the_kernel_needs_a_weight_for_every_delta():
    with pytest.raises(ValueError, match="zip"):
        add_weighted(torch.ones(1), [torch.ones(1)], [1.0, 2.0])


# -- one pass, and one operation after the other ---------------------------------------------------

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
PATTERNS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def any_numbers(n: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Return numbers of any bit pattern: zeros, subnormals, infinities and NaN among them."""
    pattern = PATTERNS[dtype]
    info = torch.iinfo(pattern)
    patterns = torch.randint(info.min, info.max + 1, (n,), generator=generator, dtype=torch.int64)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan]).to(dtype)
    numbers = patterns.to(pattern).view(dtype)
    where = torch.randint(0, 12, (n,), generator=generator)
    return torch.where(where < 5, special[where.clamp_max(4)], numbers)


@given(
    st.integers(0, 2**31),
    st.integers(1, 3000),
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.booleans(), st.floats(-2, 2, allow_subnormal=False)),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from(DTYPES),
    st.sampled_from(DTYPES),
    st.booleans(),
)
@settings(deadline=None, max_examples=150)
def test_one_pass_gives_the_bits_of_separate_operations(seed, n, parts, stored, dtype, usual):
    generator = torch.Generator().manual_seed(seed)

    def numbers(of: torch.dtype) -> torch.Tensor:
        if usual:
            return torch.randn(n, generator=generator).to(of)
        return any_numbers(n, of, generator)

    base = numbers(stored)
    deltas = [Trained(numbers(of)) if trained else numbers(of) for of, trained, _ in parts]
    weights = [weight for *_, weight in parts]
    used = [pair for pair in zip(deltas, weights, strict=True) if pair[1] != 0]
    merged = add_weighted(base, deltas, weights, dtype)
    expected = add_in_steps(base, [d for d, _ in used], [w for _, w in used], dtype)
    assert torch.equal(merged.isnan(), expected.isnan())
    known = ~expected.isnan()  # the payload of a NaN says nothing
    assert torch.equal(bits(merged)[known], bits(expected)[known])


def test_one_pass_reads_views_and_transposed_tensors_as_they_are():
    base, trained = torch.randn(40, 30).t()[3:], torch.randn(30, 80)[3:, ::2]
    merged = add_weighted(base, [Trained(trained)], [0.5])
    assert torch.equal(merged, base + 0.5 * (trained - base))
    assert merged.shape == (27, 40)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["dense", "product", "none"])
def test_a_sum_can_be_written_in_place_whatever_the_layout(dtype, form):
    base = torch.randn(6, 8).to(dtype)
    delta = (
        torch.randn(6, 8)
        if form != "product"
        else LowRank(torch.randn(6, 2), torch.randn(2, 8), 1.0)
    )
    weight = 0.0 if form == "none" else 0.5
    expected = add_weighted(base, [delta], [weight])
    for out in (torch.zeros(6, 8, dtype=dtype), torch.zeros(8, 6, dtype=dtype).t()):
        assert add_weighted(base, [delta], [weight], out=out) is out
        assert torch.equal(out, expected)


@pytest.mark.parametrize(
    "delta",
    [torch.ones(3), Trained(torch.ones(9)), LowRank(torch.ones(2, 1), torch.ones(1, 4), 1.0)],
)
def test_shapes_that_differ_are_refused_before_memory_is_read(delta):
    with pytest.raises(ModelError, match=r"a delta of shape .* cannot be added to a base tensor"):
        add_weighted(torch.zeros(8), [delta], [1.0])


def test_nothing_at_all_can_be_merged():
    assert add_weighted(torch.ones(0, 4), [torch.ones(0, 4)], [1.0]).shape == (0, 4)


def test_every_form_of_a_delta_is_the_same_delta():
    base = torch.randn(6, 5)
    product = LowRank(torch.randn(6, 2), torch.randn(2, 5), 0.5)
    delta = product.to_dense()
    torch.testing.assert_close(to_dense(Trained(base + delta), base), delta)
    torch.testing.assert_close(to_dense(delta, base), delta)
    torch.testing.assert_close(to_dense(product, base), delta)


WITHOUT_A_PLACE = """
import torch
from optimer_hf.merging.kernel import add_weighted
print(add_weighted(torch.ones(3), [torch.ones(3)], [0.5]).tolist())
"""


def test_the_pass_is_compiled_where_its_cache_cannot_be_written(tmp_path):
    locked = tmp_path / "locked"
    shutil.copytree(
        Path(kernel.__file__).parents[1],
        locked / "optimer_hf",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    (locked / "optimer_hf" / "__pycache__").write_text("not a folder", encoding="utf-8")
    environment = os.environ | {
        "PYTHONPATH": str(locked),
        "HOME": "/dev/null",
        "XDG_CACHE_HOME": "/dev/null/cache",
    }
    ran = subprocess.run(
        [sys.executable, "-c", WITHOUT_A_PLACE],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert ran.stdout == "[1.5, 1.5, 1.5]\n", ran.stderr
