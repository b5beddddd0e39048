"""Model + objective -> per-item scores of every term, combined values and paired intervals; lm-eval
in process.

An item is kept as the two numbers of a ratio: its share of the numerator and of the denominator. An
accuracy is (1 or 0, 1), bits per byte is (bits, bytes), and the score of a term is sum / sum for
both, so subsets, bootstraps and comparisons need no special cases. What a reader would not guess:
prompts, few-shot examples included, depend on nothing but the item, so that every trial is asked
the same, after a resume and on any worker.
"""

import contextlib
import logging
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field

from optimer_hf.corpus import CorpusConfig, documents
from optimer_hf.errors import CorpusError, EvaluationError
from optimer_hf.files import (
    FileModel,
    LocalPath,
    Mistake,
    Place,
    VersionedFile,
    did_you_mean,
    digest,
    shown,
)
from optimer_hf.harness import harness_model, quiet_harness
from optimer_hf.intervals import Interval, Paired, interval_of
from optimer_hf.texts import has_rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

GENERATION_CAP = 256  # tokens, where a task sets none: generation that never stops
N_ASKED = 32  # items of a term whose prompts its digest looks at
LENGTHS = ("max_gen_toks", "max_tokens", "max_completion_tokens")  # lm-eval's names of one
LARGEST_SETTING = 2**20  # of a number of `generation` that sizes nothing
SIZES = {  # of `generation`: least and most
    **dict.fromkeys(LENGTHS, (1, 2**17)),
    **dict.fromkeys(("max_new_tokens", "max_length"), (1, 2**17)),
    **dict.fromkeys(("min_new_tokens", "min_length"), (0, 2**17)),
    **dict.fromkeys(("num_beams", "num_beam_groups", "num_return_sequences"), (1, 1024)),
    **dict.fromkeys(("top_k", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), (0, 2**20)),
}
ASKED_BY = (  # and fields of lm-eval's task that say how they are asked and scored
    "output_type",
    "num_fewshot",
    "description",
    "fewshot_delimiter",
    "target_delimiter",
    "generation_kwargs",
    "filter_list",
    "metric_list",
)
AGGREGATIONS = ("mean", "bits_per_byte", "weighted_perplexity", "perplexity")
REPORTED = (
    "arc_challenge",
    "arc_easy",
    "bbh",
    "boolq",
    "ceval",
    "cmmlu",
    "gpqa",
    "gsm8k",
    "hellaswag",
    "hendrycks_math",
    "humaneval",
    "ifeval",
    "jcommonsenseqa",
    "jmmlu",
    "lambada",
    "math500",
    "mbpp",
    "mgsm",
    "minerva_math",
    "mmlu",
    "openbookqa",
    "piqa",
    "triviaqa",
    "truthfulqa",
    "winogrande",
)


Portion = Annotated[float, Field(ge=0, le=1)]
ONLY_OF_ITEMS = {"metric", "text_field", "num_fewshot", "generation", "hash_range"}


class Term(FileModel):
    """One part of an objective: a metric of an lm-eval task, bits per byte or perplexity of the
    documents of a file, or a Python function of the model, named here and given to `ResidentPool`.

    `generation` goes to lm-eval as generation_kwargs. `hash_range` takes the items whose hash, as a
    number in [0, 1), is in [low, high): the same task can serve the search and the sealed test.
    """

    task: str | None = None
    text: LocalPath | None = None
    function: str | None = None
    text_field: str = "text"
    metric: str = "bits_per_byte"
    higher_is_better: bool | None = None
    name: str | None = None
    weight: float = Field(default=1.0, ge=0, le=1e6)
    limit: int | None = Field(default=None, gt=0, le=10**7)
    num_fewshot: int | None = Field(default=None, ge=0, le=1000)
    generation: dict[str, Any] = {}
    hash_range: tuple[Portion, Portion] = (0.0, 1.0)
    rescore_only: bool = False

    def mistakes(self) -> Iterator[Mistake]:
        if sum(source is not None for source in (self.task, self.text, self.function)) != 1:
            yield (
                (),
                "give exactly one of 'task' (an lm-eval task), 'text' (a JSONL file) and "
                "'function'",
            )
        if self.text is not None and self.metric not in ("bits_per_byte", "byte_perplexity"):
            yield (
                ("metric",),
                f"found {self.metric!r}. A 'text' term has the metric bits_per_byte or "
                "byte_perplexity",
            )
        if (self.function is None) != (self.higher_is_better is None):
            yield (
                ("higher_is_better",),
                "'higher_is_better' goes with 'function': lm-eval tasks know their direction",
            )
        changed = self.model_dump(exclude_defaults=True)  # a study that is read again sets all
        for name in sorted(ONLY_OF_ITEMS & changed.keys()):
            if self.function is not None:
                yield (name,), f"{name!r} says nothing to a 'function'; leave it out"
            elif self.text is not None and name in ("num_fewshot", "generation"):
                yield (name,), "a 'text' term has no num_fewshot and no generation; leave it out"
        for at, message in _no_plain_json(self.generation):
            yield ("generation", *at), message
        for name, value in self.generation.items():
            if reason := _out_of_range(name, value):
                yield ("generation", name), reason
        if not 0 <= self.hash_range[0] < self.hash_range[1] <= 1:
            yield (
                ("hash_range",),
                f"found {list(self.hash_range)}. Expected [low, high] with 0 <= low < high <= 1",
            )

    @property
    def label(self) -> str:
        """How the term is called in trials, tables and messages."""
        if self.text is not None:
            return self.name or self.text.name.split(".")[0]
        return str(self.name or self.task or self.function)

    @property
    def asked_as(self) -> str:
        """Names the task as this term asks it; terms that ask alike share the answers."""
        settings = [self.num_fewshot, self.generation]
        return self.task_name + (f" {digest(settings)[:8]}" if settings != [None, {}] else "")

    @property
    def task_name(self) -> str:
        """The lm-eval task that scores the term."""
        if self.task is not None:
            return self.task
        if self.function is not None:
            return f"function-{self.function}"
        # one file, one task, whatever its label: search and test use the same labels
        return f"text-{digest([str(self.text), self.text_field])[:16]}"


