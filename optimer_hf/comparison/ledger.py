"""Where the time of a study went, and what the same attempts would have cost as data mixtures.

Trials come in, seconds, tokens and items by phase go out. An attempt at a data mixture is training
on the tokens of all vectors together and one evaluation; the vectors are trained once, whatever the
number of trials. What a reader would not guess: two ratios are given, because the vectors have to
be paid for, too, unless somebody else has trained them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optimer_hf.comparison.rows import SealedRow
from optimer_hf.scoring.scores import TermScore
from optimer_hf.study.directory import Study
from optimer_hf.study.trials import Trial
from optimer_hf.vectors.record import read_record

PHASES = ("ask", "merge", "evaluate", "forward", "cpu")


def trial_ledger(trials: Sequence[Trial | SealedRow]) -> dict[str, Any]:
    """Return count, items, tokens and seconds of trials by phase, their CPU-seconds (asking
    aside), and the share that is not the model's forward pass. Items of scores that were taken over
    cost nothing and do not count.
    """
    total = {phase: sum(trial.seconds.get(phase, 0.0) for trial in trials) for phase in PHASES}
    spent = total["ask"] + total["merge"] + total["evaluate"]
    return {
        "n": len(trials),
        "items": sum(
            len(score.items)
            for trial in trials
            for score in _scores_of(trial).values()
            if not score.taken_over
        ),
        "tokens": sum(trial.n_tokens for trial in trials),
        "seconds": round(spent, 1),
        "cpu_seconds": round(total["cpu"], 1),
        "ask": round(total["ask"], 2),
        "merge": round(total["merge"], 2),
        "forward": round(total["forward"], 1),
        "harness": round(total["evaluate"] - total["forward"], 2),
        "overhead_share": round(1 - total["forward"] / spent, 4) if spent else 0.0,
    }


def _scores_of(trial: Trial | SealedRow) -> Mapping[str, TermScore]:
    return trial.scores if isinstance(trial, SealedRow) else trial.terms


def ledger(study: Study) -> dict[str, Any]:
    """Return the ledger of a study: its trials by fidelity, and data mixtures beside them where the
    vectors say what their training took.
    """
    found: dict[str, Any] = {
        fidelity: trial_ledger(trials)
        for fidelity in ("search", "rescore")
        if (trials := study.log.of(fidelity))
    }
    paths = [Path(str(vector.source)) for vector in study.config.vectors.values()]
    records = [read_record(path) if path.is_dir() else None for path in paths]
    trainings = [record.training for record in records if record is not None and record.training]
    if len(trainings) == len(paths) and all("seconds" in training for training in trainings):
        seconds = sum(float(training["seconds"]) for training in trainings)
        found["data_mixture"] = against_mixtures(
            seconds,
            sum(entry["seconds"] for entry in found.values()),
            found["search"]["n"],
            found["search"]["seconds"],
        )
    return found


def against_mixtures(
    training_seconds: float, study_seconds: float, n_trials: int, search_seconds: float
) -> dict[str, Any]:
    """Return what n_trials data mixtures would have cost, and by how much that exceeds the study:
    without the training of its vectors, and with it.
    """
    attempts = n_trials * training_seconds + search_seconds
    return {
        "attempts": n_trials,
        "seconds": round(attempts, 1),
        "ratio_search_only": round(attempts / max(study_seconds, 1e-9), 1),
        "ratio_end_to_end": round(attempts / max(training_seconds + study_seconds, 1e-9), 1),
    }
