"""Recorded trials -> whether the next trial takes gradients.

The answer follows from the record alone, so a resumed search gives the same one: what a trial with
gradients takes, and which terms have them, is read from the first one that has them.
"""

import math
from collections.abc import Mapping, Sequence

from optimer_hf.scoring.objective import Objective, gains
from optimer_hf.scoring.scores import TermScore
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.space import anchors
from optimer_hf.study.trials import Trial

WORTH = 0.7  # of a derivative, in scores of a term; `benchmarks/search.py --only worth`
WORTH_FOR_PRIOR = 0.3  # the same where trials are counted that speak against the prior of the total
N_TO_FIT = 2  # trials that a surrogate with gradients needs
N_PLACES = 2  # trials whose gradients choose the vectors of a large pool, see `screening`


def takes_gradients(config: StudyConfig, trials: Sequence[Trial]) -> bool:
    """Whether the next trial takes gradients, given the search trials on record.

    With `auto` the first one does, so that its time can be measured; see `saves_time`. With a
    screen the first two do.
    """
    setting = config.search.gradients
    if not config.can_use_gradients:
        return False
    if needs_places(config, trials):
        return True
    if setting == "never":
        return False
    measured = first_with_gradients(trials)
    return setting == "always" or measured is None or saves_time(config, measured)


def next_anchor(
    config: StudyConfig,
    number: int,
    trials: Sequence[Trial],
    running: Sequence[Mapping[str, float]] = (),
) -> tuple[str, dict[str, float]] | None:
    """Return origin and weights of trial `number` if that is an anchor, while those of others are
    `running`; None: ask the surrogate.

    With gradients the base and the average say what every vector does, so the single vectors wait
    until the surrogate has too few trials. An anchor that was tried is no trial of its own.
    """
    if first_with_gradients(trials) is None:
        return dict(enumerate(anchors(config))).get(number)
    takes = takes_gradients(config, trials)
    sound = [trial for trial in trials if trial.status == "ok"]
    if takes and min(number, len(sound)) >= N_TO_FIT:
        return None
    planned = anchors(config, average_first=takes)
    if number >= len(planned) + N_PLACES:  # the places need not be anchors of what is searched
        return None
    tried = [*(trial.weights for trial in trials), *running]
    return next((anchor for anchor in planned if anchor[1] not in tried), None)


def places_of_screen(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials whose gradients choose the vectors to search, as many as there are now."""
    return [trial for trial in trials if trial.gradients][:N_PLACES]


def needs_places(config: StudyConfig, trials: Sequence[Trial]) -> bool:
    """Whether the screen of a large pool still waits for gradients."""
    return config.search.screen is not None and len(places_of_screen(trials)) < N_PLACES


def first_with_gradients(trials: Sequence[Trial]) -> Trial | None:
    """Return the first trial on record that has gradients, or None."""
    return next((trial for trial in trials if trial.gradients), None)


def saves_time(config: StudyConfig, measured: Trial) -> bool:
    """Whether a search with gradients needs less time than one without to learn as much, judged by
    one trial that has them.
    """
    return n_trials_saved(config, measured) > cost_ratio(measured)


def cost_ratio(measured: Trial) -> float:
    """Return how many times as long a trial takes with gradients as without, from one that has
    them: the backward passes are a part of its evaluation that others do not have.
    """
    merge, evaluate, backward = (
        measured.seconds.get(phase, 0.0) for phase in ("merge", "evaluate", "backward")
    )
    if backward == 0:
        return 1.0
    without = merge + evaluate - backward
    return (merge + evaluate) / without if without > 0 else math.inf


def n_trials_saved(config: StudyConfig, measured: Trial) -> float:
    """Return how many trials without gradients are worth one with them.

    A term with gradients is worth 1 + WORTH * d without, d being the number of searched
    weights. Terms without hold the others back as the serial part of a program does (Amdahl's law).
    """
    constraints = {term.label for term in config.objective.constraints}
    counting = [
        term.label
        for term in config.objective.terms_at("search")
        if term.weight > 0 or term.label in constraints
    ]
    share = sum(label in measured.gradients for label in counting) / len(counting)
    return 1 / (1 - share + share / (1 + WORTH * len(config.free)))


def n_trials_worth(config: StudyConfig, trials: Sequence[Trial]) -> float:
    """Return as how many trials without gradients these count against the search's prior."""
    n_with = sum(bool(trial.gradients) for trial in trials)
    return len(trials) + WORTH_FOR_PRIOR * len(config.free) * n_with


def has_all_gradients(config: StudyConfig, trials: Sequence[Trial]) -> bool:
    """Whether all sound trials have the gradients of all terms that count, so that each of them
    told of its surroundings. A screen alone, or an `auto` that goes on without, takes too few.
    """
    counting = [term.label for term in config.objective.terms_at("search") if term.weight > 0]
    sound = [trial for trial in trials if trial.status == "ok"]
    return all(label in trial.gradients for trial in sound for label in counting)


def differentiable_part(objective: Objective, trials: Sequence[Trial]) -> Objective | None:
    """Return the objective with those of its terms that count and have a gradient in all of these
    trials; None if no term has.
    """
    counting = [term for term in objective.terms_at("search") if term.weight > 0]
    known = [term for term in counting if all(term.label in trial.gradients for trial in trials)]
    return objective.model_copy(update={"terms": known}) if known else None


def value_gradient(
    objective: Objective, trial: Trial, base: Mapping[str, TermScore]
) -> dict[str, float] | None:
    """Return the derivative of the objective's value in every searched weight at a trial, by name
    of the vector; None if a term that counts has no gradient there. Larger values are better.
    """
    counting = [term for term in objective.terms_at("search") if term.weight > 0]
    if not all(term.label in trial.gradients for term in counting):
        return None
    if objective.combine == "worst":  # the value is that of the worst term
        each = gains(trial.terms, base)
        counting = [min(counting, key=lambda term: each[term.label])]
    total, is_relative = sum(term.weight for term in counting), objective.combine != "weighted_mean"
    factors = {
        term.label: term.weight / total * gain_per_score(base[term.label], is_relative=is_relative)
        for term in counting
    }
    names = trial.gradients[counting[0].label]
    return {
        name: sum(factor * trial.gradients[label][name] for label, factor in factors.items())
        for name in names
    }


def gain_gradients(trial: Trial, base: Mapping[str, TermScore]) -> dict[str, dict[str, float]]:
    """Return the derivatives of the gains over the base, by label and name of the vector, of the
    terms that have gradients at a trial.
    """
    return {
        label: {name: slope * gain_per_score(base[label]) for name, slope in gradient.items()}
        for label, gradient in trial.gradients.items()
    }


def gain_per_score(base: TermScore, *, is_relative: bool = True) -> float:
    """Return by how much a gain rises with its score; of losses it is relative to the base."""
    if base.higher_is_better:
        return 1.0
    return -1.0 / (abs(base.score) or 1.0) if is_relative else -1.0
