"""Paired items of two models and their base -> the difference of their values with a 95 % interval.

Each term has numerators and denominators by item, for both sides and for the base, and the number
of the document behind each item. Documents are the sampling unit: items that one document gives to
several terms are drawn together. The kind of the interval depends on the items, because no kind is
right for few items, for skewed ones and for right/wrong answers.

* Bootstrap-t (Efron & Tibshirani 1993, sec. 12.5): every draw is studentised by its own standard
  error, from the delta method. Its error in coverage falls as 1/n, that of percentiles as
  1/sqrt(n).
* Student's t with the same standard error and the degrees of freedom of Welch and Satterthwaite,
  if items differ in few ways (accuracies) or are fewer than FEWEST. A term whose items differ in
  few ways gets two imaginary items, one in favour of each side, as in Bonett & Price (2012) for
  paired proportions: ten equal answers do not prove that all answers are equal.
* None, if there are not two documents, or if all items differ alike, so that no scale is known.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


N_DRAWS = 2000
FEWEST = 10  # items in each term with a weight above 0; below that, no verdict is given
MOST = 1000  # documents that are drawn one by one; more are drawn in that many bundles
COARSE = 0.5  # share of distinct differences; up to it, items differ in few ways
SOUND = 0.99  # share of the draws that must have a standard error
NO_SPREAD = 1e-10  # relative standard error, below which it is rounding alone
Kind = Literal["bootstrap-t", "Student's t", "none"]
Answer = Literal[
    "better",
    "worse",
    "no significant difference",
    "too few items to tell",
    "equal on every item",
    "no interval, because all items differ alike",
]
Rule = Literal["relative_to_base", "weighted_mean", "worst"]


@dataclass(frozen=True)
class Interval:
    """A difference with its paired 95 % interval, the number of documents in the term that has the
    fewest (`n_fewest`, `fewest_in`), and whether both sides are the same on every item of every
    term (`is_equal`). If `kind` is "none", the ends are infinite.
    """

    difference: float
    low: float
    high: float
    kind: Kind = "none"
    n_fewest: int = 0
    fewest_in: str = ""
    is_equal: bool = False

    @property
    def has_few_items(self) -> bool:
        """Whether a term has too few items for a verdict."""
        return self.n_fewest < FEWEST

    @property
    def excludes_zero(self) -> bool:
        """Whether the sign of the difference is certain at 95 %; never with few items."""
        return not self.has_few_items and (self.low > 0 or self.high < 0)

    @property
    def answer(self) -> Answer:
        """What the items say about the difference."""
        if self.has_few_items:
            return "too few items to tell"
        if self.kind == "none" and self.is_equal:  # equal answers may differ on other items
            return "equal on every item"
        if self.kind == "none":
            return "no interval, because all items differ alike"
        if not self.excludes_zero:
            return "no significant difference"
        return "better" if self.low > 0 else "worse"

    @property
    def verdict(self) -> str:
        """The answer, with the reason if there is none."""
        if self.has_few_items:
            return f"{self.answer} ({self.n_fewest} in term {self.fewest_in!r})"
        return self.answer + " at 95 %" * (self.answer == "no significant difference")

    def to_json(self) -> dict[str, Any]:
        """Return the interval as JSON values; infinite ends are null."""
        low, high = (end if math.isfinite(end) else None for end in (self.low, self.high))
        return {
            "difference": self.difference,
            "low": low,
            "high": high,
            "kind": self.kind,
            "n_fewest": self.n_fewest,
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class PairedTerm:
    """A term with its weight, the documents [n] of its items, and the items [n, 2] (numerator,
    denominator) of the two sides and the base.
    """

    label: str
    weight: float
    higher_is_better: bool
    is_perplexity: bool
    documents: "NDArray[np.int64]"
    sides: "tuple[Array, Array, Array]"


def interval_of(terms: Sequence[PairedTerm], rule: Rule, *, seed: int = 0) -> Interval:
    """Return value(first side) - value(second side) with its 95 % interval.

    Equal seeds and documents give equal draws, whatever the sides are.
    """
    value = _value(terms, rule)
    columns = [np.hstack(term.sides) for term in terms]
    sums = np.concatenate([column.sum(axis=0) for column in columns])[None]
    difference, slopes = value(sums)
    counts = [len(np.unique(term.documents)) for term in terms]
    fewest = int(np.argmin(counts))
    n_fewest, fewest_in = counts[fewest], terms[fewest].label
    is_equal = all(np.array_equal(*term.sides[:2]) for term in terms)
    nothing = Interval(
        float(difference[0]), -math.inf, math.inf, "none", n_fewest, fewest_in, is_equal
    )
    groups, is_coarse = _groups(terms, columns, slopes[0])
    observed = sum(group.table.sum(axis=0) for group in groups)[None]
    middle, slopes = value(observed)
    variances = [group.variance(slopes[0]) for group in groups]
    error = math.sqrt(sum(variances))
    size = np.abs(slopes[0]) @ np.abs(observed[0])
    if n_fewest < 2 or not error > NO_SPREAD * size:
        return nothing
    kind: Kind = "bootstrap-t"
    quantiles: tuple[float, float] | None = None
    if not is_coarse and n_fewest >= FEWEST:
        quantiles = _bootstrap_quantiles(groups, value, float(middle[0]), seed)
    if quantiles is None:
        quantile = _student_quantile(variances, [len(group.table) for group in groups])
        quantiles, kind = (-quantile, quantile), "Student's t"
    low, high = quantiles
    ends = float(middle[0] - high * error), float(middle[0] - low * error)
    return Interval(float(difference[0]), *ends, kind, n_fewest, fewest_in, is_equal)


# -- the value and its slopes ----------------------------------------------------------------------


def _value(terms: Sequence[PairedTerm], rule: Rule) -> Callable[["Array"], tuple["Array", "Array"]]:
    """Return a function of sums [m, 6 n_terms] that returns value(first) - value(second) [m] and
    its derivatives by the sums, the slopes [m, 6 n_terms].
    """
    weights = np.array([term.weight for term in terms]) / sum(term.weight for term in terms)

    def value(sums: "Array") -> tuple["Array", "Array"]:
        with np.errstate(all="ignore"):  # a draw may lack a term's documents
            parts = [
                _term_values(term, sums[:, 6 * at : 6 * at + 6], rule)
                for at, term in enumerate(terms)
            ]
        total, slopes = np.zeros(len(sums)), np.zeros_like(sums)
        for side, sign in ((0, 1.0), (1, -1.0)):
            values = np.stack([part[side][0] for part in parts], axis=1)
            share = np.broadcast_to(weights, values.shape)
            if rule == "worst":
                share = np.eye(len(terms))[np.argmin(values, axis=1)]
            total += sign * (share * values).sum(axis=1)
            for at, part in enumerate(parts):
                slopes[:, 6 * at : 6 * at + 6] += sign * share[:, at : at + 1] * part[side][1]
        return total, slopes

    return value


def _term_values(term: PairedTerm, sums: "Array", rule: Rule) -> list[tuple["Array", "Array"]]:
    """Return the values [m] of a term and their slopes [m, 6], for the first and second side."""
    scores, slopes = [], []
    for side in range(3):
        top, bottom = sums[:, 2 * side], sums[:, 2 * side + 1]
        ratio = top / bottom
        score = 2**ratio if term.is_perplexity else ratio
        steepness = math.log(2) * score if term.is_perplexity else np.ones_like(ratio)
        scores.append(score)
        slopes.append((steepness / bottom, -steepness * ratio / bottom))
    base, values = scores[2], []
    size = np.where(base == 0, 1.0, np.abs(base))
    for side in range(2):
        if rule == "weighted_mean":
            sign = 1.0 if term.higher_is_better else -1.0
            value = sign * scores[side]
            by_score, by_base = np.full_like(base, sign), np.zeros_like(base)
        elif term.higher_is_better:
            value, by_score, by_base = scores[side] - base, np.ones_like(base), -np.ones_like(base)
        else:
            value, by_score = (base - scores[side]) / size, -1 / size
            by_base = np.where(base == 0, 1.0, np.sign(base) * scores[side] / size**2)
        columns = np.zeros((len(sums), 6))
        for at in range(2):
            columns[:, 2 * side + at] = by_score * slopes[side][at]
            columns[:, 4 + at] += by_base * slopes[2][at]
        values.append((value, columns))
    return values


# -- documents -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """Documents that are drawn from one pool, as their parts [n, 6 n_terms] of the sums."""

    table: "Array"

    def variance(self, slopes: "Array") -> float:
        """Return the variance of the value that these documents cause, by the delta method."""
        n = len(self.table)
        return float(((self.table @ slopes) ** 2).sum() * n / max(n - 1, 1))


def _groups(
    terms: Sequence[PairedTerm], columns: Sequence["Array"], slopes: "Array"
) -> tuple[list[_Group], bool]:
    """Return the documents in groups that share no term, and whether the items of any term differ
    in few ways. `columns` are [n, 6] by term, `slopes` [6 n_terms] are those of the value.
    """
    groups, is_coarse = [], False
    for members in _group_terms([term.documents for term in terms]):
        everything = np.concatenate([terms[at].documents for at in members])
        known, place = np.unique(everything, return_inverse=True)
        ends = np.cumsum([len(terms[at].documents) for at in members])[:-1]
        table, imaginary = np.zeros((len(known), 6 * len(terms))), []
        for at, places in zip(members, np.split(place, ends), strict=True):
            own = slice(6 * at, 6 * at + 6)
            for column in range(6):
                table[:, own][:, column] = np.bincount(
                    places, columns[at][:, column], minlength=len(known)
                )
            if _is_coarse(table[np.unique(places), own] @ slopes[own]):
                is_coarse = True
                for row in _imaginary_items(terms[at]):
                    imaginary.append(np.zeros(6 * len(terms)))
                    imaginary[-1][own] = row
        groups.append(_Group(_bundle(np.vstack([table, *imaginary]))))
    return groups, is_coarse


def _group_terms(documents: Sequence["NDArray[np.int64]"]) -> list[list[int]]:
    """Return the indices of terms in groups; terms of different groups share no document."""
    groups: list[list[int]] = []
    for at, own in enumerate(documents):
        touching = [
            group for group in groups if any(np.isin(own, documents[i]).any() for i in group)
        ]
        groups = [group for group in groups if group not in touching]
        groups.append(sorted([at, *(i for group in touching for i in group)]))
    return sorted(groups)


def _is_coarse(influences: "Array") -> bool:
    size = float(np.abs(influences).max(initial=0.0))
    n_distinct = len(np.unique(np.round(influences / (size or 1.0), 9)))
    return n_distinct <= COARSE * len(influences)


def _imaginary_items(term: PairedTerm) -> list["Array"]:
    """Return two average items [6] that differ as much as items can, each in favour of one side;
    none if no items differ.
    """
    first, second, base = term.sides
    tops, bottoms = np.concatenate([first, second]).T
    is_binary = bool(np.isin(tops, (0.0, 1.0)).all() and (bottoms == 1).all())
    apart = 1.0 if is_binary else float(np.abs(first[:, 0] - second[:, 0]).max())
    if not apart:
        return []
    means = [side.mean(axis=0) for side in term.sides]
    middle, rows = (means[0][0] + means[1][0]) / 2, []
    for half in (apart / 2, -apart / 2):
        tops_here = [middle + half, middle - half, means[2][0]]
        for side in range(2):
            if term.sides[side] is base:
                tops_here[2] = tops_here[side]
        rows.append(np.array([x for at in range(3) for x in (tops_here[at], means[at][1])]))
    return rows


def _bundle(table: "Array") -> "Array":
    """Return documents as they are; if there are more than MOST, in as many fixed bundles."""
    if len(table) <= MOST:
        return table
    bundle = np.random.default_rng(0).permutation(len(table)) % MOST
    return np.stack([np.bincount(bundle, column, minlength=MOST) for column in table.T], axis=1)


# -- quantiles -------------------------------------------------------------------------------------


def _student_quantile(variances: Sequence[float], sizes: Sequence[int]) -> float:
    """Return the 97.5 % quantile of Student's t for a sum of independent variances, each from
    `sizes` documents (Satterthwaite 1946).
    """
    from scipy.stats import t

    below = sum(v**2 / max(n - 1, 1) for v, n in zip(variances, sizes, strict=True))
    return float(t.ppf(0.975, sum(variances) ** 2 / below))


def _bootstrap_quantiles(
    groups: Sequence[_Group],
    value: Callable[["Array"], tuple["Array", "Array"]],
    middle: float,
    seed: int,
) -> tuple[float, float] | None:
    """Return the 2.5 % and 97.5 % quantiles of (draw - middle) / (standard error of the draw);
    None if too many draws have no standard error.
    """
    counts = [_counts(len(group.table), at, seed) for at, group in enumerate(groups)]
    sums = np.zeros((N_DRAWS, groups[0].table.shape[1]))
    for count, group in zip(counts, groups, strict=True):
        sums += count.astype(float) @ group.table
    values, slopes = value(sums)
    variance = np.zeros(N_DRAWS)
    for count, group in zip(counts, groups, strict=True):
        n = len(group.table)
        for block in np.array_split(np.arange(N_DRAWS), 8):
            influence = slopes[block] @ group.table.T
            variance[block] += (count[block] * influence**2).sum(axis=1) * n / (n - 1)
    with np.errstate(all="ignore"):
        draws = (values - middle) / np.sqrt(variance)
    draws = draws[np.isfinite(draws)]
    if len(draws) < SOUND * N_DRAWS:
        return None
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


@lru_cache(maxsize=16)
def _counts(n: int, group: int, seed: int) -> "NDArray[np.uint8]":
    """Return how often each of n documents is drawn, [N_DRAWS, n]."""
    rng = np.random.default_rng((seed, group, n))
    drawn = rng.integers(n, size=(N_DRAWS, n)) + n * np.arange(N_DRAWS)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=N_DRAWS * n).reshape(N_DRAWS, n)
    return np.minimum(counts, 255).astype(np.uint8)
