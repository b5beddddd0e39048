"""evaluator.py: scores against independent computations and the stock harness; errors."""

import json
import logging
import math
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from pydantic import ValidationError
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from optimer_hf.errors import EvaluationError
from optimer_hf.scoring.evaluator import Evaluator
from optimer_hf.scoring.items import check_disjoint, indices_within, spread_indices
from optimer_hf.scoring.objective import Asked, Objective, Term
from optimer_hf.scoring.paired import paired_interval
from optimer_hf.scoring.scores import TermScore
from optimer_hf.scoring.tasks import load_tasks, warn_of_other_weights, warn_of_reported_benchmarks
from tests.support.scores import objective_of
from tests.support.tiny import BOS, tiny_model

CHOICE_TASK = """
task: toy_choice
dataset_path: json
dataset_kwargs: {data_files: {test: choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
metadata: {version: 1}
"""
F1_TASK = CHOICE_TASK.replace("toy_choice", "toy_f1").replace(
    "acc, aggregation: mean", "f1, aggregation: f1"
)
GENERATE_TASK = """
task: toy_generate
dataset_path: json
dataset_kwargs: {data_files: {test: choice.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
filter_list:
  - {name: whole, filter: [{function: take_first}]}
  - {name: first, filter: [{function: regex, regex_pattern: "(.)"}, {function: take_first}]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
metadata: {version: 1}
"""


