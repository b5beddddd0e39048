"""items.py: which items a limit leaves, and which of them a hash range has."""

import json
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimer_hf.errors import EvaluationError
from optimer_hf.printable import warn_once
from optimer_hf.scoring.items import check_disjoint, indices_within, spread_indices
from optimer_hf.scoring.objective import Objective
from optimer_hf.scoring.tasks import load_tasks


@given(st.integers(1, 500), st.none() | st.integers(1, 600))
def test_spread_gives_distinct_items_in_order_with_even_gaps(n_items, limit):
    chosen = spread_indices(n_items, limit)
    assert len(chosen) == min(n_items, limit or n_items)
    assert chosen == sorted(set(chosen)) and chosen[0] >= 0 and chosen[-1] < n_items
    gaps = np.diff(chosen)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_spread_takes_the_same_share_of_every_source():
    chosen = spread_indices(300, 30)
    assert [sum(start <= index < start + 100 for index in chosen) for start in (0, 100, 200)] == [
        10,
        10,
        10,
    ]


CHOICE = """\
task: my_choice
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
GENERATE = """\
task: my_generate
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
process_docs: !function prepare.answer
output_type: generate_until
doc_to_text: "Q: {{question}} A:"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["."], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
PREPARE = """\
def answer(rows):
    return rows.map(lambda row: row | {"answer": row["choices"][row["label"]]})
"""
TASKS = {"my_choice": "acc", "my_generate": "exact_match"}
ROWS = range(30)
LOW, HIGH = (0.0, 0.5), (0.5, 1.0)


@pytest.fixture
def folder(tmp_path):
    """Two tasks over 40 rows, the last ten of which are earlier ones with another id."""
    rows = [
        {"id": number, "question": f"{number % 30} plus 2?", "choices": ["a", "b"], "label": 0}
        for number in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in {
        "choice.yaml": CHOICE,
        "generate.yaml": GENERATE,
        "prepare.py": PREPARE,
    }.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def halves(folder, **fields):
    """Return what is searched on and what is sealed of both tasks, and the loaded tasks."""
    objectives = [
        Objective.model_validate(
            {
                "terms": [
                    {"task": task, "metric": metric, "hash_range": part}
                    for task, metric in TASKS.items()
                ],
                "include_path": str(folder),
                **fields,
            }
        )
        for part in (LOW, HIGH)
    ]
    return *objectives, load_tasks(objectives)


def test_tasks_over_one_file_agree_which_items_the_test_gets(folder):
    objective, test, tasks = halves(folder)
    parts = {
        name: [indices_within(tasks[name], part, "document") for part in (LOW, HIGH)]
        for name in ("my_choice", "my_generate")
    }
    assert parts["my_choice"] == parts["my_generate"]
    low, high = parts["my_choice"]
    assert sorted(low + high) == list(range(40)) and low and high
    check_disjoint(objective, test, tasks)


PROCESS = {  # what process_docs returns, and the row that each item is made from, if it tells
    "columns dropped": ("table(answer_alone(row) for row in rows)", ROWS),
    "reordered": ("answer(rows.select(range(29, -1, -1)))", ROWS[::-1]),
    "filtered": ("answer(rows).filter(lambda row: row['id'] % 3 == 0)", ROWS[::3]),
    "columns refused": ("answer(rows) if len(rows.column_names) == 4 else 1 / 0", ROWS),
    "repeated": (
        "table(each for row in answer(rows) for each in (row, row))",
        sorted([*ROWS, *ROWS]),
    ),
    "dropped and filtered": (
        "table(answer_alone(row) for row in rows if row['id'] % 3 == 0)",
        None,
    ),
    "dropped and reordered": ("table(answer_alone(row) for row in list(rows)[::-1])", None),
    "unable to take one row": ("table(answer_alone(rows[n]) for n in ROWS)", None),
}
ALONE = """
ROWS = range(30)
def table(rows):
    from datasets import Dataset
    return Dataset.from_list(list(rows))
def answer_alone(row):
    return {"question": row["question"], "answer": "a"}
def change(rows):
    return """


@pytest.mark.parametrize("name", PROCESS)
def test_an_item_goes_where_its_row_goes_whatever_process_docs_does(name, folder, caplog):
    made, made_from = PROCESS[name]
    lines = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(lines[: len(ROWS)]))
    (folder / "prepare.py").write_text(f"{PREPARE}{ALONE}{made}\n")
    (folder / "generate.yaml").write_text(GENERATE.replace("prepare.answer", "prepare.change"))
    objective, test, tasks = halves(folder)
    warn_once.cache_clear()
    plain, changed = (
        [indices_within(tasks[task], part, "document") for part in (LOW, HIGH)]
        for task in ("my_choice", "my_generate")
    )
    assert ("my_generate" in caplog.text) == (made_from is None)
    n_items = len(tasks["my_generate"].eval_docs)
    assert sorted(chain(*changed)) == list(range(n_items)) and all(changed)
    if made_from is None:
        return
    for half, rows in zip(changed, plain, strict=True):
        assert half == [at for at, row in enumerate(made_from) if row in rows]
    check_disjoint(objective, test, tasks)


def test_rows_that_the_search_scores_are_no_sealed_ones_whatever_either_is_split_by(folder):
    """A part that has no hash_range is recorded as split by prompt."""
    *_, tasks = halves(folder)
    task, other = ({"task": name, "metric": m} for name, m in TASKS.items())
    for searched, sealed in ((other, task), (task, other)):
        for splits in (("prompt", "document"), ("document", "prompt"), ("prompt", "prompt")):
            terms = (searched, sealed | {"hash_range": HIGH})
            objective, test = (
                Objective.model_validate({"terms": [term], "split_by": split})
                for term, split in zip(terms, splits, strict=True)
            )
            with pytest.raises(EvaluationError, match="are items of the search, too"):
                check_disjoint(objective, test, tasks)


def test_a_split_by_prompts_stays_what_it_was(folder, caplog):
    plain = GENERATE.replace("process_docs: !function prepare.answer\n", "")
    (folder / "generate.yaml").write_text(plain.replace("{{answer}}", "{{choices[label]}}"))
    objective, test, tasks = halves(folder, split_by="prompt")
    low = {name: indices_within(tasks[name], LOW, "prompt") for name in tasks}
    assert low["my_choice"] != low["my_generate"]
    check_disjoint(objective, test, tasks)
    assert "are items of the search, too" in caplog.text and "with other prompts" in caplog.text
    same = test.model_copy(update={"terms": objective.terms})
    with pytest.raises(EvaluationError, match="are items of the search, too"):
        check_disjoint(objective, same, tasks)
