"""gradients.py: the derivatives of scores against central differences of scores."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from optimer_hf.merging.writer import write_merged
from optimer_hf.models.layout import ResolvedModel
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
    for name, text in (("choice", CHOICE), ("answer", ANSWER), ("scaled", SCALED)):
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
    assert scored.gradients.keys() == {"bits", "some", "xyz", "right", "answers"}
    for label, gradient in scored.gradients.items():
        assert gradient == pytest.approx(expected[label], rel=1e-3, abs=2e-5), label
    for label, term in plain.terms.items():
        assert scored.terms[label].score == pytest.approx(term.score, rel=1e-6)
    assert scored.seconds["backward"] > 0 and "backward" not in plain.seconds
