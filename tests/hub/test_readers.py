"""readers.py: what readers can do with what was pushed."""

import json

import pytest

from optimer_hf.hub.readers import count_trials, list_what_stays
from optimer_hf.scoring.objective import Objective

TASK, TEXT = {"task": "gsm8k"}, {"text": "a.jsonl"}
FUNCTION = {"function": "m.py:f", "higher_is_better": True}


def test_a_trial_that_was_scored_again_is_one_trial(golden):
    text = (golden / "runs/tiny/study/trials.jsonl").read_text("utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert count_trials(text) == 10 < len(lines)
    assert len({trial["number"] for trial in lines}) == 10


def test_a_torn_line_is_no_trial():
    line = '{"number": 0, "fidelity": "search", "at": "a\N{LINE SEPARATOR}b"}'
    assert count_trials(f'{line}\n[1]\n{{"number": 1, "fidel') == 1


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"terms": [TASK]}, []),
        ({"terms": [TASK], "include_path": "tasks"}, ["tasks"]),
        ({"terms": [TEXT], "include_path": "tasks"}, ["texts"]),
        ({"terms": [FUNCTION]}, ["functions"]),
        ({"terms": [TASK], "constraints": [TEXT | {"max_relative_to_base": 0.1}]}, ["texts"]),
        ({"terms": [TASK, TEXT, FUNCTION], "include_path": "t"}, ["texts", "tasks", "functions"]),
    ],
)
def test_what_stays_with_the_author_is_named_by_kind(fields, expected):
    assert list_what_stays(Objective.model_validate(fields)) == expected
