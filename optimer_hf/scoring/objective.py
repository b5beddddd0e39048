"""What a merge is scored on: terms, constraints, and how their scores combine into one value."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
)

from optimer_hf.errors import EvaluationError
from optimer_hf.files.digest import digest
from optimer_hf.files.model import FileModel, Mistake, WrittenFile
from optimer_hf.files.paths import Place
from optimer_hf.files.reference import FunctionText, LocalPath, function_in_file
from optimer_hf.files.text import quote
from optimer_hf.scoring.scores import Scores, TermScore

N_PROMPTS = 32  # items of a term whose prompts go into its digest
FLAGS = ("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values")
PROPORTIONS = (
    *("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "length_penalty"),
    *("diversity_penalty", "epsilon_cutoff", "eta_cutoff"),
)
LENGTHS = ("max_gen_toks", "max_tokens", "max_completion_tokens")  # lm-eval's names for it
LARGEST_SETTING = 2**20  # of a number in `generation` that is no size
SIZES = {  # in `generation`: least and most
    **dict.fromkeys(LENGTHS, (1, 2**17)),
    **dict.fromkeys(("max_new_tokens", "max_length"), (1, 2**17)),
    **dict.fromkeys(("min_new_tokens", "min_length"), (0, 2**17)),
    **dict.fromkeys(("num_beams", "num_beam_groups"), (1, 1024)),
    "num_return_sequences": (1, 1),  # lm-eval reads one answer for each item
    **dict.fromkeys(("top_k", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"), (0, 2**20)),
}
TASK_FIELDS = (  # of lm-eval that say how items are prompted and scored
    "output_type",
    "num_fewshot",
    "description",
    "fewshot_delimiter",
    "target_delimiter",
    "generation_kwargs",
    "filter_list",
    "metric_list",
)

SplitBy = Literal["document", "prompt"]
Portion = Annotated[float, Field(ge=0, le=1)]
SHARED = (  # fields that a constraint takes from the term of its name
    "higher_is_better",
    "limit",
    "num_fewshot",
    "generation",
    "hash_range",
    "rescore_only",
)
NOT_FOR_FUNCTIONS = {"metric", "text_field", "num_fewshot", "generation", "hash_range"}


class Term(FileModel):
    """One part of an objective. Give exactly one of `task`, `text` and `function`."""

    task: str | None = Field(default=None, examples=["gsm8k"])
    """lm-eval task, one of its own or one found through `include_path`."""
    text: LocalPath | None = Field(default=None, examples=["held-out.jsonl"])
    """JSONL file of documents, plain or compressed, to measure the likelihood of."""
    function: FunctionText | None = Field(default=None, examples=["my_metrics.py:brevity"])
    """Python function that scores the model: FILE.py:NAME, or the name of one that is given to
    `optimer_hf.search`. It gets (model, tokenizer, limit) and returns a number for each item. Code
    in files from the Hub is never run.
    """
    text_field: str = Field(default="text", examples=["content"])
    """Field of a `text` file's rows that holds the document."""
    metric: str = Field(
        default="bits_per_byte", examples=["acc_norm", "exact_match,flexible-extract"]
    )
    """What to measure. For `text`: bits_per_byte or byte_perplexity. For `task`: a metric of the
    task, with its filter where it has one (exact_match,flexible-extract); for a multiple-choice
    task also choice_log_probability, the mean log-probability of the right answer among the
    choices.
    """
    higher_is_better: bool | None = Field(default=None, examples=[True])
    """Whether larger numbers of a `function` are better. lm-eval's metrics know this themselves."""
    name: str | None = Field(default=None, examples=["math"])
    """What tables and messages call the term. Default: the task, the function, or the name of the
    text file up to its first dot.
    """
    weight: float = Field(
        default=1.0, ge=0, le=1e6, examples=[0.5], json_schema_extra={"unit": "weight"}
    )
    """Weight of the term in the objective. 0 records the score without counting it, so that other
    objectives can use it later.
    """
    limit: int | None = Field(
        default=None, gt=0, le=10**7, examples=[100], json_schema_extra={"unit": "items"}
    )
    """Number of items to score, spread evenly over the file or task, the same in every trial.
    Default: the limit of the objective.
    """
    num_fewshot: int | None = Field(
        default=None, ge=0, le=1000, examples=[5], json_schema_extra={"unit": "examples"}
    )
    """Number of few-shot examples of a `task`. Default: what the task says."""
    generation: dict[str, Any] = Field(default={}, examples=[{"max_gen_toks": 160}])
    """Options for a `task` that generates text, over the task's own generation_kwargs; for
    instance {max_gen_toks: 160}. A task that sets no length stops at 256 tokens.
    """
    hash_range: tuple[Portion, Portion] = Field(
        default=(0.0, 1.0), examples=[[0.0, 0.5]], json_schema_extra={"unit": "share of the items"}
    )
    """Use only the items whose hash, as a number in [0, 1), lies in [low, high). With [0, 0.5] in
    the objective and [0.5, 1] in the test, one task serves both, and so do several tasks that read
    the same rows, with the exception in `split_by`. Other items in both are refused.
    """
    rescore_only: bool = Field(default=False, examples=[True])
    """Skip the term in the search and score it only when the best trials are scored again; for
    tasks that are too slow for every trial.
    """

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
                "'higher_is_better' goes with 'function': lm-eval tasks know their direction"
                if self.function is None
                else "'higher_is_better' is missing: say whether larger values are better",
            )
        changed = self.model_dump(exclude_defaults=True)  # a study that is read again sets all
        for name in sorted(NOT_FOR_FUNCTIONS & changed.keys()):
            if self.function is not None:
                yield (name,), f"{name!r} means nothing to a 'function'; leave it out"
            elif self.text is not None and name in ("num_fewshot", "generation"):
                yield (name,), "a 'text' term has no num_fewshot and no generation; leave it out"
        for at, message in mistakes_of_json(self.generation):
            yield ("generation", *at), message
        for name, value in self.generation.items():
            if reason := _mistake_of_setting(name, value):
                yield ("generation", name), reason
        if not 0 <= self.hash_range[0] < self.hash_range[1] <= 1:
            yield (
                ("hash_range",),
                f"found {list(self.hash_range)}. Expected [low, high] with 0 <= low < high <= 1",
            )

    def idle_fields(self) -> Iterator[Mistake]:
        if self.task is not None and self.text_field != "text":
            yield ("text_field",), "does nothing beside 'task'; leave it out"

    @property
    def label(self) -> str:
        """What trials, tables and messages call the term."""
        if self.text is not None:
            return self.name or self.text.name.split(".")[0]
        return str(self.name or self.task or self.function_name)

    @property
    def function_name(self) -> str | None:
        """The name of the function without its file."""
        in_file = function_in_file(self.function) if self.function is not None else None
        return self.function if in_file is None else in_file[1]

    @property
    def metric_name(self) -> str:
        """The metric without its filter."""
        return self.metric.partition(",")[0]

    @property
    def task_key(self) -> str:
        """The task and its settings in this term. Terms with equal keys share their answers."""
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


