"""The rows of a sealed test: what each one is, and what it scored.

A row is a kind and a subject (which vector, method, target or model). Its title is made from them,
and nothing reads it.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from optimer_hf.errors import ConfigError
from optimer_hf.scoring.scores import STRICT_RECORD, TermScore
from optimer_hf.study.config import StudyConfig

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
