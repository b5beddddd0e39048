"""Recorded gradients -> which vectors of a large pool are searched, and which stay out.

The first two trials with gradients, in a new study the base and the average, say by how much the
objective and every term rise with each weight. The answer follows from the record alone, so a
resumed search gives the same one.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from optimer_hf.scoring.objective import Objective
from optimer_hf.scoring.scores import TermScore
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.gradients import (
    N_PLACES,
    differentiable_part,
    gain_gradients,
    places_of_screen,
    takes_gradients,
    value_gradient,
)
from optimer_hf.study.trials import Trial

MOST_SEARCHED = 16  # of what `auto` keeps

Slopes = Mapping[str, float]


@dataclass(frozen=True)
class Screen:
    """What the gradients at `places` choose: the vectors that are searched, and those that stay at
    0, each with the largest rise of the objective that the slopes promise within its bounds.
    """

    places: list[Trial]
    kept: list[str]
    left_out: dict[str, float]


def screen_of(config: StudyConfig, trials: Sequence[Trial]) -> Screen | None:
    """Return what `search.screen` chooses, given the search trials on record; None without that
    setting, while there are too few trials with gradients, or if no term has one in all of them.
    `auto` chooses nothing where later trials take gradients, see `keeps_all`.
    """
    places = places_of_screen(trials)
    if config.search.screen is None or len(places) < N_PLACES or keeps_all(config, trials):
        return None
    objective = differentiable_part(config.objective, places)
    if objective is None:
        return None
    promises = _promises(config, objective, places, trials[0].terms)
    chosen = _choose(config, promises)
    return Screen(
        places,
        [name for name in config.free if name in chosen],
        {name: rise for name, rise in promises[0].items() if name not in chosen},
    )


def keeps_all(config: StudyConfig, trials: Sequence[Trial]) -> bool:
    """Whether `auto` searches all vectors, given the trials at the places: if later ones take
    gradients. Those tell of every vector at the same cost, and what a screen leaves out is lost.
    Scores alone tell little of dozens of vectors, so that fewer are found sooner.
    """
    return config.search.screen == "auto" and takes_gradients(config, trials)


def searched_part(config: StudyConfig, trials: Sequence[Trial]) -> StudyConfig:
    """Return the study with the weights that the screen leaves out, of vectors or of their groups,
    fixed at 0.
    """
    screen = screen_of(config, trials)
    if screen is None or not screen.left_out:
        return config
    resting = dict.fromkeys(screen.left_out, 0.0)
    vectors = {name: vector.with_fixed(name, resting) for name, vector in config.vectors.items()}
    return config.model_copy(update={"vectors": vectors})


def _promises(
    config: StudyConfig,
    objective: Objective,
    places: Sequence[Trial],
    base: Mapping[str, TermScore],
) -> list[dict[str, float]]:
    """Return the largest rise that the slopes promise within the bounds of each vector: of the
    objective, and then of each of its terms.
    """
    gains = [gain_gradients(place, base) for place in places]
    labels = [term.label for term in objective.terms if term.weight > 0]
    values = [value_gradient(objective, place, base) or {} for place in places]
    sets = [values, *([gain[label] for gain in gains] for label in labels)]
    return [{name: _rise(config, name, slopes) for name in config.free} for slopes in sets]


def _rise(config: StudyConfig, name: str, slopes: Sequence[Slopes]) -> float:
    return max(slope[name] * end for slope in slopes for end in config.free[name] if end)


def _choose(config: StudyConfig, promises: Sequence[Slopes]) -> list[str]:
    """Return the vectors to search: in turn the one that promises most for the objective, for the
    first term, for the second, and so on, so that no term is left without its vectors.
    """
    setting = config.search.screen
    order = list(dict.fromkeys(_in_turn(promises)))
    if setting == "auto":
        order.sort(key=lambda name: promises[0][name] <= 0)  # those that promise nothing come last
        setting = min(sum(rise > 0 for rise in promises[0].values()), MOST_SEARCHED)
    return order[: max(setting or 1, _least_for_total(config, order))]


def _in_turn(promises: Sequence[Slopes]) -> Iterator[str]:
    ranked = [
        [name for name in sorted(each, key=lambda name: -each[name]) if each[name] > 0 or not row]
        for row, each in enumerate(promises)
    ]
    for names in zip_longest(*ranked):
        yield from (name for name in names if name is not None)


def _least_for_total(config: StudyConfig, order: Sequence[str]) -> int:
    """Return how many vectors, in this order, can reach the lowest `search.total`; at least one."""
    reached, needed = 0.0, config.search.total[0] if config.search.total else 0.0
    for number, name in enumerate(order, start=1):
        reached += config.free[name][1]
        if reached >= needed:
            return number
    return len(order)
