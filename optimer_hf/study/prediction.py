"""Recorded trials + a new objective -> predicted best weights and fronts, without a new evaluation.

Each trial records the score of every term, so the surrogate of a new weighting of the terms is a
new sum of the same processes. To verify a prediction is to search,
in a study of its own that begins with the trials of the old one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from optimer_hf.errors import StudyError
from optimer_hf.scoring.objective import Objective, Term, gains, is_feasible
from optimer_hf.study.acquisition import maximise
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.directory import Study
from optimer_hf.study.space import from_unit, to_unit, within_total
from optimer_hf.study.surrogate import Surrogate, fit_surrogate
from optimer_hf.study.trials import Trial

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


SCALE_STEP = 0.05
CAUTION = 0.5  # standard deviations; weights far from all trials can have a high mean by chance
PREDICTION = "prediction"  # origin of the trial that verifies one


@dataclass(frozen=True)
class Estimate:
    """A posterior mean with its standard deviation."""

    value: float
    deviation: float


@dataclass(frozen=True)
class Prediction:
    """Weights, the value the surrogate expects of them, the gain of every term that counts, and the
    probability that they keep the constraints.
    """

    weights: dict[str, float]
    value: float
    deviation: float
    terms: dict[str, Estimate]
    feasible: float


# -- new objectives --------------------------------------------------------------------------------


def reweight(objective: Objective, term_weights: Mapping[str, float]) -> Objective:
    """Return the objective with other weights on its terms; terms that are not named count nothing.

    Raises StudyError for a term that was not recorded.
    """
    for label in term_weights:
        _find_term(objective.scored_terms, label)
    terms = [
        Term.model_validate(term.model_dump(exclude={"max_relative_to_base"}) | {"weight": weight})
        for term in objective.scored_terms
        for weight in [term_weights.get(term.label, 0.0)]
    ]
    return objective.model_copy(update={"terms": terms, "combine": "relative_to_base"})


def match_to_record(study: Study, target: Objective) -> Objective:
    """Return a new objective over the terms that a study recorded, matched by label.

    Weights, combination and constraints are those of `target`; the items those of the record.
    Raises StudyError for a term that was not recorded, or from another source or in another metric.
    """
    recorded = study.config.objective

    def recorded_fields(term: Term) -> dict[str, Any]:
        known = _find_term(recorded.terms_at("search"), term.label)
        _refuse_other_source(term, known)
        return known.model_dump(exclude={"weight", "max_relative_to_base"}) | {
            "limit": recorded.limit_of(known)
        }

    return Objective.model_validate(
        {
            "combine": target.combine,
            "terms": [recorded_fields(term) | {"weight": term.weight} for term in target.terms],
            "constraints": [
                recorded_fields(term) | {"max_relative_to_base": term.max_relative_to_base}
                for term in target.constraints
            ],
            "include_path": recorded.include_path,
            **recorded.prompting,
        }
    )


def _refuse_other_source(term: Term, known: Term) -> None:
    """Raise StudyError for a term that looks at something else than the one recorded as it. Of
    files the names are compared: a study may have been moved.
    """

    def source_of(term: Term) -> str:
        return str(term.text.name if term.text is not None else term.task or term.function)

    for field, found, expected in (
        ("source", source_of(term), source_of(known)),
        ("metric", term.metric, known.metric),
    ):
        if found != expected:
            raise StudyError(
                f"term {term.label!r}: {field} {found!r}, but the study recorded {expected!r} "
                "under that name. Nothing else can be answered from its record: give the recorded "
                "one, or search a study of its own."
            )


def _find_term(terms: Sequence[Term], label: str) -> Term:
    for term in terms:
        if term.label == label:
            return term
    raise StudyError(
        f"no term {label!r} was recorded; this study has {sorted(term.label for term in terms)}."
    )


# -- predicting ------------------------------------------------------------------------------------


def predict(study: Study, target: Objective | Mapping[str, float] | None = None) -> Prediction:
    """Return the weights with the best posterior mean, less CAUTION standard deviations, for an
    objective over recorded terms, given whole or as term weights (None: the study's own).
    """
    config = _config_for(study, target)
    trials = study.trials
    posterior = fit_surrogate(config, trials)
    points = to_unit(config, [trial.weights for trial in trials])
    near = points[np.argsort(-posterior.ranking(points), kind="stable")[:5]]
    rng = np.random.default_rng(config.search.seed)
    best = maximise(
        lambda found: posterior.ranking(found, CAUTION),
        points.shape[1],
        rng,
        near,
        allowed=lambda found: within_total(config, found),
    )
    mean, variance = posterior.predict(best[None])
    return Prediction(
        from_unit(config, best),
        float(mean[0]),
        float(np.sqrt(variance[0])),
        _terms_at(config, posterior, best),
        float(np.exp(posterior.log_feasibility(best[None])[0])),
    )


def _config_for(study: Study, target: Objective | Mapping[str, float] | None) -> StudyConfig:
    if target is None:
        return study.config
    if not isinstance(target, Objective):
        for label in target:
            _find_term(study.config.objective.terms_at("search"), label)
        target = reweight(study.config.objective, target)
    return study.config.model_copy(update={"objective": target})


def _terms_at(config: StudyConfig, posterior: Surrogate, point: "Array") -> dict[str, Estimate]:
    labels = [term.label for term in config.objective.terms_at("search") if term.weight > 0]
    processes = posterior.objective.processes
    if len(processes) != len(labels):  # `worst` has one process for all
        return {}
    found = {}
    for label, process in zip(labels, processes, strict=True):
        mean, variance = process.predict(point[None])
        found[label] = Estimate(float(mean[0]), float(np.sqrt(variance[0])))
    return found


def best_scale(study: Study, name: str) -> dict[str, float]:
    """Return the weights of one vector alone at the scale the surrogate likes best, on a grid of
    SCALE_STEP.
    """
    config = study.config
    low, high = config.free[name]
    scales = np.arange(low, high + 1e-9, SCALE_STEP)
    sets = [
        {other: float(s) * (other == name) for other in config.free} | config.fixed for s in scales
    ]
    ranking = fit_surrogate(config, study.trials).ranking(to_unit(config, sets))
    best = sets[int(np.argmax(ranking))]
    return {other: round(weight, 4) for other, weight in best.items()}


# -- the front -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """A trial that no other one beats in every term, with the gains of the terms that count."""

    trial: Trial
    gains: dict[str, float]


def front(study: Study) -> list[Choice]:
    """Return the Pareto front of the search trials: sound, within the constraints, and beaten in
    every term by none. Gains are those measured on the search items; sorted by the first term.
    """
    objective = study.config.objective
    labels = [term.label for term in objective.terms_at("search") if term.weight > 0]
    sound = [
        Choice(trial, {label: gains(trial.terms, study.base)[label] for label in labels})
        for trial in study.trials
        if trial.status == "ok" and is_feasible(objective, trial.terms, study.base)
    ]
    table = np.array([list(choice.gains.values()) for choice in sound])
    kept = [
        choice
        for choice, row in zip(sound, table, strict=True)
        if not ((table >= row).all(axis=1) & (table > row).any(axis=1)).any()
    ]
    return sorted(kept, key=lambda choice: -choice.gains[labels[0]])
