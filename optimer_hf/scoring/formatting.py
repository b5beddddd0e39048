"""Values of an objective as text: their unit, differences with intervals, verdicts."""

import math
from dataclasses import dataclass, replace

from optimer_hf.files.text import signed
from optimer_hf.scoring.intervals import Interval
from optimer_hf.scoring.objective import Objective, combine
from optimer_hf.scoring.scores import Scores

MOST_DIGITS = 9  # decimals of a difference that fewer would show as 0


@dataclass(frozen=True)
class Unit:
    """The unit of an objective's values. They are shown times `factor`, with `digits` decimals, in
    percent or in the unit `name`. `text` is the label of an axis of gains.
    """

    factor: float
    text: str
    name: str = ""
    digits: int = 2

    @classmethod
    def of(cls, objective: Objective) -> "Unit":
        """Return percent over the base; under `weighted_mean`, the metric of the terms."""
        if objective.combine != "weighted_mean":
            return PERCENT
        term = next(term for term in objective.terms if term.weight > 0)
        name = term.function_name or term.metric_name
        return cls(1.0, f"objective over the base, {name}", name, 4)

    def show(self, gain: float) -> str:
        """Return a gain as text; larger is better."""
        return f"{self.number(gain)}{' %' if self.factor > 1 else self.name and f' {self.name}'}"

    @property
    def sign(self) -> str:
        """What stands behind numbers in this unit, for the label of an axis."""
        return "%" if self.factor > 1 else self.name

    def show_difference(self, difference: float) -> str:
        """Return a difference of two gains as text; a difference of percentages is in points."""
        return f"{self.number(difference)} points" if self.factor > 1 else self.show(difference)

    def show_interval(self, interval: Interval) -> str:
        """Return the ends of an interval as text. An end that is not 0 is never shown as 0."""
        if interval.kind == "none":
            return "no interval"
        ends = (interval.low, interval.high)
        return f"[{', '.join(self.telling_from_zero(end).number(end) for end in ends)}]"

    def show_mean(self, mean: float) -> str:
        """Return the mean of the terms of a `weighted_mean` as text."""
        return f"{mean:.{self.digits}f} {self.name}"

    def telling_from_zero(self, value: float) -> "Unit":
        """Return the unit with as many decimals as it takes to see that a value is not 0."""
        if not value or round(self.factor * value, self.digits):
            return self
        digits = -math.floor(math.log10(abs(self.factor * value)))
        return replace(self, digits=min(digits, MOST_DIGITS))

    def number(self, value: float) -> str:
        """Return a value as a number with a sign, but never as -0.00."""
        return signed(self.factor * value, self.digits)


PERCENT = Unit(100.0, "objective over the base, %")
OF_TERMS = Unit(100.0, "gain over the base, %")  # of losses relative, of accuracies in points


def describe_interval(interval: Interval, unit: Unit, *, is_gain: bool) -> str:
    """Return a difference, its interval and the verdict as text. `is_gain` says that it is a gain
    over the base, not a difference between two merges.
    """
    unit = unit.telling_from_zero(interval.difference)
    show = unit.show if is_gain else unit.show_difference
    text = show(interval.difference)
    if interval.kind != "none":
        text += f" {unit.show_interval(interval)}, paired 95 % interval ({interval.kind})"
    return f"{text}: {interval.verdict}"


def show_value(objective: Objective, scores: Scores, base: Scores, *, is_base: bool) -> str:
    """Return the value of an objective as tables show it: relative to the base. Under
    `weighted_mean`, the base itself is shown with its mean.
    """
    unit, mean = Unit.of(objective), mean_of(objective, scores)
    if is_base and mean is not None:
        return unit.show_mean(mean)
    return unit.show(combine(objective, scores, base) - combine(objective, base, base))


def mean_of(objective: Objective, scores: Scores) -> float | None:
    """Return the mean of the terms in their own unit, where lower may be better; None if the
    objective is no `weighted_mean`.
    """
    if objective.combine != "weighted_mean":
        return None
    value = combine(objective, scores, scores)
    counting = [term.label for term in objective.terms if term.weight > 0]
    return value if any(scores[label].higher_is_better for label in counting) else -value