def _no_plain_json(value: Any, at: Place = ()) -> Iterator[Mistake]:
    """Yield the values within one that JSON does not have, and so no record and no digest."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _no_plain_json(item, (*at, str(key)))
            if not isinstance(key, str):
                yield at, f"found the key {shown(key)}. Expected a text"
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _no_plain_json(item, (*at, index))
    elif not isinstance(value, str | bool | int | float | None) or (
        isinstance(value, float) and not math.isfinite(value)
    ):
        expected = "Expected a finite number, a text, true, false, null, a list or a mapping"
        yield at, f"found {shown(value)}. {expected}"


def _out_of_range(name: str, value: Any) -> str | None:
    """Return what is wrong with a number of `generation`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if name not in SIZES:
        least, most = -LARGEST_SETTING, LARGEST_SETTING
        is_sound = not is_number or least <= value <= most
    else:
        least, most = SIZES[name]
        is_sound = isinstance(value, int) and is_number and least <= value <= most
        is_sound |= value is None and name not in LENGTHS
    what = "a whole number" if name in SIZES else "a number"
    return None if is_sound else f"found {shown(value)}. Expected {what} of {least:,} to {most:,}"


class Constraint(Term):
    """A term that must not get worse than the base by more than a share of the base's score.

    With the label of a term it is about that term, and nothing is scored twice.
    """

    weight: Literal[0] = 0
    max_relative_to_base: float = Field(ge=0, le=1e6)


def _asked_otherwise(constraint: Term, term: Term) -> str | None:
    """Return the field in which a constraint that is about a term asks for something else; what it
    leaves out is as in the term.
    """
    if constraint.task_name != term.task_name:
        return "task"
    if constraint.metric != term.metric:
        return "metric"
    changed = constraint.model_dump(exclude_defaults=True).keys()
    fields = ("limit", "num_fewshot", "generation", "hash_range", "rescore_only")
    unlike = (name for name in fields if getattr(constraint, name) != getattr(term, name))
    return next((name for name in unlike if name in changed), None)


class Objective(FileModel):
    """Terms and how they become one number, larger is better; terms of weight 0 are recorded and do
    not count. Merges that break a constraint are out.
    """

    combine: Literal["relative_to_base", "weighted_mean", "worst"] = "relative_to_base"
    terms: list[Term] = Field(min_length=1)
    constraints: list[Constraint] = []
    include_path: LocalPath | None = None
    limit: int | None = Field(default=None, gt=0, le=10**7)
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool = False
    system_instruction: str | None = None

    def mistakes(self) -> Iterator[Mistake]:
        yield from self._mistakes_of_names()
        counting = [term for term in self.terms if term.weight > 0]
        if not counting:
            yield ("terms",), "every term has weight 0; at least one must count"
        elif all(term.rescore_only for term in counting):
            yield ("terms",), "every counting term is rescore_only; the search needs at least one"
        if self.combine == "weighted_mean" and len({t.function or t.metric for t in counting}) > 1:
            yield (
                ("combine",),
                "weighted_mean of different metrics mixes units; use combine: relative_to_base, "
                "or terms of one metric",
            )

    def _mistakes_of_names(self) -> Iterator[Mistake]:
        by_label = {term.label: term for term in self.terms}
        for group, terms in (("terms", self.terms), ("constraints", self.constraints)):
            labels = [term.label for term in terms]
            for index, term in enumerate(terms):
                where = (group, index)
                if term.label in labels[:index]:
                    yield (
                        where,
                        f"two {group} are called {term.label!r}; tell them apart with 'name'",
                    )
                known = by_label.get(term.label, term)
                if group == "constraints" and (differing := _asked_otherwise(term, known)):
                    yield (
                        (*where, differing),
                        f"constraint {term.label!r} is called as a term with another {differing}; "
                        "leave it out, or tell them apart with 'name'",
                    )

    @property
    def scored(self) -> list[Term]:
        """Every term, and every constraint that is not one of them."""
        labels = {term.label for term in self.terms}
        return [*self.terms, *(term for term in self.constraints if term.label not in labels)]

    def at(self, stage: Literal["search", "rescore"]) -> list[Term]:
        """Return the terms and constraints that are scored at a stage."""
        return [term for term in self.scored if stage == "rescore" or not term.rescore_only]

    def limit_of(self, term: Term) -> int | None:
        """Return how many items of a term the search looks at (None: all)."""
        return term.limit if term.limit is not None else self.limit

    @property
    def prompting(self) -> dict[str, Any]:
        """How lm-eval turns items into prompts, under its own names."""
        return {
            "apply_chat_template": self.apply_chat_template,
            "fewshot_as_multiturn": self.fewshot_as_multiturn,
            "system_instruction": self.system_instruction,
        }


