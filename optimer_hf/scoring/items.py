"""Which items of a task are scored, and whether two objectives share items."""

from collections.abc import Mapping
from typing import Any

from optimer_hf.errors import EvaluationError
from optimer_hf.files.digest import digest
from optimer_hf.scoring.objective import Objective


def spread_indices(n_items: int, limit: int | None) -> list[int]:
    """Return `limit` indices that are spread evenly over range(n_items), in order; all of them if
    the limit is None or larger.

    Corpora list their sources one after another, so an even spread is stratified by source.
    """
    if limit is None or limit >= n_items:
        return list(range(n_items))
    return [(2 * index + 1) * n_items // (2 * limit) for index in range(limit)]


def indices_within(task: Any, hash_range: tuple[float, float]) -> list[int]:
    """Return the indices of a task's items whose hash, as a number in [0, 1), is in a range."""
    low, high = hash_range
    if (low, high) == (0.0, 1.0):
        return list(range(len(task.eval_docs)))
    numbers = (int(item[:12], 16) / 16**12 for item in hash_items(task))
    return [index for index, number in enumerate(numbers) if low <= number < high]


def _hash_rows(task: Any) -> list[str]:
    """Return a digest of every row from which a task makes its items."""
    return [digest(repr(doc)) for doc in task.eval_docs]


def hash_items(task: Any) -> list[str]:
    """Return a digest of prompt, target and choices of every item of a task."""
    return [hash_item(task, doc) for doc in task.eval_docs]


def hash_item(task: Any, doc: Any) -> str:
    """Return a digest of prompt, target and choices of one item."""
    has_choices = task.config.doc_to_choice is not None
    choices = [str(choice) for choice in task.doc_to_choice(doc)] if has_choices else []
    return digest([str(task.doc_to_text(doc)), str(task.doc_to_target(doc)), choices])


def check_disjoint(objective: Objective, test: Objective, tasks: Mapping[str, Any]) -> None:
    """Raise EvaluationError if the search may score an item of the sealed test."""
    seen: dict[str, str] = {}
    for part in (objective, test):
        for term in part.scored_terms:
            if term.function is not None:
                continue
            task = tasks[term.task_key]
            rows, items = _hash_rows(task), hash_items(task)
            within = indices_within(task, term.hash_range)
            hashes = [(rows[index], items[index]) for index in within]
            if part is objective:
                seen |= {each: term.label for pair in hashes for each in pair}
            elif shared := [pair for pair in hashes if seen.keys() & set(pair)]:
                first = next(seen[each] for each in shared[0] if each in seen)
                raise EvaluationError(
                    f"test term {term.label!r}: {len(shared)} of its {len(hashes)} items are items "
                    f"of the search, too (term {first!r}). Give the test other items: a file of "
                    "its own, or another hash_range."
                )
