"""trials.py: lines of trials.jsonl."""

import json
import math

import pytest

from optimer_hf.errors import StudyError
from optimer_hf.scoring.scores import TermScore
from optimer_hf.study.trials import Candidate, Trial, TrialLog

SCORES = {"t": TermScore([(2.0, 1.0)], False)}


@pytest.mark.parametrize("line", [b"[]\n", b"3\n", b"\xff\n", b'{"number": 1}\n', b"\n"])
def test_any_line_that_is_no_trial_is_an_error(tmp_path, line):
    (tmp_path / "trials.jsonl").write_bytes(line)
    with pytest.raises(StudyError, match=r"trials\.jsonl:1: not a trial"):
        TrialLog(tmp_path / "trials.jsonl")


def test_a_trial_without_gradients_is_written_as_before_there_were_any():
    trial = Candidate(3, "x", {"w": 0.5}).to_trial(SCORES, {"ask": 0.5}, 10)
    assert trial.to_json() == (
        '{"number": 3, "origin": "x", "fidelity": "search", "weights": {"w": 0.5}, "status": "ok", '
        '"terms": {"t": {"items": [[2.0, 1.0]], "higher_is_better": false, "n_tokens": 0, '
        '"is_perplexity": false, "taken_over": false, "documents": []}}, "seconds": {"ask": 0.5}, '
        '"n_tokens": 10, "error": null, "worker": null}'
    )


def test_gradients_are_written_and_read_again():
    candidate = Candidate(3, "x", {"w": 0.5}, with_gradients=True)
    trial = candidate.to_trial(SCORES, {}, 10, {"t": {"w": -0.25}})
    assert trial.gradients == {"t": {"w": -0.25}}
    assert json.loads(trial.to_json())["gradients"] == {"t": {"w": -0.25}}
    assert Trial.from_json(trial.to_json()) == trial


@pytest.mark.parametrize("slope", [math.nan, math.inf, -1e200])
def test_a_score_is_kept_without_its_gradient_where_that_is_not_finite(slope):
    gradients = {"t": {"w": slope, "v": 0.0}, "u": {"w": 1.0, "v": 2.0}}
    scores = SCORES | {"u": SCORES["t"]}
    trial = Candidate(3, "x", {"w": 0.5, "v": 0.0}).to_trial(scores, {}, 10, gradients)
    assert trial.gradients == {"u": {"w": 1.0, "v": 2.0}}
    assert trial.terms == scores
