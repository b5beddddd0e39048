"""items.py: which items a limit leaves, and which of them a hash range has."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimer_hf.errors import EvaluationError
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
    tasks = {"my_choice": "acc", "my_generate": "exact_match"}
    objectives = [
        Objective.model_validate(
            {
                "terms": [
                    {"task": task, "metric": metric, "hash_range": part}
                    for task, metric in tasks.items()
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


def test_a_split_by_prompts_stays_what_it_was(folder):
    plain = GENERATE.replace("process_docs: !function prepare.answer\n", "")
    (folder / "generate.yaml").write_text(plain.replace("{{answer}}", "{{choices[label]}}"))
    objective, test, tasks = halves(folder, split_by="prompt")
    low = {name: indices_within(tasks[name], LOW, "prompt") for name in tasks}
    assert low["my_choice"] != low["my_generate"]
    with pytest.raises(EvaluationError, match="are items of the search, too"):
        check_disjoint(objective, test, tasks)
