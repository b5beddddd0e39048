"""Recorded trials + a new objective -> predicted weights and Pareto fronts, without evaluations.

Each trial records the score of every term, so the surrogate of a new weighting of the terms is a
new sum of the same processes. To verify a prediction, `searching.loop.search_on` searches further,
in a study of its own that begins with the recorded trials.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from optimer_hf.errors import StudyError
from optimer_hf.files.reference import is_there
from optimer_hf.scoring.objective import Objective, Term, gains, is_feasible
from optimer_hf.study.acquisition import climb, maximise
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.directory import Study
from optimer_hf.study.screening import searched_part
from optimer_hf.study.space import columns_of, embed, from_unit, to_unit, within_total
from optimer_hf.study.surrogate import SMALLEST_SPREAD, Surrogate, columns, fit_surrogate
from optimer_hf.study.trials import Trial

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


SCALE_STEP, FEWEST_SCALES = 0.05, 20
CAUTION = 0.5  # standard deviations: far from all trials, the mean can be high by chance
PREDICTION = "prediction"  # origin of the trial that verifies one


@dataclass(frozen=True)
class Estimate:
    """A posterior mean and its standard deviation."""

    value: float
    deviation: float


@dataclass(frozen=True)
class Prediction:
    """Weights; the value that the surrogate expects of them, with its standard deviation; the gain
    of every term with a weight above 0; and the probability (`feasible`) that the weights keep all
    constraints. `note` is empty, or says why these weights could not be predicted.
    """

    weights: dict[str, float]
    value: float
    deviation: float
    terms: dict[str, Estimate]
    feasible: float
    note: str = ""


# -- new objectives --------------------------------------------------------------------------------


def reweight(objective: Objective, term_weights: Mapping[str, float]) -> Objective:
    """Return the objective with new weights on its terms, 0 for those that are not named, combined
    as relative_to_base. Its constraints stay.

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
    """Return the objective `target` over the terms that a study recorded, matched by label.

    Weights, combination and constraints come from `target`, items and prompts from the record. A
    file or folder that is not where the record says, as in a study that was pulled, is that of
    `target`.
    Raises StudyError for a term that was not recorded, or that has another source or metric there.
    """
    recorded = study.config.objective

    def recorded_fields(term: Term) -> dict[str, Any]:
        known = _find_term(recorded.terms_at("search"), term.label)
        _refuse_other_source(term, known)
        own = {} if known.text is None or is_there(known.text) else {"text": term.text}
        return known.model_dump(exclude={"weight", "max_relative_to_base"}) | {
            "limit": recorded.limit_of(known),
            **own,
        }

    return Objective.model_validate(
        {
            "combine": target.combine,
            "terms": [recorded_fields(term) | {"weight": term.weight} for term in target.terms],
            "constraints": [
                recorded_fields(term) | {"max_relative_to_base": term.max_relative_to_base}
                for term in target.constraints
            ],
            "include_path": (
                recorded.include_path
                if recorded.include_path is not None and is_there(recorded.include_path)
                else target.include_path
            ),
            "split_by": recorded.split_by,
            **recorded.prompting,
        }
    )


def _refuse_other_source(term: Term, known: Term) -> None:
    """Raise StudyError if a term has another source than the recorded term of its label, or names
    another metric. Files are compared by name, since a study may have been moved.
    """

    def source_of(term: Term) -> str:
        return str(term.text.name if term.text is not None else term.task or term.function_name)

    names_metric = "metric" in term.model_fields_set
    for field, given, recorded in (
        ("source", source_of(term), source_of(known)),
        ("metric", term.metric if names_metric else known.metric, known.metric),
    ):
        if given != recorded:
            raise StudyError(
                f"term {term.label!r}: {field} {given!r}, but the study recorded {recorded!r} "
                "under that name, and only what it recorded can be predicted. Give the recorded "
                "one, or start a new search."
            )


def _find_term(terms: Sequence[Term], label: str) -> Term:
    for term in terms:
        if term.label == label:
            return term
    raise StudyError(
        f"no term {label!r} was recorded; this study has "
        f"{', '.join(sorted(term.label for term in terms))}."
    )


# -- predicting ------------------------------------------------------------------------------------


