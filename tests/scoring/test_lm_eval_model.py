"""lm_eval_model.py: batches that follow the free memory answer as the stock harness does."""

import copy
import random

import pytest
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import processors

from optimer_hf.errors import EvaluationError, ModelError
from optimer_hf.scoring.batching import Budget
from optimer_hf.scoring.harness import quiet_lm_eval
from optimer_hf.scoring.lm_eval_model import make_lm_eval_model
from tests.support.tiny import EOS, GROUPED, VOCABULARY, WIDE, tiny_model

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


# -- tokens at the join of a prompt and a choice ---------------------------------------------------


def tokenizer_with(tokenizer, *, merges=(), ending=False):
    """Return a byte tokenizer with tokens of two characters, or one that ends every text."""
    changed = copy.deepcopy(tokenizer)
    changed.add_tokens([*merges])
    if ending:
        changed.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A <eos>",
            special_tokens=[("<bos>", tokenizer.bos_token_id), ("<eos>", EOS)],
        )
    return changed


def sum_by_hand(model, tokens: list[int], n: int) -> float:
    """Return the log-likelihood of the last n tokens, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0].double()
    values = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])
    return values[-n:].sum().item()


JOINS = {  # prompt, choice, and the tokens that are scored
    "one token is all of the choice": ("Answer:", "A", ["A"]),
    "one token is its beginning": ("Answer:", "Ab", ["b"]),
    "the choice as it is encoded alone": ("Answer:", "b:A", ["b", ":A"]),
    "no token over the join": ("Answer:", "bc", ["b", "c"]),
    "a space of the prompt": ("Answer: ", "bc", [" ", "b", "c"]),
}


@pytest.mark.parametrize("plain_head", [True, False])
@pytest.mark.parametrize("kind", JOINS)
def test_a_choice_in_the_last_token_of_its_prompt_is_scored_and_others_as_by_lm_eval(
    tokenizer, kind, plain_head
):
    context, choice, scored = JOINS[kind]
    model = tiny_model("llama").eval()
    model.resize_token_embeddings(VOCABULARY + 1, mean_resizing=False)
    if not plain_head:
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCABULARY + 1))
    own = tokenizer_with(tokenizer, merges=[":A"])
    lm = make_lm_eval_model(model, own)
    assert (lm._likelihoods is not None) is plain_head
    asked = instances("loglikelihood", [(context, choice)])
    tokens = [
        *own(context.rstrip())["input_ids"],
        *(own(each, add_special_tokens=False)["input_ids"][0] for each in scored),
    ]
    ((value, _),) = lm.loglikelihood(asked)
    assert value == pytest.approx(sum_by_hand(model, tokens, len(scored)), rel=1e-5)
    if choice != "A":  # where the stock class stops
        with quiet_lm_eval():
            stock = HFLM(pretrained=model, tokenizer=own, batch_size=1)
        ((expected, _),) = stock.loglikelihood(asked, disable_tqdm=True)
        assert value == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("context", ["", "abc"])
def test_an_empty_choice_is_refused(tokenizer, context):
    lm = make_lm_eval_model(tiny_model("llama").eval(), tokenizer)
    with pytest.raises(
        EvaluationError, match="task 'task': an item asks for the likelihood of an empty"
    ):
        lm.loglikelihood(instances("loglikelihood", [("abc", "d"), (context, "")]))


@pytest.mark.parametrize("context", ["abc d", "<bos>abc d", "abc <eos>", ""])
def test_a_tokenizer_that_ends_every_text_scores_as_one_that_does_not(tokenizer, context):
    model = tiny_model("llama").eval()
    ending = tokenizer_with(tokenizer, ending=True)
    assert ending("a")["input_ids"][-1] == EOS
    values, texts = [], []
    for each in (tokenizer, ending):
        lm = make_lm_eval_model(model, each)
        values.append(lm.loglikelihood(instances("loglikelihood", [(context, "xyz")])))
        prompts_of_both = [(context or "a", SETTINGS[1]), ("longer than it", SETTINGS[1])]
        texts.append(lm.generate_until(instances("generate_until", prompts_of_both)))
    assert values[0] == values[1]
    assert texts[0] == texts[1]
    assert ending("a")["input_ids"][-1] == EOS, "that of the caller has not changed"


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
    assert lm._keeps_padding_out is (architecture in ("MambaForCausalLM", "LlamaForCausalLM"))
    one_by_one = stock(model, tokenizer).generate_until(requests, disable_tqdm=True)
    assert texts == one_by_one
