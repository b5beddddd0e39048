"""The lm-eval tasks of the recipes load offline, have two separate halves, and score a model."""

import math
from pathlib import Path

import pytest

from optimer_hf.errors import EvaluationError
from optimer_hf.scoring.evaluator import Evaluator
from optimer_hf.scoring.objective import Asked, Objective, Term
from optimer_hf.scoring.tasks import load_tasks
from tests.support.tiny import tiny_model

ROOT = Path(__file__).parents[2]
FOLDERS = sorted(path for path in (ROOT / "recipes").glob("*/tasks") if path.is_dir())
ON_THE_HUB = {"piqa_search", "piqa_test"}  # examples over Hub data sets; the suite is offline
WINDOW = 4096  # a byte tokenizer makes long items; lm-eval needs each solution in one window


def objective_over(folder: Path) -> Objective:
    """Return an objective of all local tasks of a folder; a file that begins with _ is included."""

    def metric(name: str) -> str:
        generated = "exact_match" if name.startswith("gsm8k") else "acc"
        return "bits_per_byte" if "_bpb_" in name else generated

    names = {path.stem for path in folder.glob("[!_]*.yaml")} - ON_THE_HUB
    terms = [Term(task=name, metric=metric(name)) for name in sorted(names)]
    return Objective(include_path=folder, terms=terms)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.parent.name)
def test_search_and_test_halves_of_a_task_share_no_item(folder: Path):
    tasks = load_tasks([objective_over(folder)])
    for name, task in tasks.items():
        assert len(task.eval_docs) > 0, name
        if name.endswith("_search"):
            other = tasks[name.removesuffix("search") + "test"]
            halves = [{half.doc_to_text(doc) for doc in half.eval_docs} for half in (task, other)]
            assert not halves[0] & halves[1], name


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.parent.name)
def test_every_task_scores_a_tiny_model(folder: Path, tokenizer):
    objective = objective_over(folder)
    model = tiny_model()
    model.config.max_position_embeddings = WINDOW
    evaluator = Evaluator(model, tokenizer, [objective])
    for task in evaluator.tasks.values():
        if task.OUTPUT_TYPE == "generate_until":
            assert task.config.generation_kwargs["max_gen_toks"] <= 256, task.config.task
            task.set_config("generation_kwargs", {"max_gen_toks": 2}, update=True)
    scores = evaluator.evaluate([Asked(term, 2) for term in objective.terms])
    for term in objective.terms:
        score = scores[term.label]
        assert len(score.items) == 2, term.label
        assert math.isfinite(score.score), term.label
        if term.metric == "bits_per_byte":  # (bits, bytes); an untrained model knows nothing
            assert not score.higher_is_better
            task = next(task for task in evaluator.tasks.values() if task.config.task == term.task)
            marks = [len(task.doc_to_target(doc)) / len(doc["solution"]) for doc in task.eval_docs]
            assert 7 < score.score < 9 * max(marks), term.label  # the end of a turn has no bytes


def test_a_likelihood_item_is_the_bits_and_the_bytes_of_its_solution(tokenizer):
    folder = ROOT / "recipes" / "gemma-3-270m-paper" / "tasks"
    term = Term(task="gsm_symbolic_jpn_bpb_search")
    model = tiny_model()
    model.config.max_position_embeddings = WINDOW
    evaluator = Evaluator(model, tokenizer, [Objective(include_path=folder, terms=[term])])
    items = evaluator.evaluate([Asked(term, 1)])[term.label].items
    docs = evaluator.tasks[term.task_name].eval_docs
    assert items[0][1] == len(docs[len(docs) // 2]["solution"].encode())


def test_a_folder_of_tasks_counts_only_where_a_task_is_asked_for(tmp_path, corpus_dir):
    text = {"text": str(corpus_dir / "aaa.search.jsonl"), "name": "aaa"}
    gone = {"include_path": str(tmp_path / "gone")}
    assert [*load_tasks([Objective.model_validate({"terms": [text]} | gone)])]
    task = {"task": "mine", "metric": "acc"}
    with pytest.raises(EvaluationError, match=r"include_path: .*gone: no such directory of tasks"):
        load_tasks([Objective.model_validate({"terms": [text, task]} | gone)])