def predict(study: Study, target: Objective | Mapping[str, float] | None = None) -> Prediction:
    """Return the weights with the largest posterior mean minus CAUTION standard deviations. Vectors
    that the study's screen leaves out stay at 0 for any target, since no trial says how far to go.
    If the target has the same value in all trials, the weights are those of the study's best trial
    that keeps its constraints.

    `target` is an objective over recorded terms, or their weights by label; None stands for the
    study's own objective. Raises StudyError for a term that was not recorded.
    """
    config = _config_for(study, target)
    posterior = fit_surrogate(config, study.trials)
    if _are_alike(config, study.trials) and not posterior.has_gradients:
        trial = _best_that_keeps(study, config.objective)
        note = _say_alike(study, config.objective, trial)
        return _prediction_at(config, posterior, to_unit(config, [trial.weights]), note)
    return _prediction_at(config, posterior, _best_point(study, config, posterior)[None])


def _best_point(study: Study, config: StudyConfig, posterior: Surrogate) -> "Array":
    """Return the point [d] of the unit box that `predict` returns as weights."""
    trials = study.trials
    searched = searched_part(study.config, trials)
    points = to_unit(config, [trial.weights for trial in trials])
    near = points[np.argsort(-posterior.ranking(points), kind="stable")[:5]]
    near = near[:, columns_of(config, searched)]
    rng = np.random.default_rng(config.search.seed)

    def value(points: "Array") -> "Array":
        return posterior.ranking(embed(config, searched, points), CAUTION)

    allowed = partial(within_total, searched)
    best = maximise(value, len(searched.free), rng, near, allowed=allowed)
    if posterior.has_gradients:
        best = climb(value, best, allowed=allowed)
    return np.asarray(embed(config, searched, best[None])[0])


def _prediction_at(
    config: StudyConfig, posterior: Surrogate, point: "Array", note: str = ""
) -> Prediction:
    """Return what is expected at a point [1, d] of the unit box."""
    mean, variance = posterior.predict(point)
    return Prediction(
        from_unit(config, point[0]),
        float(mean[0]),
        float(np.sqrt(variance[0])),
        _terms_at(config, posterior, point[0]),
        float(np.exp(posterior.log_feasibility(point)[0])),
        note,
    )


# -- when all trials are alike ---------------------------------------------------------------------


def _are_alike(config: StudyConfig, trials: Sequence[Trial]) -> bool:
    """Whether everything that the surrogate learns of an objective is the same in all trials that
    were scored, so that a surrogate prefers no weights to others.
    """
    sound = [trial for trial in trials if trial.status == "ok"]
    return bool((np.ptp(columns(config, sound), axis=0) <= SMALLEST_SPREAD).all())


def _best_that_keeps(study: Study, target: Objective) -> Trial:
    """Return the best trial of a study that keeps the constraints of another objective; the base
    always does.
    """
    ranked = study.rank_trials()
    if study.has_best_trial:
        best = study.best_trial.number
        ranked.sort(key=lambda trial: trial.number != best)
    return next(trial for trial in ranked if is_feasible(target, trial.terms, study.base))


def _say_alike(study: Study, target: Objective, trial: Trial) -> str:
    labels = ", ".join(term.label for term in target.terms_at("search") if term.weight > 0)
    which = "the best one that keeps the constraints" if target.constraints else "the best one"
    return (
        f"all {len(study.trials)} trials have the same value under this objective ({labels}), so "
        f"they prefer no weights to others. These are the weights of trial {trial.number}, {which} "
        "for the study's own objective."
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
    estimates = {}
    for label, process in zip(labels, processes, strict=True):
        mean, variance = process.predict(point[None])
        estimates[label] = Estimate(float(mean[0]), float(np.sqrt(variance[0])))
    return estimates


def best_scale(study: Study, name: str) -> dict[str, float]:
    """Return the weights of one vector alone, at the scale with the largest posterior mean on a
    grid of SCALE_STEP, or finer between narrow bounds, with both bounds. All its groups have that
    weight, within the bounds of all of them together.
    """
    config, own = study.config, study.config.free_parts[name]
    lows, highs = zip(*(config.free[part] for part in own), strict=True)
    low, high = min(lows), max(highs)
    step = min(SCALE_STEP, (high - low) / FEWEST_SCALES)
    scales = [*np.arange(low, high, step), high]
    sets = [
        {other: float(s) * (other in own) for other in config.free} | config.fixed for s in scales
    ]
    ranking = fit_surrogate(config, study.trials).ranking(to_unit(config, sets))
    best = sets[int(np.argmax(ranking))]
    return {other: round(weight, 4) for other, weight in best.items()}


# -- the front -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """A trial of the Pareto front, with the gain of every term that has a weight above 0."""

    trial: Trial
    gains: dict[str, float]


def front(study: Study) -> list[Choice]:
    """Return the Pareto front of the search trials, those with the largest gain in the first term
    first.

    A trial is on the front when it keeps all constraints and no other trial is at least as good in
    every term and better in one. Gains are those on the items of the search.
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
