"""The fused output layer against PyTorch's cross entropy and log-softmax over whole logits."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model

from optimer_hf.models.head_loss import (
    GPU_LOGITS,
    IGNORED_LABEL,
    TAIL,
    VOCABULARY_BLOCK,
    HeadLoss,
    differentiable_log_probabilities,
    fuse_loss,
    is_plain_head,
    keeps_documents_apart,
    log_probabilities,
    log_probabilities_in_few_passes,
    rows_at_a_time,
    softcap_of,
)
from tests.support.tiny import EOS, VOCABULARY, tiny_model

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


# -- models ----------------------------------------------------------------------------------------


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


def adapt_with_bias(model):
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCABULARY))


def adapt_with_hook(model):
    model.lm_head.register_forward_hook(lambda layer, given, logits: 2 * logits)


def adapt_with_pre_hook(model):
    model.lm_head.register_forward_pre_hook(lambda layer, given: (2 * given[0],))


def adapt_with_another_forward(model):
    stock = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 2 * stock(hidden)


def adapt_with_parametrisation(model):
    torch.nn.utils.parametrizations.weight_norm(model.lm_head)


HEADS = {  # ways to adapt a head: options of LoraConfig, or a function
    "lora": {"target_modules": ["q_proj", "lm_head"]},
    "rslora": {"target_modules": ["lm_head"], "use_rslora": True, "rank_pattern": {"lm_head": 2}},
    "dora": {"target_modules": ["lm_head"], "use_dora": True},
    "lora with a bias": {"target_modules": ["lm_head"], "lora_bias": True},
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [5, 6, 7]}},
    "tokens of both": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": {"embed_tokens": [5, 9], "lm_head": [5, 9]},
    },
    "bias": adapt_with_bias,
    "hook": adapt_with_hook,
    "pre-hook": adapt_with_pre_hook,
    "another forward": adapt_with_another_forward,
    "parametrisation": adapt_with_parametrisation,
}


def adapted(way, fused: bool):
    """Return a Llama whose head is adapted after its loss was fused, every factor moved."""
    model = tiny_model("llama")
    if fused:
        assert fuse_loss(model)
    torch.manual_seed(3)
    if not isinstance(way, dict):
        way(model)
        return model
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **way)
    whole = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in whole.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return whole


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


@pytest.mark.parametrize("way", HEADS.values(), ids=HEADS)
@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed:peft.utils.warning.PeftWarning")
def test_an_adapted_head_is_scored_through_its_adapter(way):
    model = adapted(way, fused=False)
    inner = model.get_base_model() if isinstance(way, dict) else model
    assert is_plain_head(inner) == (way is HEADS["saved"])


def test_scaled_logits_are_noticed():
    from transformers import GraniteConfig, GraniteForCausalLM

    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "eos_token_id": EOS,
    }
    torch.manual_seed(0)
    config = GraniteConfig(**options, logits_scaling=8.0, initializer_range=1.0)
    assert not is_plain_head(GraniteForCausalLM(config))
    config.logits_scaling = 1.0
    assert is_plain_head(GraniteForCausalLM(config))


# -- packed documents ------------------------------------------------------------------------------


def test_attention_keeps_packed_documents_apart(kind):
    assert keeps_documents_apart(tiny_model(kind))
    assert keeps_documents_apart(tiny_model(kind, dtype=torch.bfloat16))


@pytest.mark.parametrize("architecture", ["Qwen3NextForCausalLM", "Lfm2ForCausalLM"])
def test_recurrent_and_convolutional_layers_are_noticed(architecture):
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    configs = {
        "Qwen3NextForCausalLM": lambda: transformers.Qwen3NextConfig(
            **options,
            head_dim=8,
            linear_num_value_heads=2,
            linear_num_key_heads=2,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
            num_experts=0,
            mlp_only_layers=[0, 1, 2, 3],
        ),
        "Lfm2ForCausalLM": lambda: transformers.Lfm2Config(**options, full_attn_idxs=[1, 3]),
    }
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(configs[architecture]()).eval()
    assert not keeps_documents_apart(model)


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
