"""The fused output layer against PyTorch's cross entropy and log-softmax over whole logits."""

import pytest
import torch
import torch.nn.functional as F

from optimer_hf.models.head_loss import (
    GPU_LOGITS,
    TAIL,
    VOCABULARY_BLOCK,
    HeadLoss,
    differentiable_log_probabilities,
    log_probabilities,
    log_probabilities_in_few_passes,
    rows_at_a_time,
)

SIZES = [
    100,
    VOCABULARY_BLOCK,
    2 * VOCABULARY_BLOCK + 77,
]  # part of a block, one block, two and a part
SOFTCAPS = [None, 5.0]


def problem(n_vocabulary: int, dtype: torch.dtype = torch.float32, n: int = 23, size: int = 16):
    """Return hidden [n, d], weight [v, d] and labels [n] with logits of standard deviation four."""
    generator = torch.Generator().manual_seed(n_vocabulary)
    hidden = torch.randn(n, size, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(n_vocabulary, size, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(n_vocabulary, (n,), generator=generator)
    labels[:2] = torch.tensor([0, n_vocabulary - 1])
    return hidden, weight, labels


def logits_of(hidden: torch.Tensor, weight: torch.Tensor, softcap: float | None) -> torch.Tensor:
    logits = hidden.double() @ weight.double().T
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def reference(hidden, weight, labels, softcap, scale: float = 1.0):
    """Return loss and both gradients in float64 through whole logits."""
    loss = F.cross_entropy(logits_of(hidden, weight, softcap), labels, reduction="sum")
    return loss, *torch.autograd.grad(loss * scale, (hidden, weight))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


# -- loss and gradients ----------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("n_vocabulary", SIZES)
def test_loss_and_gradients_equal_cross_entropy_in_float32(n_vocabulary, softcap):
    hidden, weight, labels = problem(n_vocabulary)
    expected, hidden_gradient, weight_gradient = reference(hidden, weight, labels, softcap)
    loss = HeadLoss.apply(hidden, weight, labels, softcap)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(hidden.grad, hidden_gradient, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad, weight_gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("n_vocabulary", SIZES)
def test_loss_and_gradients_are_near_cross_entropy_in_bfloat16(n_vocabulary, softcap):
    hidden, weight, labels = problem(n_vocabulary, torch.bfloat16)
    expected, hidden_gradient, weight_gradient = reference(hidden, weight, labels, softcap)
    loss = HeadLoss.apply(hidden, weight, labels, softcap)
    loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    assert loss.item() == pytest.approx(expected.item(), rel=5e-3)
    assert relative_error(hidden.grad, hidden_gradient) < 0.02
    assert relative_error(weight.grad, weight_gradient) < 0.02


@pytest.mark.parametrize("softcap", SOFTCAPS)
def test_a_factor_on_the_loss_scales_both_gradients(softcap):
    hidden, weight, labels = problem(300)
    _, hidden_gradient, weight_gradient = reference(hidden, weight, labels, softcap, scale=-0.37)
    (HeadLoss.apply(hidden, weight, labels, softcap) * -0.37).backward()
    torch.testing.assert_close(hidden.grad, hidden_gradient, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight.grad, weight_gradient, rtol=1e-4, atol=1e-5)


def test_a_frozen_head_gets_no_gradient_and_leaves_that_of_the_hidden_states_unchanged():
    hidden, weight, labels = problem(300)
    _, expected, _ = reference(hidden, weight, labels, None)
    weight = weight.detach()
    HeadLoss.apply(hidden, weight, labels, None).backward()
    assert weight.grad is None
    torch.testing.assert_close(hidden.grad, expected, rtol=1e-4, atol=1e-5)


def test_logits_in_the_thousands_neither_overflow_nor_underflow():
    hidden, weight, labels = problem(3 * VOCABULARY_BLOCK)
    with torch.no_grad():
        hidden *= 1000
    expected, hidden_gradient, _ = reference(hidden, weight, labels, None)
    loss = HeadLoss.apply(hidden, weight, labels, None)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(hidden.grad, hidden_gradient, rtol=1e-3, atol=1e-3)


# -- scoring ---------------------------------------------------------------------------------------


WAYS = pytest.mark.parametrize("way", [log_probabilities, log_probabilities_in_few_passes])


@WAYS
@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("n_vocabulary", SIZES)
def test_log_probabilities_equal_log_softmax(n_vocabulary, softcap, way):
    hidden, weight, labels = problem(n_vocabulary)
    values, _ = way(hidden, weight, labels, softcap)
    expected = torch.log_softmax(logits_of(hidden, weight, softcap), -1).gather(
        1, labels.unsqueeze(1)
    )[:, 0]
    assert values.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-5)


@WAYS
@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("n_vocabulary", SIZES)
def test_greedy_flags_mark_labels_that_are_the_most_likely_token(n_vocabulary, softcap, way):
    hidden, weight, labels = problem(n_vocabulary, n=64)
    best = logits_of(hidden, weight, softcap).argmax(1)
    labels[::2] = best[::2]
    _, greedy = way(hidden, weight, labels, softcap)
    assert greedy.dtype == torch.bool
    assert greedy.tolist() == (labels == best).tolist()
    assert 32 <= greedy.sum() < 64


@pytest.mark.parametrize("softcap", SOFTCAPS)
@pytest.mark.parametrize("n_vocabulary", SIZES)
def test_gradients_of_log_probabilities_equal_those_of_whole_logits(n_vocabulary, softcap):
    """Also where most of the vocabulary is at the tail, which the weight's gradient leaves out."""
    hidden, weight, labels = problem(n_vocabulary, n=64)
    hidden = (hidden + hidden[:1]).detach().requires_grad_()  # the positions are of one text
    every = logits_of(hidden, weight, softcap).log_softmax(-1)
    likely = torch.multinomial(every.exp(), 1, generator=torch.Generator().manual_seed(0))[:, 0]
    labels = torch.cat([labels[:3], likely[3:]])  # the first are at the tail themselves
    factors = torch.linspace(1, 2, 64)
    expected = every.gather(1, labels[:, None])[:, 0]
    of_hidden, of_weight = torch.autograd.grad(expected @ factors.double(), (hidden, weight))
    values, _ = differentiable_log_probabilities(hidden, weight, labels, softcap)
    (values @ factors).backward()
    assert torch.equal(values, log_probabilities(hidden, weight, labels, softcap)[0])
    assert relative_error(hidden.grad, of_hidden) < 1e-5
    assert relative_error(weight.grad.to_dense(), of_weight) < 2e-3
    doubt = factors @ (1 - expected.exp()).float() * hidden.norm(dim=1).max()
    assert (weight.grad.to_dense() - of_weight).norm() < 2 * TAIL * doubt
    kept = weight.grad.coalesce().indices()[0]
    assert set(labels.tolist()) <= set(kept.tolist())
    if softcap is None and n_vocabulary > VOCABULARY_BLOCK:
        assert len(kept) < 0.8 * n_vocabulary


@WAYS
@pytest.mark.parametrize("scale", [1, 300])
def test_log_probabilities_in_bfloat16_differ_only_by_the_rounding_of_the_logits(way, scale):
    hidden, weight, labels = problem(1000, torch.bfloat16)
    with torch.no_grad():
        hidden *= scale
    values, _ = way(hidden, weight, labels, None)
    logits = (hidden @ weight.T).float()
    expected = torch.log_softmax(logits, -1).gather(1, labels.unsqueeze(1))[:, 0]
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)


# -- devices ---------------------------------------------------------------------------------------


def test_a_gpu_takes_as_many_rows_of_the_vocabulary_as_there_is_room_for_logits():
    assert rows_at_a_time(512, "cpu") == VOCABULARY_BLOCK
    assert rows_at_a_time(512, "cuda") == GPU_LOGITS // 512
    for n in (511, 32_613):  # products with an odd number of columns are slow
        rows = rows_at_a_time(n, "cuda")
        assert rows % VOCABULARY_BLOCK == 0 and n * rows <= GPU_LOGITS < n * (
            rows + VOCABULARY_BLOCK
        )
    assert rows_at_a_time(10**6, "cuda") == VOCABULARY_BLOCK
    assert rows_at_a_time(0, "cuda") == GPU_LOGITS


def test_the_number_of_rows_at_a_time_changes_no_result(monkeypatch):
    hidden, weight, labels = problem(2 * VOCABULARY_BLOCK + 77)
    results = []
    for rows in (VOCABULARY_BLOCK, 3 * VOCABULARY_BLOCK, 130):
        monkeypatch.setattr(
            "optimer_hf.models.head_loss.rows_at_a_time", lambda n, device, rows=rows: rows
        )
        loss = HeadLoss.apply(hidden, weight, labels, None)
        gradients = torch.autograd.grad(loss, (hidden, weight))
        results.append(
            (loss.detach(), *gradients, log_probabilities(hidden, weight, labels, None)[0])
        )
    for other in results[1:]:
        for value, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
