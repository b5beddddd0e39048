"""Which items of a task are scored, and whether two objectives share items."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from typing import Any

from optimer_hf.errors import EvaluationError
from optimer_hf.files.digest import digest
from optimer_hf.printable import warn_once
from optimer_hf.scoring.objective import Objective, SplitBy, Term

logger = logging.getLogger(__name__)

ROW_NUMBER = "optimer row number"  # a column that follows the rows through process_docs
N_TRIED_ALONE = 16  # rows


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


def refuse_no_items(term: Term, within: Sequence[int]) -> None:
    """Raise EvaluationError if a term has no item, given the indices of those in its range."""
    if not within:
        raise EvaluationError(
            f"term {term.label!r}: no item of {term.task_name!r} is in hash_range "
            f"{list(term.hash_range)}."
        )


def _hash_documents(task: Any) -> list[str]:
    """Return a digest of the row of every item. Items that differ in nothing but their rows, say in
    an id, have the smallest of their digests, so no range separates them.
    """
    rows = _rows_of(task)
    if rows is None:
        warn_once(
            logger,
            f"task {task.config.task!r}: its process_docs does not tell which row an item is made "
            "from, so hash_range divides its items by what process_docs makes of the rows. Other "
            "tasks over the same rows may divide them otherwise",
        )
        rows = list(task.eval_docs)
    first: dict[str, str] = {}
    items = hash_items(task)
    for item, row in zip(items, _hash_rows(rows), strict=True):
        first[item] = min(row, first.get(item, row))
    return [first[item] for item in items]


def _rows_of(task: Any) -> list[Any] | None:
    """Return the row of the data set that each item is made from; what tasks make of one
    (`process_docs`) differs. None if a task that changes its rows does not tell.
    """
    items = list(task.eval_docs)
    split = task.config.test_split or task.config.validation_split
    raw = (task.dataset or {}).get(split)
    if raw is None or _texts(raw) == _texts(items):
        return items
    numbers = _row_numbers(task, split, raw, items) if hasattr(raw, "add_column") else None
    if numbers is None:
        return None
    rows = list(raw)
    return [rows[number] for number in numbers]


def _row_numbers(task: Any, split: str, raw: Any, items: Sequence[Any]) -> list[int] | None:
    """Return which row each item is made from: a column tells, where the task keeps columns.
    Otherwise it has to make one item of each row, in order, and so of a few rows given alone.
    """
    made = _items_from(task, split, raw.add_column(ROW_NUMBER, list(range(len(raw)))))
    numbers: list[Any] = [doc.get(ROW_NUMBER) for doc in made if isinstance(doc, Mapping)]
    if len(numbers) == len(items) and all(isinstance(number, int) for number in numbers):
        return numbers
    is_one_each = len(items) == len(raw) and all(
        _texts(_items_from(task, split, raw.select([number]))) == _texts([items[number]])
        for number in spread_indices(len(raw), N_TRIED_ALONE)
    )
    return list(range(len(raw))) if is_one_each else None


def _items_from(task: Any, split: str, rows: Any) -> list[Any]:
    """Return the items that a task makes of other rows; none if its code does not bear them."""
    from optimer_hf.scoring.harness import quiet_lm_eval

    other = copy(task)
    other.dataset = {**task.dataset, split: rows}
    try:
        with quiet_lm_eval():
            return list(other.eval_docs)
    except Exception:  # whatever the code of a task raises
        return []


def _texts(rows: Iterable[Any]) -> list[str]:
    return [row_text(row) for row in rows]


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
    """Raise EvaluationError if the search may score an item of the sealed test.

    Where both are split by prompts, as before there was `split_by`, prompts that share only their
    row were never kept apart: such a study goes on as it was begun, with a warning.
    """
    is_by_prompt = all(
        each.splits_items and each.split_by == "prompt" for each in (objective, test)
    )
    seen: dict[str, str] = {}
    for part in (objective, test):
        for term in part.scored_terms:
            if term.function is not None:
                continue
            task = tasks[term.task_key]
            within = indices_within(task, term.hash_range, part.split_by)
            every = list(zip(*_hashes_in_every_form(task), strict=True))
            hashes = [every[index] for index in within]
            if part is objective:
                seen |= {each: term.label for forms in hashes for each in forms}
            elif shared := [forms for forms in hashes if seen.keys() & set(forms)]:
                first = next(seen[each] for each in shared[0] if each in seen)
                found = (
                    f"test term {term.label!r}: {len(shared)} of its {len(hashes)} items are items "
                    f"of the search, too (term {first!r})"
                )
                if is_by_prompt and not any(forms[0] in seen for forms in shared):
                    logger.warning("%s, with other prompts: `split_by: prompt` allows that", found)
                    continue
                raise EvaluationError(
                    f"{found}. Give the test other items: a file of its own, or another hash_range."
                )


def _hashes_in_every_form(task: Any) -> list[list[str]]:
    """Return the digests of all items of a task as prompts, as what process_docs makes of their
    rows, and as those rows themselves: two tasks may share an item in one form only.
    """
    docs = list(task.eval_docs)
    return [hash_items(task), _hash_rows(docs), _hash_rows(_rows_of(task) or docs)]
