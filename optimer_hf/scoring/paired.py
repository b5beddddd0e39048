"""Two models scored on the same items -> the difference of their values with an interval."""

import math
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from optimer_hf.errors import EvaluationError
from optimer_hf.scoring.intervals import Interval, PairedTerm, interval_of
from optimer_hf.scoring.objective import Objective, Term
from optimer_hf.scoring.scores import Scores, TermScore

if TYPE_CHECKING:
    from numpy.typing import NDArray


def paired_interval(
    objective: Objective, scores: Scores, other: Scores, base: Scores, *, seed: int = 0
) -> Interval:
    """Return value(scores) - value(other) of an objective, with a 95 % interval over the items.

    Terms that share documents are resampled together; see `intervals`. Raises EvaluationError if
    the two models were not scored on the same items.
    """
    terms = [term for term in objective.terms if term.weight > 0 and term.label in scores]
    if all(scores[term.label] is other[term.label] for term in terms):
        fewest = min(terms, key=lambda term: len(scores[term.label].items))
        n_fewest = len(scores[fewest.label].items)
        return Interval(0.0, -math.inf, math.inf, "none", n_fewest, fewest.label, is_equal=True)
    paired = []
    for term in terms:
        sides = scores[term.label], other[term.label], base[term.label]
        _check_paired(term, sides)
        own = PairedTerm(
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
    """Raise EvaluationError if scores of a term are not from the same items."""
    counts = sorted({len(side.items) for side in sides})
    known = [side.documents for side in sides if side.documents]
    if len(counts) > 1:
        difference = f"{counts[0]} and {counts[-1]} items"
    elif any(documents != known[0] for documents in known):
        difference = "different documents"
    else:
        return
    raise EvaluationError(
        f"term {term.label!r}: two models were scored on {difference}, so they cannot be compared "
        "item by item. Score them again on the same items."
    )


def _documents_of(term: Term, score: TermScore) -> "NDArray[np.int64]":
    """Return a number for the document behind each item, [n]. If they were not recorded, terms of
    the same task and length are taken to have the same documents.
    """
    if score.documents:
        return np.array(score.documents, dtype=np.int64)
    n = len(score.items)
    source = zlib.crc32(repr((term.task_name, term.hash_range, n)).encode())
    return np.arange(n, dtype=np.int64) + ((source + 1) << 31)
