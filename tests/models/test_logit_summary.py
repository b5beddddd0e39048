"""The summary of a block of logits, compiled and not, against float64."""

import shutil
from functools import partial

import pytest
import torch

from optimer_hf.models import logit_summary
from optimer_hf.models.logit_summary import (
    LOGITS_AT_ONCE,
    WORTH_COMPILING,
    choose_summary,
    columns_at_a_time,
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


@pytest.fixture(autouse=True)
def forget_compiled(monkeypatch):
    monkeypatch.setattr(logit_summary, "_COMPILED", [])


def block(n: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    return (20 * torch.randn(n, width, generator=generator)).to(DEVICE, dtype)


def check(way, logits: torch.Tensor, softcap: float | None) -> None:
    """Assert that a way to summarize logits gives what float64 gives."""
    normaliser, peak = way(logits, softcap)
    exact = logits.double()
    capped = exact if softcap is None else softcap * torch.tanh(exact / softcap)
    assert normaliser.dtype == peak.dtype == torch.float32
    assert torch.equal(peak.double(), exact.amax(1, keepdim=True))
    expected = torch.logsumexp(capped, 1, keepdim=True)
    torch.testing.assert_close(normaliser.double(), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("way", [summarize, compute_summary])
@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_summary_is_the_log_of_the_sum_and_the_largest_logit(way, softcap, dtype):
    check(way, block(7, 300, dtype), softcap)


@needs_compiler
def test_compiled_code_gives_the_same_for_any_number_of_rows():
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (8, 9, 640):
            check(summarize_in_one_pass, block(n, 64, torch.bfloat16), 30.0)


def test_what_was_scored_before_does_not_choose_the_code(monkeypatch):
    """torch would compile the second width for any width, and then take that for the first, too."""
    graphs, calls = [], []

    def backend(module, _):
        number = len(graphs)
        graphs.append(module)

        def run(*inputs):
            calls.append(number)
            return module.forward(*inputs)

        return run

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    summarize_in_one_pass(block(8, 64, torch.float32), None)  # compiles
    calls.clear()
    for n, width in ((8, 64), (640, 64), (8, 16), (9, 64), (70, 16)):
        summarize_in_one_pass(block(n, width, torch.float32), None)
    assert calls == [0, 0, 1, 0, 1]


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


@pytest.mark.parametrize("n", [1, 3, 1000, 32613, 2**16])
@pytest.mark.parametrize("n_vocabulary", [10, 50257, 2**18])
def test_blocks_are_as_wide_as_memory_allows(n, n_vocabulary):
    width = columns_at_a_time(n, n_vocabulary)
    assert width.bit_count() == 1 and width <= n_vocabulary and n * width <= LOGITS_AT_ONCE
    assert 2 * width > n_vocabulary or 2 * n * width > LOGITS_AT_ONCE
