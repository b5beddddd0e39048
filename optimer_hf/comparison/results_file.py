"""results.json: every row of a sealed test with its scores, and the intervals of its differences.

A Comparison goes in when a run ends. The record of several runs comes out where their seeds are
compared.
"""

import math
from pathlib import Path
from typing import Any, Self

from pydantic import Field

from optimer_hf.comparison.result import Comparison, limited_terms, verdicts
from optimer_hf.comparison.rows import LeftOut, RowKind, SealedRow, mark_title
from optimer_hf.comparison.sealed_file import kind_of_title
from optimer_hf.files.model import FileModel, VersionedFile, parse
from optimer_hf.files.reading import read_yaml
from optimer_hf.scoring.formatting import OF_TERMS, PERCENT, Unit, describe_interval, mean_of
from optimer_hf.scoring.intervals import FEWEST, Interval, Kind
from optimer_hf.study.config import StudyConfig


class IntervalRecord(FileModel):
    """A difference with its paired 95 % interval; ends that are infinite are null."""

    difference: float
    low: float | None = None
    high: float | None = None
    kind: Kind = "none"
    n_fewest: int | None = None
    verdict: str = ""

    @classmethod
    def of(cls, interval: Interval) -> Self:
        """Return the record of an interval."""
        low, high = (end if math.isfinite(end) else None for end in (interval.low, interval.high))
        return cls(
            difference=interval.difference,
            low=low,
            high=high,
            kind=interval.kind,
            n_fewest=interval.n_fewest,
            verdict=interval.verdict,
        )

    @property
    def has_few_items(self) -> bool:
        """Whether a term has so few items that there is no verdict."""
        return self.n_fewest is not None and self.n_fewest < FEWEST


class TermResult(FileModel):
    """What a row scored on one term, and its gain over the base."""

    score: float
    n_items: int | None = None
    gain: IntervalRecord


class RowResult(FileModel):
    """A row of the sealed test: its weights, and its differences from the base and to the merge.

    `mean` is the mean of its terms in their own unit, under `weighted_mean`.
    """

    name: str
    kind: RowKind
    subject: str
    weights: dict[str, float]
    chosen_after_seal: bool
    value: float
    mean: float | None = None
    over_base: IntervalRecord
    summary: str = ""
    merge_minus: IntervalRecord
    terms: dict[str, TermResult] = {}

    @property
    def key(self) -> tuple[RowKind, str]:
        """Kind and subject, which identify a row within a comparison."""
        return self.kind, self.subject


class Results(VersionedFile):
    """results.json of a run: the rows with the base first, in `unit`, and the verdicts.

    `limited` has the labels of the terms that were scored on some of their items. Files of version
    0.1.0 lack both; `read_results` adds them. `rank_correlation` is that of `check_ratios`, if the
    run has trained enough attempts at a mixture. `left_out` has the baselines that could not be
    scored.
    """

    rows: list[RowResult] = Field(min_length=1)
    verdicts: list[str] = []
    unit: Unit = PERCENT
    limited: list[str] = []
    rank_correlation: float | None = Field(default=None, exclude_if=lambda value: value is None)
    left_out: list[LeftOut] = Field(default=[], exclude_if=lambda value: not value)

    @property
    def by_key(self) -> dict[tuple[RowKind, str], RowResult]:
        """The rows by kind and subject."""
        return {row.key: row for row in self.rows}

    @property
    def merge(self) -> RowResult:
        """The searched merge."""
        return self.by_key["merge", ""]


def results_of(comparison: Comparison, rank_correlation: float | None = None) -> Results:
    """Return the record of a comparison, and of a check of the ratios."""
    objective = comparison.objective
    return Results(
        rows=[_result_of(comparison, row) for row in comparison.rows],
        verdicts=verdicts(comparison),
        unit=Unit.of(objective),
        limited=limited_terms(objective),
        rank_correlation=rank_correlation,
        left_out=comparison.left_out,
    )


def _result_of(comparison: Comparison, row: SealedRow) -> RowResult:
    over_base = comparison.interval(row, comparison.base)
    gain = describe_interval(over_base, Unit.of(comparison.objective), is_gain=True)
    return RowResult(
        name=row.title,
        kind=row.kind,
        subject=row.subject,
        weights=row.weights,
        chosen_after_seal=row.chosen_after_seal,
        value=comparison.value(row),
        mean=mean_of(comparison.objective, row.scores),
        over_base=IntervalRecord.of(over_base),
        summary=f"over the base {gain}",
        merge_minus=IntervalRecord.of(comparison.interval(comparison.merge, row)),
        terms={
            label: TermResult(
                score=row.scores[label].score,
                n_items=len(row.scores[label].items),
                gain=IntervalRecord.of(comparison.term_interval(row, label)),
            )
            for label in comparison.base.scores
        },
    )


def read_results(path: Path, config: StudyConfig) -> Results:
    """Read the results.json of a run of a study.

    Version 0.1.0 wrote no unit and no kinds; those come from the study and from the titles of that
    version. Raises ConfigError for a file that is not one.
    """
    data = read_yaml(path)
    rows = data.get("rows")
    if isinstance(rows, list):
        data["rows"] = [_add_kind(row, config) for row in rows]
    if "unit" not in data:
        objective = config.test or config.objective
        data |= {"unit": Unit.of(objective), "limited": limited_terms(objective)}
    return parse(Results, data, path)


def _add_kind(row: Any, config: StudyConfig) -> Any:
    if not isinstance(row, dict) or "kind" in row or not isinstance(row.get("name"), str):
        return row
    kind, subject = kind_of_title(row["name"], config)
    return row | {"kind": kind, "subject": subject}


def table_of(results: Results) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table of a sealed test, as `result.table` does."""
    unit, base = results.unit, results.rows[0]
    marked = [
        f"{label} ({term.n_items} items)" if label in results.limited else label
        for label, term in base.terms.items()
    ]
    lines = []
    for row in results.rows:
        value = unit.show(row.value - base.value)
        cells = [OF_TERMS.show(term.gain.difference) for term in row.terms.values()]
        if row is base:
            cells = [f"{term.score:.4f}" for term in row.terms.values()]
            value = value if row.mean is None else unit.show_mean(row.mean)
        lines.append([mark_title(row.name, row.chosen_after_seal), *cells, value])
    return ["weights", *marked, "objective"], lines
