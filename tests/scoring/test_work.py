"""work.py: tokens of items, counted without a model."""

import json
from pathlib import Path

import pytest
import yaml

from optimer_hf.errors import EvaluationError
from optimer_hf.models.loader import model_without_weights, read_tokenizer
from optimer_hf.scoring.objective import Objective
from optimer_hf.scoring.work import ItemWork, count_work, key_of_items

QUESTIONS = [{"q": "a" * n, "choices": ["yes", "nope"], "answer": 0} for n in range(1, 41)]
OUTPUTS = {
    "multiple_choice": {"doc_to_choice": "{{choices}}", "doc_to_target": "answer"},
    "generate_until": {
        "doc_to_target": "yes",
        "generation_kwargs": {"until": ["x"], "max_gen_toks": 12},
    },
}


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(map(json.dumps, QUESTIONS)))
    for kind, fields in OUTPUTS.items():
        task = {
            "task": f"my_{kind}",
            "output_type": kind,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": str(file)},
            "test_split": "train",
            "doc_to_text": "{{q}}",
            **fields,
        }
        (tmp_path / f"{kind}.yaml").write_text(yaml.safe_dump(task))
    return tmp_path


def count(objective: Objective, base) -> list[ItemWork]:
    model, tokenizer = model_without_weights(base.path), read_tokenizer(base.path)
    works = count_work([objective], model, tokenizer)
    return [works[key_of_items(term)] for term in objective.scored_terms]


def test_texts_are_read_whole(make_base, tmp_path: Path):
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"{n:02d}" + "a" * 18}) for n in range(50)))
    (work,) = count(Objective.model_validate({"terms": [{"text": str(file)}]}), make_base("gemma"))
    assert (work.n_items, work.n_inputs, work.n_written) == (50, 1, 0)
    assert 20 <= work.n_read <= 22  # with what begins a text


def test_each_choice_is_an_input_and_the_length_is_the_mean_of_all_items(make_base, task_folder):
    terms = [{"task": "my_multiple_choice", "metric": "acc"}]
    objective = Objective.model_validate({"terms": terms, "include_path": str(task_folder)})
    (work,) = count(objective, make_base("gemma"))
    assert (work.n_items, work.n_inputs, work.n_written) == (40, 2, 0)
    assert work.n_read == pytest.approx(20.5 + 1 + 3.5, abs=2)


@pytest.mark.parametrize(("generation", "n_written"), [({}, 12), ({"max_gen_toks": 7}, 7)])
def test_answers_count_with_their_longest_length(make_base, task_folder, generation, n_written):
    terms = [{"task": "my_generate_until", "metric": "exact_match", "generation": generation}]
    objective = Objective.model_validate({"terms": terms, "include_path": str(task_folder)})
    (work,) = count(objective, make_base("gemma"))
    assert (work.n_items, work.n_inputs, work.n_written) == (40, 1, n_written)
    assert work.n_read == pytest.approx(20.5, abs=2)


def test_a_term_without_items_is_named(make_base, tmp_path: Path):
    file = tmp_path / "texts.jsonl"
    file.write_text(json.dumps({"text": "one"}))
    term = {"text": str(file), "name": "t", "hash_range": [0.999999, 1]}
    with pytest.raises(EvaluationError, match=r"^term 't': no item of .* is in hash_range"):
        count(Objective.model_validate({"terms": [term]}), make_base("gemma"))
