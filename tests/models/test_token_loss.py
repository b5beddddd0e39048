"""The loss for GPUs, a block of tokens at a time, against cross entropy in float64."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from optimer_hf.models import token_loss
from optimer_hf.models.head_loss import IGNORED_LABEL
from optimer_hf.models.token_loss import TokenBlockLoss, stock_loss

N_VOCABULARY = 301
# compiling imports modules of torch that use what it has deprecated
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and DEVICE == "cpu", reason="torch.compile needs a compiler"
)


def problem(dtype: torch.dtype, n: int = 37, size: int = 16):
    """Return hidden [n, d], weight [v, d] and labels [n], some of which do not count."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(n, size, generator=generator).to(dtype)
    weight = torch.randn(N_VOCABULARY, size, generator=generator).to(dtype)
    labels = torch.randint(N_VOCABULARY, (n,), generator=generator)
    labels[:3] = torch.tensor([0, N_VOCABULARY - 1, IGNORED_LABEL])
    labels[-1] = IGNORED_LABEL
    hidden, weight = (each.to(DEVICE).requires_grad_() for each in (hidden, weight))
    return hidden, weight, labels.to(DEVICE)


def reference(hidden, weight, labels, softcap, scale):
    """Return the loss and both gradients, all in float64."""
    logits = hidden.double() @ weight.double().T
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return loss, *torch.autograd.grad(loss * scale, (hidden, weight))


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


WAYS = {  # tokens in a block: one, a few, all; compiled code is the same for each size
    "blocks of 1": (1, False),
    "blocks of 5": (5, False),
    "one block": (1000, False),
    "blocks of 5, compiled": pytest.param(5, True, marks=needs_compiler),
}
in_blocks = pytest.mark.parametrize(("size", "is_compiled"), WAYS.values(), ids=WAYS)


@pytest.fixture
def set_blocks(monkeypatch):
    """Return a function that sets how many tokens a block has."""

    def set_size(size: int) -> None:
        monkeypatch.setattr(
            token_loss,
            "_blocks",
            lambda hidden, n_vocabulary, is_compiled: [
                slice(start, min(start + size, len(hidden)))
                for start in range(0, len(hidden), size)
            ],
        )

    return set_size


@in_blocks
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_loss_and_gradients_equal_cross_entropy_in_float32(set_blocks, softcap, size, is_compiled):
    set_blocks(size)
    hidden, weight, labels = problem(torch.float32)
    expected, hidden_gradient, weight_gradient = reference(hidden, weight, labels, softcap, -0.37)
    loss = TokenBlockLoss.apply(hidden, weight, labels, softcap, is_compiled)
    (loss * -0.37).backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(hidden.grad, hidden_gradient, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad, weight_gradient, rtol=1e-4, atol=1e-5)


@in_blocks
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_loss_and_gradients_are_near_cross_entropy_in_bfloat16(
    set_blocks, softcap, size, is_compiled
):
    set_blocks(size)
    hidden, weight, labels = problem(torch.bfloat16)
    expected, hidden_gradient, weight_gradient = reference(hidden, weight, labels, softcap, 1.0)
    loss = TokenBlockLoss.apply(hidden, weight, labels, softcap, is_compiled)
    loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(expected.item(), rel=5e-3)
    assert relative_error(hidden.grad, hidden_gradient) < 0.02
    assert relative_error(weight.grad, weight_gradient) < 0.02


def test_a_float32_head_gets_a_float32_gradient_of_bfloat16_states():
    hidden, weight, labels = problem(torch.bfloat16)
    whole = weight.detach().float().requires_grad_()
    TokenBlockLoss.apply(hidden, whole, labels, None, False).backward()
    _, _, expected = reference(hidden, weight, labels, None, 1.0)
    assert whole.grad.dtype == torch.float32
    assert relative_error(whole.grad, expected) < 0.02


def test_a_frozen_head_gets_no_gradient():
    hidden, weight, labels = problem(torch.float32)
    _, expected, _ = reference(hidden, weight, labels, None, 1.0)
    weight = weight.detach()
    TokenBlockLoss.apply(hidden, weight, labels, None, False).backward()
    assert weight.grad is None
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_confident_token_is_not_rounded_away():
    """The probability of this label is 1 - 1e-4; bfloat16 rounds it to 1."""
    weight = torch.tensor([[9.2103], [0.0]], dtype=torch.bfloat16, device=DEVICE)
    hidden = torch.ones(1, 1, dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    labels = torch.zeros(1, dtype=torch.long, device=DEVICE)
    TokenBlockLoss.apply(hidden, weight, labels, None, False).backward()
    _, expected, _ = reference(hidden, weight.clone().requires_grad_(), labels, None, 1.0)
    assert hidden.grad.item() == pytest.approx(expected.item(), rel=0.02)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_the_stock_loss_is_that_of_transformers(softcap):
    hidden, weight, labels = problem(torch.float32)
    expected, hidden_gradient, _ = reference(hidden, weight, labels, softcap, 1.0)
    loss = stock_loss(hidden, weight, labels, softcap)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(hidden.grad, hidden_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_blocks_are_as_large_as_their_logits_may_be(monkeypatch, is_compiled):
    monkeypatch.setattr(token_loss, "largest_block", lambda device: 8 * 2**20)
    hidden = torch.zeros(4096, 4, dtype=torch.bfloat16)
    blocks = token_loss._blocks(hidden, 2048, is_compiled)
    n_bytes = 2 if is_compiled else token_loss.PLAIN_BYTES
    sizes = [block.stop - block.start for block in blocks]
    assert sum(sizes) == len(hidden)
    assert max(sizes) * 2048 * n_bytes <= 8 * 2**20 + token_loss.ALIGNED * 2048 * n_bytes
    assert all(size % token_loss.ALIGNED == 0 for size in sizes[:-1])


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_liger_computes_the_same_loss():
    pytest.importorskip("liger_kernel")
    hidden, weight, labels = problem(torch.bfloat16)
    expected, hidden_gradient, _ = reference(hidden, weight, labels, None, 1.0)
    loss = token_loss.liger_loss(hidden, weight, labels, None)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=5e-3)
    assert relative_error(hidden.grad, hidden_gradient) < 0.02
