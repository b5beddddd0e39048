"""Rows of a comparison."""

from collections.abc import Mapping
from dataclasses import dataclass

from optimer_hf.scoring.intervals import Interval
from optimer_hf.scoring.objective import Objective, combine
from optimer_hf.scoring.scores import TermScore
from optimer_hf.scoring.units import paired_interval
from optimer_hf.study.config import MERGE, RETARGETED
from optimer_hf.study.prediction import retargeted

AT_BEST_SCALE = " at its best scale"


def titled(name: str, chosen_after_seal: bool) -> str:
    """Return the name of a row, marked when it was chosen after sealed scores had been seen."""
    return name + " (chosen after the seal was opened)" * chosen_after_seal


@dataclass(frozen=True)
class Row:
    """One weight set on the sealed test."""

    name: str
    weights: dict[str, float]
    scores: dict[str, TermScore]
    chosen_after_seal: bool

    @property
    def title(self) -> str:
        """The name, marked when the row was chosen after sealed scores had been seen."""
        return titled(self.name, self.chosen_after_seal)

    @property
    def is_baseline(self) -> bool:
        """Whether the merge is compared with it: all but the merge and re-targeted merges."""
        return self.name != MERGE and not self.name.startswith(RETARGETED)


@dataclass(frozen=True)
class Comparison:
    """All rows, first the base, and the objective they are compared by."""

    rows: list[Row]
    objective: Objective
    retarget: Mapping[str, Mapping[str, float]]

    @property
    def base(self) -> Row:
        """The base model."""
        return self.rows[0]

    @property
    def merge(self) -> Row:
        """The searched merge."""
        return next(row for row in self.rows if row.name == MERGE)

    def value(self, row: Row, objective: Objective | None = None) -> float:
        """Return the value of a row under an objective (None: that of the study)."""
        return combine(objective or self.objective, row.scores, self.base.scores)

    def best_baseline(self, objective: Objective | None = None) -> Row:
        """Return the best of the others by its sealed value: the hardest one to beat."""
        return max(
            (row for row in self.rows if row.is_baseline),
            key=lambda row: self.value(row, objective),
        )

    def interval(self, row: Row, other: Row, objective: Objective | None = None) -> Interval:
        """Return value(row) - value(other) with its paired 95 % interval."""
        return paired_interval(
            objective or self.objective, row.scores, other.scores, self.base.scores
        )

    def term_interval(self, row: Row, label: str) -> Interval:
        """Return the gain of a row over the base on one term, with its interval."""
        return self.interval(row, self.base, retargeted(self.objective, {label: 1.0}))
