"""Values of an objective as text, and paired intervals of their differences."""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from optimer_hf.errors import EvaluationError
from optimer_hf.scoring.intervals import Interval, Paired, interval_of
from optimer_hf.scoring.objective import Objective, Term, _metric_name, combine
from optimer_hf.scoring.scores import Scores, TermScore

if TYPE_CHECKING:
    from numpy.typing import NDArray


def paired_interval(
    objective: Objective, scores: Scores, other: Scores, base: Scores, *, seed: int = 0
) -> Interval:
    """Return value(scores) - value(other) with a 95 % interval over the items that all three have.

    Terms that share documents are resampled together; see `intervals`. Raises EvaluationError when
    the sides were not scored on the same items.
    """
    terms = [term for term in objective.terms if term.weight > 0 and term.label in scores]
    if all(scores[term.label] is other[term.label] for term in terms):
        fewest = min(terms, key=lambda term: len(scores[term.label].items))
        n_fewest = len(scores[fewest.label].items)
        return Interval(0.0, -math.inf, math.inf, "none", n_fewest, fewest.label)
    paired = []
    for term in terms:
        sides = scores[term.label], other[term.label], base[term.label]
        _check_paired(term, sides)
        own = Paired(
            term.label,
            term.weight,
            sides[0].higher_is_better,
            sides[0].is_perplexity,
            _documents_of(term, sides[0]),
            (sides[0].table, sides[1].table, sides[2].table),
        )
        paired.append(own)
    return interval_of(paired, objective.combine, seed=seed)


def _check_paired(term: Term, sides: Sequence[TermScore]) -> None:
    counts = sorted({len(side.items) for side in sides})
    known = [side.documents for side in sides if side.documents]
    if len(counts) > 1:
        found = f"{counts[0]} and {counts[-1]} items"
    elif any(documents != known[0] for documents in known):
        found = "other documents"
    else:
        return
    raise EvaluationError(
        f"term {term.label!r}: two models were scored on {found}, so they cannot be compared item "
        "by item. Score them again on the same items."
    )


def _documents_of(term: Term, score: TermScore) -> "NDArray[np.int64]":
    """Return numbers of the documents behind items, [n]. Where they were not recorded, terms of one
    task and one length are taken to have the same.
    """
    if score.documents:
        return np.array(score.documents, dtype=np.int64)
    n = len(score.items)
    source = zlib.crc32(repr((term.task_name, term.hash_range, n)).encode())
    return np.arange(n, dtype=np.int64) + ((source + 1) << 31)


# -- in words --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """What the values of an objective are counted in: the number shown is `factor` times a value,
    with `digits` decimals, in percent or in what `name` says. `text` describes a gain.
    """

    factor: float
    text: str
    name: str = ""
    digits: int = 2

    @classmethod
    def of(cls, objective: Objective) -> "Unit":
        """Percent over the base, or the metric of the terms under `weighted_mean`."""
        if objective.combine != "weighted_mean":
            return cls(100.0, "objective over the base, %")
        term = next(term for term in objective.terms if term.weight > 0)
        name = term.function or _metric_name(term)
        return cls(1.0, f"objective over the base, {name}", name, 4)

    def show(self, gain: float) -> str:
        """Return a gain, larger is better, as text."""
        return f"{self.number(gain)}{' %' if self.factor > 1 else self.name and f' {self.name}'}"

    def show_difference(self, difference: float) -> str:
        """Return a difference of two gains as text: of percentages it is points."""
        return f"{self.number(difference)} points" if self.factor > 1 else self.show(difference)

    def show_interval(self, interval: Interval) -> str:
        """Return the ends of an interval as text."""
        if interval.kind == "none":
            return "no interval"
        return f"[{self.number(interval.low)}, {self.number(interval.high)}]"

    def number(self, value: float) -> str:
        """Return a value as a number with its sign, and never as -0.00."""
        return f"{round(self.factor * value, self.digits) + 0.0:+.{self.digits}f}"


OF_TERMS = Unit(100.0, "gain over the base, %")  # losses relative, accuracies in points


def said_of(interval: Interval, unit: Unit, *, is_gain: bool) -> str:
    """Return a difference with its interval, the kind of it, and the verdict, as text; `is_gain`
    says that it is one over the base, not one between two merges.
    """
    show = unit.show if is_gain else unit.show_difference
    found = show(interval.difference)
    if interval.kind != "none":
        found += f" {unit.show_interval(interval)}, paired 95 % interval ({interval.kind})"
    return f"{found}: {interval.verdict}"


def shown_value(objective: Objective, scores: Scores, base: Scores, *, is_base: bool) -> str:
    """Return the objective as tables show it: over the base, or under `weighted_mean` for the base
    itself as the mean that it is.
    """
    unit, value = Unit.of(objective), combine(objective, scores, base)
    if not is_base or objective.combine != "weighted_mean":
        return unit.show(value - combine(objective, base, base))
    counting = [term.label for term in objective.terms if term.weight > 0]
    lower_is_better = not any(base[label].higher_is_better for label in counting)
    return f"{-value if lower_is_better else value:.{unit.digits}f} {unit.name}"