class ObjectiveFile(VersionedFile, Objective):
    """An objective in a file of its own, for `optimer evaluate` and `optimer search MERGE.yml`."""


STRICT_RECORD = ConfigDict(
    extra="forbid", allow_inf_nan=False, strict=True
)  # of what is read back from a log


@dataclass(frozen=True)
class TermScore:
    """The items of one term: [numerator, denominator] each, and the direction of the metric; a
    perplexity is two to the power of the ratio (numerators are in bits). `taken_over`: scored for
    the search and copied to re-scoring. `documents`: a checksum of the row behind each item, where
    there is one; it says which items of several terms are of one document.
    """

    __pydantic_config__ = STRICT_RECORD

    items: list[tuple[float, float]]
    higher_is_better: bool
    n_tokens: int = 0
    is_perplexity: bool = False
    taken_over: bool = False
    documents: list[int] = field(default_factory=list)

    @cached_property
    def score(self) -> float:
        """Sum of numerators over sum of denominators, in the unit of the metric."""
        ratio = sum(top for top, _ in self.items) / sum(bottom for _, bottom in self.items)
        return float(2**ratio) if self.is_perplexity else ratio

    @cached_property
    def table(self) -> "NDArray[np.float64]":
        """The items, [n, 2]."""
        return np.array(self.items, dtype=np.float64).reshape(-1, 2)


Scores = Mapping[str, TermScore]


# -- from scores to one number ---------------------------------------------------------------------


def gain(score: float, base: float, *, higher_is_better: bool) -> float:
    """Return how much better than the base: points for accuracies, relative change for losses."""
    return score - base if higher_is_better else (base - score) / (abs(base) or 1.0)


def gains(scores: Scores, base: Scores) -> dict[str, float]:
    """Return the gain of every term that both have."""
    return {
        label: gain(term.score, base[label].score, higher_is_better=term.higher_is_better)
        for label, term in scores.items()
        if label in base
    }


def combine(objective: Objective, scores: Scores, base: Scores) -> float:
    """Return the value of an objective, larger is better, over the terms that were scored."""
    terms = [term for term in objective.terms if term.weight > 0 and term.label in scores]
    weights = np.array([term.weight for term in terms])
    if objective.combine == "weighted_mean":
        signed = [
            scores[t.label].score * (1 if scores[t.label].higher_is_better else -1) for t in terms
        ]
        return float(np.average(signed, weights=weights))
    each = gains(scores, base)
    values = np.array([each[term.label] for term in terms])
    return float(
        values.min() if objective.combine == "worst" else np.average(values, weights=weights)
    )


def headroom(constraint: Constraint, score: TermScore, base: TermScore) -> float:
    """Return how far a score is from breaking a constraint, as a share of the base's score (in its
    unit, where that is 0); less than 0 breaks it.
    """
    better = score.score - base.score if score.higher_is_better else base.score - score.score
    return constraint.max_relative_to_base + better / (abs(base.score) or 1.0)


def feasible(objective: Objective, scores: Scores, base: Scores) -> bool:
    """Return whether scores keep every constraint that was scored."""
    return all(
        headroom(constraint, scores[constraint.label], base[constraint.label]) >= 0
        for constraint in objective.constraints
        if constraint.label in scores
    )


def paired_interval(
    objective: Objective, scores: Scores, other: Scores, base: Scores, *, seed: int = 0
) -> Interval:
    """Return value(scores) - value(other) with a 95 % interval over the items that all three have.

    Terms that share documents are resampled together; see `intervals`. Raises EvaluationError when
    the sides were not scored on the same items.
    """
    terms = [term for term in objective.terms if term.weight > 0 and term.label in scores]
    if all(scores[term.label] is other[term.label] for term in terms):
        fewest = min(terms, key=lambda term: len(scores[term.label].items))
        n_fewest = len(scores[fewest.label].items)
        return Interval(0.0, -math.inf, math.inf, "none", n_fewest, fewest.label)
    paired = []
    for term in terms:
        sides = scores[term.label], other[term.label], base[term.label]
        _check_paired(term, sides)
        own = Paired(
            term.label,
            term.weight,
            sides[0].higher_is_better,
            sides[0].is_perplexity,
            _documents_of(term, sides[0]),
            (sides[0].table, sides[1].table, sides[2].table),
        )
        paired.append(own)
    return interval_of(paired, objective.combine, seed=seed)


