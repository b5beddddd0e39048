"""The score of a term, item by item."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from pydantic import ConfigDict

if TYPE_CHECKING:
    from numpy.typing import NDArray


# for what is read back from a log
STRICT_RECORD = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)


@dataclass(frozen=True)
class TermScore:
    """The score of one term, as [numerator, denominator] of every item.

    A perplexity is two to the power of the ratio of the sums; its numerators are in bits.
    `taken_over` marks scores of the search that re-scoring keeps. `documents` has a checksum of the
    row behind each item, which shows which items of several terms come from the same document; it
    may be empty.
    """

    __pydantic_config__ = STRICT_RECORD

    items: list[tuple[float, float]]
    higher_is_better: bool
    n_tokens: int = 0
    is_perplexity: bool = False
    taken_over: bool = False
    documents: list[int] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"TermScore({self.score:.4g}, {len(self.items)} items)"

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
