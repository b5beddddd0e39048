"""fused_loss.py: the loss without logits and its gradients are those of the stock forward."""

import pytest
import torch

from optimer_hf.models.fused_loss import fuse_loss
from optimer_hf.models.head_loss import IGNORED_LABEL
from optimer_hf.models.plain_head import softcap_of
from tests.support.heads import HEADS, adapted
from tests.support.tiny import VOCABULARY, tiny_model


def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, VOCABULARY, (2, 40), generator=generator)
    labels = ids.clone()
    labels[0, :5] = labels[1, 20:] = IGNORED_LABEL
    return {"input_ids": ids, "labels": labels}


def losses_and_gradients(model, **options):
    loss = model(**batch(), **options).loss
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": torch.tensor(91)}])
def test_the_fused_loss_and_its_gradients_equal_those_of_the_stock_forward(kind, options):
    fused = tiny_model(kind)
    assert fuse_loss(fused)
    expected, expected_gradients = losses_and_gradients(tiny_model(kind), **options)
    loss, gradients = losses_and_gradients(fused, **options)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_softcapped_model_is_fused_with_its_cap():
    models = [tiny_model("gemma"), tiny_model("gemma")]
    for model in models:
        model.config.final_logit_softcapping = 0.5
    assert fuse_loss(models[1])
    assert softcap_of(models[1]) == 0.5
    stock, fused = (losses_and_gradients(model) for model in models)
    assert fused[0].item() == pytest.approx(stock[0].item(), rel=1e-6)
    assert softcap_of(tiny_model("llama")) is None


def test_a_head_with_a_bias_keeps_its_stock_forward():
    model = tiny_model("llama")
    model.lm_head = torch.nn.Linear(32, VOCABULARY, bias=True)
    stock = model.forward
    assert not fuse_loss(model)
    assert model.forward == stock
    assert model(**batch()).logits.shape == (2, 40, VOCABULARY)


@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed:peft.utils.warning.PeftWarning")
@pytest.mark.parametrize("options", [{}, {"num_items_in_batch": torch.tensor(91)}])
@pytest.mark.parametrize("way", HEADS.values(), ids=HEADS)
def test_an_adapted_head_gets_the_loss_and_the_gradients_of_the_stock_forward(way, options):
    expected, expected_gradients = losses_and_gradients(adapted(way, fused=False), **options)
    loss, gradients = losses_and_gradients(adapted(way, fused=True), **options)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, gradient in expected_gradients.items():
        if gradient is None:
            assert gradients[name] is None, name
        else:
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    trained = [gradients[name] for name in gradients if "lm_head" in name]
    assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in trained)


def test_a_head_saved_as_a_whole_keeps_the_fused_loss():
    model = adapted(HEADS["saved"], fused=True)
    assert model(**batch()).get("logits") is None
    with model.disable_adapter():
        assert model(**batch()).get("logits") is None
