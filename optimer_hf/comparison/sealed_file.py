"""Read and write the sealed test on disk: sealed.json has the rows that were chosen before it was
opened, and those that could not be scored; sealed.jsonl has those that were scored.

Version 0.1.0 wrote trials whose origin was the title of the row. They are read as rows here and
nowhere else.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

from pydantic import Field, TypeAdapter

from optimer_hf.comparison.result import Comparison
from optimer_hf.comparison.rows import (
    OF_ONE_VECTOR,
    TITLES,
    Contender,
    LeftOut,
    RowKind,
    SealedRow,
    order_rows,
    weights_key,
)
from optimer_hf.errors import StudyError
from optimer_hf.files.model import VersionedFile
from optimer_hf.files.text import first_line, quote
from optimer_hf.study.config import MergeMethod, StudyConfig
from optimer_hf.study.directory import Study
from optimer_hf.study.records import (
    LARGEST_COUNT,
    append_line,
    mistakes_of_cost,
    mistakes_of_size,
    mistakes_of_terms,
    read_lines,
)
from optimer_hf.study.trials import SEALED_FILE, Trial

_ROW = TypeAdapter(SealedRow)


class Seal(VersionedFile):
    """sealed.json: the rows chosen before the first sealed score was seen, as title -> weights, and
    the baselines that could not be scored.
    """

    rows: dict[str, str]
    left_out: list[LeftOut] = Field(default=[], exclude_if=lambda rows: not rows)


class SealedLog:
    """sealed.jsonl: append-only, with one fsync for each row.

    Of rows with equal weights, one was scored; the others have its scores and took no time.
    """

    def __init__(self, directory: Path, config: StudyConfig, *, repair: bool = True) -> None:
        """Read the rows in a directory with `read_lines`. Raise StudyError for a line that is no
        row, or that contradicts the study.
        """
        self.path = directory / SEALED_FILE
        self._seal = directory / "sealed.json"
        self._labels = (
            [term.label for term in config.test.terms_at("rescore")] if config.test else None
        )
        self.rows: list[SealedRow] = []
        lines = [line.decode(errors="replace") for line in read_lines(self.path, repair=repair)]
        trials = _trials_of_0_1_0(self.path, lines)
        planned = self._planned_weights(trials) if trials else frozenset()
        for number, line in enumerate(lines, start=1):
            if number in trials:
                row = _row_of(trials[number], config, planned)
            else:
                row = _parse(self.path, number, line)
            if (wrong := self.mistake_of(row)) is not None:
                raise StudyError(
                    f"{self.path}:{number}: row {quote(row.subject or row.kind)}: {wrong}. Restore "
                    "the line, or remove it to go on without that row."
                )
            self.rows.append(row)

    def mistake_of(self, row: SealedRow) -> str | None:
        """Return what is wrong with the next row, or None: what was found and what was expected."""
        return None if self._labels is None else next(_mistakes(row, self.rows, self._labels), None)

    def append(self, row: SealedRow) -> None:
        """Write one row to disk before returning."""
        append_line(self.path, json.dumps(asdict(row), ensure_ascii=False, allow_nan=False))
        self.rows.append(row)

    @property
    def scored(self) -> list[SealedRow]:
        """The rows that were scored, one for each weight set."""
        scored: dict[str, SealedRow] = {}
        for row in self.rows:
            scored.setdefault(row.key, row)
        return list(scored.values())

    def append_equals(self, rows: Sequence[SealedRow]) -> None:
        """Write the rows that got the scores of equal weights, so that readers find them, too. Of
        those with one kind and subject the last one counts: a longer search may choose the weights
        again that it chose before last.
        """
        last = {(row.kind, row.subject): row.key for row in self.rows}
        for row in rows:
            if last.get((row.kind, row.subject)) != row.key:
                self.append(replace(row, seconds={}, n_tokens=0))

    def open_seal(self, contenders: Sequence[Contender]) -> frozenset[str]:
        """Return the weights that were chosen before the seal was opened. The first opening writes
        down those of the contenders.
        """
        if not self._seal.exists():
            first = [row for row in self.rows if row.n_trials_known == self.rows[0].n_trials_known]
            Seal(rows={row.title: row.key for row in first or contenders}).write(self._seal)
        return frozenset(Seal.read(self._seal).rows.values())

    def record_left_out(
        self, contenders: Sequence[Contender], reasons: Mapping[str, str]
    ) -> list[LeftOut]:
        """Write down which contenders could not be scored, and return them; `reasons` is by their
        keys. What is known of other rows stays.
        """
        left_out = [
            LeftOut(kind=row.kind, subject=row.subject, name=row.title, reason=reasons[row.key])
            for row in contenders
            if row.key in reasons
        ]
        seal, tried = Seal.read(self._seal), {(row.kind, row.subject) for row in contenders}
        others = [each for each in seal.left_out if (each.kind, each.subject) not in tried]
        if seal.left_out != (known := [*others, *left_out]):
            seal.model_copy(update={"left_out": known}).write(self._seal)
        return left_out

    def read_left_out(self) -> list[LeftOut]:
        """Return the baselines that could not be scored."""
        return Seal.read(self._seal).left_out if self._seal.exists() else []

    def _planned_weights(self, trials: Mapping[int, Trial]) -> frozenset[str]:
        """Return what `open_seal` returns for trials of version 0.1.0; write nothing."""
        if self._seal.exists():
            return frozenset(Seal.read(self._seal).rows.values())
        first, *_ = trials.values()
        return frozenset(
            weights_key(trial.weights) for trial in trials.values() if trial.number == first.number
        )


def _mistakes(row: SealedRow, before: Sequence[SealedRow], labels: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with a row, given the rows before it."""
    if not 0 <= row.n_trials_known < LARGEST_COUNT:
        yield f"found {quote(row.n_trials_known)} trials known, expected 0 or more"
    yield from mistakes_of_size(row.weights)
    if row.kind in OF_ONE_VECTOR and not row.own_weights:
        yield f"found no weight of {row.subject!r}, expected one"
    last = {(each.kind, each.subject): each.weights for each in before}
    if last.get((row.kind, row.subject)) == row.weights:
        yield "found weights that were sealed before"
    elif any(row.scores != each.scores for each in before if each.weights == row.weights):
        yield "found weights that were sealed before, with other scores"
    yield from mistakes_of_cost(row.seconds, row.n_tokens, row.scores)
    yield from mistakes_of_terms(row.scores, labels, before[0].scores if before else {})


