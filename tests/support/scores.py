"""Objectives, and scores of made-up items."""

from optimer_hf.scoring.objective import Objective
from optimer_hf.scoring.scores import TermScore


def objective_of(*terms, **options) -> Objective:
    return Objective.model_validate({"terms": list(terms), **options})


def losses(*values: float) -> TermScore:
    return TermScore([(value, 1.0) for value in values], False)


def accuracies(*values: float) -> TermScore:
    return TermScore([(value, 1.0) for value in values], True)


BASE = {"loss": losses(2.0, 4.0), "acc": accuracies(0, 1, 0, 1), "free": losses(1.0)}
OTHER = {"loss": losses(1.0, 2.0), "acc": accuracies(1, 1, 0, 1), "free": losses(9.0)}
TERMS = [
    {"task": "a", "metric": "m", "name": "loss", "weight": 3},
    {"task": "b", "metric": "acc", "name": "acc"},
    {"task": "c", "metric": "m", "name": "free", "weight": 0},
]
