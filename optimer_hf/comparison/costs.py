"""Count what a study took, and what as many data mixtures would have cost.

Trials come in; seconds, tokens and items by phase go out. An attempt at a data mixture trains on
the tokens of all vectors together and is evaluated once, while the vectors are trained once for all
trials. There are two ratios, with and without the training of the vectors, because somebody else
may have trained them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from optimer_hf.comparison.ledger import Ledger, MixtureCost, TrainingCost, TrialCost
from optimer_hf.comparison.rows import SealedRow
from optimer_hf.scoring.scores import TermScore
from optimer_hf.study.directory import Study
from optimer_hf.study.trials import Trial
from optimer_hf.vectors.record import read_record
from optimer_hf.vectors.training_record import RunRecord

PHASES = ("ask", "merge", "evaluate", "forward", "backward", "cpu")


def trial_cost(trials: Sequence[Trial | SealedRow]) -> TrialCost:
    """Return what some trials took in total."""
    total = {phase: sum(trial.seconds.get(phase, 0.0) for trial in trials) for phase in PHASES}
    spent = total["ask"] + total["merge"] + total["evaluate"]
    computed = total["forward"] + total["backward"]
    return TrialCost(
        n=len(trials),
        items=sum(
            len(score.items)
            for trial in trials
            for score in _scores_of(trial).values()
            if not score.taken_over
        ),
        tokens=sum(trial.n_tokens for trial in trials),
        seconds=round(spent, 1),
        cpu_seconds=round(total["cpu"], 1),
        ask=round(total["ask"], 2),
        merge=round(total["merge"], 2),
        forward=round(total["forward"], 1),
        backward=round(total["backward"], 1),
        harness=round(total["evaluate"] - computed, 2),
        overhead_share=round(1 - computed / spent, 4) if spent else 0.0,
    )


def training_cost(runs: Sequence[RunRecord], n: int | None = None) -> TrainingCost:
    """Return what some training runs took in total."""
    seconds = sum(run.seconds for run in runs)
    tokens = sum(run.n_tokens for run in runs)
    return TrainingCost(
        n=n,
        seconds=round(seconds, 1),
        cpu_seconds=round(sum(run.cpu_seconds for run in runs), 1),
        tokens=tokens,
        tokens_per_second=round(tokens / seconds),
        mfu=_mean_mfu(runs),
    )


def _mean_mfu(runs: Sequence[RunRecord]) -> float | None:
    """Return the mean MFU of some training runs over their seconds; None if one is not known."""
    shares = [run.speed.mfu if run.speed is not None else None for run in runs]
    known = [share for share in shares if share is not None]
    if not runs or len(known) < len(runs):
        return None
    weighted = sum(share * run.seconds for share, run in zip(known, runs, strict=True))
    return round(weighted / max(sum(run.seconds for run in runs), 1e-9), 3)


def _scores_of(trial: Trial | SealedRow) -> Mapping[str, TermScore]:
    return trial.scores if isinstance(trial, SealedRow) else trial.terms


def ledger_of_study(study: Study) -> Ledger:
    """Return the ledger of a study: its trials by fidelity and, if all vectors record what their
    training took, what data mixtures would have cost.
    """
    search, rescored = study.trials, study.log.trials_at("rescore")
    spent = Ledger(
        search=trial_cost(search) if search else None,
        rescore=trial_cost(rescored) if rescored else None,
    )
    paths = [Path(source) for source in study.config.sources.values()]
    records = [read_record(path) if path.is_dir() else None for path in paths]
    runs = [record.training for record in records if record is not None]
    seconds = [run.seconds for run in runs if run is not None and run.seconds is not None]
    if spent.search is None or len(seconds) != len(paths):
        return spent
    study_seconds = spent.search.seconds + (spent.rescore.seconds if spent.rescore else 0.0)
    mixed = sum(
        second
        for name, second in zip(study.config.sources, seconds, strict=True)
        if name in study.config.mixtures
    )
    mixtures = mixture_cost(sum(seconds) - mixed, study_seconds, spent.search, mixed_seconds=mixed)
    return spent.model_copy(update={"data_mixture": mixtures})


def mixture_cost(
    training_seconds: float, study_seconds: float, search: TrialCost, *, mixed_seconds: float = 0.0
) -> MixtureCost:
    """Return what as many data mixtures as trials would have cost, and the ratio of that to the
    cost of the study, without and with the training of its vectors.

    `training_seconds` is what the vectors with text of their own took, and an attempt as well;
    `mixed_seconds` is what the mixtures in the pool took.
    """
    attempts = search.n * training_seconds + search.seconds
    whole = training_seconds + mixed_seconds + study_seconds
    return MixtureCost(
        attempts=search.n,
        seconds=round(attempts, 1),
        ratio_search_only=round(attempts / max(study_seconds, 1e-9), 1),
        ratio_end_to_end=round(attempts / max(whole, 1e-9), 1),
    )
