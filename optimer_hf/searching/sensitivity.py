"""A pool and an objective -> what a little more of each vector does to every term, from two passes.

One pass with gradients at the base and one at the average give the derivatives in all weights, so a
pool of sixty vectors is looked at in the time of two trials. A vector that raises the objective at
neither place is not worth a dimension of the search.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimer_hf.errors import ConfigError, EvaluationError
from optimer_hf.files.text import markdown_table
from optimer_hf.progress import announce
from optimer_hf.scoring.formatting import OF_TERMS, Unit
from optimer_hf.searching.runner import InProcess, Runner, Slots
from optimer_hf.searching.study_file import read_study
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.gradients import differentiable_part, gain_gradients, value_gradient
from optimer_hf.study.space import anchors
from optimer_hf.study.trials import Candidate, Trial


@dataclass(frozen=True)
class Slope:
    """What one more unit of a vector's weight adds at two places, in gains over the base: to the
    objective (`value`), and to every term that has a gradient.
    """

    value: tuple[float, float]
    terms: dict[str, tuple[float, float]]

    @property
    def is_worth_searching(self) -> bool:
        """Whether the objective rises with the weight at one of the two places."""
        return max(self.value) > 0

    @property
    def advice(self) -> str:
        """What the slopes say, in a few words."""
        rises_at_first, rises_at_second = (slope > 0 for slope in self.value)
        if rises_at_first:
            return "search, may need much" if rises_at_second else "search, needs little"
        if rises_at_second:
            return "search, helps beside the others"
        helped = [label for label, slopes in self.terms.items() if max(slopes) > 0]
        return f"leave out, helps only {', '.join(helped)}" if helped else "leave out"


@dataclass(frozen=True)
class Sensitivity:
    """The slopes of every searched vector, the steepest first, and the trials that measured them:
    the base and the average (of a single vector: it alone).

    The slopes of the objective are those of its terms that have a gradient; `lacking` are the
    others.
    """

    config: StudyConfig
    places: tuple[Trial, Trial]
    slopes: dict[str, Slope]
    lacking: list[str]

    @property
    def worth_searching(self) -> list[str]:
        """Names of the vectors with which the objective rises at one of the places."""
        return [name for name, slope in self.slopes.items() if slope.is_worth_searching]


def measure_sensitivity(path: Path, *, objective: Path | None = None) -> Sensitivity:
    """Return the slopes of the pool in a study.yaml, or in a mergekit YAML with an objective file;
    see `sensitivity_of`.
    """
    return sensitivity_of(read_study(path, objective=objective))


def sensitivity_of(config: StudyConfig, *, runner: Runner | None = None) -> Sensitivity:
    """Return the slopes of the pool of a study.

    Raises ConfigError for an engine without gradients, and EvaluationError if one of the two places
    cannot be scored or no term of the objective has a gradient.
    """
    if config.engine.name != "transformers":
        raise ConfigError(
            f"engine: {config.engine.name} has no gradients. Leave the engine out to measure the "
            "sensitivity with transformers."
        )
    first, second = anchors(config, average_first=True)[:2]
    with (runner or InProcess()).open(config) as slots:
        base = _take_gradients(config, slots, Candidate(0, *first, with_gradients=True))
        other = _take_gradients(config, slots, Candidate(1, *second, with_gradients=True))
    return _summarize(config, base, other)


def _take_gradients(config: StudyConfig, slots: Slots, candidate: Candidate) -> Trial:
    with announce(f"vectors: gradients, {candidate.origin}"):
        slots.submit(candidate, config.objective.asked_terms("search"))
        trial = slots.next_finished()
    if trial.status != "ok":
        reason = str(trial.error).partition("\n")[0]
        raise EvaluationError(f"{candidate.origin}: cannot be scored: {reason}")
    return trial


def _summarize(config: StudyConfig, base: Trial, other: Trial) -> Sensitivity:
    places = (base, other)
    counting = [term for term in config.objective.terms_at("search") if term.weight > 0]
    objective = differentiable_part(config.objective, places)
    if objective is None:
        raise EvaluationError(_why_no_slopes([term.label for term in counting], places))
    values = [value_gradient(objective, place, base.terms) or {} for place in places]
    gains = [gain_gradients(place, base.terms) for place in places]
    labels = [label for label in base.gradients if label in other.gradients]
    slopes = {
        name: Slope(
            (values[0][name], values[1][name]),
            {label: (gains[0][label][name], gains[1][label][name]) for label in labels},
        )
        for name in config.free
    }
    steepest = sorted(slopes, key=lambda name: -max(slopes[name].value))
    lacking = [term.label for term in counting if term not in objective.terms]
    return Sensitivity(config, places, {name: slopes[name] for name in steepest}, lacking)


def _why_no_slopes(labels: Sequence[str], places: Sequence[Trial]) -> str:
    """Return why no term that counts has a gradient at both places; `labels` are those terms."""
    seen = [label for label in labels if any(label in place.gradients for place in places)]
    if not seen:
        return (
            f"objective: none of its terms ({', '.join(labels)}) has a gradient. Add one that is a "
            "likelihood, such as bits_per_byte of a text."
        )
    without = {place.origin: [x for x in seen if x not in place.gradients] for place in places}
    where = "; ".join(f"{origin}: {', '.join(gone)}" for origin, gone in without.items() if gone)
    return (
        f"objective: no term has a finite gradient at both places (not finite at {where}). Set "
        "`dtype: float32`, or leave out vectors that break the model."
    )


# -- showing ---------------------------------------------------------------------------------------


def to_json(sensitivity: Sensitivity) -> dict[str, Any]:
    """Return what JSON shows: for each place its weights, scores, seconds and derivatives of the
    scores, for each vector its slopes and the advice.
    """
    return {
        "places": {
            trial.origin: {
                "weights": trial.weights,
                "scores": {label: term.score for label, term in trial.terms.items()},
                "gradients": trial.gradients,
                "seconds": trial.seconds,
            }
            for trial in sensitivity.places
        },
        "vectors": {
            name: {
                "objective": list(slope.value),
                "terms": {label: list(slopes) for label, slopes in slope.terms.items()},
                "advice": slope.advice,
            }
            for name, slope in sensitivity.slopes.items()
        },
        "worth_searching": sensitivity.worth_searching,
        "terms_without_gradient": sensitivity.lacking,
    }


def to_markdown(sensitivity: Sensitivity) -> str:
    """Return the slopes as a table, and what to conclude from them."""
    labels = list(next(iter(sensitivity.slopes.values())).terms)
    places = " / ".join(trial.origin for trial in sensitivity.places)
    header = ["vector", f"objective: {places}", *labels, "advice"]
    unit = Unit.of(sensitivity.config.objective)
    rows = [
        [
            name,
            _show(unit, slope.value),
            *(_show(OF_TERMS, slope.terms[label]) for label in labels),
            slope.advice,
        ]
        for name, slope in sensitivity.slopes.items()
    ]
    unit_text = "in %" if unit.factor > 1 else "of terms in %"
    lines = [
        markdown_table(header, rows),
        f"Each cell: gain over the base for one more unit of weight, {unit_text}, at the two places"
        f" ({places}). Steepest first.",
        _conclude(sensitivity),
    ]
    if sensitivity.lacking:
        lines.append(f"Without a gradient, so not in it: {', '.join(sensitivity.lacking)}.")
    return "\n".join(lines)


def _show(unit: Unit, slopes: Sequence[float]) -> str:
    return " / ".join(unit.number(slope) for slope in slopes)


def _conclude(sensitivity: Sensitivity) -> str:
    worth = sensitivity.worth_searching
    left = [name for name in sensitivity.slopes if name not in worth]
    if not worth:
        return "None is worth searching: the objective falls with each of them, at both places."
    text = f"Worth searching: {', '.join(worth)}."
    if left:
        text += f" The objective falls with {', '.join(left)}, at both places."
    return text