def write_texts(path: Path, texts) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)
    rows = [
        {
            "question": "".join(rng.choice(list("ab xy"), 12)),
            "choices": [" " + "".join(rng.choice(list("abxy"), n)) for n in (2, 5, 3)],
            "label": int(rng.integers(3)),
        }
        for _ in range(24)
    ]
    (folder / "choice.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    (folder / "toy_choice.yaml").write_text(CHOICE_TASK, encoding="utf-8")
    (folder / "toy_f1.yaml").write_text(F1_TASK, encoding="utf-8")
    (folder / "toy_generate.yaml").write_text(GENERATE_TASK, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def model(kind):
    return tiny_model(kind).eval()


def evaluate_all(model, tokenizer, objective: Objective) -> dict[str, TermScore]:
    evaluator = Evaluator(model, tokenizer, [objective])
    return evaluator.evaluate([Asked(term, objective.limit_of(term)) for term in objective.terms])


# -- texts -----------------------------------------------------------------------------------------


def bits_and_bytes(model, text: str) -> tuple[float, float]:
    """The definition, for a text that fits the context: BOS once, then one token a byte."""
    ids = torch.tensor([[BOS, *reference_ids(text)]])
    with torch.no_grad():
        log_p = torch.log_softmax(model(ids).logits[0, :-1].float(), -1)
    nats = log_p.gather(1, ids[0, 1:, None]).double().sum().item()
    return -nats / math.log(2), len(text.encode())


def reference_ids(text: str) -> list[int]:
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return (
        [3 + alphabet.index(char) for char in byte_level.pre_tokenize_str(text)[0][0]]
        if text
        else []
    )


TEXTS = ["aa ab ba", "xyz " * 20, "é 日本", "b", " leading space", "a\nb\n"]


def test_bits_per_byte_of_texts_equal_an_independent_computation(model, tokenizer, tmp_path):
    objective = objective_of({"text": write_texts(tmp_path / "t.jsonl", TEXTS)})
    found = evaluate_all(model, tokenizer, objective)["t"]
    expected = [bits_and_bytes(model, text) for text in TEXTS]
    for item, (bits, n_bytes) in zip(found.items, expected, strict=True):
        assert item == pytest.approx((bits, n_bytes), rel=1e-5)
    assert found.score == pytest.approx(
        sum(b for b, _ in expected) / sum(n for _, n in expected), rel=1e-5
    )
    assert found.higher_is_better is False


def test_bos_comes_once_not_twice(model, tokenizer, tmp_path):
    path = write_texts(tmp_path / "t.jsonl", ["aa ab"])
    (bits, _), *_ = evaluate_all(model, tokenizer, objective_of({"text": path}))["t"].items
    ids = torch.tensor([[BOS, BOS, *reference_ids("aa ab")]])
    with torch.no_grad():
        log_p = (
            torch.log_softmax(model(ids).logits[0, :-1], -1)
            .gather(1, ids[0, 1:, None])[1:]
            .sum()
            .item()
        )
    assert bits == pytest.approx(bits_and_bytes(model, "aa ab")[0], rel=1e-5)
    assert bits != pytest.approx(-log_p / math.log(2), rel=1e-5)


def test_documents_longer_than_the_context_equal_the_stock_rolling_windows(
    model, tokenizer, tmp_path
):
    texts = ["ab xy " * n for n in (30, 43, 90, 200)]  # 256 tokens are the context
    found = evaluate_all(
        model, tokenizer, objective_of({"text": write_texts(tmp_path / "t.jsonl", texts)})
    )["t"]
    raw = tokenizer.backend_tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    raw.post_processor = processors.ByteLevel(
        trim_offsets=False
    )  # adds no BOS, so the stock windows have one
    bare = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        model_max_length=256,
    )
    stock = HFLM(pretrained=model, tokenizer=bare, batch_size=1)
    from lm_eval.api.instance import Instance

    requests = [
        Instance("loglikelihood_rolling", {}, (text,), index) for index, text in enumerate(texts)
    ]
    expected = stock.loglikelihood_rolling(requests, disable_tqdm=True)
    assert [bits for bits, _ in found.items] == pytest.approx(
        [-nats / math.log(2) for nats in expected], rel=1e-5
    )


def test_scores_of_a_bfloat16_model_use_a_float32_softmax(tokenizer, tmp_path):
    model = tiny_model("gemma", dtype=torch.bfloat16).eval()
    found = evaluate_all(
        model, tokenizer, objective_of({"text": write_texts(tmp_path / "t.jsonl", TEXTS[:2])})
    )["t"]
    for (bits, _), text in zip(found.items, TEXTS, strict=False):
        assert bits == pytest.approx(bits_and_bytes(model, text)[0], rel=2e-3)


def test_a_score_follows_the_weights_of_the_live_model(tokenizer, tmp_path):
    model = tiny_model("gemma").eval()
    objective = objective_of({"text": write_texts(tmp_path / "t.jsonl", TEXTS)})
    evaluator = Evaluator(model, tokenizer, [objective])
    first = evaluator.evaluate([Asked(objective.terms[0], None)])
    model.load_state_dict(tiny_model("gemma", seed=5).state_dict())
    second = evaluator.evaluate([Asked(objective.terms[0], None)])
    model.load_state_dict(tiny_model("gemma").state_dict())
    assert second["t"].items != first["t"].items
    assert evaluator.evaluate([Asked(objective.terms[0], None)])["t"].items == first["t"].items


def test_a_limit_scores_the_spread_items_and_they_equal_those_of_the_whole_file(
    tokenizer, tmp_path
):
    model = tiny_model("gemma").eval()
    path = write_texts(tmp_path / "t.jsonl", [f"text number {n}" for n in range(9)])
    whole = evaluate_all(model, tokenizer, objective_of({"text": path}))["t"].items
    some = evaluate_all(model, tokenizer, objective_of({"text": path}, limit=3))["t"].items
    assert [bits for bits, _ in some] == pytest.approx(
        [whole[index][0] for index in spread_indices(9, 3)], rel=1e-6
    )


def test_search_and_test_terms_of_one_name_read_their_own_files(tokenizer, tmp_path):
    search = objective_of({"text": write_texts(tmp_path / "ja.search.jsonl", ["aaaa"])})
    sealed = objective_of({"text": write_texts(tmp_path / "ja.test.jsonl", ["x", "yy"])})
    evaluator = Evaluator(tiny_model("gemma").eval(), tokenizer, [search, sealed])
    assert search.terms[0].label == sealed.terms[0].label == "ja"
    assert len(evaluator.evaluate([Asked(search.terms[0], None)])["ja"].items) == 1
    assert len(evaluator.evaluate([Asked(sealed.terms[0], None)])["ja"].items) == 2


def test_texts_that_look_like_templates_lists_or_numbers_are_scored_as_they_are(
    tokenizer, tmp_path
):
    model = tiny_model("gemma").eval()
    texts = ["{{ 1 + 1 }}", "['a', 'b']", "42", "{% raw %}", "2024-01-01", "12:30:00", "null"]
    found = evaluate_all(
        model, tokenizer, objective_of({"text": write_texts(tmp_path / "t.jsonl", texts)})
    )["t"]
    assert found.items == [pytest.approx(bits_and_bytes(model, text), rel=1e-5) for text in texts]


def test_texts_that_all_look_like_dates_are_scored_as_text(tokenizer, tmp_path):
    model = tiny_model("gemma").eval()
    texts = [f"2024-01-{day:02d}" for day in range(1, 4)]
    found = evaluate_all(
        model, tokenizer, objective_of({"text": write_texts(tmp_path / "t.jsonl", texts)})
    )["t"]
    assert found.items == [pytest.approx(bits_and_bytes(model, text), rel=1e-5) for text in texts]


def test_another_text_field_is_read_and_a_missing_one_is_an_error(tokenizer, tmp_path):
    model = tiny_model("gemma").eval()
    (tmp_path / "t.jsonl").write_text('{"body": "aa ab"}\n', encoding="utf-8")
    path = tmp_path / "t.jsonl"
    found = evaluate_all(model, tokenizer, objective_of({"text": path, "text_field": "body"}))["t"]
    assert found.items == [pytest.approx(bits_and_bytes(model, "aa ab"), rel=1e-5)]
    expected = r"term 't': .*t\.jsonl:1: no text in field 'text'; found \['body'\]"
    with pytest.raises(EvaluationError, match=expected):
        evaluate_all(model, tokenizer, objective_of({"text": path}))


def test_tokens_are_counted(tokenizer, tmp_path):
    objective = objective_of({"text": write_texts(tmp_path / "t.jsonl", ["aaaa", "bb"])})
    evaluator = Evaluator(tiny_model("gemma").eval(), tokenizer, [objective])
    evaluator.evaluate([Asked(objective.terms[0], None)])
    assert (
        evaluator.n_tokens == 6
    )  # BOS a a a, BOS b: the last token of a text is predicted, not read
    assert evaluator.forward_seconds > 0


# -- tasks of the harness --------------------------------------------------------------------------


def test_accuracies_of_a_local_task_equal_the_stock_harness(
    model, tokenizer, tasks_dir, monkeypatch
):
    objective = objective_of(
        {"task": "toy_choice", "metric": "acc", "name": "acc"},
        {"task": "toy_choice", "metric": "acc_norm", "name": "norm"},
        include_path=tasks_dir,
    )
    found = evaluate_all(model, tokenizer, objective)
    monkeypatch.chdir(tasks_dir)
    stock = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=["toy_choice"],
        task_manager=TaskManager(include_path=str(tasks_dir), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    assert found["acc"].score == pytest.approx(stock["results"]["toy_choice"]["acc,none"])
    assert found["norm"].score == pytest.approx(stock["results"]["toy_choice"]["acc_norm,none"])
    logged = sorted(stock["samples"]["toy_choice"], key=lambda row: row["doc_id"])
    assert [item[0] for item in found["acc"].items] == [row["acc"] for row in logged]
    assert found["acc"].higher_is_better and len(found["acc"].items) == 24
    assert 0 < found["acc"].score < 1


def test_generated_answers_equal_the_stock_harness_under_the_chosen_filter(
    tokenizer, tasks_dir, monkeypatch
):
    model = tiny_model("llama").eval()
    objective = objective_of(
        {"task": "toy_generate", "metric": "exact_match,first", "limit": 4}, include_path=tasks_dir
    )
    found = evaluate_all(model, tokenizer, objective)["toy_generate"]
    monkeypatch.chdir(tasks_dir)
    stock = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4),
        tasks=["toy_generate"],
        task_manager=TaskManager(include_path=str(tasks_dir), include_defaults=False),
        samples={"toy_generate": spread_indices(24, 4)},
        bootstrap_iters=0,
    )
    assert len(found.items) == 4
    assert found.score == pytest.approx(stock["results"]["toy_generate"]["exact_match,first"])


