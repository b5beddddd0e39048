"""Append-only files of JSON lines, and the rules that trials have to obey.

The same rules hold before a trial is written and when it is read. So whatever a search wrote can be
read again, and what somebody changed in the meantime is found before it is used.
"""

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol

from optimer_hf.errors import StudyError
from optimer_hf.files.disk import naming_disk_errors
from optimer_hf.files.text import quote
from optimer_hf.scoring.objective import gain
from optimer_hf.scoring.scores import TermScore

logger = logging.getLogger(__name__)


ROUNDING = 1e-4  # weights are recorded with 4 digits
LARGEST_SCORE = 1e290  # sums of such scores stay finite
LARGEST_GAIN = 1e100  # squares of such gains stay finite
LARGEST_SLOPE = 1e100  # squares of such derivatives stay finite
LARGEST_COUNT = 10**15  # of tokens, bytes or items
LONGEST = 1e12  # seconds


# -- lines -----------------------------------------------------------------------------------------


def read_lines(path: Path, *, repair: bool) -> list[bytes]:
    """Return the complete lines of a file, without line breaks; none if there is no file.

    An incomplete last line is left out, and with `repair` it is cut off. Only the holder of the
    lock may repair: a running search may just be writing that line. Raises StudyError for a file
    that cannot be read.
    """
    if not path.exists():
        return []
    try:
        *lines, incomplete = path.read_bytes().split(b"\n")
    except OSError as error:
        raise StudyError(f"{path}: cannot be read ({error.strerror}).") from None
    if incomplete and repair:
        logger.warning("%s: a crash left the last line incomplete; it is dropped", path.name)
        with open(path, "r+b") as file:
            _cut_incomplete_line(file)
    return lines


