"""Objectives -> lm-eval's tasks, with the settings of the terms, checked before any scoring."""

import contextlib
import logging
import math
import zlib
from collections.abc import Iterator, Sequence
from copy import copy
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from optimer_hf.corpus.config import CorpusConfig
from optimer_hf.corpus.documents import read_documents
from optimer_hf.corpus.texts import has_rows
from optimer_hf.errors import CorpusError, EvaluationError
from optimer_hf.files.text import did_you_mean
from optimer_hf.printable import warn_once
from optimer_hf.scoring.generation import generation_settings
from optimer_hf.scoring.harness import quiet_lm_eval
from optimer_hf.scoring.objective import Constraint, Objective, Term, naming_test
from optimer_hf.scoring.task_names import fault_of_task, folders_of_tasks, read_task_names

logger = logging.getLogger(__name__)


LIKELIHOOD_AGGREGATIONS = ("bits_per_byte", "weighted_perplexity", "perplexity")
AGGREGATIONS = ("mean", *LIKELIHOOD_AGGREGATIONS)
CHOICE_METRIC = "choice_log_probability"  # ours, for every multiple-choice task of lm-eval
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


def warn_of_reported_benchmarks(objective: Objective, test: Objective | None) -> None:
    """Log a warning for terms that count, whose benchmark is usually reported: the weights are
    fitted to it. If the sealed test has other items of the same task, that is in order.
    """
    sealed = {_benchmark_of(term) for term in test.scored_terms} if test is not None else set()
    counting = [
        term for term in objective.scored_terms if term.weight > 0 or isinstance(term, Constraint)
    ]
    for term in counting:
        name = _benchmark_of(term)
        if name is not None and name not in sealed:
            logger.warning(
                "objective term %r: %s is usually reported, and the weights are fitted to it; do "
                "not report its score as if it were unseen. `test:` can seal its other items "
                "(hash_range)",
                term.label,
                name,
            )


def _benchmark_of(term: Term) -> str | None:
    """Return the benchmark of a term that is usually reported, or None."""
    return next((name for name in REPORTED if (term.task or "").startswith(name)), None)