def test_examples_in_the_prompt_change_the_scores(tokenizer, tasks_dir):
    model = tiny_model("llama").eval()
    term = {"task": "toy_choice", "metric": "acc"}
    plain = evaluate_all(model, tokenizer, objective_of(term, include_path=tasks_dir))["toy_choice"]
    shots = evaluate_all(
        model, tokenizer, objective_of(term | {"num_fewshot": 2}, include_path=tasks_dir)
    )
    assert shots["toy_choice"].n_tokens > 2 * plain.n_tokens


# -- several terms of one task ---------------------------------------------------------------------

EXAMPLES = [{"question": q, "choices": [" a", " b"], "label": n % 2} for n, q in enumerate("pqrs")]
PAIRS = [  # of terms of one task that differ in one field
    ({"limit": 2}, {"limit": 6}),
    ({"limit": 6}, {"limit": 2}),
    ({"limit": 5}, {}),
    ({"limit": 100}, {"limit": 1}),
    ({"metric": "acc"}, {"metric": "acc_norm"}),
    ({"num_fewshot": 2}, {}),
    ({"num_fewshot": 1}, {"num_fewshot": 3, "limit": 4}),
    ({"hash_range": [0, 0.5]}, {"hash_range": [0.5, 1]}),
    ({"hash_range": [0, 0.6], "limit": 3}, {"hash_range": [0.3, 1]}),
    ({"hash_range": [0, 0.6]}, {}),
    ({"weight": 0}, {"weight": 2}),
    ({"rescore_only": True, "limit": 3}, {"limit": 4}),
]
GENERATED = [
    ({"generation": {"max_gen_toks": 1}}, {"generation": {"max_gen_toks": 6}}),
    ({"generation": {"until": ["a"]}}, {}),
    ({"metric": "exact_match,whole"}, {"metric": "exact_match,first", "limit": 3}),
]


CASES = [("toy_choice", "acc_norm", pair) for pair in PAIRS]
CASES += [("toy_generate", "exact_match,first", pair) for pair in GENERATED]


@pytest.fixture(scope="module")
def alone(tokenizer, tasks_dir, tmp_path_factory):
    """Return the terms of all cases by name, an evaluator of them, and a function that returns what
    stock lm-eval gives each item of a term.
    """
    folder, model = tmp_path_factory.mktemp("alone"), tiny_model("llama").eval()
    for text in (CHOICE_TASK, GENERATE_TASK):
        task = text.replace("choice.jsonl", str(tasks_dir / "choice.jsonl"))
        task += f"fewshot_config: {{sampler: first_n, samples: {EXAMPLES}}}\n"
        task = task.replace('"{{choices[label]}}"', '"a"')  # some answers are right
        (folder / f"{text.split()[1]}.yaml").write_text(task, encoding="utf-8")
    manager = TaskManager(include_path=str(folder), include_defaults=False)

    @cache
    def logged(task, num_fewshot, generation):
        return simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=24),
            tasks=[task],
            num_fewshot=num_fewshot,
            gen_kwargs=generation and json.loads(generation),
            task_manager=manager,
            bootstrap_iters=0,
            log_samples=True,
        )["samples"][task]

    def items_of(term, task):
        generation = term.get("generation")
        found = logged(term["task"], term.get("num_fewshot"), generation and json.dumps(generation))
        name, _, chain = term["metric"].partition(",")
        kept = [row for row in found if row["filter"] == (chain or found[0]["filter"])]
        kept.sort(key=lambda row: row["doc_id"])
        within = indices_within(task, tuple(term.get("hash_range", (0.0, 1.0))), "document")
        chosen = [within[index] for index in spread_indices(len(within), term.get("limit"))]
        return chosen, [kept[index][name] for index in chosen]

    terms = {
        name: {"task": task, "metric": metric, "name": name} | fields
        for at, (task, metric, pair) in enumerate(CASES)
        for name, fields in zip((f"{at}a", f"{at}b"), pair, strict=True)
    }
    evaluator = Evaluator(model, tokenizer, [objective_of(*terms.values(), include_path=folder)])
    return terms, evaluator, items_of