def _check_paired(term: Term, sides: Sequence[TermScore]) -> None:
    counts = sorted({len(side.items) for side in sides})
    known = [side.documents for side in sides if side.documents]
    if len(counts) > 1:
        found = f"{counts[0]} and {counts[-1]} items"
    elif any(documents != known[0] for documents in known):
        found = "other documents"
    else:
        return
    raise EvaluationError(
        f"term {term.label!r}: two models were scored on {found}, so they cannot be compared item "
        "by item. Score them again on the same items."
    )


def _documents_of(term: Term, score: TermScore) -> "NDArray[np.int64]":
    """Return numbers of the documents behind items, [n]. Where they were not recorded, terms of one
    task and one length are taken to have the same.
    """
    if score.documents:
        return np.array(score.documents, dtype=np.int64)
    n = len(score.items)
    source = zlib.crc32(repr((term.task_name, term.hash_range, n)).encode())
    return np.arange(n, dtype=np.int64) + ((source + 1) << 31)


# -- in words --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """What the values of an objective are counted in: the number shown is `factor` times a value,
    with `digits` decimals, in percent or in what `name` says. `text` describes a gain.
    """

    factor: float
    text: str
    name: str = ""
    digits: int = 2

    @classmethod
    def of(cls, objective: Objective) -> "Unit":
        """Percent over the base, or the metric of the terms under `weighted_mean`."""
        if objective.combine != "weighted_mean":
            return cls(100.0, "objective over the base, %")
        term = next(term for term in objective.terms if term.weight > 0)
        name = term.function or _metric_name(term)
        return cls(1.0, f"objective over the base, {name}", name, 4)

    def show(self, gain: float) -> str:
        """Return a gain, larger is better, as text."""
        return f"{self.number(gain)}{' %' if self.factor > 1 else self.name and f' {self.name}'}"

    def show_difference(self, difference: float) -> str:
        """Return a difference of two gains as text: of percentages it is points."""
        return f"{self.number(difference)} points" if self.factor > 1 else self.show(difference)

    def show_interval(self, interval: Interval) -> str:
        """Return the ends of an interval as text."""
        if interval.kind == "none":
            return "no interval"
        return f"[{self.number(interval.low)}, {self.number(interval.high)}]"

    def number(self, value: float) -> str:
        """Return a value as a number with its sign, and never as -0.00."""
        return f"{round(self.factor * value, self.digits) + 0.0:+.{self.digits}f}"


OF_TERMS = Unit(100.0, "gain over the base, %")  # losses relative, accuracies in points


def said_of(interval: Interval, unit: Unit, *, is_gain: bool) -> str:
    """Return a difference with its interval, the kind of it, and the verdict, as text; `is_gain`
    says that it is one over the base, not one between two merges.
    """
    show = unit.show if is_gain else unit.show_difference
    found = show(interval.difference)
    if interval.kind != "none":
        found += f" {unit.show_interval(interval)}, paired 95 % interval ({interval.kind})"
    return f"{found}: {interval.verdict}"


def shown_value(objective: Objective, scores: Scores, base: Scores, *, is_base: bool) -> str:
    """Return the objective as tables show it: over the base, or under `weighted_mean` for the base
    itself as the mean that it is.
    """
    unit, value = Unit.of(objective), combine(objective, scores, base)
    if not is_base or objective.combine != "weighted_mean":
        return unit.show(value - combine(objective, base, base))
    counting = [term.label for term in objective.terms if term.weight > 0]
    lower_is_better = not any(base[label].higher_is_better for label in counting)
    return f"{-value if lower_is_better else value:.{unit.digits}f} {unit.name}"


# -- the harness -----------------------------------------------------------------------------------


Scorer = Callable[[Any, Any, int | None], Sequence[float]]


class Evaluator:
    """A model, its tokenizer and the tasks of some objectives, ready to be scored."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        objectives: Sequence[Objective],
        *,
        functions: Mapping[str, Scorer] | None = None,
    ) -> None:
        """Load the tasks. `functions` score the terms that name them: (model, tokenizer, limit) ->
        a number per item.

        Raises EvaluationError for a task, metric, file or function that does not exist.
        """
        self._lm = harness_model(model, tokenizer)
        self.tasks = load_tasks(objectives)
        self._prompting = objectives[0].prompting
        self._functions = dict(functions or {})
        self._within: dict[tuple[str, tuple[float, float]], list[int]] = {}
        for term in (term for objective in objectives for term in objective.scored):
            if term.function is not None and term.function not in self._functions:
                raise EvaluationError(
                    f"term {term.label!r}: no function {term.function!r} was given; functions "
                    "come from Python: search(..., pool=partial(ResidentPool, functions={...}))."
                )
            if term.function is None and not self._indices(term):
                raise EvaluationError(
                    f"term {term.label!r}: no item of {term.task_name!r} is in hash_range "
                    f"{list(term.hash_range)}."
                )

    def _chosen(self, term: Term, limit: int | None) -> list[int]:
        """Return the items that a term is scored on."""
        within = self._indices(term)
        return [within[index] for index in spread(len(within), limit)]

    def _indices(self, term: Term) -> list[int]:
        """Return the items of a term that are in its hash range."""
        key = (term.task_name, term.hash_range)
        if key not in self._within:
            self._within[key] = items_within(self.tasks[term.asked_as], term.hash_range)
        return self._within[key]

    def items_digest(self, term: Term) -> str | None:
        """Return a digest of the items of a term: their rows, of a few what is asked, and how they
        are scored; None for a term that a function scores.
        """
        if term.function is not None:
            return None
        task, within = self.tasks[term.asked_as], self._indices(term)
        docs, few = list(task.eval_docs), spread(len(within), N_ASKED)
        asked = [_item_hash(task, docs[within[index]]) for index in few]
        how = [repr(getattr(task.config, name, None)) for name in ASKED_BY]
        rows = [docs[index] for index in within]
        return digest([*map(_without_addresses, how), *map(_plain, rows), *asked])

    def n_items(self, term: Term) -> int:
        """Return how many items a term of the harness has."""
        return len(self._indices(term))

    def evaluate(
        self, terms: Sequence[Term], *, limits: Mapping[str, int | None]
    ) -> dict[str, TermScore]:
        """Score terms, each on the first `limits[label]` of its items in a fixed order spread over
        the file.

        Raises EvaluationError when a score is not a finite number.
        """
        before = self.n_tokens
        of_harness = [term for term in terms if term.function is None]
        found = self._harness_scores(of_harness, limits)
        used = (self.n_tokens - before) // max(len(of_harness), 1)
        for term in terms:
            if term.function is None:
                found[term.label] = replace(found[term.label], n_tokens=used)
            else:
                found[term.label] = self._function_score(term, limits[term.label])
        return {term.label: found[term.label] for term in terms}

    def _harness_scores(
        self, terms: Sequence[Term], limits: Mapping[str, int | None]
    ) -> dict[str, TermScore]:
        from lm_eval.evaluator import evaluate

        chosen = {term.label: self._chosen(term, limits[term.label]) for term in terms}
        samples: dict[str, list[int]] = {}
        for term in terms:  # each item is asked once, whatever the number of terms that look at it
            known = samples.get(term.asked_as, [])
            samples[term.asked_as] = sorted({*known, *chosen[term.label]})
        if not samples:
            return {}
        tasks = {name: self.tasks[name] for name in sorted(samples)}
        with quiet_harness():
            try:
                results = evaluate(
                    lm=self._lm,
                    task_dict={"tasks": tasks, "groups": {}, "group_map": {}},
                    samples=samples,
                    bootstrap_iters=0,
                    log_samples=True,
                    **self._prompting,
                )
            except OverflowError as error:  # of lm-eval's perplexities
                raise EvaluationError(
                    f"{sorted(tasks)}: a score is not a finite number."
                ) from error
        found = {}
        for term in terms:
            task, own = self.tasks[term.asked_as], {*chosen[term.label]}
            logged = [row for row in results["samples"][term.asked_as] if row["doc_id"] in own]
            found[term.label] = _sound(term, _term_score(term, task, logged))
        return found

    def _function_score(self, term: Term, limit: int | None) -> TermScore:
        function = self._functions[str(term.function)]
        with torch.no_grad():
            values = [float(value) for value in function(self._lm.model, self._lm.tokenizer, limit)]
        if not values or not all(map(math.isfinite, values)):
            raise EvaluationError(
                f"term {term.label!r}: function {term.function!r} gave {values[:5]!r}, expected a "
                "finite number per item."
            )
        return TermScore([(value, 1.0) for value in values], bool(term.higher_is_better))

    @property
    def forward_seconds(self) -> float:
        """Seconds spent inside the model so far."""
        return float(self._lm.forward_seconds)

    @property
    def n_tokens(self) -> int:
        """Tokens the model has read so far."""
        return int(self._lm.n_tokens["total"])


