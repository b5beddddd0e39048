"""Choose among attempts at a data mixture by the items of the search, like a merge.

The models of R attempts come in, each trained on 1/R of the tokens of all vectors. The best one is
a row of the sealed test, which plays no part in the choice.
"""

from collections.abc import Callable
from dataclasses import dataclass

from optimer_hf.comparison.baselines import ModelContender, add_fixed, ready_model, short_digest
from optimer_hf.comparison.mixtures_file import Attempt, read_attempts
from optimer_hf.errors import StudyError
from optimer_hf.files.digest import digest
from optimer_hf.files.text import count
from optimer_hf.scoring.objective import combine, is_feasible
from optimer_hf.searching.loop import search
from optimer_hf.searching.runner import InProcess
from optimer_hf.searching.trial import Pool
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.directory import Study


@dataclass(frozen=True)
class ScoredAttempt:
    """An attempt and its value on the items of the search; larger is better."""

    attempt: Attempt
    value: float
    is_feasible: bool


def choose_attempts(study: Study, pool: Callable[[StudyConfig], Pool]) -> list[ModelContender]:
    """Return the row of the best attempt for each number of attempts that the study asks for and
    whose models are here. `pool` opens what scores them.
    """
    rows = []
    trained = read_attempts(study.directory)
    for n in (each for each in study.config.baselines.attempts if each in trained):
        scored = score_attempts(study, trained[n], pool)
        best = max(scored, key=lambda each: (each.is_feasible, each.value))
        model = ready_model("attempts", str(n), str(best.attempt.model))
        rows.append(add_fixed(model, study.config))
    return rows


def score_attempts(
    study: Study, attempts: list[Attempt], pool: Callable[[StudyConfig], Pool]
) -> list[ScoredAttempt]:
    """Score attempts on the items of the search, each beside the fixed vectors. Scores that are on
    disk are read. Raises StudyError if none can be scored.
    """
    sources = {f"attempt {i}": str(each.model) for i, each in enumerate(attempts, start=1)}
    config = study.config.with_attempts(sources)
    nothing = dict.fromkeys(sources, 0.0) | config.fixed
    planned = {i: (name, nothing | {name: 1.0}) for i, name in enumerate(sources, start=1)}
    key = digest([short_digest(source) for source in sources.values()])[:6]
    directory = study.directory / "searches" / f"attempts-{len(attempts)}-{key}"
    scored = search(config, directory, runner=InProcess(pool), planned=planned, warns=False)
    trials = {trial.number: trial for trial in scored.trials if trial.status == "ok"}
    if len(trials) < 2:  # the base is one
        raise StudyError(f"{directory}: none of {count(len(attempts), 'attempt')} can be scored.")
    return [
        ScoredAttempt(
            attempt,
            combine(config.objective, trials[i].terms, scored.base),
            is_feasible(config.objective, trials[i].terms, scored.base),
        )
        for i, attempt in enumerate(attempts, start=1)
        if i in trials
    ]
