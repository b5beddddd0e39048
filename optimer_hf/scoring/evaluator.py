"""Model + objective -> the score of every term, by lm-eval in this process."""

import logging
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from optimer_hf.errors import EvaluationError
from optimer_hf.files.digest import digest
from optimer_hf.printable import warn_once
from optimer_hf.scoring.functions import (
    Scorer,
    collect_functions,
    digest_function,
    score_by_function,
)
from optimer_hf.scoring.generation import refuse_too_long
from optimer_hf.scoring.gradients import Derivatives, Differentiation, Sum, sum_of
from optimer_hf.scoring.harness import quiet_lm_eval
from optimer_hf.scoring.items import (
    drop_addresses,
    hash_item,
    indices_within,
    refuse_no_items,
    row_text,
    spread_indices,
)
from optimer_hf.scoring.objective import (
    N_PROMPTS,
    TASK_FIELDS,
    Asked,
    Objective,
    Term,
    naming_test,
    split_of,
)
from optimer_hf.scoring.scores import TermScore
from optimer_hf.scoring.tasks import aggregation_of, load_tasks

logger = logging.getLogger(__name__)


class Evaluator:
    """Scores a live model on the tasks of some objectives."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        objectives: Sequence[Objective],
        *,
        functions: Mapping[str, Scorer] | None = None,
    ) -> None:
        """Load the tasks. `functions` score the terms that name them: each takes (model, tokenizer,
        limit) and returns a number for each item.

        Raises EvaluationError for a task, metric, file or function that does not exist, and for a
        task that generates more than the model's window holds.
        """
        from optimer_hf.scoring.lm_eval_model import make_lm_eval_model  # takes seconds to import

        self._open(
            make_lm_eval_model(model, tokenizer), load_tasks(objectives), objectives, functions
        )

    @classmethod
    def of(
        cls,
        lm: Any,
        tasks: Mapping[str, Any],
        objectives: Sequence[Objective],
        *,
        functions: Mapping[str, Scorer] | None = None,
    ) -> Self:
        """Return an evaluator of a model of lm-eval, which answers the tasks of `load_tasks`."""
        evaluator = cls.__new__(cls)
        evaluator._open(lm, tasks, objectives, functions)
        return evaluator

    def _open(
        self,
        lm: Any,
        tasks: Mapping[str, Any],
        objectives: Sequence[Objective],
        functions: Mapping[str, Scorer] | None,
    ) -> None:
        self._lm, self.tasks = lm, tasks
        self._prompting, self._split_by = objectives[0].prompting, split_of(objectives)
        self._functions = collect_functions(objectives, functions)
        self._within: dict[tuple[str, tuple[float, float]], list[int]] = {}
        for objective in objectives:
            with naming_test(objectives, objective):
                for term in (each for each in objective.scored_terms if each.function is None):
                    self._check_task(term)

    def _check_task(self, term: Term) -> None:
        """Raise EvaluationError for a term without items, or that generates too much for the
        model.
        """
        refuse_no_items(term, self._indices_of(term))
        task = self.tasks[term.task_key]
        if task.OUTPUT_TYPE == "generate_until":
            refuse_too_long(term, task.config.generation_kwargs, self._lm.max_length)

    def _choose_items(self, asked: Asked) -> list[int]:
        """Return the indices of the items to score."""
        within = self._indices_of(asked.term)
        return [within[index] for index in spread_indices(len(within), asked.limit)]

    def _indices_of(self, term: Term) -> list[int]:
        """Return the indices of the items that are in the hash range of a term."""
        key = (term.task_name, term.hash_range)
        if key not in self._within:
            task = self.tasks[term.task_key]
            self._within[key] = indices_within(task, term.hash_range, self._split_by)
        return self._within[key]

    def digest_items(self, term: Term) -> str | None:
        """Return a digest of the items of a term: all rows, the prompts of a few, and how they are
        scored; of a term that a function of a file scores, of that file. A function that was given
        has none.
        """
        if term.function is not None:
            return digest_function(term)
        task, within = self.tasks[term.task_key], self._indices_of(term)
        docs, few = list(task.eval_docs), spread_indices(len(within), N_PROMPTS)
        prompts = [hash_item(task, docs[within[index]]) for index in few]
        settings = [repr(getattr(task.config, name, None)) for name in TASK_FIELDS]
        rows = [docs[index] for index in within]
        return digest([*map(drop_addresses, settings), *map(row_text, rows), *prompts])

    def count_items(self, term: Term) -> int:
        """Return how many items a term that lm-eval scores has."""
        return len(self._indices_of(term))

    def evaluate(self, asked: Sequence[Asked]) -> dict[str, TermScore]:
        """Score terms, each on `limit` items that are spread evenly over all of its items, and
        return the scores by label.

        Raises EvaluationError if a score is not a finite number.
        """
        before = self.n_tokens
        of_tasks = [each for each in asked if each.term.function is None]
        scores = self._task_scores(of_tasks)
        used = (self.n_tokens - before) // max(len(of_tasks), 1)
        for each in asked:
            if each.term.function is None:
                scores[each.label] = replace(scores[each.label], n_tokens=used)
            else:
                scores[each.label] = self._function_score(each)
        return {each.label: scores[each.label] for each in asked}

    def differentiate(
        self, asked: Sequence[Asked], derivatives: Derivatives
    ) -> tuple[dict[str, TermScore], dict[str, dict[str, float]]]:
        """Return scores, as `evaluate` does, and the derivatives of those that have some in the
        weights of the vectors, by label and name. Values and derivatives come from one pass.
        """
        of_tasks = [each for each in asked if each.term.function is None]
        sums: dict[str, Sum] = {}
        for each in of_tasks:
            task, items = self.tasks[each.term.task_key], self._choose_items(each)
            if (total := sum_of(each.term, task, items)) is not None:
                sums[each.label] = total
        unlike = list(dict.fromkeys(sums.values()))
        samples = self._samples_of(of_tasks)
        differentiation = Differentiation(derivatives, unlike, self.tasks, samples)
        self._lm.differentiation = differentiation
        try:
            with derivatives.active():
                scores = self.evaluate(asked)
        finally:
            self._lm.differentiation = None
        gradients = {}
        for label, total in sums.items():
            gradient = differentiation.gradient_of(total, scores[label])
            if gradient is None:
                warn_once(logger, f"term {label!r}: no gradients, as its task changes the sums")
            else:
                gradients[label] = gradient
        return scores, gradients

    def _samples_of(self, asked: Sequence[Asked]) -> dict[str, list[int]]:
        """Return the items of each task that some terms score. An item runs once, however many
        terms score it.
        """
        samples: dict[str, list[int]] = {}
        for each in asked:
            known = samples.get(each.term.task_key, [])
            samples[each.term.task_key] = sorted({*known, *self._choose_items(each)})
        return samples

    def _task_scores(self, asked: Sequence[Asked]) -> dict[str, TermScore]:
        from lm_eval.evaluator import evaluate

        chosen = {each.label: self._choose_items(each) for each in asked}
        terms = [each.term for each in asked]
        samples = self._samples_of(asked)
        if not samples:
            return {}
        tasks = {name: self.tasks[name] for name in sorted(samples)}
        with quiet_lm_eval():
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
        scores = {}
        for term in terms:
            task, own = self.tasks[term.task_key], {*chosen[term.label]}
            logged = [row for row in results["samples"][term.task_key] if row["doc_id"] in own]
            scores[term.label] = _require_finite(term, _term_score(term, task, logged))
        return scores

    def _function_score(self, asked: Asked) -> TermScore:
        function = self._functions[str(asked.term.function)]
        return score_by_function(
            asked.term, function, self._lm.model, self._lm.tokenizer, asked.limit
        )

    @property
    def forward_seconds(self) -> float:
        """Seconds spent inside the model so far."""
        return float(self._lm.forward_seconds)

    @property
    def backward_seconds(self) -> float:
        """Seconds spent in backward passes so far."""
        return float(self._lm.backward_seconds)

    @property
    def n_tokens(self) -> int:
        """Number of tokens that the model has read so far."""
        return int(self._lm.n_tokens)


def _require_finite(term: Term, score: TermScore) -> TermScore:
    """Return the score, or raise EvaluationError if it is not a finite number."""
    try:
        if math.isfinite(score.score):
            return score
    except (OverflowError, ZeroDivisionError):
        pass
    raise EvaluationError(f"term {term.label!r}: the score is not a finite number.")


def _term_score(term: Term, task: Any, logged: Sequence[Mapping[str, Any]]) -> TermScore:
    """Return the score of a term from what lm-eval logged for its items, under all filters."""
    name, _, wanted = term.metric.partition(",")
    rows = [row for row in logged if row["filter"] == (wanted or row["filter"])]
    if not wanted:
        rows = [row for row in rows if row["filter"] == rows[0]["filter"]]
    rows.sort(key=lambda row: row["doc_id"])
    aggregation = aggregation_of(term, task)
    items = [_item_parts(row[name], aggregation) for row in rows]
    for row, (top, _) in zip(rows, items, strict=True):
        if not math.isfinite(top):
            raise EvaluationError(
                f"term {term.label!r}: the score of item {row['doc_id']} is not a finite number."
            )
    higher, is_perplexity = task.higher_is_better()[name], aggregation.endswith("perplexity")
    documents = [_document_checksum(term, row["doc"]) for row in rows]
    return TermScore(items, bool(higher), 0, is_perplexity, documents=documents)


def _item_parts(value: Any, aggregation: str) -> tuple[float, float]:
    """Return numerator and denominator of an item from lm-eval's value for it."""
    if isinstance(value, tuple):  # (log-likelihood in nats, bytes or words)
        return -float(value[0]) / math.log(2), float(value[1])
    if aggregation == "perplexity":  # log-likelihood in nats
        return -float(value) / math.log(2), 1.0
    return float(value), 1.0


def _document_checksum(term: Term, row: Any) -> int:
    """Return a checksum of the row that an item is made from, or of the text of a document."""
    return zlib.crc32((row[term.text_field] if term.text is not None else row_text(row)).encode())