def spread(n_items: int, limit: int | None) -> list[int]:
    """Return `limit` indices spread evenly over range(n_items), in order; all of them when limit is
    None or larger.

    Corpora list their sources one after another, so an even spread is stratified by source.
    """
    if limit is None or limit >= n_items:
        return list(range(n_items))
    return [(2 * index + 1) * n_items // (2 * limit) for index in range(limit)]


def items_within(task: Any, hash_range: tuple[float, float]) -> list[int]:
    """Return the indices of a task's items whose hash, as a number in [0, 1), is in the range."""
    low, high = hash_range
    if (low, high) == (0.0, 1.0):
        return list(range(len(task.eval_docs)))
    places = (int(item[:12], 16) / 16**12 for item in item_hashes(task))
    return [index for index, place in enumerate(places) if low <= place < high]


def _row_hashes(task: Any) -> list[str]:
    """Return a digest of every row that the items of a task are made from."""
    return [digest(repr(doc)) for doc in task.eval_docs]


def item_hashes(task: Any) -> list[str]:
    """Return a digest of prompt, target and choices of every item of a task."""
    return [_item_hash(task, doc) for doc in task.eval_docs]


def _item_hash(task: Any, doc: Any) -> str:
    has_choices = task.config.doc_to_choice is not None
    choices = [str(choice) for choice in task.doc_to_choice(doc)] if has_choices else []
    return digest([str(task.doc_to_text(doc)), str(task.doc_to_target(doc)), choices])


def check_disjoint(objective: Objective, test: Objective, tasks: Mapping[str, Any]) -> None:
    """Raise EvaluationError when an item of the sealed test is one the search may look at."""
    seen: dict[str, str] = {}
    for part in (objective, test):
        for term in part.scored:
            if term.function is not None:
                continue
            task = tasks[term.asked_as]
            rows, items = _row_hashes(task), item_hashes(task)
            found = [(rows[index], items[index]) for index in items_within(task, term.hash_range)]
            if part is objective:
                seen |= {each: term.label for pair in found for each in pair}
            elif shared := [pair for pair in found if seen.keys() & set(pair)]:
                first = next(seen[each] for each in shared[0] if each in seen)
                raise EvaluationError(
                    f"test term {term.label!r}: {len(shared)} of its {len(found)} items are items "
                    f"of the search, too (term {first!r}). Give the test other items: a file of "
                    "its own, or another hash_range."
                )


def warn_of_reported_benchmarks(objective: Objective) -> None:
    """Log a warning for terms whose benchmark is usually reported: weights are fitted to it."""
    for term in objective.scored:
        name = next((name for name in REPORTED if (term.task or "").startswith(name)), None)
        if name is not None:
            logger.warning(
                "objective term %r: %s is usually reported, and the weights are fitted to it; do "
                "not report its score as if it were unseen, and seal other items for the test",
                term.label,
                name,
            )


def warn_of_other_weights(objective: Objective, test: Objective) -> None:
    """Log a warning for a sealed test that weighs the terms of the objective otherwise: its
    `objective` column is then another objective than the one that was searched.
    """
    weights = {term.label: 0.0 for term in objective.constraints}
    weights |= {term.label: term.weight for term in objective.terms}
    shared = {term.label: term.weight for term in test.terms if term.label in weights}
    total, again = sum(weights[label] for label in shared), sum(shared.values())
    for label, weight in shared.items():
        if not math.isclose(weight * total, weights[label] * again, abs_tol=1e-9):
            logger.warning(
                "sealed test, term %r: weight %g of %g, but %g of %g in the objective, so the "
                "test asks for something else. Give its terms the weights of the objective, "
                "unless you mean that",
                label,
                weight,
                again,
                weights[label],
                total,
            )
            return


def load_tasks(objectives: Sequence[Objective]) -> dict[str, Any]:
    """Return the lm-eval tasks of some objectives by `asked_as`, and by name as the first of its
    terms asks it; needs no model, so it comes before anything expensive.

    Raises EvaluationError for a task, metric or file that does not exist.
    """
    _refuse_two_folders(objectives)
    tasks: dict[str, Any] = {}
    for objective in objectives:
        named = [term for term in objective.scored if term.function is None]
        wanted = {term.asked_as: term for term in named if term.asked_as not in tasks}
        for term in wanted.values():
            if term.text is not None:
                _check_text(term, term.text)
        if wanted:
            tasks |= _load_tasks(list(wanted.values()), objective.include_path)
        for term in named:
            tasks.setdefault(term.task_name, tasks[term.asked_as])
            _check_metric(term, tasks[term.asked_as])
            _refuse_sealed_examples(term, tasks[term.asked_as])
    return tasks


def _refuse_two_folders(objectives: Sequence[Objective]) -> None:
    """Raise EvaluationError for a task that two objectives look up in different folders: it is one
    task by its name, in records and in tables.
    """
    folders: dict[str, Path] = {}
    for objective in objectives:
        for term in objective.scored:
            if term.task is None or objective.include_path is None:
                continue
            folder = folders.setdefault(term.task, objective.include_path)
            if folder != objective.include_path:
                raise EvaluationError(
                    f"term {term.label!r}: task {term.task!r} is looked up in two folders "
                    f"(include_path: {folder} and {objective.include_path}). Give objective and "
                    "test the same include_path."
                )


def _check_text(term: Term, path: Path) -> None:
    """Read the documents of a term: a mistake is told with its line and field, which lm-eval would
    not do, or only in the middle of a search.
    """
    if path.is_dir() or (path.is_file() and not has_rows(path)):
        found = "a folder" if path.is_dir() else f"a file that ends in {path.suffix!r}"
        raise EvaluationError(
            f"term {term.label!r}: {path}: found {found}, expected a JSONL file, or another with a "
            "document in each row (.json, .csv, .parquet)."
        )
    try:
        n_texts = sum(map(bool, documents(CorpusConfig(path=path, text_field=term.text_field))))
    except CorpusError as error:
        raise EvaluationError(f"term {term.label!r}: {error}") from None
    if not n_texts:
        raise EvaluationError(f"term {term.label!r}: {path}: holds no text to score.")


def _load_tasks(terms: Sequence[Term], include_path: Path | None) -> dict[str, Any]:
    from lm_eval.tasks import TaskManager

    named = [term for term in terms if term.task is not None]
    if include_path is not None and not include_path.is_dir():
        raise EvaluationError(f"include_path: {include_path}: no such directory of tasks.")
    include = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=include, include_defaults=False)
    groups = {*manager.all_groups, *manager.all_tags}
    if any(term.task not in {*manager.all_subtasks, *groups} for term in named):
        manager = TaskManager(
            include_path=include
        )  # ten seconds, only for tasks that ship with lm-eval
    for term in named:
        if term.task in {*manager.all_groups, *manager.all_tags}:
            raise EvaluationError(
                f"term {term.label!r}: {term.task!r} is a group of tasks in lm-eval. Name its "
                "tasks, each in a term of its own."
            )
        if term.task not in manager.all_subtasks:
            where = f" or {include_path}" if include_path is not None else ""
            hint = did_you_mean(str(term.task), list(manager.all_subtasks))
            raise EvaluationError(
                f"term {term.label!r}: no task named {term.task!r} in lm-eval{where}.{hint}"
            )
    loaded: dict[str, Any] = {}
    for term in terms:
        spec: Any = _text_task(term) if term.text is not None else term.task
        folder = include_path if include_path is not None and term.text is None else Path.cwd()
        try:
            with contextlib.chdir(folder), quiet_harness():
                tasks = manager.load([spec])["tasks"]
        except Exception as error:  # lm-eval and `datasets` raise many types for a broken task
            raise EvaluationError(
                f"term {term.label!r}: task {term.task_name!r} cannot be loaded ({error})."
            ) from error
        loaded[term.asked_as] = _with_settings(tasks[term.task_name], term)
    return loaded


