"""surrogate.py: what it learns from a trial."""

import pytest

from optimer_hf.scoring.scores import TermScore
from optimer_hf.study.surrogate import columns
from optimer_hf.study.trials import Trial
from tests.support.landscapes import config_of


def test_crashed_and_very_bad_trials_are_learned_at_a_floor():
    def trial(loss, status="ok"):
        terms = (
            {"t": TermScore([(loss, 1.0)], False), "u": TermScore([(loss, 1.0)], False)}
            if status == "ok"
            else {}
        )
        return Trial(0, "x", "search", dict.fromkeys("wxyz", 0.0), status, terms, {})

    table = columns(config_of(), [trial(2.0), trial(1.8), trial(0, "crashed"), trial(1e9)])
    assert table[:, 0] == pytest.approx([0, 0.1, -1, -1])


def test_the_surrogate_of_a_weighted_mean_learns_losses_in_their_own_unit():
    objective = config_of().objective.model_dump() | {"combine": "weighted_mean"}

    def trial(t, u):
        terms = {"t": TermScore([(t, 1.0)], False), "u": TermScore([(u, 1.0)], False)}
        return Trial(0, "x", "search", dict.fromkeys("wxyz", 0.0), "ok", terms, {})

    table = columns(config_of(objective=objective), [trial(100.0, 1.0), trial(90.0, 0.5)])
    assert table[1] == pytest.approx([10.0, 0.5])
