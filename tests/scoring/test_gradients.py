"""gradients.py: the derivatives of scores against central differences of scores."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from optimer_hf.merging.writer import write_merged
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.scoring import likelihood as likelihood_module
from optimer_hf.scoring.batching import Budget
from optimer_hf.scoring.evaluator import Evaluator
from optimer_hf.scoring.tasks import CHOICE_METRIC
from optimer_hf.searching.trial import ResidentPool
from optimer_hf.study.config import StudyConfig

WEIGHTS = {"lora": 0.6, "dense": -0.4}
STEP = 0.02
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: rows.jsonl}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: {target}
metric_list:
"""
CHOICE = TASK.format(name="toy_choice", kind="multiple_choice", target="label") + (
    "  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
)
ANSWER = TASK.format(
    name="toy_answer", kind="loglikelihood", target='"{{choices[label]}}"'
).replace("doc_to_choice: choices\n", "") + (
    "  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}\n"
    "  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
)
WORDS = """
task: toy_words
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""
SCALED = ANSWER.replace("toy_answer", "toy_scaled").replace(
    "metric_list", "process_results: !function scaled.process\nmetric_list"
)
ROWS = [
    {"question": "ab xy ba", "choices": [" a", " b", " x"], "label": 1},
    {"question": "xyzzy", "choices": [" zyx", " ab ba ab ba", " y"], "label": 0},
    {"question": "ba", "choices": [" yy", " zz"], "label": 1},
    {"question": "the of and aa", "choices": [" the", " of it all", " aa", " b"], "label": 2},
]


@pytest.fixture(scope="module")
def config(tmp_path_factory, make_base, make_adapter, make_tuned, corpus_dir):
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, text in (
        ("choice", CHOICE),
        ("answer", ANSWER),
        ("words", WORDS),
        ("scaled", SCALED),
    ):
        (folder / f"{name}.yaml").write_text(text)
    (folder / "scaled.py").write_text(
        "def process(doc, results):\n    return {'perplexity': 0.5 * results[0][0], 'acc': 1.0}\n"
    )
    base = make_base("gemma", torch.float32)
    text = str(corpus_dir / "aaa.search.jsonl")
    return StudyConfig.model_validate(
        {
            "base_model": str(base.path),
            "vectors": {
                "lora": str(make_adapter(base, 1, r=3)),
                "dense": str(make_tuned(base, "gemma", 2, torch.float32, 0.02)),
            },
            "objective": {
                "terms": [
                    {"text": text, "name": "bits"},
                    {"text": text, "name": "some", "metric": "byte_perplexity", "limit": 3},
                    {"text": str(corpus_dir / "xyz.search.jsonl"), "name": "xyz"},
                    {"task": "toy_choice", "name": "right", "metric": CHOICE_METRIC},
                    {"task": "toy_choice", "name": "accuracy", "metric": "acc", "limit": 2},
                    {"task": "toy_answer", "name": "answers", "metric": "perplexity"},
                    {"task": "toy_words", "name": "words", "metric": "word_perplexity"},
                ],
                "include_path": str(folder),
            },
            "dtype": "float32",
        }
    )


@pytest.fixture(scope="module")
def pool(config):
    return ResidentPool(config)


@pytest.fixture(scope="module")
def expected(config, pool, tokenizer, tmp_path_factory):
    """The central differences of the scores of a model in float64, by label and name."""
    folder = tmp_path_factory.mktemp("merges") / "merge"
    base = ResolvedModel(pool.base.path, "base")
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float64)
    evaluator = Evaluator(model.eval(), tokenizer, [config.objective])

    def scores(weights) -> dict[str, float]:
        write_merged(base, pool.vectors, weights, folder, out_dtype="float32", replace=True)
        tensors = load_file(folder / "model.safetensors")
        model.load_state_dict({name: each.double() for name, each in tensors.items()}, strict=False)
        found = evaluator.evaluate(config.objective.asked_terms("search"))
        return {label: term.score for label, term in found.items()}

    slopes: dict[str, dict[str, float]] = {}
    for name in WEIGHTS:
        one, two, three, four = (
            scores(WEIGHTS | {name: WEIGHTS[name] + step * STEP}) for step in (-2, -1, 1, 2)
        )
        for label in one:
            slope = (8 * (three[label] - two[label]) - (four[label] - one[label])) / (12 * STEP)
            slopes.setdefault(label, {})[name] = slope
    return slopes


@pytest.mark.parametrize("n_tokens", [None, 200, 40, 4])
def test_gradients_of_scores_equal_central_differences(config, pool, expected, n_tokens):
    """Also in batches that hold one item, and where the choices of an item do not fit into one."""
    asked = config.objective.asked_terms("search")
    plain = pool.score(WEIGHTS, asked)
    likelihoods = pool._engine.lm._likelihoods
    likelihoods._gradient_budget = None if n_tokens is None else Budget(n_tokens)
    scored = pool.score(WEIGHTS, asked, gradients=True)
    assert scored.gradients.keys() == {"bits", "some", "words", "xyz", "right", "answers"}
    for label, gradient in scored.gradients.items():
        assert gradient == pytest.approx(expected[label], rel=1e-3, abs=2e-5), label
    for label, term in plain.terms.items():
        assert scored.terms[label].score == pytest.approx(term.score, rel=1e-6)
    assert scored.seconds["backward"] > 0 and "backward" not in plain.seconds


def test_a_trial_after_one_with_gradients_scores_the_same_bits(config, pool):
    asked = config.objective.asked_terms("search")
    pool.score(WEIGHTS, asked, gradients=True)
    after = pool.score(WEIGHTS, asked)
    fresh = ResidentPool(config).score(WEIGHTS, asked)
    assert after.terms == fresh.terms and after.gradients == {}
    model = pool._engine.lm.model
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_batch_that_does_not_fit_changes_no_gradient(config, pool):
    """The device lacks memory in a backward pass, after some of its derivatives were taken."""
    asked = config.objective.asked_terms("search")
    likelihoods = pool._engine.lm._likelihoods
    likelihoods._gradient_budget = Budget(400)
    whole = pool.score(WEIGHTS, asked, gradients=True)
    first = pool._engine.lm.model.base_model.layers[0]
    n_failures = 0

    def refuse(module, gradients, _) -> None:
        nonlocal n_failures
        if gradients[0].numel() // gradients[0].shape[-1] > 150:
            n_failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory.")

    hook = first.register_full_backward_hook(refuse)
    halved = pool.score(WEIGHTS, asked, gradients=True)
    hook.remove()
    assert n_failures > 1 and likelihoods._gradient_budget.n_tokens < 400
    for label, gradient in whole.gradients.items():
        assert halved.gradients[label] == pytest.approx(gradient, rel=1e-4, abs=1e-6)


def test_long_rows_are_computed_twice_rather_than_kept(config, pool, monkeypatch):
    asked = config.objective.asked_terms("search")
    likelihoods, opened = pool._engine.lm._likelihoods, []
    likelihoods._gradient_budget = Budget(1024)
    kept = pool.score(WEIGHTS, asked, gradients=True)
    recompute = likelihood_module.recompute_layers
    monkeypatch.setattr(
        likelihood_module, "recompute_layers", lambda model: opened.append(1) or recompute(model)
    )
    likelihoods._gradient_budget = Budget(8)
    again = pool.score(WEIGHTS, asked, gradients=True)
    assert opened
    for label, gradient in kept.gradients.items():
        assert again.gradients[label] == pytest.approx(gradient, rel=1e-4, abs=1e-6)


def test_gradients_in_bfloat16_are_near_those_in_float32(config, pool):
    asked = config.objective.asked_terms("search")
    exact = pool.score(WEIGHTS, asked, gradients=True).gradients
    rounded = ResidentPool(config.model_copy(update={"dtype": "bfloat16"}))
    found = rounded.score(WEIGHTS, asked, gradients=True).gradients
    for label, gradient in exact.items():
        size = max(map(abs, gradient.values()))
        assert found[label] == pytest.approx(gradient, abs=0.05 * size), label


def changed(config: StudyConfig, **changes) -> StudyConfig:
    return StudyConfig.model_validate(config.model_dump(mode="json") | changes)


def test_only_free_weights_have_gradients(config):
    vectors = {name: vector.model_dump() for name, vector in config.vectors.items()}
    fixed = changed(config, vectors=vectors | {"dense": vectors["dense"] | {"fixed": 1.0}})
    asked = fixed.objective.asked_terms("search")[:1]
    scored = ResidentPool(fixed).score({"lora": 0.6, "dense": 1.0}, asked, gradients=True)
    assert scored.gradients["bits"].keys() == {"lora"}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("spread", "device_map"),
        ("scaled head", "no single matrix product"),
        ("no derivative", "the backward pass failed"),
    ],
)
def test_what_has_no_gradients_says_so_and_is_scored(config, caplog, monkeypatch, kind, message):
    if kind == "spread":
        config = changed(config, device_map={"": "cpu"})
    pool = ResidentPool(config)
    asked = config.objective.asked_terms("search")
    expected = pool.score(WEIGHTS, asked)
    if kind == "scaled head":
        pool._engine.lm._likelihoods = None
    if kind == "no derivative":
        norm = pool._engine.lm.model.base_model.norm
        norm.register_forward_hook(lambda module, inputs, output: Detached.apply(output))
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        scored = pool.score(WEIGHTS, asked, gradients=True)
        assert scored.gradients == {}
        for label, term in expected.terms.items():
            assert scored.terms[label].score == pytest.approx(term.score, rel=1e-5)
    assert caplog.text.count(message) == 1


class Detached(torch.autograd.Function):
    """An operation that nobody wrote the derivative of."""

    @staticmethod
    def forward(ctx, states):
        return states.clone()


def test_a_task_that_changes_its_likelihoods_has_values_only(config, caplog):
    objective = config.objective.model_dump(mode="json", exclude_defaults=True)
    term = {"task": "toy_scaled", "metric": "perplexity"}
    config = changed(config, objective=objective | {"terms": [term]})
    scored = ResidentPool(config).score(
        WEIGHTS, config.objective.asked_terms("search"), gradients=True
    )
    assert scored.gradients == {} and "its task changes the sums" in caplog.text


def test_the_choice_metric_is_the_share_of_the_right_answer(config, pool):
    asked = config.objective.asked_terms("search")
    scored = pool.score(WEIGHTS, asked).terms["right"]
    model, encode = pool._engine.lm.model, pool._engine.lm.tok_encode

    def log_likelihood(row, choice: str) -> torch.Tensor:
        ids = torch.tensor([encode(row["question"] + choice)])
        n = len(encode(choice, add_special_tokens=False))
        with torch.no_grad():
            values = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        return values[-n:].sum()

    for row, (value, weight) in zip(ROWS, scored.items, strict=True):
        choices = torch.stack([log_likelihood(row, f" {choice}") for choice in row["choices"]])
        assert value == pytest.approx(choices.log_softmax(0)[row["label"]].item(), abs=1e-4)
        assert weight == 1.0
    assert scored.higher_is_better