def _parse(path: Path, number: int, line: str) -> SealedRow:
    try:
        return _ROW.validate_json(line)
    except (ValueError, RecursionError, OverflowError) as error:
        raise StudyError(
            f"{path}:{number}: not a row ({first_line(error)}). Remove the damaged line to go on "
            "without that row."
        ) from None


def read_comparison(study: Study) -> Comparison | None:
    """Return the rows that were scored so far; None if the best trial is not among them."""
    config = study.config
    if config.test is None:
        return None
    log = SealedLog(study.directory, config, repair=False)
    scored = {row.key: row for row in log.scored}
    rows = {(row.kind, row.subject): give_scores(row, scored[row.key]) for row in log.rows}
    zero = (row for row in rows.values() if not any(row.weights.values()))
    base = rows.get(("base", "")) or next(zero, None)  # older files lack rows of equal weights
    merge = rows.get(("merge", ""))
    if base is None or merge is None or merge.key != weights_key(study.best_trial.weights):
        return None
    others = [row for row in rows.values() if row is not base and row.is_baseline]
    targets = [row for row in rows.values() if row.kind == "retargeted"]
    retarget = {
        name: weights for name, weights in config.retarget.items() if ("retargeted", name) in rows
    }
    first = replace(base, kind="base", subject="")
    titles = {row.title for row in rows.values()}  # scored since, before another one ended a test
    left_out = [each for each in log.read_left_out() if each.name not in titles]
    ordered = order_rows([first, *others, merge, *targets], config)
    return Comparison(ordered, config.test, retarget, left_out)


def give_scores(contender: Contender, scored: SealedRow) -> SealedRow:
    """Return the row of a contender with the scores, time and tokens of equal weights."""
    return replace(
        scored, kind=contender.kind, subject=contender.subject, weights=contender.weights
    )


# -- files of version 0.1.0 ------------------------------------------------------------------------


def _trials_of_0_1_0(path: Path, lines: Sequence[str]) -> dict[int, Trial]:
    """Return the lines that are trials, by line number."""
    trials = {}
    for number, line in enumerate(lines, start=1):
        if '"origin"' not in line:
            continue
        try:
            trial = Trial.from_json(line)
        except (ValueError, RecursionError, OverflowError):
            continue  # it is no row either, which `_parse` reports
        if (trial.fidelity, trial.status) != ("sealed", "ok"):
            raise StudyError(
                f"{path}:{number}: found fidelity {trial.fidelity!r} and status {trial.status!r}, "
                "expected sealed and ok. Restore the line, or remove it to go on without that row."
            )
        trials[number] = trial
    return trials


def _row_of(trial: Trial, config: StudyConfig, planned: frozenset[str]) -> SealedRow:
    kind, subject = kind_of_title(trial.origin, config)
    return SealedRow(
        kind,
        subject,
        trial.weights,
        trial.terms,
        weights_key(trial.weights) not in planned,
        trial.number,
        trial.seconds,
        trial.n_tokens,
    )


def kind_of_title(title: str, config: StudyConfig) -> tuple[RowKind, str]:
    """Return the kind and subject of a row of version 0.1.0, which recorded only its title."""
    baselines = config.baselines
    if title in get_args(MergeMethod):
        return "method", title
    named: tuple[tuple[RowKind, Mapping[str, object]], ...] = (
        ("other_search", baselines.searches),
        ("mixture", baselines.mixtures),
        ("model", baselines.models),
    )
    for kind, names in named:
        if title in names:
            return kind, title
    for kind in ("base", "fixed", "average", "sum", "random", "merge"):
        if title == TITLES[kind]:
            return kind, ""
    for name in config.vectors:
        if title == TITLES["alone"].format(name):
            return "alone", name
        if title.startswith(TITLES["best_scale"].format(name)):
            return "best_scale", name
    prefix = TITLES["retargeted"].format("")
    if title.startswith(prefix):
        return "retargeted", title.removeprefix(prefix)
    return "model", title