def _with_settings(task: Any, term: Term) -> Any:
    """Return a task with the few-shot and generation settings of its term, which builds its
    requests once for the same items.
    """
    if getattr(task, "UNSAFE_CODE", False):  # lm-eval gives it to such tasks alone
        raise EvaluationError(
            f"term {term.label!r}: {term.task_name!r} runs the code that a model writes, which a "
            "search does not. Score the likelihood of the reference solutions instead, as the "
            "tasks of recipes/gemma-3-270m-paper do."
        )
    if term.num_fewshot is not None:
        task.set_config(key="num_fewshot", value=term.num_fewshot)
        _refuse_too_many_examples(task, term)
    if task.OUTPUT_TYPE == "generate_until":
        _refuse_unknown_generation(term)
        cap = {"max_gen_toks": GENERATION_CAP} | (task.config.generation_kwargs or {})
        task.set_config(key="generation_kwargs", value=cap | term.generation)
    elif term.generation:
        raise EvaluationError(
            f"term {term.label!r}: 'generation' is for tasks that generate; {term.task_name!r} is "
            f"of type {task.OUTPUT_TYPE!r}."
        )
    _draw_examples_by_item(task)
    build, built = task.build_all_requests, dict[str, list[Any]]()

    def build_once(**settings: Any) -> None:
        key = repr(settings["samples"])
        if key not in built:
            build(**settings)
            built[key] = task._instances
        for instance in built[key]:
            instance.resps, instance.filtered_resps = [], {}
        task._instances = built[key]

    task.build_all_requests = build_once
    return task


