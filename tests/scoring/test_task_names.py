"""task_names.py: the names are those that lm-eval itself finds, and a wrong one is explained."""

from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

from optimer_hf.scoring.objective import Objective
from optimer_hf.scoring.task_names import (
    TaskNames,
    fault_of_task,
    folders_of_tasks,
    list_unknown_tasks,
    read_task_names,
    shipped_names,
)


def test_the_names_and_files_are_those_of_lm_evals_own_index():
    manager, names = TaskManager(), shipped_names()
    files = {name: manager.task_index[name].yaml_path for name in manager.all_subtasks}
    assert len(files) > 10_000 and names.tasks == files
    grouped = {*manager.all_groups, *manager.all_tags}
    assert grouped <= names.groups and len(names.groups - grouped) < 5


OWN = {
    "a.yaml": "task: one  # a comment\ntag: [x, 'y']\n",
    "b/c.yaml": "group: many\ntask:\n  - one\n  - task: inner\n",
    "b/d.yaml": '"task": "two"\ninclude: _base\ndoc_to_text: |\n  task: no\n',
    "b/e.yaml": "task: one\n",
    "b/_base": "tag:\n- z\n",
    "b/broken.yaml": "task: [\n",
    "class.yaml": "class: !function x.Y\ntask: three\ngroup: g\n",
    "__pycache__/f.yaml": "task: four\n",
    "note.md": "task: five\n",
}


@pytest.fixture
def own(tmp_path: Path) -> TaskNames:
    for name, text in OWN.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return read_task_names(tmp_path)


def test_a_folder_of_ones_own_is_read_as_lm_eval_reads_it(own, tmp_path):
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    assert set(own.tasks) == {"one", "two", "three"} == set(manager.all_subtasks)
    assert own.tasks["one"] == tmp_path / "a.yaml" == manager.task_index["one"].yaml_path
    assert own.groups == {"many", "x", "y", "z"}
    assert read_task_names(None) == TaskNames()


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("one", None),
        ("gsm8k", None),
        ("gsm9k", "no task named 'gsm9k' in lm-eval or {}. Did you mean 'gsm8k'?"),
        ("thre", "no task named 'thre' in lm-eval or {}. Did you mean 'three'?"),
        ("many", "'many' is a group of tasks in lm-eval. Name its tasks"),
        ("z", "'z' is a group of tasks in lm-eval. Name its tasks"),
        ("mmlu", "'mmlu' is a group of tasks in lm-eval. Name its tasks"),
        ("ai2_arc", "'ai2_arc' is a group of tasks in lm-eval. Name its tasks"),
    ],
)
def test_a_name_that_is_no_task_is_explained(own, name, fault):
    found = fault_of_task(name, own)
    assert found is None if fault is None else found.startswith(fault.format(own.folder))


def test_only_the_folders_of_the_tasks_are_indexed(own, tmp_path):
    (tmp_path / "mine.yaml").write_text("task: arc_easy\n", encoding="utf-8")
    own = read_task_names(tmp_path)
    gsm8k = shipped_names().tasks["gsm8k"].parent
    assert folders_of_tasks(["gsm8k", "arc_easy"], own) == [gsm8k, tmp_path]
    assert folders_of_tasks(["gsm8k", "gsm8k"], TaskNames()) == [gsm8k]


def test_unknown_tasks_are_listed_with_their_places(own):
    terms = [{"task": "one", "metric": "acc"}, {"task": "tow", "metric": "acc"}]
    constraint = {"task": "arc_easi", "metric": "acc", "max_relative_to_base": 0.1}
    objective = Objective(terms=terms, constraints=[constraint], include_path=own.folder)
    places = [at for at, _ in list_unknown_tasks(objective, ("test",))]
    assert places == [("test", "terms", 1, "task"), ("test", "constraints", 0, "task")]
    gone = objective.model_copy(update={"include_path": own.folder / "gone"})
    assert not list(list_unknown_tasks(gone))