@pytest.mark.parametrize("at", range(len(CASES)))
def test_terms_of_one_task_are_each_scored_as_lm_eval_scores_them_alone(alone, at):
    terms, evaluator, items_of = alone
    pair = [terms[f"{at}{name}"] for name in "ab"]
    found = evaluator.evaluate([Asked(Term.model_validate(t), t.get("limit")) for t in pair])
    places = []
    for term in pair:
        chosen, expected = items_of(term, evaluator.tasks[term["task"]])
        places.append(set(chosen))
        assert [top for top, _ in found[term["name"]].items] == pytest.approx(expected)
    documents = [set(score.documents) for score in found.values()]
    assert len(documents[0] & documents[1]) == len(places[0] & places[1])
    assert [len(each) for each in documents] == [len(each) for each in places]


def test_terms_of_one_file_are_each_scored_on_their_own_items(tokenizer, tmp_path):
    model, texts = tiny_model("gemma").eval(), [f"text number {n}" for n in range(9)]
    path = write_texts(tmp_path / "t.jsonl", texts)
    limits = {"a": 2, "b": 5, "c": None}
    terms = [{"text": path, "name": name, "limit": limit} for name, limit in limits.items()]
    terms[1]["metric"] = "byte_perplexity"
    found = evaluate_all(model, tokenizer, objective_of(*terms))
    for name, limit in limits.items():
        expected = [bits_and_bytes(model, texts[index]) for index in spread_indices(9, limit)]
        assert found[name].items == [pytest.approx(item, rel=1e-5) for item in expected]


@pytest.mark.parametrize(
    ("field", "value"),
    [("limit", 3), ("num_fewshot", 1), ("generation", {"until": ["x"]}), ("hash_range", [0, 0.5])],
)
def test_a_constraint_about_a_term_asks_as_the_term_does(field, value):
    term = {"task": "a", "metric": "acc"}
    limited = {**term, field: value}
    bound = {"max_relative_to_base": 0.1}
    with pytest.raises(ValidationError, match=f"'a' has the name of a term with another {field}"):
        objective_of(term, constraints=[limited | bound])
    assert objective_of(limited, constraints=[term | bound]).scored_terms == [
        objective_of(limited).terms[0]
    ]
    assert objective_of(limited, constraints=[limited | bound])


def test_a_constraint_that_names_no_metric_has_that_of_its_term():
    term, bound = {"task": "a", "metric": "acc"}, {"task": "a", "max_relative_to_base": 0.1}
    objective = objective_of(term, constraints=[bound])
    assert objective.constraints[0].metric == "acc"
    assert objective == objective_of(term, constraints=[bound | {"metric": "acc"}])
    assert objective == Objective.model_validate(objective.model_dump())
    for metric in ("bits_per_byte", "acc_norm"):  # the first is the default
        with pytest.raises(ValidationError, match="'a' has the name of a term with another metric"):
            objective_of(term, constraints=[bound | {"metric": metric}])


def test_a_constraint_about_a_function_has_the_direction_of_its_term():
    term = {"function": "brevity", "higher_is_better": True}
    bound = {"max_relative_to_base": 0.1}
    assert objective_of(term, constraints=[term | bound])
    with pytest.raises(ValidationError, match="a term with another higher_is_better"):
        objective_of(term, constraints=[term | bound | {"higher_is_better": False}])


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (
            {"task": "toy_choise", "metric": "acc"},
            r"no task named 'toy_choise' in lm-eval or .*toy_choice",
        ),
        ({"task": "toy_choice", "metric": "accc"}, r"has no metric 'accc'.* Did you mean 'acc'"),
        ({"task": "toy_f1", "metric": "f1"}, r"metric 'f1' is aggregated by '\w+'; only means"),
    ],
)
def test_a_task_or_metric_that_cannot_be_used_is_an_error_before_any_model(
    tasks_dir, term, message
):
    with pytest.raises(EvaluationError, match=message):
        load_tasks([objective_of(term, include_path=tasks_dir)])


