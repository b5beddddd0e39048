"""Rows of a comparison."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from optimer_hf.files.text import html_table
from optimer_hf.scoring.intervals import Interval
from optimer_hf.scoring.objective import Objective, combine, gains
from optimer_hf.scoring.scores import TermScore
from optimer_hf.scoring.units import Unit, paired_interval
from optimer_hf.study.config import MERGE, RETARGETED
from optimer_hf.study.prediction import retargeted

if TYPE_CHECKING:
    from pandas import DataFrame

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

    def __repr__(self) -> str:
        unit, merge = Unit.of(self.objective), self.merge
        gain = unit.show(self.value(merge) - self.value(self.base))
        best = self.best_baseline()
        ahead = unit.show_difference(self.value(merge) - self.value(best))
        return (
            f"Comparison({len(self.rows)} rows; {merge.title}: {gain} over the base, {ahead} over "
            f"{best.title})"
        )

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the table of the sealed test and its verdicts."""
        from optimer_hf.comparison.tables import table, verdicts

        return html_table(" ".join(verdicts(self)), *table(self))

    def to_dataframe(self) -> "DataFrame":
        """Return a pandas DataFrame with a row for every weight set, indexed by its name.

        Columns: chosen_after_seal, objective (larger is better), and `weight/NAME`, `score/TERM`
        and `gain/TERM` (over the base; losses relative, accuracies as a difference).
        """
        from pandas import DataFrame, Index

        rows = [
            {"chosen_after_seal": row.chosen_after_seal, "objective": self.value(row)}
            | {f"weight/{name}": weight for name, weight in row.weights.items()}
            | {f"score/{label}": score.score for label, score in row.scores.items()}
            | {f"gain/{name}": g for name, g in gains(row.scores, self.base.scores).items()}
            for row in self.rows
        ]
        return DataFrame(rows, index=Index([row.title for row in self.rows], name="row"))

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