def mistakes_of_json(value: Any, at: Place = ()) -> Iterator[Mistake]:
    """Yield the parts of a value that JSON cannot hold, so that no record and no digest could."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from mistakes_of_json(item, (*at, str(key)))
            if not isinstance(key, str):
                yield at, f"found the key {quote(key)}. Expected a text"
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from mistakes_of_json(item, (*at, index))
    elif not isinstance(value, str | bool | int | float | None) or (
        isinstance(value, float) and not math.isfinite(value)
    ):
        expected = "Expected a finite number, a text, true, false, null, a list or a mapping"
        yield at, f"found {quote(value)}. {expected}"


def _mistake_of_setting(name: str, value: Any) -> str | None:
    """Return what is wrong with a setting of `generation`; transformers would say it too late."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    texts = value if isinstance(value, list) else [value]
    if name == "until" and not all(isinstance(text, str) for text in texts):
        return f"found {quote(value)}. Expected a text or a list of texts"
    if name in FLAGS and not isinstance(value, bool | None):
        return f"found {quote(value)}. Expected true or false"
    if name in PROPORTIONS and not is_number and value is not None:
        return f"found {quote(value)}. Expected a number"
    if name not in SIZES:
        least, most = -LARGEST_SETTING, LARGEST_SETTING
        is_sound = not is_number or least <= value <= most
    else:
        least, most = SIZES[name]
        is_sound = isinstance(value, int) and is_number and least <= value <= most
        is_sound |= value is None and name not in LENGTHS
    what = "a whole number" if name in SIZES else "a number"
    return None if is_sound else f"found {quote(value)}. Expected {what} of {least:,} to {most:,}"