def test_a_missing_text_file_is_an_error_with_term_and_path(tmp_path):
    with pytest.raises(EvaluationError, match=r"term 'none': .*none\.jsonl: no such file"):
        load_tasks([objective_of({"text": tmp_path / "none.jsonl"})])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.jsonl", '{"text": "a"}\n{"txt": "b"}\n', r"term 't': .*t\.jsonl:2: no text in field"),
        ("t.jsonl", '{"text": ""}\n', r"term 't': .*t\.jsonl: holds no text to score"),
        (
            "t.txt",
            "hello",
            r"term 't': .*t\.txt: found a file that ends in '\.txt', expected a JSONL file",
        ),
    ],
)
def test_a_text_file_is_read_to_its_end_before_it_is_scored(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(EvaluationError, match=message):
        load_tasks([objective_of({"text": tmp_path / name})])


def test_a_task_that_runs_what_a_model_writes_is_refused_before_anything_is_loaded(
    tasks_dir, tmp_path
):
    (tmp_path / "choice.jsonl").write_text((tasks_dir / "choice.jsonl").read_text())
    (tmp_path / "toy.yaml").write_text(GENERATE_TASK + "unsafe_code: true\n")
    term = {"task": "toy_generate", "metric": "exact_match"}
    with pytest.raises(EvaluationError, match=r"'toy_generate' runs the code that a model writes"):
        load_tasks([objective_of(term, include_path=tmp_path)])


def test_a_group_of_tasks_and_a_missing_folder_of_tasks_are_named(tasks_dir, tmp_path):
    (tmp_path / "group.yaml").write_text("group: toys\ntask: [toy_choice]\n")
    for path in tasks_dir.glob("*.yaml"):
        (tmp_path / path.name).write_text(path.read_text())
    term = {"task": "toys", "metric": "acc"}
    with pytest.raises(EvaluationError, match=r"'toys' is a group of tasks .* Name its tasks"):
        load_tasks([objective_of(term, include_path=tmp_path)])
    with pytest.raises(EvaluationError, match=r"include_path: .*gone: no such directory"):
        load_tasks([objective_of(term, include_path=tmp_path / "gone")])


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (
            {"task": "toy_choice", "metric": "acc", "num_fewshot": 99},
            r"num_fewshot: found 99, but 'toy_choice' has \d+ examples to draw from\. Lower it",
        ),
        (
            {"task": "toy_generate", "metric": "exact_match", "generation": {"temprature": 1}},
            r"generation: unknown field 'temprature'\. Did you mean 'temperature'\?",
        ),
    ],
)
def test_settings_that_no_item_can_be_asked_with_are_refused(tasks_dir, term, message):
    with pytest.raises(EvaluationError, match=message):
        load_tasks([objective_of(term, include_path=tasks_dir)])


def test_all_samples_of_a_task_may_be_examples(tmp_path, tasks_dir):
    samples = [{"question": "a", "choices": ["b", "c"], "label": 0}] * 2
    task = CHOICE_TASK.replace("choice.jsonl", str(tasks_dir / "choice.jsonl"))
    task += f"fewshot_config: {{sampler: first_n, samples: {samples}}}\n"
    (tmp_path / "toy_choice.yaml").write_text(task)
    term = {"task": "toy_choice", "metric": "acc"}
    assert load_tasks([objective_of(term | {"num_fewshot": 2}, include_path=tmp_path)])
    with pytest.raises(EvaluationError, match="found 3, but 'toy_choice' has 2 examples"):
        load_tasks([objective_of(term | {"num_fewshot": 3}, include_path=tmp_path)])


def test_an_unreadable_task_file_is_an_error_with_its_name(tmp_path):
    (tmp_path / "toy_broken.yaml").write_text(
        CHOICE_TASK.replace("toy_choice", "toy_broken").replace("choice.jsonl", "gone.jsonl"),
        encoding="utf-8",
    )
    with pytest.raises(EvaluationError, match="task 'toy_broken' cannot be loaded"):
        load_tasks([objective_of({"task": "toy_broken", "metric": "acc"}, include_path=tmp_path)])


def test_an_unknown_filter_lists_those_of_the_task(tokenizer, tasks_dir):
    objective = objective_of(
        {"task": "toy_choice", "metric": "acc,strict", "limit": 1}, include_path=tasks_dir
    )
    with pytest.raises(EvaluationError, match=r"no filter 'strict'\. Known: none"):
        evaluate_all(tiny_model("gemma").eval(), tokenizer, objective)


def test_a_metric_of_several_filters_is_scored_with_the_first_and_that_is_said(tasks_dir, caplog):
    term = {"task": "toy_generate", "metric": "exact_match", "name": "bare"}
    load_tasks([objective_of(term, include_path=tasks_dir)])
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "term 'bare': task 'toy_generate' has 2 filters, and 'exact_match' alone is scored with "
        "the first. Say which in `metric`: exact_match,whole, exact_match,first"
    ]
    caplog.clear()
    load_tasks([objective_of(term | {"metric": "exact_match,first"}, include_path=tasks_dir)])
    assert not caplog.records


def test_scores_that_are_not_numbers_raise(tokenizer, tmp_path):
    model = tiny_model("gemma").eval()
    objective = objective_of({"text": write_texts(tmp_path / "t.jsonl", TEXTS)})
    evaluator = Evaluator(model, tokenizer, [objective])
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(
        EvaluationError, match="term 't': the score of item 0 is not a finite number"
    ):
        evaluator.evaluate([Asked(objective.terms[0], None)])


