"""Recorded trials + a new objective -> predicted best weights, without a new evaluation.

Each trial records the score of every term, so the surrogate of a new weighting of the terms is a
new sum of the same processes.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from optimer_hf.errors import StudyError
from optimer_hf.evaluate import Objective
from optimer_hf.study import Study, from_unit, surrogate_of, to_unit
from optimer_hf.surrogate import maximise

SCALE_STEP = 0.05


@dataclass(frozen=True)
class Prediction:
    """Weights, and the value the surrogate expects of them with its standard deviation."""

    weights: dict[str, float]
    value: float
    deviation: float


def retargeted(objective: Objective, term_weights: Mapping[str, float]) -> Objective:
    """Return the objective with other weights on its terms; terms that are not named count nothing.

    Raises StudyError for a term that was not recorded.
    """
    labels = {term.label for term in objective.terms}
    unknown = sorted(set(term_weights) - labels)
    if unknown:
        raise StudyError(f"no term {unknown[0]!r} was recorded; this study has {sorted(labels)}.")
    terms = [
        term.model_copy(update={"weight": term_weights.get(term.label, 0.0)})
        for term in objective.terms
    ]
    return objective.model_copy(update={"terms": terms, "combine": "relative_to_base"})


def predict(study: Study, term_weights: Mapping[str, float] | None = None) -> Prediction:
    """Return the weights with the best posterior mean for an objective over recorded terms (None:
    the study's own).
    """
    config = study.config
    if term_weights is not None:
        objective = retargeted(config.objective, term_weights)
        config = config.model_copy(update={"objective": objective})
    trials = study.log.of("search")
    posterior = surrogate_of(config, trials)
    points = to_unit(config, [trial.weights for trial in trials])
    near = points[np.argsort(-posterior.predict(points)[0])[:5]]
    rng = np.random.default_rng(config.search.seed)
    best = maximise(lambda x: posterior.predict(x)[0], points.shape[1], rng, near)
    mean, variance = posterior.predict(best[None])
    return Prediction(from_unit(config, best), float(mean[0]), float(np.sqrt(variance[0])))


def best_scale(study: Study, name: str) -> dict[str, float]:
    """Return the weights of one vector alone at the scale the surrogate likes best, on a grid of
    SCALE_STEP.
    """
    config = study.config
    low, high = config.free[name]
    scales = np.arange(max(low, 0.0), high + 1e-9, SCALE_STEP)
    sets = [
        {other: float(s) * (other == name) for other in config.free} | config.fixed for s in scales
    ]
    mean, _ = surrogate_of(config, study.log.of("search")).predict(to_unit(config, sets))
    best = sets[int(np.argmax(mean))]
    return {other: round(weight, 4) for other, weight in best.items()}