def warn_of_other_weights(objective: Objective, test: Objective) -> None:
    """Log a warning for a sealed test whose term weights differ from those of the objective: it
    measures something else than was searched for.
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
    """Return the lm-eval tasks of some objectives by the `task_key` of their terms. Each is also
    there under its plain name, with the settings of its first term. No model is needed.

    Raises EvaluationError for a task, metric or file that does not exist or cannot be used.
    """
    _refuse_two_folders(objectives)
    tasks: dict[str, Any] = {}
    for objective in objectives:
        with naming_test(objectives, objective):
            _add_tasks(tasks, objective)
    return tasks


def _add_tasks(tasks: dict[str, Any], objective: Objective) -> None:
    """Add the tasks of one objective to those that are loaded."""
    named = [term for term in objective.scored_terms if term.function is None]
    wanted = {term.task_key: term for term in named if term.task_key not in tasks}
    for term in wanted.values():
        if term.text is not None:
            _check_text(term, term.text)
    if wanted:
        tasks |= _load_tasks(list(wanted.values()), objective.include_path)
    for term in named:
        tasks.setdefault(term.task_name, tasks[term.task_key])
        _check_metric(term, tasks[term.task_key])
        _refuse_sealed_examples(term, tasks[term.task_key])


def _refuse_two_folders(objectives: Sequence[Objective]) -> None:
    """Raise EvaluationError for a task that two objectives look up in different folders. Records
    and tables would take the two for one, since they have one name.
    """
    folders: dict[str, Path] = {}
    for objective in objectives:
        for term in objective.scored_terms:
            if term.task is None or objective.include_path is None:
                continue
            folder = folders.setdefault(term.task, objective.include_path)
            if folder != objective.include_path:
                raise EvaluationError(
                    f"test term {term.label!r}: task {term.task!r} is looked up in two folders "
                    f"(include_path: {folder} and {objective.include_path}). Give objective and "
                    "test the same include_path."
                )


def _check_text(term: Term, path: Path) -> None:
    """Raise EvaluationError for a text file that cannot be scored, with line and field. lm-eval
    would say less, and only in the middle of a search.
    """
    if path.is_dir() or (path.is_file() and not has_rows(path)):
        what = "a folder" if path.is_dir() else f"a file that ends in {path.suffix!r}"
        raise EvaluationError(
            f"term {term.label!r}: {path}: found {what}, expected a JSONL file, or another with a "
            "document in each row (.json, .csv, .parquet)."
        )
    corpus = CorpusConfig(path=path, text_field=term.text_field)
    try:
        n_texts = sum(map(bool, read_documents(corpus)))
    except CorpusError as error:
        raise EvaluationError(f"term {term.label!r}: {error}") from None
    if not n_texts:
        raise EvaluationError(f"term {term.label!r}: {path}: holds no text to score.")


def _open_manager(terms: Sequence[Term], include_path: Path | None) -> Any:
    """Return lm-eval's index of the folders in which the tasks of some terms are defined. That of
    all its tasks would take seven seconds. Raises EvaluationError for tasks that do not exist.
    """
    from lm_eval.tasks import TaskManager

    named = [term for term in terms if term.task is not None]
    if named and include_path is not None and not include_path.is_dir():
        raise EvaluationError(f"include_path: {include_path}: no such directory of tasks.")
    own = read_task_names(include_path if named else None)
    for term in named:
        if fault := fault_of_task(str(term.task), own):
            raise EvaluationError(f"term {term.label!r}: {fault}")
    folders = folders_of_tasks([str(term.task) for term in named], own)
    return TaskManager(include_path=[*folders], include_defaults=False)


def _load_tasks(terms: Sequence[Term], include_path: Path | None) -> dict[str, Any]:
    manager = _open_manager(terms, include_path)
    loaded: dict[str, Any] = {}
    for term in terms:
        spec: Any = _text_task(term) if term.text is not None else term.task
        folder = include_path if include_path is not None and term.text is None else Path.cwd()
        try:
            with contextlib.chdir(folder), quiet_lm_eval():
                tasks = manager.load([spec])["tasks"]
        except Exception as error:  # lm-eval and `datasets` raise many types for a broken task
            raise EvaluationError(
                f"term {term.label!r}: task {term.task_name!r} cannot be loaded ({error})."
            ) from error
        loaded[term.task_key] = _with_settings(tasks[term.task_name], term)
    return loaded


def _with_settings(task: Any, term: Term) -> Any:
    """Return a task with the few-shot and generation settings of its term. It reads and builds the
    same items only once.
    """
    if getattr(task, "UNSAFE_CODE", False):  # only such tasks have the attribute
        raise EvaluationError(
            f"term {term.label!r}: {term.task_name!r} runs the code that a model writes, which a "
            "search does not. Score the likelihood of the reference solutions instead, as the "
            "tasks of recipes/gemma-3-270m-paper do."
        )
    if term.num_fewshot is not None:
        task.set_config(key="num_fewshot", value=term.num_fewshot)
        _refuse_too_many_examples(task, term)
    if task.OUTPUT_TYPE == "generate_until":
        settings = generation_settings(term, task.config.generation_kwargs or {})
        task.set_config(key="generation_kwargs", value=settings)
    elif term.generation:
        raise EvaluationError(
            f"term {term.label!r}: 'generation' is for tasks that generate; {term.task_name!r} is "
            f"of type {task.OUTPUT_TYPE!r}."
        )
    _draw_examples_by_item(task)
    _add_choice_metric(task)
    _keep_requests(task)
    _keep_items(task)
    return task


def _keep_requests(task: Any) -> None:
    """Make a task build the requests for the same items only once."""
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


def _keep_items(task: Any) -> None:
    """Make a task read the same items only once. lm-eval reads all rows of a data set anew to find
    a few of them.
    """
    walk, walked = task.doc_iterator, dict[str, list[tuple[int, Any]]]()

    def walk_once(**settings: Any) -> Iterator[tuple[int, Any]]:
        key = repr(settings["samples"])
        if key not in walked:
            walked[key] = list(walk(**settings))
        return ((number, copy(doc)) for number, doc in walked[key])

    task.doc_iterator = walk_once


def _refuse_sealed_examples(term: Term, task: Any) -> None:
    """Raise EvaluationError if few-shot examples may be items outside the hash range of a term."""
    has_examples = bool(task.config.num_fewshot)  # set by the term, or by the task itself
    if has_examples and term.hash_range != (0.0, 1.0) and not _has_other_examples(task):
        raise EvaluationError(
            f"term {term.label!r}: the examples of num_fewshot come from the items themselves, so "
            "hash_range would not keep sealed items out. Give the task a fewshot_split."
        )


def _refuse_too_many_examples(task: Any, term: Term) -> None:
    n_examples = len(task.sampler.fewshot_docs()) if term.num_fewshot else 0
    n_own = int(
        task.fewshot_cfg.split == task.config.test_split
    )  # an item is no example for itself
    if (term.num_fewshot or 0) > n_examples - n_own:
        raise EvaluationError(
            f"term {term.label!r}: num_fewshot: found {term.num_fewshot}, but {term.task_name!r} "
            f"has {n_examples} examples to draw from. Lower it."
        )


def _has_other_examples(task: Any) -> bool:
    """Whether few-shot examples come from another split than the items."""
    split = task.config.fewshot_split or task.config.training_split or task.config.validation_split
    return split is not None and split != (task.config.test_split or task.config.validation_split)


def _draw_examples_by_item(task: Any) -> None:
    """Draw the few-shot examples of every item with a seed of its own. lm-eval's draws depend on
    earlier ones, and so on limits, resumed searches and workers.
    """
    plain = task.fewshot_context

    def context(doc: Any, *arguments: Any, **settings: Any) -> Any:
        task.set_fewshot_seed(zlib.crc32(repr(doc).encode()))
        return plain(doc, *arguments, **settings)

    task.fewshot_context = context


def _add_choice_metric(task: Any) -> None:
    """Give a multiple-choice task CHOICE_METRIC: the logarithm of the share of the right answer in
    the probabilities of the choices, in nats. Unlike accuracy, it is a smooth function of a model.
    """
    from lm_eval.api.metrics import mean
    from lm_eval.api.task import ConfigurableTask

    if not isinstance(task, ConfigurableTask) or task.OUTPUT_TYPE != "multiple_choice":
        return
    process, aggregation = task.process_results, task.aggregation
    direction = task.higher_is_better

    def process_results(doc: Any, results: Any) -> dict[str, Any]:
        values = [value for value, _ in results][: len(task.doc_to_choice(doc))]
        right = [values[choice] for choice in right_choices(task, doc)]
        known: dict[str, Any] = process(doc, results)
        share = np.logaddexp.reduce(right or [-math.inf]) - np.logaddexp.reduce(values)
        return known | {CHOICE_METRIC: float(share)}

    task.process_results = process_results
    task.aggregation = lambda: {**aggregation(), CHOICE_METRIC: mean}
    task.higher_is_better = lambda: {**direction(), CHOICE_METRIC: True}


def right_choices(task: Any, doc: Any) -> list[int]:
    """Return the indices of the right choices of an item, as lm-eval finds them."""
    choices = task.doc_to_choice(doc)
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(gold, str):
        gold = choices.index(gold) if gold in choices else -1
    every = gold if isinstance(gold, list) else [gold]
    return [choice for choice in every if 0 <= choice < len(choices)]


def _text_task(term: Term) -> dict[str, Any]:
    """Return an lm-eval task that scores each document of a file on its own, after BOS."""
    corpus = CorpusConfig(path=term.text, text_field=term.text_field)

    def rows(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {"test": Dataset.from_dict({term.text_field: list(read_documents(corpus))})}

    return {
        "task": term.task_name,
        "dataset_path": "json",
        "custom_dataset": rows,  # `datasets` would read texts that look like dates as dates
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        # a template would turn the document "[1, 2]" into a list
        "doc_to_target": itemgetter(term.text_field),
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}],
        "metadata": {"version": 1},
    }


def _check_metric(term: Term, task: Any) -> None:
    """Raise EvaluationError if the task has no such metric, or if its score is not a ratio of sums
    over items.
    """
    known = dict(task.aggregation())
    name = term.metric_name
    if name not in known and "metric" not in term.model_fields_set:
        raise EvaluationError(
            f"term {term.label!r}: names no `metric`. Give one of task {term.task_name!r}: "
            f"{', '.join(sorted(known))}."
        )
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
    if not wanted and len(filters) > 1:
        choices = ", ".join(f"{name},{each}" for each in filters)
        warn_once(
            logger,
            f"term {term.label!r}: task {term.task_name!r} has {len(filters)} filters, and "
            f"{name!r} alone is scored with the first. Say which in `metric`: {choices}",
        )
    if aggregation_of(term, task) not in AGGREGATIONS:
        raise EvaluationError(
            f"term {term.label!r}: metric {name!r} is aggregated by "
            f"{aggregation_of(term, task)!r}; only means, bits_per_byte and perplexities can be "
            "compared item by item. Use one of the task's other metrics."
        )
    if task.higher_is_better().get(name) is None:
        raise EvaluationError(
            f"term {term.label!r}: metric {name!r} of task {term.task_name!r} has no direction. "
            "Set `higher_is_better` in the metric_list of the task."
        )


def aggregation_of(term: Term, task: Any) -> str:
    """Return lm-eval's name for the function that aggregates the items of a term to its score."""
    return str(task.aggregation()[term.metric_name].__name__)
