"""lm_eval_model.py: batches that follow the free memory answer as the stock harness does."""

import random

import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from optimer_hf.errors import ModelError
from optimer_hf.scoring.batching import Budget
from optimer_hf.scoring.harness import quiet_lm_eval
from optimer_hf.scoring.lm_eval_model import make_lm_eval_model
from tests.support.tiny import GROUPED, VOCABULARY, WIDE, tiny_model

SETTINGS = [
    {"until": ["\n"], "max_gen_toks": 5, "do_sample": False},
    {"until": ["z"], "max_gen_toks": 12, "do_sample": False},
]
BEAMS = SETTINGS[1] | {"num_beams": 2}  # what a beam becomes depends on its batch, in stock, too


def prompts(n: int = 30) -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choice("abc d") for _ in range(draw.randint(1, 80))) for _ in range(n)]


def instances(kind: str, arguments) -> list[Instance]:
    return [
        Instance(kind, {}, each, index, metadata=("task", index, 1))
        for index, each in enumerate(arguments)
    ]


def harness(model, tokenizer, n_tokens: int):
    """Return our model with batches of a number of tokens, as on a GPU."""
    lm = make_lm_eval_model(model, tokenizer)
    lm.follows_memory = True
    lm._generation_budget = lm._logits_budget = Budget(n_tokens)
    return lm


def stock(model, tokenizer):
    with quiet_lm_eval():
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)


@pytest.mark.parametrize("n_tokens", [1, 150, 10**4])
def test_generated_texts_equal_those_of_the_stock_harness_one_by_one(tokenizer, kind, n_tokens):
    model = tiny_model(kind).eval()
    requests = instances(
        "generate_until",
        [(text, SETTINGS[index % 2]) for index, text in enumerate(prompts())],
    )
    texts = harness(model, tokenizer, n_tokens).generate_until(requests)
    assert texts == stock(model, tokenizer).generate_until(requests, disable_tqdm=True)


def test_a_batch_counts_prompt_answer_and_beams(tokenizer):
    lm, seen = harness(tiny_model("llama").eval(), tokenizer, 200), []
    generate = lm._model_generate

    def noting(context, **options):
        seen.append((context.shape, options.get("num_beams", 1), options["max_length"]))
        return generate(context, **options)

    lm._model_generate = noting
    lm.generate_until(
        instances(
            "generate_until", [(text, each) for text in prompts() for each in (SETTINGS[0], BEAMS)]
        )
    )
    assert sum(shape[0] for shape, _, _ in seen) == 60
    assert all(shape[0] * beams * length <= 200 for shape, beams, length in seen)
    assert max(shape[0] for shape, _, _ in seen) > 5  # short ones are many


def test_generation_goes_on_with_half_a_batch_when_memory_runs_out(tokenizer):
    model = tiny_model().eval()
    requests = instances("generate_until", [(text, SETTINGS[0]) for text in prompts()])
    lm, sizes = harness(model, tokenizer, 10**4), []
    generate = lm._model_generate

    def scarce(context, **options):
        sizes.append(len(context))
        if len(context) > 7:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return generate(context, **options)

    lm._model_generate = scarce
    texts = lm.generate_until(requests)
    assert texts == stock(model, tokenizer).generate_until(requests, disable_tqdm=True)
    assert sizes[:2] == [30, 30] and sizes[2] <= 15 and sizes[-1] <= 7


@pytest.mark.parametrize("n_tokens", [1, 150, 10**4])
def test_a_head_with_a_bias_is_scored_by_the_stock_code_in_batches(tokenizer, n_tokens):
    model = tiny_model("llama").eval()
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(-2, 2, model.config.vocab_size))
    requests = instances("loglikelihood", [(text, " d" + text[:3]) for text in prompts()])
    lm = harness(model, tokenizer, n_tokens)
    assert lm._likelihoods is None
    answers = lm.loglikelihood(requests)
    expected = stock(model, tokenizer).loglikelihood(requests, disable_tqdm=True)
    assert [v for v, _ in answers] == pytest.approx([v for v, _ in expected], rel=1e-5)
    assert [g for _, g in answers] == [g for _, g in expected]


# -- models ----------------------------------------------------------------------------------------


def test_an_encoder_is_not_scored(tokenizer):
    model = transformers.BertLMHeadModel(transformers.BertConfig(**WIDE)).eval()
    with pytest.raises(ModelError, match="BertLMHeadModel: is not causal"):
        make_lm_eval_model(model, tokenizer)


PADDED = {
    "RwkvForCausalLM": lambda: transformers.RwkvConfig(
        vocab_size=VOCABULARY, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2
    ),
    "MiniMaxForCausalLM": lambda: transformers.MiniMaxConfig(
        **GROUPED,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        num_local_experts=2,
        num_experts_per_tok=1,
        block_size=16,
    ),
    "MambaForCausalLM": lambda: transformers.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=32, state_size=4, num_hidden_layers=2
    ),
    "LlamaForCausalLM": lambda: transformers.LlamaConfig(**GROUPED),
}


@pytest.mark.parametrize("follows_memory", [False, True])
@pytest.mark.parametrize("architecture", PADDED)
def test_padding_does_not_change_what_is_generated(tokenizer, architecture, follows_memory):
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(PADDED[architecture]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    requests = instances("generate_until", [(text, SETTINGS[1]) for text in prompts(6)])
    lm = harness(model, tokenizer, 10**4)
    lm.follows_memory = follows_memory
    texts = lm.generate_until(requests)
    one_by_one = stock(model, tokenizer).generate_until(requests, disable_tqdm=True)
    assert texts == one_by_one
