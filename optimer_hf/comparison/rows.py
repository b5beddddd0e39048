"""The rows of a sealed test: what each one is, what it scored, and how two of them compare.

A row is a kind and a subject (which vector, method, target or model); its title is made from them
and never read.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from optimer_hf.errors import ConfigError
from optimer_hf.files.text import html_table
from optimer_hf.scoring.formatting import Unit
from optimer_hf.scoring.intervals import Interval
from optimer_hf.scoring.objective import Objective, combine, gains
from optimer_hf.scoring.paired import paired_interval
from optimer_hf.scoring.scores import STRICT_RECORD, TermScore
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.prediction import reweight

if TYPE_CHECKING:
    from pandas import DataFrame

RowKind = Literal[
    "base",
    "fixed",
    "alone",
    "best_scale",
    "average",
    "sum",
    "method",
    "random",
    "other_search",
    "mixture",
    "model",
    "merge",
    "retargeted",
]
TITLES: dict[RowKind, str] = {  # {} is the subject
    "base": "base",
    "fixed": "fixed vectors alone",
    "alone": "{} at 1.0",
    "best_scale": "{} at its best scale",
    "average": "uniform average",
    "sum": "uniform sum",
    "method": "{}",
    "random": "random vectors of equal norm",
    "other_search": "{}",
    "mixture": "{}",
    "model": "{}",
    "merge": "searched merge",
    "retargeted": "re-targeted to {}",
}
OF_ONE_VECTOR: tuple[RowKind, ...] = ("alone", "best_scale")


def title_of(kind: RowKind, subject: str) -> str:
    """Return the title of a row, without weights."""
    return TITLES[kind].format(subject)


def marked(title: str, chosen_after_seal: bool) -> str:
    """Return a title, marked for a row that was chosen after sealed scores had been seen."""
    return title + " (chosen after the seal was opened)" * chosen_after_seal


def rows_of(config: StudyConfig) -> list[tuple[RowKind, str]]:
    """Return kind and subject of every row that a comparison of a study may have, in the order of
    the table.
    """
    free, baselines = list(config.free), config.baselines
    rows: list[tuple[RowKind, str]] = [("base", "")]
    rows += [("fixed", "")] if config.fixed else []
    rows += [("alone", name) for name in free]
    rows += [("best_scale", name) for name in free]
    rows += [("average", ""), ("sum", "")] if len(free) > 1 else []
    rows += [("other_search", name) for name in baselines.searches]
    rows += [("method", method) for method in baselines.merge_methods]
    rows += [("random", "")] if baselines.random_vectors else []
    rows += [("model", name) for name in baselines.models]
    rows += [("mixture", name) for name in baselines.mixtures]
    return [*rows, ("merge", ""), *(("retargeted", name) for name in config.retarget)]


def check_titles(config: StudyConfig) -> None:
    """Raise ConfigError when two rows of a comparison would have one title."""
    counts = Counter(title_of(kind, subject) for kind, subject in rows_of(config))
    for title, n in counts.items():
        if n > 1:
            raise ConfigError(
                f"baselines: {title!r} is the name of another row. Give another name."
            )


@dataclass(frozen=True)
class Contender:
    """Weights to score on the sealed test; `subject` is the vector, method, target or model that
    the kind is about, empty for kinds of which there is one.
    """

    kind: RowKind
    subject: str
    weights: dict[str, float]

    @property
    def title(self) -> str:
        """The name of the row in tables and figures."""
        if self.kind == "alone":
            return f"{self.subject} at {self.weights[self.subject]}"
        title = title_of(self.kind, self.subject)
        is_scaled = self.kind == "best_scale"
        return f"{title}, {self.weights[self.subject]:g}" if is_scaled else title

    @property
    def key(self) -> str:
        """The weights as text: rows with equal keys are scored once."""
        return weights_key(self.weights)

    @property
    def is_baseline(self) -> bool:
        """Whether the merge is compared with it: all but the merge and re-targeted merges."""
        return self.kind not in ("merge", "retargeted")


def weights_key(weights: Mapping[str, float]) -> str:
    """Return weights as text, to six digits."""
    rounded = {name: round(weight, 6) + 0.0 for name, weight in weights.items()}
    return json.dumps(rounded, sort_keys=True)


@dataclass(frozen=True)
class SealedRow(Contender):
    """What weights scored on the sealed test: a line of sealed.jsonl.

    `n_trials_known` is how many trials of the search had been recorded by then; `seconds` are
    merge, evaluate, forward (a part of evaluate) and cpu.
    """

    __pydantic_config__ = STRICT_RECORD

    scores: dict[str, TermScore]
    chosen_after_seal: bool
    n_trials_known: int
    seconds: dict[str, float]
    n_tokens: int

    @property
    def marked_title(self) -> str:
        """The title, marked when the row was chosen after sealed scores had been seen."""
        return marked(self.title, self.chosen_after_seal)


@dataclass(frozen=True)
class Comparison:
    """All rows, first the base, and the objective they are compared by."""

    rows: list[SealedRow]
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
        """Return a pandas DataFrame with a row for every weight set, indexed by its title.

        Columns: kind, subject, chosen_after_seal, objective (larger is better), and `weight/NAME`,
        `score/TERM` and `gain/TERM` (over the base; losses relative, accuracies as a difference).
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
        """Return the row of a kind and subject."""
        return next(row for row in self.rows if (row.kind, row.subject) == (kind, subject))

    def value(self, row: SealedRow, objective: Objective | None = None) -> float:
        """Return the value of a row under an objective (None: that of the study)."""
        return combine(objective or self.objective, row.scores, self.base.scores)

    def best_baseline(self, objective: Objective | None = None) -> SealedRow:
        """Return the best of the others by its sealed value: the hardest one to beat."""
        return max(
            (row for row in self.rows if row.is_baseline),
            key=lambda row: self.value(row, objective),
        )

    def interval(
        self, row: SealedRow, other: SealedRow, objective: Objective | None = None
    ) -> Interval:
        """Return value(row) - value(other) with its paired 95 % interval."""
        return paired_interval(
            objective or self.objective, row.scores, other.scores, self.base.scores
        )

    def term_interval(self, row: SealedRow, label: str) -> Interval:
        """Return the gain of a row over the base on one term, with its interval."""
        return self.interval(row, self.base, reweight(self.objective, {label: 1.0}))