# -- perplexities, functions, generation, hash ranges ----------------------------------------------


def test_byte_perplexity_is_two_to_the_bits_per_byte(model, tokenizer, tmp_path):
    texts = ["some text", "and some more of it", "x y z", *(f"text {n} of ten" for n in range(10))]
    path = write_texts(tmp_path / "a.jsonl", texts)
    objective = objective_of(
        {"text": str(path), "name": "bits"},
        {"text": str(path), "name": "perplexity", "metric": "byte_perplexity"},
    )
    found = evaluate_all(model, tokenizer, objective)
    assert found["perplexity"].score == pytest.approx(2 ** found["bits"].score)
    assert not found["perplexity"].higher_is_better
    worse = TermScore(
        [(top + 8, bottom) for top, bottom in found["perplexity"].items], False, 0, True
    )
    better = paired_interval(
        objective_of({"text": "p", "name": "perplexity", "metric": "byte_perplexity"}),
        found,
        {"perplexity": worse},
        found,
    )
    assert better.low > 0, "an interval of perplexities resamples perplexities"
    assert better.difference == pytest.approx(worse.score / found["perplexity"].score - 1)


def test_a_python_function_can_be_a_term(tokenizer):
    model = tiny_model().eval()

    def norms(model, tokenizer, limit):
        return [float(p.detach().norm()) for p in list(model.parameters())[:limit]]

    objective = objective_of({"function": "norms", "higher_is_better": False, "limit": 3})
    evaluator = Evaluator(model, tokenizer, [objective], functions={"norms": norms})
    found = evaluator.evaluate([Asked(objective.terms[0], 3)])["norms"]
    assert [top for top, _ in found.items] == norms(model, tokenizer, 3)
    assert not found.higher_is_better
    with pytest.raises(EvaluationError, match=r"no function 'norms' was given\. Name its file"):
        Evaluator(model, tokenizer, [objective])
    broken = Evaluator(
        model, tokenizer, [objective], functions={"norms": lambda *_: [float("nan")]}
    )
    with pytest.raises(EvaluationError, match="returns a finite number for each item"):
        broken.evaluate([Asked(objective.terms[0], 3)])


def test_generation_options_reach_the_harness_and_a_cap_is_always_set(tokenizer, tasks_dir):
    term = {"task": "toy_generate", "metric": "exact_match,whole", "generation": {"temperature": 1}}
    objective = objective_of(term, include_path=str(tasks_dir))
    options = load_tasks([objective])["toy_generate"].config.generation_kwargs
    assert (options["temperature"], options["max_gen_toks"], options["until"]) == (1, 4, ["\n"])
    uncapped = tasks_dir / "uncapped"
    uncapped.mkdir()
    text = GENERATE_TASK.replace(", max_gen_toks: 4", "").replace("choice.jsonl", "../choice.jsonl")
    (uncapped / "t.yaml").write_text(text, encoding="utf-8")
    objective = objective_of(term, include_path=str(uncapped))
    assert load_tasks([objective])["toy_generate"].config.generation_kwargs["max_gen_toks"] == 256


@pytest.mark.parametrize(
    ("own", "generation", "message"),
    [
        (4, {"max_gen_toks": 256}, r"generation\.max_gen_toks: found 256, but .* 256 tokens"),
        (4, {"max_new_tokens": 9999}, r"generation\.max_new_tokens: found 9,999"),
        (1024, {}, r"task 'toy_generate' generates up to 1,024 tokens, but the model's window"),
        (None, {}, r"task 'toy_generate' generates up to 256 tokens"),
    ],
)
def test_a_task_that_generates_more_than_the_window_holds_is_refused_before_it_is_scored(
    own, generation, message, tokenizer, tmp_path, tasks_dir
):
    shutil.copy(tasks_dir / "choice.jsonl", tmp_path)
    task = GENERATE_TASK.replace(", max_gen_toks: 4", f", max_gen_toks: {own}" if own else "")
    (tmp_path / "toy_generate.yaml").write_text(task, encoding="utf-8")
    term = {"task": "toy_generate", "metric": "exact_match,whole", "generation": generation}
    objective = objective_of(term, include_path=tmp_path)
    with pytest.raises(EvaluationError, match=f"term 'toy_generate': {message}"):
        Evaluator(tiny_model("llama"), tokenizer, [objective])


def test_prompts_that_lose_their_beginning_are_counted_before_any_is_answered(
    tokenizer, tasks_dir, caplog
):
    generation = {"max_gen_toks": 250, "until": ["\n"]}
    term = {"task": "toy_generate", "metric": "exact_match,whole", "generation": generation}
    objective = objective_of(term, include_path=tasks_dir, limit=3)
    with caplog.at_level(logging.WARNING):
        evaluate_all(tiny_model("llama"), tokenizer, objective)
    (said,) = [r.message for r in caplog.records if "prompts" in r.message]
    assert said.startswith("task 'toy_generate': 3 of 3 prompts lose their beginning: the model's")
    assert "holds 256 tokens, and 250 of them are for the answer" in said