@dataclass(frozen=True)
class Asked:
    """A term to score, and on how many of its items (None: all)."""

    term: Term
    limit: int | None = None

    @property
    def label(self) -> str:
        """What trials, tables and messages call the term."""
        return self.term.label


class Constraint(Term):
    """A term that must not get much worse than the base; merges that break it are rejected.

    A constraint with the name of a term is a bound on that term, and nothing is scored twice.
    """

    weight: Literal[0] = Field(default=0, examples=[0], json_schema_extra={"unit": "weight"})
    """A constraint does not count in the objective."""
    max_relative_to_base: float = Field(
        ge=0, le=1e6, examples=[0.02], json_schema_extra={"unit": "share of the base's score"}
    )
    """How much worse than the base the score may be, as a share of the base's score: 0.02 allows a
    loss 2 % higher or an accuracy 2 % lower.
    """


def _differing_field(constraint: Term, term: Term) -> str | None:
    """Return the field in which a constraint contradicts the term of its name, or None; what the
    constraint leaves out is taken from the term.
    """
    if constraint.task_name != term.task_name:
        return "task"
    if constraint.metric != term.metric:
        return "metric"
    changed = constraint.model_dump(exclude_defaults=True).keys()
    unlike = (name for name in SHARED if getattr(constraint, name) != getattr(term, name))
    return next((name for name in unlike if name in changed), None)


