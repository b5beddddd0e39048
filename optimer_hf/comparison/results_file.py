"""results.json: every row of a sealed test with its scores, and the intervals of its differences.

A Comparison goes in when a run ends. The record of several runs comes out where their seeds are
compared.
"""

import math
from pathlib import Path
from typing import Any, Self

from optimer_hf.comparison.result import Comparison, verdicts
from optimer_hf.comparison.rows import RowKind, SealedRow
from optimer_hf.comparison.sealed_file import kind_of_title
from optimer_hf.files.model import FileModel, VersionedFile, parse
from optimer_hf.files.reading import read_yaml
from optimer_hf.scoring.formatting import Unit, describe_interval
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
    """A row of the sealed test: its weights, and its differences from the base and to the merge."""

    name: str
    kind: RowKind
    subject: str
    weights: dict[str, float]
    chosen_after_seal: bool
    value: float
    over_base: IntervalRecord
    summary: str = ""
    merge_minus: IntervalRecord
    terms: dict[str, TermResult] = {}

    @property
    def key(self) -> tuple[RowKind, str]:
        """Kind and subject, which identify a row within a comparison."""
        return self.kind, self.subject


class Results(VersionedFile):
    """results.json of a run."""

    rows: list[RowResult]
    verdicts: list[str] = []

    @property
    def by_key(self) -> dict[tuple[RowKind, str], RowResult]:
        """The rows by kind and subject."""
        return {row.key: row for row in self.rows}

    @property
    def merge(self) -> RowResult:
        """The searched merge."""
        return self.by_key["merge", ""]


def results_of(comparison: Comparison) -> Results:
    """Return the record of a comparison."""
    rows = [_result_of(comparison, row) for row in comparison.rows]
    return Results(rows=rows, verdicts=verdicts(comparison))


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

    Version 0.1.0 wrote no kinds; they are told from the titles of that version. Raises ConfigError
    for a file that is not one.
    """
    data = read_yaml(path)
    rows = data.get("rows")
    if isinstance(rows, list):
        data["rows"] = [_add_kind(row, config) for row in rows]
    return parse(Results, data, path)


def _add_kind(row: Any, config: StudyConfig) -> Any:
    if not isinstance(row, dict) or "kind" in row or not isinstance(row.get("name"), str):
        return row
    kind, subject = kind_of_title(row["name"], config)
    return row | {"kind": kind, "subject": subject}