def test_generation_options_of_a_task_that_does_not_generate_are_refused(tasks_dir):
    term = {"task": "toy_choice", "metric": "acc", "generation": {"temperature": 1}}
    with pytest.raises(EvaluationError, match="'generation' is for tasks that generate"):
        load_tasks([objective_of(term, include_path=str(tasks_dir))])


def test_a_metric_without_a_direction_is_refused(tasks_dir, tmp_path):
    text = CHOICE_TASK.replace(", higher_is_better: true", ", higher_is_better: null")
    (tmp_path / "t.yaml").write_text(
        text.replace("choice.jsonl", str(tasks_dir / "choice.jsonl")), encoding="utf-8"
    )
    with pytest.raises(EvaluationError, match="'acc' of task 'toy_choice' has no direction"):
        load_tasks(
            [objective_of({"task": "toy_choice", "metric": "acc"}, include_path=str(tmp_path))]
        )


def test_a_chat_template_wraps_the_prompts(tokenizer, tasks_dir):
    model = tiny_model().eval()
    chatty = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        chat_template="{% for m in messages %}[{{ m.role }}] {{ m.content }} {% endfor %}> ",
    )
    term = {"task": "toy_choice", "metric": "acc"}
    plain, wrapped = (
        objective_of(term, include_path=str(tasks_dir), apply_chat_template=chat)
        for chat in (False, True)
    )
    tokens = []
    for objective in (plain, wrapped):
        evaluator = Evaluator(model, chatty, [objective])
        evaluator.evaluate([Asked(objective.terms[0], 4)])
        tokens.append(evaluator.n_tokens)
    assert tokens[1] > tokens[0] + 4 * len("[user]  >")


def test_hash_ranges_split_the_items_of_a_task_and_never_overlap(tokenizer, tasks_dir):
    model = tiny_model().eval()
    term = {"task": "toy_choice", "metric": "acc"}
    halves = [
        objective_of(term | {"hash_range": span}, include_path=str(tasks_dir))
        for span in ([0, 0.5], [0.5, 1])
    ]
    whole = objective_of(term, include_path=str(tasks_dir))
    tasks = load_tasks([whole])
    parts = [indices_within(tasks["toy_choice"], h.terms[0].hash_range, "document") for h in halves]
    assert sorted(parts[0] + parts[1]) == list(range(24))
    check_disjoint(*halves, tasks)
    everything = evaluate_all(model, tokenizer, whole)["toy_choice"].items
    for half, indices in zip(halves, parts, strict=True):
        found = evaluate_all(model, tokenizer, half)["toy_choice"].items
        assert found == [everything[index] for index in indices]
    with pytest.raises(EvaluationError, match=r"no item of 'toy_choice' is in hash_range"):
        empty = objective_of(term | {"hash_range": [0.999999, 1]}, include_path=str(tasks_dir))
        Evaluator(model, tokenizer, [empty])


def test_sealed_items_that_the_search_sees_are_refused(tmp_path):
    search = write_texts(tmp_path / "search.jsonl", ["one", "two", "three"])
    test = write_texts(tmp_path / "test.jsonl", ["four", "two", "five"])
    objectives = [objective_of({"text": str(path), "name": "t"}) for path in (search, test)]
    with pytest.raises(
        EvaluationError, match=r"test term 't': 1 of its 3 items are items of the search, too"
    ):
        check_disjoint(*objectives, load_tasks(objectives))


def test_requests_are_built_once_and_answered_anew(tokenizer, tasks_dir):
    model = tiny_model().eval()
    objective = objective_of(
        {"task": "toy_choice", "metric": "acc_norm"}, include_path=str(tasks_dir)
    )
    evaluator = Evaluator(model, tokenizer, [objective])
    task = evaluator.tasks["toy_choice"]
    asked = [Asked(objective.terms[0], 10)]
    first = evaluator.evaluate(asked)
    requests = task.instances
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    second = evaluator.evaluate(asked)
    assert all(a is b for a, b in zip(task.instances, requests, strict=True))
    fresh = Evaluator(model, tokenizer, [objective]).evaluate(asked)
    assert second["toy_choice"].items == fresh["toy_choice"].items != first["toy_choice"].items


def test_benchmarks_that_are_usually_reported_are_warned_of_unless_the_test_seals_others(caplog):
    searched = {"task": "gsm8k_cot", "metric": "exact_match", "hash_range": [0.0, 0.5]}
    own = {"task": "my_own_task", "metric": "acc"}
    for test in (None, objective_of(own)):
        warn_of_reported_benchmarks(objective_of(searched), test)
        assert "gsm8k is usually reported" in caplog.text
        caplog.clear()
    warn_of_reported_benchmarks(objective_of(own), None)
    warn_of_reported_benchmarks(objective_of(searched | {"weight": 0}, own), None)  # fits nothing
    sealed = objective_of(searched | {"hash_range": [0.5, 1.0]})
    warn_of_reported_benchmarks(objective_of(searched), sealed)
    assert not caplog.text


