"""Running a study: weights are asked for, a pool answers with scores, the log keeps both.

A StudyConfig comes in, a finished Study goes out. A killed study goes on as if nothing had
happened, because each ask depends only on the recorded trials and the trial's number. What a reader
would not guess: SMAC's own run history is scratch in a temporary directory; its files are neither
append-only nor safe to kill.
"""

import logging
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter

from optimer_hf.ask import Asker, anchors
from optimer_hf.errors import EvaluationError
from optimer_hf.progress import Meter
from optimer_hf.study import Study, StudyConfig, Trial, locked, open_study
from optimer_hf.trial import Pool, ResidentPool, run_trial

logger = logging.getLogger(__name__)


def search(
    config: StudyConfig, directory: Path, *, pool: Callable[[StudyConfig], Pool] = ResidentPool
) -> Study:
    """Run a study to its end and return it; trials that are on disk already are not run again.

    Raises OptimerError for anything wrong with the config before the first trial. A trial that
    fails is recorded as crashed and the search goes on, unless the base itself cannot be scored.
    """
    with locked(directory):
        study = open_study(config, directory)
        if study.is_finished:
            logger.info(
                "search: %d trials are recorded, nothing to do", len(study.log.of("search"))
            )
            return study
        runner = pool(config)
        _run_search(study, runner)
        _run_rescore(study, runner)
    return study


def _run_search(study: Study, pool: Pool) -> None:
    config, n_trials = study.config, study.config.search.n_trials
    done = study.log.of("search")
    terms = config.objective.at("search")
    limits = {term.label: config.objective.limit_of(term) for term in terms}
    planned = anchors(config)
    asker: Asker | None = None
    with (
        Meter("search", n_trials, "trials", done=len(done)) as meter,
        tempfile.TemporaryDirectory(prefix="optimer-smac-") as scratch,
    ):
        for number in range(len(done), n_trials):
            started = perf_counter()
            if number < len(planned):
                origin, weights = planned[number]
            else:
                if asker is None:
                    asker = Asker(config, Path(scratch))
                    for trial in study.log.of("search"):
                        asker.tell(trial)
                started = perf_counter()
                origin, weights = "surrogate", asker.ask()
            asked = perf_counter() - started
            trial = run_trial(
                pool,
                Trial(number, origin, "search", weights, "ok", {}, {"ask": asked}),
                terms,
                limits,
            )
            if number == 0 and trial.status == "crashed":
                raise EvaluationError(f"the base model itself cannot be scored: {trial.error}")
            study.log.append(trial)
            if asker is not None:
                asker.tell(trial)
            meter.advance(1, _note(study, trial))


def _note(study: Study, trial: Trial) -> str:
    if trial.status == "crashed":
        return "crashed"
    best = max(study.value(t) for t in study.log.of("search") if t.status == "ok")
    return f"{study.value(trial):+.4f}, best {best:+.4f}"


def _run_rescore(study: Study, pool: Pool) -> None:
    """Score the base and the best few on more items, with the terms that joined for this."""
    config = study.config
    terms = config.objective.at("rescore")
    limits = {
        term.label: config.search.rescore_limit
        if term.limit is None or not term.rescore_only
        else term.limit
        for term in terms
    }
    remaining, done = study.to_rescore(), len(study.log.of("rescore"))
    with Meter("re-score", done + len(remaining), "trials", done=done) as meter:
        for trial in remaining:
            again = replace(trial, fidelity="rescore", terms={}, seconds={}, n_tokens=0)
            rescored = run_trial(pool, again, terms, limits)
            if trial.number == 0 and rescored.status == "crashed":
                raise EvaluationError(
                    f"the base model itself cannot be scored again: {rescored.error}"
                )
            study.log.append(rescored)
            meter.advance(1)