class Objective(FileModel):
    """What to score a merge on, and how the scores become one number; larger is better."""

    combine: Literal["relative_to_base", "weighted_mean", "worst"] = Field(
        default="relative_to_base", examples=["worst"]
    )
    """How the terms become one number. relative_to_base: the weighted mean of the gains over the
    base, where a gain is the difference of accuracies or the relative decrease of a loss.
    weighted_mean: the weighted mean of the scores themselves (losses negated), for terms of one
    metric. worst: the smallest gain of any term, so that no term is sacrificed for another.
    """
    terms: list[Term] = Field(
        min_length=1, examples=[[{"task": "gsm8k", "metric": "exact_match,flexible-extract"}]]
    )
    """Tasks, texts and functions to score."""
    constraints: list[Constraint] = Field(
        default=[], examples=[[{"text": "english.jsonl", "max_relative_to_base": 0.02}]]
    )
    """What must not get worse; merges that break a constraint are rejected."""
    include_path: LocalPath | None = Field(default=None, examples=["tasks"])
    """Folder with your own lm-eval tasks (YAML)."""
    limit: int | None = Field(
        default=None, gt=0, le=10**7, examples=[100], json_schema_extra={"unit": "items"}
    )
    """Number of items for each term and trial. Default: all items."""
    apply_chat_template: bool = Field(default=False, examples=[True])
    """Wrap the prompts of tasks in the tokenizer's chat template."""
    fewshot_as_multiturn: bool = Field(default=False, examples=[True])
    """Write few-shot examples as turns of a conversation instead of one long prompt. Needs
    apply_chat_template.
    """
    system_instruction: str | None = Field(default=None, examples=["Answer briefly."])
    """System message to put before every prompt."""
    split_by: SplitBy = Field(default="document", examples=["document"])
    """What `hash_range` hashes. document: the row that an item is made from, so that all tasks over
    the same rows agree which of them the test gets, even if they filter or reorder them. If the
    process_docs of a task does not tell which row an item is made from, a warning says so, and what
    it makes of the row is hashed. prompt: the prompt and its answer, as in studies from before this
    field, which keep it; a row that two tasks share may then be in both parts, with a warning.
    """

    @field_validator("constraints")
    @classmethod
    def _fill_metrics(cls, constraints: list[Constraint], info: ValidationInfo) -> list[Constraint]:
        """Give a constraint that names no metric that of the term of its name. Done here, while it
        is known what was named: a record names every field.
        """
        metrics = {term.label: term.metric for term in info.data.get("terms", ())}
        return [
            each
            if "metric" in each.model_fields_set or metrics.get(each.label) in (None, each.metric)
            else each.model_copy(update={"metric": metrics[each.label]})
            for each in constraints
        ]

    @model_serializer(mode="wrap")
    def _without_idle_split(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out `split_by` where no term has a hash_range: it says nothing there, and records
        stay what they were before there was such a field.
        """
        data: dict[str, Any] = serialize(self)
        if not self.splits_items:
            data.pop("split_by", None)
        return data

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

    def idle_fields(self) -> Iterator[Mistake]:
        if self.split_by != "document" and not self.splits_items:
            yield ("split_by",), "does nothing without a 'hash_range'; leave it out"
        if self.fewshot_as_multiturn and not self.apply_chat_template:
            message = "does nothing without apply_chat_template; leave it out, or set that to true"
            yield ("fewshot_as_multiturn",), message

    def _mistakes_of_names(self) -> Iterator[Mistake]:
        by_label = {term.label: term for term in self.terms}
        for group, terms in (("terms", self.terms), ("constraints", self.constraints)):
            labels = [term.label for term in terms]
            for index, term in enumerate(terms):
                where = (group, index)
                if term.label in labels[:index]:
                    yield (
                        where,
                        f"two {group} are called {term.label!r}; give each its own 'name'",
                    )
                known = by_label.get(term.label, term)
                if group == "constraints" and (differing := _differing_field(term, known)):
                    yield (
                        (*where, differing),
                        f"constraint {term.label!r} has the name of a term with another "
                        f"{differing}; leave it out, or give the constraint its own 'name'",
                    )

    @property
    def scored_terms(self) -> list[Term]:
        """All terms, and the constraints that are not one of them."""
        labels = {term.label for term in self.terms}
        return [*self.terms, *(term for term in self.constraints if term.label not in labels)]

    @property
    def splits_items(self) -> bool:
        """Whether a term scores only a part of its items, by `hash_range`."""
        return any(term.hash_range != (0.0, 1.0) for term in self.scored_terms)

    def terms_at(self, stage: Literal["search", "rescore"]) -> list[Term]:
        """Return the terms and constraints that are scored at a stage."""
        return [term for term in self.scored_terms if stage == "rescore" or not term.rescore_only]

    def asked_terms(self, stage: Literal["search", "rescore"]) -> list[Asked]:
        """Return what is scored at a stage: each term, with its limit."""
        return [Asked(term, self.limit_of(term)) for term in self.terms_at(stage)]

    def limit_of(self, term: Term) -> int | None:
        """Return how many items of a term the search scores (None: all)."""
        return term.limit if term.limit is not None else self.limit

    @property
    def prompting(self) -> dict[str, Any]:
        """How lm-eval turns items into prompts, under lm-eval's names."""
        return {
            "apply_chat_template": self.apply_chat_template,
            "fewshot_as_multiturn": self.fewshot_as_multiturn,
            "system_instruction": self.system_instruction,
        }


def split_of(objectives: Sequence[Objective]) -> SplitBy:
    """Return what hash ranges divide the items by; objective and test have the same."""
    return next((each.split_by for each in objectives if each.splits_items), "document")


@contextmanager
def naming_test(objectives: Sequence[Objective], objective: Objective) -> Iterator[None]:
    """Say in an EvaluationError about a term whether it is one of the sealed test: of all
    `objectives` but the first.
    """
    try:
        yield
    except EvaluationError as error:
        if objective is objectives[0] or not str(error).startswith("term "):
            raise
        raise EvaluationError(f"test {error}") from error


class ObjectiveFile(WrittenFile, Objective):
    """An objective in a file of its own, for `optimer evaluate` and `optimer search MERGE.yml`."""


# -- from scores to one number ---------------------------------------------------------------------


def gain(score: float, base: float, *, higher_is_better: bool) -> float:
    """Return by how much a score beats the base: a difference of accuracies, a share of a loss."""
    return score - base if higher_is_better else (base - score) / (abs(base) or 1.0)


def gains(scores: Scores, base: Scores) -> dict[str, float]:
    """Return the gain over the base of every term that both have."""
    return {
        label: gain(term.score, base[label].score, higher_is_better=term.higher_is_better)
        for label, term in scores.items()
        if label in base
    }


def combine(objective: Objective, scores: Scores, base: Scores) -> float:
    """Return the value of an objective over the terms that were scored; larger is better."""
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
    """Return how far a score is from breaking a constraint, as a share of the base's score (or in
    its unit, if that score is 0). Below 0, the constraint is broken.
    """
    better = score.score - base.score if score.higher_is_better else base.score - score.score
    return constraint.max_relative_to_base + better / (abs(base.score) or 1.0)


def is_feasible(objective: Objective, scores: Scores, base: Scores) -> bool:
    """Whether scores keep every constraint that was scored."""
    return all(
        headroom(constraint, scores[constraint.label], base[constraint.label]) >= 0
        for constraint in objective.constraints
        if constraint.label in scores
    )
