"""The rows of a sealed test: what each one is, and what it scored.

A row is a kind and a subject (which vector, method, target or model). Its title is made from them,
and nothing reads it.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from optimer_hf.errors import ConfigError
from optimer_hf.files.layered import Origin
from optimer_hf.files.model import FileModel, list_mistakes
from optimer_hf.files.text import count, prefix_field
from optimer_hf.scoring.scores import STRICT_RECORD, TermScore
from optimer_hf.study.config import StudyConfig

RowKind = Literal[  # in the order of a table
    "base",
    "fixed",
    "alone",
    "best_scale",
    "average",
    "sum",
    "weights",
    "other_search",
    "plugin",
    "method",
    "random",
    "model",
    "mixture",
    "scaled_mixture",
    "attempts",
    "scaled_attempts",
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
    "weights": "{}",
    "other_search": "{}",
    "plugin": "{}",
    "method": "{}",
    "random": "random vectors of equal norm",
    "model": "{}",
    "mixture": "{}",
    "scaled_mixture": "{} at its best scale",
    "attempts": "best of {} at equal cost",
    "scaled_attempts": "best of {} at equal cost, at its best scale",
    "merge": "searched merge",
    "retargeted": "re-targeted to {}",
}
OF_MIXTURES: tuple[RowKind, ...] = ("mixture", "scaled_mixture")
OF_ATTEMPTS: tuple[RowKind, ...] = ("attempts", "scaled_attempts")  # their subject is how many
OF_SCALED_MODELS: tuple[RowKind, ...] = ("scaled_mixture", "scaled_attempts")
OF_ONE_VECTOR: tuple[RowKind, ...] = ("alone", "best_scale")


def title_of(kind: RowKind, subject: str) -> str:
    """Return the title of a row, without its weights. Beside `uniform average`, the name of a
    mixture alone would not say that it is one.
    """
    if kind in OF_ATTEMPTS:
        subject = count(int(subject), "data mixture")
    elif kind in OF_MIXTURES and "mixture" not in subject.lower():
        subject = f"mixture: {subject}"
    return TITLES[kind].format(subject)


def mark_title(title: str, chosen_after_seal: bool) -> str:
    """Return a title, with a mark if the row was chosen after the seal was opened."""
    return title + " (chosen after the seal was opened)" * chosen_after_seal


def list_rows(config: StudyConfig) -> list[tuple[RowKind, str]]:
    """Return the kind and subject of every row that the comparison of a study may have, in the
    order of the table.
    """
    free, singles, baselines = list(config.free_parts), config.free_singles, config.baselines
    rows: list[tuple[RowKind, str]] = [("base", "")]
    rows += [("fixed", "")] if config.fixed else []
    rows += [("alone", name) for name in free]
    rows += [("best_scale", name) for name in free]
    rows += [("average", ""), ("sum", "")] if len(singles) > 1 else []
    rows += [("weights", name) for name in baselines.weights]
    rows += [("other_search", name) for name in baselines.searches]
    rows += [("plugin", name) for name in baselines.plugins]
    rows += [("method", method) for method in baselines.merge_methods]
    rows += [("random", "")] if baselines.random_vectors else []
    rows += [("model", name) for name in baselines.models]
    rows += [("mixture", name) for name in baselines.mixtures]
    scaled = [name for name, each in baselines.mixtures.items() if each.scale == "searched"]
    rows += [("scaled_mixture", name) for name in scaled]
    rows += [(kind, str(n)) for kind in OF_ATTEMPTS for n in baselines.attempts]
    return [*rows, ("merge", ""), *(("retargeted", name) for name in config.retarget)]


NAMED_BY: dict[RowKind, tuple[str, ...]] = {  # where a study names the subjects of a kind
    "weights": ("baselines", "weights"),
    "other_search": ("baselines", "searches"),
    "plugin": ("baselines", "plugins"),
    "model": ("baselines", "models"),
    **dict.fromkeys(("mixture", "scaled_mixture"), ("baselines", "mixtures")),
    "retargeted": ("retarget",),
}


def check_titles(config: StudyConfig, origin: Origin | str) -> None:
    """Raise ConfigError if two rows of the comparison of a study, read from `origin`, would have
    the same title.
    """
    rows = [(title_of(kind, subject), kind, subject) for kind, subject in list_rows(config)]
    counts = Counter(title for title, _, _ in rows)
    mistakes = [
        ((*NAMED_BY[kind], subject), f"{title!r} is the title of another row. Choose another name.")
        for title, kind, subject in rows
        if counts[title] > 1 and kind in NAMED_BY
    ]
    if mistakes:
        named = [(place, prefix_field(place, message)) for place, message in mistakes]
        raise ConfigError(list_mistakes(origin, named))


@dataclass(frozen=True)
class Contender:
    """Weights to score on the sealed test.

    `subject` is the vector, method, target or model that the kind is about. It is empty for kinds
    that occur once.
    """

    kind: RowKind
    subject: str
    weights: dict[str, float]

    @property
    def title(self) -> str:
        """Title of the row in tables and figures."""
        if self.kind == "alone":
            return f"{self.subject} at {self._own_weight}"
        title = title_of(self.kind, self.subject)
        if self.kind in OF_SCALED_MODELS:  # its own weight is the first; fixed vectors follow
            return f"{title}, {next(iter(self.weights.values())):g}"
        is_scaled = self.kind == "best_scale"
        return f"{title}, {self._own_weight:g}" if is_scaled else title

    @property
    def own_weights(self) -> list[float]:
        """The weights of the vector that the row is about: one, or those of its groups."""
        if self.subject in self.weights:
            return [self.weights[self.subject]]
        return [w for name, w in self.weights.items() if name.startswith(f"{self.subject}.")]

    @property
    def _own_weight(self) -> float:
        """The weight of the vector that the row is about, which its searched groups share; fixed
        weights come after them.
        """
        return self.own_weights[0]

    @property
    def key(self) -> str:
        """The weights as text. Rows with equal keys are scored once."""
        return weights_key(self.weights)

    @property
    def is_baseline(self) -> bool:
        """Whether the merge is compared with it, as with all rows but re-targeted merges."""
        return self.kind not in ("merge", "retargeted")


def weights_key(weights: Mapping[str, float]) -> str:
    """Return weights as text, rounded to six digits."""
    rounded = {name: round(weight, 6) + 0.0 for name, weight in weights.items()}
    return json.dumps(rounded, sort_keys=True)


class LeftOut(FileModel):
    """A baseline that is not in the table of a sealed test, with its title, and why."""

    kind: RowKind
    subject: str
    name: str
    reason: str


@dataclass(frozen=True)
class SealedRow(Contender):
    """What weights scored on the sealed test: a line of sealed.jsonl.

    `n_trials_known` counts the trials that the search had recorded by then. The phases of `seconds`
    are merge, evaluate, forward (part of evaluate) and cpu.
    """

    __pydantic_config__ = STRICT_RECORD

    scores: dict[str, TermScore]
    chosen_after_seal: bool
    n_trials_known: int
    seconds: dict[str, float]
    n_tokens: int

    @property
    def marked_title(self) -> str:
        """The title, with a mark if the row was chosen after the seal was opened."""
        return mark_title(self.title, self.chosen_after_seal)


def order_rows(rows: Iterable[SealedRow], config: StudyConfig) -> list[SealedRow]:
    """Return rows in the order of the table, in whatever order they were scored."""
    kinds = {kind: place for place, kind in enumerate(get_args(RowKind))}
    places = {row: place for place, row in enumerate(list_rows(config))}
    last = len(places)  # rows of models that a command added
    return sorted(
        rows, key=lambda row: (kinds[row.kind], places.get((row.kind, row.subject), last))
    )