def _refuse_sealed_examples(term: Term, task: Any) -> None:
    has_examples = bool(task.config.num_fewshot)  # of the term, or of the task itself
    if has_examples and term.hash_range != (0.0, 1.0) and not _has_other_examples(task):
        raise EvaluationError(
            f"term {term.label!r}: the examples of num_fewshot come from the items themselves, so "
            "hash_range would not keep sealed ones out. Give the task a fewshot_split."
        )


def _refuse_too_many_examples(task: Any, term: Term) -> None:
    n_examples = len(task.sampler.fewshot_docs()) if term.num_fewshot else 0
    n_own = int(task.fewshot_cfg.split == task.config.test_split)  # an item is none for itself
    if (term.num_fewshot or 0) > n_examples - n_own:
        raise EvaluationError(
            f"term {term.label!r}: num_fewshot: found {term.num_fewshot}, but {term.task_name!r} "
            f"has {n_examples} examples to draw from. Lower it."
        )


def _refuse_unknown_generation(term: Term) -> None:
    from transformers import GenerationConfig

    known = ["until", *LENGTHS, *(key for key in vars(GenerationConfig()) if key[0] != "_")]
    for key in term.generation:
        if key not in known:
            raise EvaluationError(
                f"term {term.label!r}: generation: unknown field {key!r}.{did_you_mean(key, known)}"
            )


