"""The summary of a block of logits, compiled and not, against float64."""

import shutil

import pytest
import torch

from optimer_hf.models import logit_summary
from optimer_hf.models.logit_summary import (
    WORTH_COMPILING,
    choose_summary,
    compute_summary,
    summarize,
    summarize_in_one_pass,
)

# compiling imports modules of torch that use what it has deprecated
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and DEVICE == "cpu", reason="torch.compile needs a compiler"
)
WAYS = [summarize, compute_summary, pytest.param(summarize_in_one_pass, marks=needs_compiler)]


@pytest.fixture(autouse=True)
def forget_compiled(monkeypatch):
    monkeypatch.setattr(logit_summary, "_COMPILED", [])


def block(n: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    return (20 * torch.randn(n, width, generator=generator)).to(DEVICE, dtype)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_summary_is_the_log_of_the_sum_and_the_largest_logit(way, softcap, dtype):
    for logits in (block(7, 300, dtype), block(8, 77, dtype)):  # one code for all sizes
        normaliser, peak = way(logits, softcap)
        exact = logits.double()
        capped = exact if softcap is None else softcap * torch.tanh(exact / softcap)
        expected = torch.logsumexp(capped, 1, keepdim=True)
        assert normaliser.dtype == peak.dtype == torch.float32
        assert torch.equal(peak.double(), exact.amax(1, keepdim=True))
        torch.testing.assert_close(normaliser.double(), expected, rtol=1e-6, atol=1e-5)


def test_without_a_compiler_a_batch_is_scored_all_the_same(monkeypatch):
    def refuse(function, **_):
        def fail(*_):
            raise RuntimeError("no compiler")

        return fail

    monkeypatch.setattr(torch, "compile", refuse)
    logits = block(5, 50, torch.float32)
    for _ in range(2):
        assert all(map(torch.equal, summarize_in_one_pass(logits, None), summarize(logits, None)))


def test_only_large_batches_on_a_gpu_are_worth_compiling():
    assert choose_summary(WORTH_COMPILING, "cuda") is summarize_in_one_pass
    assert choose_summary(WORTH_COMPILING - 1, "cuda") is summarize
    assert choose_summary(WORTH_COMPILING, "cpu") is summarize
