"""head_choice.py: the loss of a run is chosen by measuring, and is the same whatever is chosen."""

import pytest
import torch

from optimer_hf.models.fused_loss import fuse_loss, is_fused
from optimer_hf.models.head_loss import IGNORED_LABEL, blocked_loss, loss_by_tokens
from optimer_hf.models.token_loss import stock_loss
from optimer_hf.training import head_choice
from optimer_hf.training.head_choice import choose_fastest, install_head, measure_loss
from optimer_hf.vectors.training_record import Speed
from tests.support.tiny import VOCABULARY, tiny_model


def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(7))
    labels = ids.clone()
    labels[0, :5] = labels[1, 20:] = IGNORED_LABEL
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("loss", [blocked_loss("cpu"), loss_by_tokens(False), stock_loss])
def test_every_loss_is_that_of_the_stock_forward(loss, softcap, dtype):
    stock, ours = tiny_model("gemma", dtype=dtype), tiny_model("gemma", dtype=dtype)
    for model in (stock, ours):
        model.config.final_logit_softcapping = softcap
    assert fuse_loss(ours, loss)
    expected, found = (model(**batch()).loss for model in (stock, ours))
    assert found.item() == pytest.approx(expected.item(), rel=1e-3)
    found.backward()
    expected.backward()
    for one, other in zip(ours.parameters(), stock.parameters(), strict=True):
        difference = (one.grad.float() - other.grad.float()).norm()
        assert difference <= (1e-4 if dtype == torch.float32 else 0.03) * other.grad.float().norm()


@pytest.mark.parametrize(
    ("wanted", "head", "fused"),
    [("auto", "blocked", True), ("blocked", "blocked", True), ("stock", "stock", False)],
)
def test_a_cpu_uses_the_blocked_loss_unless_told_otherwise(wanted, head, fused):
    model, speed = tiny_model("llama"), Speed()
    install_head(model, wanted, 80, torch.float32, speed)
    assert (speed.head, is_fused(model)) == (head, fused)


def test_a_resumed_run_repeats_the_choice():
    model, speed = tiny_model("llama"), Speed(head="stock")
    install_head(model, "auto", 80, torch.float32, speed)
    assert speed.head == "stock" and not is_fused(model)


def test_a_head_with_a_bias_keeps_the_stock_loss():
    model, speed = tiny_model("llama"), Speed()
    model.lm_head = torch.nn.Linear(32, VOCABULARY, bias=True)
    install_head(model, "blocked", 80, torch.float32, speed)
    assert speed.head == "stock" and not is_fused(model)


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({"stock": 10.0, "blocked": 5.0}, "blocked"),
        ({"stock": 5.0, "blocked": 10.0}, "stock"),
        ({"stock": 9.2, "blocked": 10.0}, "blocked"),
        ({"blocked": 10.0, "liger": 5.0}, "liger"),
        ({"stock": 1.0}, "stock"),
        ({}, "blocked"),
    ],
)
def test_the_fastest_loss_is_chosen_and_near_it_the_one_that_needs_less_memory(times, chosen):
    assert choose_fastest(times) == chosen


def test_a_measured_loss_leaves_no_gradient_behind():
    weight = torch.randn(300, 16, requires_grad=True)
    milliseconds = measure_loss(stock_loss, weight, 64, torch.float32, None)
    assert milliseconds is not None and milliseconds > 0
    assert weight.grad is None


def test_a_loss_that_does_not_fit_is_no_candidate():
    def too_large(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert measure_loss(too_large, torch.randn(300, 16), 64, torch.float32, None) is None


@pytest.mark.parametrize(
    ("n_batches", "compiled_ms", "expected"),
    [
        (10, 1.0, ("stock", False)),  # too short a run
        (10_000, 1.0, ("blocked", True)),
        (10_000, 9.0, ("stock", False)),
        (10_000, None, ("stock", False)),  # there is no compiler
    ],
)
def test_the_loss_of_a_long_run_is_compiled_where_that_is_faster(
    monkeypatch, n_batches, compiled_ms, expected
):
    times = {stock_loss: 5.0}
    monkeypatch.setattr(head_choice, "measure_loss", lambda loss, *_: times.get(loss, 7.0))
    measure = head_choice._try_to_measure
    monkeypatch.setattr(
        head_choice,
        "_try_to_measure",
        lambda *given: compiled_ms if given[2] == "compiled" else measure(*given),
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    model, speed = tiny_model("llama").to("meta"), Speed()
    chosen = head_choice._choose(model, 80, torch.float32, speed, n_batches)
    assert (chosen, speed.compiled_head) == expected