def append_line(path: Path, text: str) -> None:
    """Append a line; it is on disk when this returns. Only the holder of the lock may call this, so
    an incomplete last line is what a crash left, and goes. Half of a surrogate pair, as in the name
    of a file that is not UTF-8, becomes a question mark.
    """
    with naming_disk_errors(path, "All lines before this one are kept"), open(path, "a+b") as file:
        _cut_incomplete_line(file)
        file.write(text.encode(errors="replace") + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _cut_incomplete_line(file: BinaryIO) -> None:
    """Remove what follows the last line break of a file, if anything does."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


# -- trials ----------------------------------------------------------------------------------------


class RecordedTrial(Protocol):
    """The fields of `trials.Trial`."""

    @property
    def number(self) -> int: ...
    @property
    def origin(self) -> str: ...
    @property
    def fidelity(self) -> str: ...
    @property
    def weights(self) -> Mapping[str, float]: ...
    @property
    def status(self) -> str: ...
    @property
    def terms(self) -> Mapping[str, TermScore]: ...
    @property
    def seconds(self) -> Mapping[str, float]: ...
    @property
    def n_tokens(self) -> int: ...
    @property
    def gradients(self) -> Mapping[str, Mapping[str, float]]: ...


@dataclass
class Rules:
    """What the config of a study and its earlier trials demand of the next trial.

    `bounds` are [low, high] for every vector, where a fixed one has its weight twice; `base` are
    the weights of trial 0; `labels` are those of the terms, by fidelity; `n_trials` is the number
    of trials in the search.
    """

    bounds: Mapping[str, tuple[float, float]]
    base: Mapping[str, float]
    labels: Mapping[str, Sequence[str]]
    n_trials: int
    _seen: dict[str, dict[int, RecordedTrial]] = field(default_factory=dict)

    def add(self, trial: RecordedTrial) -> None:
        """Add a trial, with which later ones are compared."""
        self._seen.setdefault(trial.fidelity, {}).setdefault(trial.number, trial)

    def mistakes(self, trial: RecordedTrial) -> Iterator[str]:
        """Yield what is wrong with the next trial: what was found and what was expected."""
        if trial.fidelity not in self.labels:
            expected = " or ".join(self.labels)
            yield f"found fidelity {trial.fidelity!r}, expected {expected}"
            return
        yield from self._mistakes_of_place(trial)
        yield from self._mistakes_of_weights(trial)
        yield from mistakes_of_cost(trial.seconds, trial.n_tokens, trial.terms)
        yield from self._mistakes_of_terms(trial)
        yield from self._mistakes_of_gradients(trial)

    def first(self, fidelity: str) -> RecordedTrial | None:
        """Return the first trial of one fidelity, which is the base, or None."""
        return next(iter(self._seen.get(fidelity, {}).values()), None)

    def _mistakes_of_place(self, trial: RecordedTrial) -> Iterator[str]:
        """Yield what is wrong with number and status, given the earlier trials."""
        before = self._seen.get(trial.fidelity, {})
        if not 0 <= trial.number < LARGEST_COUNT:
            yield f"found number {quote(trial.number)}, expected one from 0 on"
        if not before and trial.number != 0:
            yield "comes first, expected number 0, the base that all others are compared with"
        if not before and trial.status != "ok":
            yield f"found status {trial.status!r}, expected 'ok', because it is the base"
        if trial.number in before:
            yield (
                f"found number {trial.number} a second time, expected each {trial.fidelity} trial "
                "once"
            )
        if trial.number >= self.n_trials:
            yield (
                f"found number {quote(trial.number)}, expected one below {self.n_trials}, the "
                "n_trials of the study"
            )

    def _mistakes_of_weights(self, trial: RecordedTrial) -> Iterator[str]:
        if wrong := next(mistakes_of_size(trial.weights), None):
            yield wrong
            return
        if lacking := [name for name in self.bounds if name not in trial.weights]:
            yield f"lacks {lacking[0]!r}, which the study has"
            return
        if unknown := [name for name in trial.weights if name not in self.bounds]:
            yield f"found a weight of {unknown[0]!r}, expected {sorted(self.bounds)}"
            return
        if trial.number == 0 and dict(trial.weights) != dict(self.base):
            yield (
                f"found weights {quote(dict(trial.weights))}, expected the base, "
                f"{quote(dict(self.base))}"
            )
            return
        for name, (low, high) in self.bounds.items() if trial.number else ():
            if not low - ROUNDING <= trial.weights[name] <= high + ROUNDING:
                yield (f"found {name} at {trial.weights[name]!r}, expected [{low:g}, {high:g}]")
                return
        if trial.fidelity == "rescore":
            yield from self._mistakes_of_searched(trial)

    def _mistakes_of_searched(self, trial: RecordedTrial) -> Iterator[str]:
        searched = self._seen.get("search", {}).get(trial.number)
        if searched is None or searched.status != "ok":
            yield f"found no search trial {trial.number} before it that was scored"
        elif dict(searched.weights) != dict(trial.weights):
            yield (
                f"found weights {quote(dict(trial.weights))}, expected those of search trial "
                f"{trial.number}, {quote(dict(searched.weights))}"
            )

    def _mistakes_of_terms(self, trial: RecordedTrial) -> Iterator[str]:
        labels = self.labels[trial.fidelity] if trial.status == "ok" else []
        first = self.first(trial.fidelity)
        yield from mistakes_of_terms(trial.terms, labels, first.terms if first is not None else {})
        for label, term in trial.terms.items():
            if term.taken_over:
                for wrong in self._mistakes_of_taken_over(trial, label):
                    yield f"term {label!r}: {wrong}"

    def _mistakes_of_gradients(self, trial: RecordedTrial) -> Iterator[str]:
        free = sorted(name for name, (low, high) in self.bounds.items() if low != high)
        for label, gradient in trial.gradients.items():
            if label not in trial.terms:
                yield f"found a gradient of {label!r}, expected one of {sorted(trial.terms)}"
                return
            if sorted(gradient) != free:
                yield f"found a gradient of {label!r} in {sorted(gradient)}, expected one in {free}"
                return
            for name, slope in gradient.items():
                if not abs(slope) <= LARGEST_SLOPE:
                    yield f"found gradient {slope!r} of {label!r} in {name}, expected a finite one"
                    return

    def _mistakes_of_taken_over(self, trial: RecordedTrial, label: str) -> Iterator[str]:
        searched = self._seen.get("search", {}).get(trial.number)
        known = None if searched is None else searched.terms.get(label)
        if trial.fidelity != "rescore" or known is None or known.items != trial.terms[label].items:
            yield "found scores that were taken over, expected those of its search trial"


def check_trials(path: Path, trials: Sequence[RecordedTrial], rules: Rules) -> None:
    """Raise StudyError, with file and line, for the first trial that breaks the rules."""
    for line, trial in enumerate(trials, start=1):
        for wrong in rules.mistakes(trial):
            fix = "Restore the line"
            if trial.number != 0:
                fix += ", or remove it to go on without that trial"
            raise StudyError(
                f"{path}:{line}: trial {quote(trial.number)} ({trial.fidelity}): {wrong}. {fix}."
            )
        rules.add(trial)


def mistakes_of_size(weights: Mapping[str, float]) -> Iterator[str]:
    """Yield what is wrong with the first weight that is too large for any sum."""
    for name, weight in weights.items():
        if not abs(weight) <= LARGEST_SCORE:
            yield f"found weight {weight!r} of {name!r}, expected a finite one"
            return


def mistakes_of_cost(
    seconds: Mapping[str, float], n_tokens: int, terms: Mapping[str, TermScore]
) -> Iterator[str]:
    """Yield what is wrong with the time and the tokens that an evaluation took."""
    for phase, value in seconds.items():
        if not 0 <= value <= LONGEST:
            yield f"found {value!r} seconds of {phase!r}, expected 0 or more"
            return
    for n in (n_tokens, *(term.n_tokens for term in terms.values())):
        if not 0 <= n <= LARGEST_COUNT:
            yield f"found {quote(n)} tokens, expected 0 or more"
            return


def mistakes_of_terms(
    terms: Mapping[str, TermScore], labels: Sequence[str], first: Mapping[str, TermScore]
) -> Iterator[str]:
    """Yield what is wrong with the scores of an evaluation. `labels` are the terms that are
    expected, `first` the scores of the first evaluation on the same items.
    """
    for label in labels:
        if label not in terms or not terms[label].items:
            yield f"lacks {label!r}, which the study has"
            return
    for label, term in terms.items():
        if label not in labels:
            yield f"found scores of {label!r}, expected {sorted(labels)}"
            return
        base = first.get(label)
        wrong = next(mistakes_of_score(term), None)
        if wrong is None and base is not None:
            wrong = next(_mistakes_beside(term, base), None)
        if wrong is not None:
            yield f"term {label!r}: {wrong}"
            return


def _mistakes_beside(term: TermScore, base: TermScore) -> Iterator[str]:
    """Yield why the scores of a term cannot be compared with those of the base."""
    for what, value, expected in (
        ("items", len(term.items), len(base.items)),
        ("higher_is_better", term.higher_is_better, base.higher_is_better),
        ("is_perplexity", term.is_perplexity, base.is_perplexity),
    ):
        if value != expected:
            yield f"found {what} {value}, but the base has {expected}"
    if (wrong := mistake_of_gain(term, base)) is not None:
        yield wrong


def mistakes_of_score(term: TermScore) -> Iterator[str]:
    """Yield why the items of a term do not make a score."""
    for top, bottom in term.items:
        if not (abs(top) <= LARGEST_SCORE and 0 <= bottom <= LARGEST_COUNT):
            yield f"found an item {(top, bottom)}, expected finite numbers, the second >= 0"
            return
    total = sum(bottom for _, bottom in term.items)
    if not 0 < total <= LARGEST_SCORE:
        yield f"found denominators that sum to {total:g}, expected a sum above 0"
        return
    try:
        score = term.score
    except OverflowError:
        score = math.inf
    if not abs(score) <= LARGEST_SCORE:
        yield f"found a score of {score:g}, expected at most {LARGEST_SCORE:g}"


def mistake_of_gain(term: TermScore, base: TermScore) -> str | None:
    """Return why a score cannot be compared with that of the base, or None."""
    over_base = gain(term.score, base.score, higher_is_better=base.higher_is_better)
    if math.isfinite(over_base) and over_base <= LARGEST_GAIN:
        return None
    return f"found a gain of {over_base:g} over the base, expected at most {LARGEST_GAIN:g}"
