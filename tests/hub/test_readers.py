"""readers.py: what readers can do with what was pushed."""

import json

from optimer_hf.hub.readers import count_trials


def test_a_trial_that_was_scored_again_is_one_trial(golden):
    text = (golden / "runs/tiny/study/trials.jsonl").read_text("utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert count_trials(text) == 10 < len(lines)
    assert len({trial["number"] for trial in lines}) == 10


def test_a_torn_line_is_no_trial():
    line = '{"number": 0, "fidelity": "search", "at": "a\N{LINE SEPARATOR}b"}'
    assert count_trials(f'{line}\n[1]\n{{"number": 1, "fidel') == 1