@pytest.mark.parametrize(
    ("weights", "tested", "warned"),
    [
        ((1, 1), (1, 1), False),
        ((0.5, 1), (1, 2), False),
        ((1, 0), (1, 0), False),
        ((1, 0.5), (1, 1), True),
        ((1, 0), (1, 1), True),
    ],
)
def test_a_sealed_test_that_weighs_its_terms_otherwise_is_warned_of(
    caplog, weights, tested, warned
):
    searched, sealed = (
        objective_of(
            *({"task": t, "metric": "acc", "weight": w} for t, w in zip("ab", pair, strict=False))
        )
        for pair in (weights, tested)
    )
    warn_of_other_weights(searched, sealed)
    assert ("so the test asks for something else" in caplog.text) == warned


def test_a_constraint_that_counts_in_the_sealed_test_is_warned_of(caplog):
    math, en = ({"task": name, "metric": "acc"} for name in ("math", "en"))
    searched = objective_of(math, constraints=[{**en, "max_relative_to_base": 0.1}])
    warn_of_other_weights(searched, objective_of(math, {**en, "weight": 0}))
    assert not caplog.text
    warn_of_other_weights(searched, objective_of(math, en))
    assert "so the test asks for something else" in caplog.text


def test_an_answer_longer_than_the_window_is_an_error_with_both_lengths(tokenizer, tasks_dir):
    model = tiny_model().eval()
    row = {"question": "q", "choices": [" a", " " + "b" * 400], "label": 0}
    folder = tasks_dir / "long"
    folder.mkdir()
    (folder / "long.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    text = CHOICE_TASK.replace("toy_choice", "toy_long").replace("choice.jsonl", "long.jsonl")
    (folder / "t.yaml").write_text(text, encoding="utf-8")
    objective = objective_of({"task": "toy_long", "metric": "acc"}, include_path=str(folder))
    with pytest.raises(EvaluationError, match=r"likelihood of 402 tokens, .* window is 256"):
        evaluate_all(model, tokenizer, objective)


def test_examples_in_the_prompt_do_not_depend_on_what_was_scored_before(tokenizer, tasks_dir):
    model = tiny_model().eval()
    term = {"task": "toy_choice", "metric": "acc_norm", "num_fewshot": 3}
    objective = objective_of(term, include_path=str(tasks_dir))

    def prompts(*limits):
        evaluator = Evaluator(model, tokenizer, [objective])
        for limit in limits:
            evaluator.evaluate([Asked(objective.terms[0], limit)])
        return {i.doc_id: i.args[0] for i in evaluator.tasks["toy_choice"].instances}

    whole = prompts(None)
    assert prompts(6, None) == prompts(6, 12, None) == whole
    assert len({prompt[:20] for prompt in whole.values()}) > 3, "items have examples of their own"


def test_examples_from_the_items_themselves_do_not_go_with_a_hash_range(tasks_dir):
    term = {"task": "toy_choice", "metric": "acc", "num_fewshot": 1, "hash_range": [0, 0.5]}
    with pytest.raises(EvaluationError, match="examples of num_fewshot come from the items"):
        load_tasks([objective_of(term, include_path=str(tasks_dir))])


def test_the_same_rows_under_another_template_are_refused_in_the_sealed_test(tasks_dir, tmp_path):
    text = CHOICE_TASK.replace("toy_choice", "toy_other").replace("{{question}}", "Q: {{question}}")
    (tmp_path / "t.yaml").write_text(
        text.replace("choice.jsonl", str(tasks_dir / "choice.jsonl")), encoding="utf-8"
    )
    search = objective_of({"task": "toy_choice", "metric": "acc"}, include_path=str(tasks_dir))
    test = objective_of({"task": "toy_other", "metric": "acc"}, include_path=str(tmp_path))
    with pytest.raises(EvaluationError, match="24 of its 24 items are items of the search"):
        check_disjoint(search, test, load_tasks([search]) | load_tasks([test]))


def test_a_perplexity_beyond_all_numbers_is_an_error_not_a_crash(tokenizer, tmp_path):
    path = write_texts(tmp_path / "a.jsonl", ["some text"])
    model = tiny_model().eval()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1e5)
    objective = objective_of({"text": str(path), "metric": "byte_perplexity"})
    with pytest.raises(EvaluationError, match="not a finite number"):
        evaluate_all(model, tokenizer, objective)


def test_options_that_say_nothing_to_a_term_are_refused_and_a_written_one_reads_back():
    function = {"function": "f", "higher_is_better": True}
    with pytest.raises(ValueError, match="'num_fewshot' means nothing to a 'function'"):
        objective_of(function | {"num_fewshot": 3})
    with pytest.raises(ValueError, match="a 'text' term has no num_fewshot and no generation"):
        objective_of({"text": "a.jsonl", "num_fewshot": 3})
    with pytest.raises(ValueError, match="weighted_mean of different metrics mixes units"):
        objective_of(function, {"text": "a.jsonl"}, combine="weighted_mean")
    for term in (function, {"text": "a.jsonl"}):
        objective = objective_of(term)
        assert Objective.model_validate(objective.model_dump()) == objective


def test_a_task_that_two_objectives_look_up_in_different_folders_is_refused(tmp_path):
    terms = {"terms": [{"task": "arc", "metric": "acc"}]}
    folders = [tmp_path / "a", tmp_path / "b"]
    objectives = [Objective.model_validate(terms | {"include_path": each}) for each in folders]
    with pytest.raises(EvaluationError, match="task 'arc' is looked up in two folders"):
        load_tasks(objectives)