def _has_other_examples(task: Any) -> bool:
    """Whether few-shot examples come from another split than the items."""
    split = task.config.fewshot_split or task.config.training_split or task.config.validation_split
    return split is not None and split != (task.config.test_split or task.config.validation_split)


def _draw_examples_by_item(task: Any) -> None:
    """Draw the examples before an item with a seed of its own: lm-eval's drawing depends on what
    was drawn before, and so on limits, resumes and workers.
    """
    plain = task.fewshot_context

    def context(doc: Any, *arguments: Any, **settings: Any) -> Any:
        task.set_fewshot_seed(zlib.crc32(repr(doc).encode()))
        return plain(doc, *arguments, **settings)

    task.fewshot_context = context


def _text_task(term: Term) -> dict[str, Any]:
    """Return the lm-eval task that scores each document of a file on its own, after BOS."""
    corpus = CorpusConfig(path=term.text, text_field=term.text_field)

    def rows(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_dict({term.text_field: list(documents(corpus))})}

    return {
        "task": term.task_name,
        "dataset_path": "json",
        "custom_dataset": rows,  # `datasets` would read texts that look like dates as dates
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": itemgetter(
            term.text_field
        ),  # a template would turn the document "[1, 2]" into a list
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
        "metadata": {"version": 1},
    }


def _metric_name(term: Term) -> str:
    return term.metric.split(",")[0]


def _check_metric(term: Term, task: Any) -> None:
    """Raise EvaluationError when the task has no such metric, or one whose score is not a ratio of
    sums over items.
    """
    known = dict(task.aggregation())
    name = _metric_name(term)
    if name not in known:
        raise EvaluationError(
            f"term {term.label!r}: task {term.task_name!r} has no metric "
            f"{name!r}.{did_you_mean(name, sorted(known))}"
        )
    filters = [chain.name for chain in task._filters]
    wanted = term.metric.partition(",")[2]
    if wanted and wanted not in filters:
        raise EvaluationError(
            f"term {term.label!r}: task {term.task_name!r} has no filter {wanted!r}."
            f"{did_you_mean(wanted, filters)}"
        )
    if _aggregation(term, task) not in AGGREGATIONS:
        raise EvaluationError(
            f"term {term.label!r}: metric {name!r} is aggregated by {_aggregation(term, task)!r}; "
            "only means, bits_per_byte and perplexities can be compared item by item. Use one of "
            "the task's other metrics."
        )
    if task.higher_is_better().get(name) is None:
        raise EvaluationError(
            f"term {term.label!r}: metric {name!r} of task {term.task_name!r} has no direction. "
            "Set `higher_is_better` in the metric_list of the task."
        )


def _aggregation(term: Term, task: Any) -> str:
    return str(task.aggregation()[_metric_name(term)].__name__)


def _sound(term: Term, found: TermScore) -> TermScore:
    """Return a score that is a finite number; raise EvaluationError for another."""
    try:
        if math.isfinite(found.score):
            return found
    except (OverflowError, ZeroDivisionError):
        pass
    raise EvaluationError(f"term {term.label!r}: the score is not a finite number.")


def _term_score(term: Term, task: Any, logged: Sequence[Mapping[str, Any]]) -> TermScore:
    """Return the score of a term from what lm-eval logged of its items, all filters of each."""
    name, _, chosen = term.metric.partition(",")
    rows = [row for row in logged if row["filter"] == (chosen or row["filter"])]
    if not chosen:
        rows = [row for row in rows if row["filter"] == rows[0]["filter"]]
    rows.sort(key=lambda row: row["doc_id"])
    aggregation = _aggregation(term, task)
    items = [_item(row[name], aggregation) for row in rows]
    for row, (top, _) in zip(rows, items, strict=True):
        if not math.isfinite(top):
            raise EvaluationError(
                f"term {term.label!r}: the score of item {row['doc_id']} is not a finite number."
            )
    higher, is_perplexity = task.higher_is_better()[name], aggregation.endswith("perplexity")
    documents = [_document(term, row["doc"]) for row in rows]
    return TermScore(items, bool(higher), 0, is_perplexity, documents=documents)


def _item(value: Any, aggregation: str) -> tuple[float, float]:
    """Return numerator and denominator of an item out of lm-eval's value of it."""
    if isinstance(value, tuple):  # (log-likelihood in nats, bytes or words)
        return -float(value[0]) / math.log(2), float(value[1])
    if aggregation == "perplexity":  # log-likelihood in nats
        return -float(value) / math.log(2), 1.0
    return float(value), 1.0


def _document(term: Term, row: Any) -> int:
    """Return a checksum of what an item is made from: of a document of a file its text."""
    return zlib.crc32((row[term.text_field] if term.text is not None else _plain(row)).encode())


def _plain(row: Any) -> str:
    """Return a row as text."""
    return _without_addresses(repr(row))


def _without_addresses(text: str) -> str:
    """Return a text without the addresses of functions, images and the like."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)
