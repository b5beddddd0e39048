"""The result of a sealed test: all rows, and how any two of them compare."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from optimer_hf.comparison.rows import LeftOut, RowKind, SealedRow
from optimer_hf.files.text import html_table
from optimer_hf.scoring.formatting import OF_TERMS, Unit, describe_interval, show_value
from optimer_hf.scoring.intervals import Interval
from optimer_hf.scoring.objective import Objective, combine, gains
from optimer_hf.scoring.paired import paired_interval
from optimer_hf.study.prediction import reweight

if TYPE_CHECKING:
    from pandas import DataFrame


@dataclass(frozen=True)
class Comparison:
    """The rows of a sealed test, the base first, and the objective that compares them.

    `retarget` has the term weights of each re-targeted merge, by name; `left_out` the baselines
    that could not be scored.
    """

    rows: list[SealedRow]
    objective: Objective
    retarget: Mapping[str, Mapping[str, float]]
    left_out: list[LeftOut] = field(default_factory=list)

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
        """Return the table of the sealed test and its verdicts, for a notebook."""
        return html_table(" ".join([*verdicts(self), *say_left_out(self)]), *table(self))

    def to_dataframe(self) -> "DataFrame":
        """Return a pandas DataFrame with one row for each weight set, indexed by its title.

        The columns are kind, subject, chosen_after_seal, objective (larger is better),
        `weight/NAME`, `score/TERM` and `gain/TERM`. Gains are over the base: relative for losses,
        differences for accuracies.
        """
        from pandas import DataFrame, Index

        rows = [
            {"kind": row.kind, "subject": row.subject}
            | {"chosen_after_seal": row.chosen_after_seal, "objective": self.value(row)}
            | {f"weight/{name}": weight for name, weight in row.weights.items()}
            | {f"score/{label}": score.score for label, score in row.scores.items()}
            | {f"gain/{name}": g for name, g in gains(row.scores, self.base.scores).items()}
            for row in self.rows
        ]
        return DataFrame(rows, index=Index([row.title for row in self.rows], name="row"))

    @property
    def base(self) -> SealedRow:
        """The base model."""
        return self.rows[0]

    @property
    def merge(self) -> SealedRow:
        """The searched merge."""
        return self.row("merge")

    def row(self, kind: RowKind, subject: str = "") -> SealedRow:
        """Return the row with a kind and a subject."""
        return next(row for row in self.rows if (row.kind, row.subject) == (kind, subject))

    def value(self, row: SealedRow, objective: Objective | None = None) -> float:
        """Return the value of a row under an objective (None: that of the test)."""
        return combine(objective or self.objective, row.scores, self.base.scores)

    def best_baseline(self, objective: Objective | None = None) -> SealedRow:
        """Return the baseline with the largest value, which is the hardest to beat."""
        return max(
            (row for row in self.rows if row.is_baseline),
            key=lambda row: self.value(row, objective),
        )

    def interval(
        self, row: SealedRow, other: SealedRow, objective: Objective | None = None
    ) -> Interval:
        """Return value(row) - value(other) with its paired 95 % interval over items."""
        return paired_interval(
            objective or self.objective, row.scores, other.scores, self.base.scores
        )

    def term_interval(self, row: SealedRow, label: str) -> Interval:
        """Return the gain of a row over the base on one term, with its interval."""
        return self.interval(row, self.base, reweight(self.objective, {label: 1.0}))


# -- in words --------------------------------------------------------------------------------------


def table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table of a sealed test.

    Each row has the gain over the base in every term, in percent, and in the objective, in its
    unit; the first row has the scores of the base. Terms with a `limit` show the number of items.
    """
    labels = list(comparison.base.scores)
    objective, base = comparison.objective, comparison.base.scores
    limited = limited_terms(objective)
    marked = [f"{x} ({len(base[x].items)} items)" if x in limited else x for x in labels]
    header = ["weights", *marked, "objective"]
    lines = []
    for row in comparison.rows:
        each = gains(row.scores, comparison.base.scores)
        if row is comparison.base:
            cells = [f"{row.scores[label].score:.4f}" for label in labels]
        else:
            cells = [OF_TERMS.show(each[label]) for label in labels]
        is_base = row is comparison.base
        value = show_value(objective, row.scores, comparison.base.scores, is_base=is_base)
        lines.append([row.marked_title, *cells, value])
    return header, lines


def limited_terms(objective: Objective) -> list[str]:
    """Return the labels of the terms that are scored on some of their items."""
    return [term.label for term in objective.scored_terms if objective.limit_of(term) is not None]


def verdicts(comparison: Comparison) -> list[str]:
    """Return one sentence for each objective that compares its merge with the best baseline."""
    rows: list[tuple[SealedRow, Objective | None]] = [(comparison.merge, None)]
    for name, weights in comparison.retarget.items():
        target = reweight(comparison.objective, weights)
        rows.append((comparison.row("retargeted", name), target))
    sentences = []
    for row, objective in rows:
        other = comparison.best_baseline(objective)
        interval = comparison.interval(row, other, objective)
        margin = describe_interval(
            interval, Unit.of(objective or comparison.objective), is_gain=False
        )
        if objective is not None:
            margin += "; the best scales are those for the study's own objective"
        sentences.append(f"{row.title} minus the best of the others ({other.title}): {margin}.")
    return sentences


def say_left_out(comparison: Comparison) -> list[str]:
    """Return one sentence for each baseline that could not be scored."""
    return [f"Left out: {each.name}, because {each.reason}." for each in comparison.left_out]
