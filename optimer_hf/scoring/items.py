"""Which items of a task are scored, and whether two objectives share items."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from optimer_hf.errors import EvaluationError
from optimer_hf.files.digest import digest
from optimer_hf.scoring.objective import Objective, SplitBy


def spread_indices(n_items: int, limit: int | None) -> list[int]:
    """Return `limit` indices that are spread evenly over range(n_items), in order; all of them if
    the limit is None or larger.

    Corpora list their sources one after another, so an even spread is stratified by source.
    """
    if limit is None or limit >= n_items:
        return list(range(n_items))
    return [(2 * index + 1) * n_items // (2 * limit) for index in range(limit)]


def indices_within(task: Any, hash_range: tuple[float, float], split_by: SplitBy) -> list[int]:
    """Return the indices of a task's items whose hash, as a number in [0, 1), is in a range."""
    low, high = hash_range
    if (low, high) == (0.0, 1.0):
        return list(range(len(task.eval_docs)))
    hashes = hash_items(task) if split_by == "prompt" else _hash_documents(task)
    numbers = (int(each[:12], 16) / 16**12 for each in hashes)
    return [index for index, number in enumerate(numbers) if low <= number < high]


def _hash_documents(task: Any) -> list[str]:
    """Return a digest of the row of every item. Items that differ in nothing but their rows, say in
    an id, have the smallest of their digests, so no range separates them.
    """
    first: dict[str, str] = {}
    items = hash_items(task)
    for item, row in zip(items, _hash_rows(_rows_of(task)), strict=True):
        first[item] = min(row, first.get(item, row))
    return [first[item] for item in items]


def _rows_of(task: Any) -> Sequence[Any]:
    """Return the rows that a task makes its items from, as they are in the data set if there is one
    for each item; what a task makes of them (`process_docs`) differs from task to task.
    """
    items = list(task.eval_docs)
    split = task.config.test_split or task.config.validation_split
    rows = list(task.dataset[split]) if split in task.dataset else items
    return rows if len(rows) == len(items) else items


def _hash_rows(rows: Sequence[Any]) -> list[str]:
    """Return a digest of every row."""
    return [digest(row_text(row)) for row in rows]


def row_text(row: Any) -> str:
    """Return a row as text."""
    return drop_addresses(repr(row))


def drop_addresses(text: str) -> str:
    """Return a text without memory addresses, which the reprs of functions and images have."""
    return re.sub(r" at 0x[0-9a-f]+", "", text)


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
            by_prompt = part.split_by == "prompt"
            rows = _hash_rows(task.eval_docs if by_prompt else _rows_of(task))
            items = hash_items(task)
            within = indices_within(task, term.hash_range, part.split_by)
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
