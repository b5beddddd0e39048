"""What a search records: trials and decisions, appended line by line."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from pydantic import TypeAdapter

from optimer_hf.errors import StudyError
from optimer_hf.files.digest import digest
from optimer_hf.files.text import first_line, summarize_numbers
from optimer_hf.scoring.scores import STRICT_RECORD, TermScore
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.recorded_faults import was_environmental
from optimer_hf.study.records import LARGEST_SLOPE, Rules, append_line, read_lines

Fidelity = Literal["search", "rescore", "sealed"]
Gradients = Mapping[str, Mapping[str, float]]  # label of the term -> name of the vector
ITEMS_OF: dict[Fidelity, str] = {  # which items were scored, by fidelity
    "search": "the items of the search",
    "rescore": "the items that the best trials were scored on again",
    "sealed": "the sealed test",
}
STUDY_FILE, INPUTS_FILE = "study.json", "inputs.json"
TRIALS_FILE, DECISIONS_FILE, SEALED_FILE = "trials.jsonl", "decisions.jsonl", "sealed.jsonl"
ENGINE = "engine"  # the field of inputs.json with name and version of the engine
SAMPLER = "sampler"  # the field of inputs.json with the code that chose weights, unless ours did
OF_TEST = "test."  # fields of inputs.json that are about the sealed test


# -- trials ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """Weights to try, on which items, and whether with gradients; `seconds` is the time that
    choosing them took.
    """

    number: int
    origin: str
    weights: dict[str, float]
    fidelity: Fidelity = "search"
    seconds: dict[str, float] = field(default_factory=dict)
    with_gradients: bool = False

    def to_trial(
        self,
        terms: Mapping[str, TermScore],
        seconds: Mapping[str, float],
        n_tokens: int,
        gradients: Gradients = MappingProxyType({}),
    ) -> "Trial":
        """Return the trial of a candidate that was scored; `seconds` are by phase. A gradient that
        is not finite is left out: the score is good without it.
        """
        return Trial(
            self.number,
            self.origin,
            self.fidelity,
            self.weights,
            "ok",
            dict(terms),
            self.seconds | dict(seconds),
            n_tokens,
            gradients={
                label: dict(gradient)
                for label, gradient in gradients.items()
                if all(abs(slope) <= LARGEST_SLOPE for slope in gradient.values())
            },
        )

    def to_crashed_trial(self, error: str) -> "Trial":
        """Return the trial of a candidate that failed; `error` begins with `Class: message`."""
        return Trial(
            self.number,
            self.origin,
            self.fidelity,
            self.weights,
            "crashed",
            {},
            self.seconds,
            error=error,
        )


@dataclass(frozen=True)
class Trial:
    """The scores of one set of weights, or the error with which it crashed. `seconds` has the keys
    ask, merge, evaluate, forward and backward (parts of evaluate) and cpu.

    `gradients` are the derivatives of a term's score in the weight of every free vector, by label
    and name, in the unit of the score. Terms that are not differentiable have none, nor has a trial
    that took none.
    """

    __pydantic_config__ = STRICT_RECORD

    number: int
    origin: str
    fidelity: Fidelity
    weights: dict[str, float]
    status: Literal["ok", "crashed"]
    terms: dict[str, TermScore]
    seconds: dict[str, float]
    n_tokens: int = 0
    error: str | None = None
    worker: str | None = None
    gradients: dict[str, dict[str, float]] = field(default_factory=dict)

    def __repr__(self) -> str:
        scores = {label: score.score for label, score in self.terms.items()}
        outcome = summarize_numbers(scores) if self.status == "ok" else self.status
        weights = summarize_numbers(self.weights)
        return f"Trial({self.number}, {self.origin!r}, {weights}: {outcome})"

    def to_json(self) -> str:
        """Return the trial as one line of trials.jsonl. Without gradients it is the line that
        versions wrote which knew none.
        """
        data = asdict(self)
        if not self.gradients:
            del data["gradients"]
        return json.dumps(data, ensure_ascii=False, allow_nan=False)

    @property
    def is_blameless(self) -> bool:
        """Whether it crashed through no fault of its weights; old records have such trials."""
        return self.status == "crashed" and was_environmental(self.error or "")

    @classmethod
    def from_json(cls, line: str) -> "Trial":
        """Return the trial of a line of trials.jsonl; raise ValueError for anything else."""
        return _TRIAL.validate_json(line)


_TRIAL = TypeAdapter(Trial)


class TrialLog:
    """trials.jsonl: append-only, with one fsync for each trial. A last line that a crash left
    incomplete is cut off when the file is opened with `repair`.
    """

    def __init__(self, path: Path, *, repair: bool = True) -> None:
        """Read the file, if there is one; raise StudyError for a line that is not a trial."""
        self.path = path
        self.trials: list[Trial] = []
        self._digests: dict[int, str] = {}
        for number, line in enumerate(read_lines(path, repair=repair), start=1):
            try:
                self.trials.append(Trial.from_json(line.decode()))
            except (ValueError, RecursionError, OverflowError) as error:
                raise StudyError(
                    f"{path}:{number}: not a trial ({first_line(error)}). Remove the damaged line "
                    "to go on without that trial."
                ) from None

    def append(self, trial: Trial) -> None:
        """Write one trial to disk before returning."""
        append_line(self.path, trial.to_json())
        self.trials.append(trial)

    def digest(self) -> str:
        """Return a digest of the search trials; it is computed anew only after another trial."""
        if (n_trials := len(self.trials)) not in self._digests:
            searched = self.trials_at("search")
            facts = [[each.number, each.status, each.weights] for each in searched]
            self._digests = {n_trials: digest(facts)}
        return self._digests[n_trials]

    def trials_at(self, fidelity: Fidelity) -> list[Trial]:
        """Return the trials of one fidelity, in the order in which they finished."""
        return [trial for trial in self.trials if trial.fidelity == fidelity]

    def first(self, fidelity: Fidelity) -> Trial:
        """Return the first trial of one fidelity, which is the base."""
        return next(trial for trial in self.trials if trial.fidelity == fidelity)


# -- what was decided ------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChosenRow:
    """A row of the sealed test whose weights the surrogate chooses: a vector (`subject`) alone at
    its best scale, or the objective `subject` of `retarget`, with its `target`, weights by term.
    """

    kind: Literal["best_scale", "retargeted"]
    subject: str
    target: Mapping[str, float] | None = None

    def key(self) -> str:
        """Return the text that stands for the row in decisions.jsonl. It is part of the format:
        tables may call the row something else.
        """
        if self.kind == "best_scale":
            return f"{self.subject} at its best scale"
        return f"re-targeted to {self.subject} {json.dumps(self.target, sort_keys=True)}"


@dataclass(frozen=True)
class Decision:
    """What is decided once the search is done, as numbers of trials: which ones to score again
    (`rescore`), and then which one is the best (`incumbent`). `trials` is a digest of the search
    trials that it is about.

    `rows` are weights that the surrogate chose from these trials for the sealed test, by the key of
    a ChosenRow.
    """

    __pydantic_config__ = STRICT_RECORD

    trials: str
    rescore: list[int]
    incumbent: int | None = None
    rows: dict[str, dict[str, float]] = field(default_factory=dict)


_DECISION = TypeAdapter(Decision)


class DecisionLog:
    """decisions.jsonl: append-only, one line for each decision. Of the decisions about the same
    trials, the last one counts.

    A decision is never made again, because a later version may fit another surrogate.
    """

    def __init__(self, path: Path, *, repair: bool = True) -> None:
        """Read the file, if there is one; raise StudyError for a line that is not a decision."""
        self.path = path
        self.decisions: list[Decision] = []
        for number, line in enumerate(read_lines(path, repair=repair), start=1):
            try:
                self.decisions.append(_DECISION.validate_json(line))
            except (ValueError, RecursionError, OverflowError) as error:
                raise StudyError(
                    f"{path}:{number}: not a decision ({first_line(error)}). Remove the line: what "
                    "it decided is decided again."
                ) from None

    def add(self, decision: Decision, *, to_disk: bool) -> None:
        """Add a decision; with `to_disk`, write it to disk before returning."""
        if to_disk:
            append_line(self.path, json.dumps(asdict(decision)))
        self.decisions.append(decision)

    def about(self, log: TrialLog) -> Decision | None:
        """Return the last decision about the search trials of a log; None if there is none."""
        if not self.decisions:
            return None
        key = log.digest()
        return next((each for each in reversed(self.decisions) if each.trials == key), None)


def rules_of(config: StudyConfig, n_trials: int) -> Rules:
    """Return the rules for the trials of a study that has `n_trials` of them."""
    fixed = {name: (weight, weight) for name, weight in config.fixed.items()}
    labels = {
        "search": [term.label for term in config.objective.terms_at("search")],
        "rescore": [term.label for term in config.objective.terms_at("rescore")],
    }
    return Rules(
        config.free | fixed, dict.fromkeys(config.free, 0.0) | config.fixed, labels, n_trials
    )
