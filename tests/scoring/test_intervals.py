"""intervals.py: coverage of the truth, joint draws of shared documents, few items and no spread."""

import math
import time
import tracemalloc

import numpy as np
import pytest

from optimer_hf.errors import EvaluationError
from optimer_hf.scoring import intervals
from optimer_hf.scoring.objective import Objective, combine
from optimer_hf.scoring.paired import paired_interval
from optimer_hf.scoring.scores import TermScore


def term_score(values, *, higher=False, bottoms=None, perplexity=False, documents=()):
    bottoms = np.ones(len(values)) if bottoms is None else bottoms
    items = [(float(top), float(bottom)) for top, bottom in zip(values, bottoms, strict=True)]
    return TermScore(items, higher, 0, perplexity, documents=list(documents))


def objective_of(*names: str, rule="relative_to_base", **fields) -> Objective:
    terms = [{"task": name, "metric": "m", "name": name} | fields for name in names]
    return Objective.model_validate({"terms": terms, "combine": rule})


# -- coverage --------------------------------------------------------------------------------------

WORLDS = {  # differences of items whose mean is known, and the share of intervals that may miss it
    "normal": (lambda rng, n: (rng.normal(1, 1, n), np.zeros(n)), 1.0, 0.09),
    "skewed": (lambda rng, n: (rng.exponential(1, n), np.zeros(n)), 1.0, 0.10),
    "skewed to the left": (lambda rng, n: (-rng.exponential(1, n), np.zeros(n)), -1.0, 0.10),
    "right or wrong": (lambda rng, n: (rng.random(n) < 0.6, rng.random(n) < 0.4), 0.2, 0.06),
    "rarely wrong": (lambda rng, n: (rng.random(n) < 0.97, rng.random(n) < 0.9), 0.07, 0.06),
}


@pytest.mark.parametrize("n", [10, 20, 50])
@pytest.mark.parametrize("world", WORLDS)
def test_the_interval_covers_the_truth_about_95_times_in_100(world, n):
    draw, truth, may_miss = WORLDS[world]
    rng, objective = np.random.default_rng(n), objective_of("t", rule="weighted_mean")
    n_missed, n_samples = 0, 300
    for _ in range(n_samples):
        first, second = ({"t": term_score(side, higher=True)} for side in draw(rng, n))
        interval = paired_interval(objective, first, second, second)
        n_missed += not interval.low <= truth <= interval.high
        assert interval.kind == ("Student's t" if "wrong" in world else "bootstrap-t")
    assert n_missed <= may_miss * n_samples


# -- against the jackknife -------------------------------------------------------------------------


def jackknife(objective, sides, documents) -> float:
    """Return the standard error of value(first) - value(second) by leaving out each document."""

    def without(score, place):
        kept = [item for item, other in zip(score.items, places, strict=True) if other != place]
        return TermScore(kept, score.higher_is_better, 0, score.is_perplexity)

    values = []
    for document in sorted({place for places in documents.values() for place in places}):
        left = []
        for side in sides:
            left.append({})
            for label, score in side.items():
                places = documents[label]
                left[-1][label] = without(score, document)
        values.append(combine(objective, left[0], left[2]) - combine(objective, left[1], left[2]))
    n = len(values)
    return math.sqrt((n - 1) / n * ((np.array(values) - np.mean(values)) ** 2).sum())


@pytest.mark.parametrize("overlap", [0, 40, 80])
@pytest.mark.parametrize("rule", ["relative_to_base", "weighted_mean", "worst"])
@pytest.mark.parametrize("kind", ["loss", "negative loss", "accuracy", "perplexity"])
def test_the_interval_is_as_wide_as_the_jackknife_over_documents_says(kind, rule, overlap):
    """Two terms of 80 items each; `overlap` of their documents are the same."""
    rng = np.random.default_rng(5)
    hard = rng.gamma(9, 0.2, 80 + 80 - overlap)  # of documents, and so of both terms
    documents = {"t": range(80), "u": range(80 - overlap, 160 - overlap)}
    bottoms, sign = rng.integers(1, 5, len(hard)).astype(float), -1 if "negative" in kind else 1
    sides = []
    for scale in (0.8, 0.9, 1.0):
        side = {}
        for label, places in documents.items():
            tops = scale * hard[places] + 0.1 * rng.normal(size=80) + (label == "u")
            side[label] = term_score(
                sign * tops * (1 if kind == "accuracy" else bottoms[places]),
                higher=kind == "accuracy",
                bottoms=None if kind == "accuracy" else bottoms[places],
                perplexity=kind == "perplexity",
                documents=places,
            )
        sides.append(side)
    objective = objective_of("t", "u", rule=rule)
    interval = paired_interval(objective, *sides)
    error = (interval.high - interval.low) / (2 * 1.97)
    assert error == pytest.approx(jackknife(objective, sides, documents), rel=0.2)
    expected = combine(objective, sides[0], sides[2]) - combine(objective, sides[1], sides[2])
    assert interval.difference == pytest.approx(expected)
    assert interval.low <= expected <= interval.high


@pytest.mark.parametrize("same", [True, False])
def test_terms_that_share_their_documents_tell_no_more_than_one_of_them(same):
    rng = np.random.default_rng(0)
    hard = rng.gamma(9, 0.5, 60)

    def side(scale):
        values = scale * hard + 0.3 * rng.normal(size=60)
        numbers = {"t": range(60), "u": range(60) if same else range(60, 120)}
        return {label: term_score(values, documents=places) for label, places in numbers.items()}

    sides = side(0.8), side(0.9), side(1.0)
    alone = paired_interval(objective_of("t"), *sides)
    both = paired_interval(objective_of("t", "u"), *sides)
    width = (both.high - both.low) / (alone.high - alone.low)
    assert width == pytest.approx(1 if same else math.sqrt(0.5), rel=0.05)


def test_items_whose_documents_are_not_recorded_are_joined_by_their_task():
    rng = np.random.default_rng(0)
    hard = rng.gamma(9, 0.5, 60)
    sides = [
        {label: term_score(scale * hard + 0.3 * rng.normal(size=60)) for label in "tu"}
        for scale in (0.8, 0.9, 1.0)
    ]
    widths = []
    for task in ("t", "other"):
        terms = [{"task": "t", "metric": "m"}, {"task": task, "metric": "m", "name": "u"}]
        sides = [{"t": side["t"], "u": side["t"]} for side in sides]
        interval = paired_interval(Objective.model_validate({"terms": terms}), *sides)
        widths.append(interval.high - interval.low)
    assert widths[1] == pytest.approx(math.sqrt(0.5) * widths[0], rel=0.05)


# -- few items, no spread --------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 9, 10])
def test_no_verdict_is_given_below_ten_items_in_any_term_that_counts(n):
    rng = np.random.default_rng(0)
    sides = [
        {
            "many": term_score(level + 0.01 * rng.normal(size=50)),
            "few": term_score(level + 0.01 * rng.normal(size=n)),
        }
        for level in (1.0, 2.0, 3.0)
    ]
    interval = paired_interval(objective_of("many", "few"), *sides)
    assert interval.excludes_zero == (n == 10) and interval.has_few_items == (n < 10)
    assert interval.verdict == (
        "better" if n == 10 else f"too few items to tell ({n} in term 'few')"
    )
    assert (interval.kind == "none") == (n == 1)
    only = Objective.model_validate(
        {"terms": [{"task": "many", "metric": "m"}, {"task": "few", "metric": "m", "weight": 0}]}
    )
    assert paired_interval(only, *sides).verdict == "better"


def test_copies_of_one_document_are_one_item():
    sides = [
        {"t": term_score(level * np.linspace(1, 2, 20), documents=[3] * 20)} for level in (1, 2, 3)
    ]
    assert paired_interval(objective_of("t"), *sides).verdict.startswith("too few items to tell (1")


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("n", [10, 50, 5000])
def test_equal_answers_are_no_proof_that_all_answers_are_equal(n, value):
    first, second = ({"t": term_score(np.full(n, value), higher=True)} for _ in range(2))
    interval = paired_interval(objective_of("t"), first, second, second)
    assert interval.difference == 0 and interval.low < -1 / n and interval.high > 1 / n
    assert interval.answer == "no significant difference"


@pytest.mark.parametrize("level", [0.0, 2.0])
def test_losses_that_are_equal_item_by_item_have_no_interval(level):
    tops, bottoms = level * np.linspace(1, 2, 30), np.full(30, 2)
    first, second = ({"t": term_score(tops, bottoms=bottoms)} for _ in range(2))
    interval = paired_interval(objective_of("t"), first, second, second)
    assert (interval.low, interval.high, interval.kind) == (-math.inf, math.inf, "none")
    assert interval.verdict == "equal on every item"


def test_a_worst_term_that_is_equal_is_no_equality_where_another_differs():
    tops, others = np.linspace(1, 2, 30), np.linspace(2, 3, 30)
    base = {"t": term_score(others + 1), "u": term_score(others)}
    first = {"t": term_score(others), "u": term_score(others)}
    second = first | {"t": term_score(tops)}
    interval = paired_interval(objective_of("t", "u", rule="worst"), first, second, base)
    assert interval.difference == 0
    assert interval.answer != "equal on every item"


def test_losses_in_the_same_proportion_on_every_item_have_no_interval():
    tops, bottoms = np.linspace(1, 2, 30), np.full(30, 2)
    first, second = ({"t": term_score(top, bottoms=bottoms)} for top in (1.25 * tops, tops))
    interval = paired_interval(objective_of("t"), first, second, second)
    assert interval.difference != 0
    assert interval.verdict == "no interval, because all items differ alike"
    assert interval.to_json()["low"] is None and interval.to_json()["high"] is None


def test_both_directions_of_a_comparison_say_the_same():
    rng = np.random.default_rng(0)
    a, b, base = ({"t": term_score(rng.gamma(9, 0.5, 40))} for _ in range(3))
    there, back = (paired_interval(objective_of("t"), *pair, base) for pair in ((a, b), (b, a)))
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))
    assert there == paired_interval(objective_of("t"), a, b, base)


def test_sides_that_were_scored_on_other_items_are_not_compared():
    a, b = {"t": term_score([1.0] * 12)}, {"t": term_score([1.0] * 11)}
    with pytest.raises(EvaluationError, match=r"term 't': .* scored on 11 and 12 items"):
        paired_interval(objective_of("t"), a, b, b)
    a, b = ({"t": term_score([1.0] * 12, documents=range(at, at + 12))} for at in (0, 1))
    with pytest.raises(EvaluationError, match=r"term 't': .* scored on different documents"):
        paired_interval(objective_of("t"), a, b, b)


# -- load ------------------------------------------------------------------------------------------


def test_an_interval_of_100_000_items_takes_little_time_and_memory():
    rng, n = np.random.default_rng(0), 100_000
    hard = rng.gamma(9, 0.5, n)
    sides = [
        {"t": term_score(scale * hard + rng.normal(size=n), documents=range(n))}
        for scale in (0.9, 0.95, 1.0)
    ]
    for score in (side["t"] for side in sides):
        score.table  # noqa: B018
    intervals._counts.cache_clear()
    began = time.process_time()
    interval = paired_interval(objective_of("t"), *sides)
    assert time.process_time() - began < 1
    assert intervals._counts.cache_info().misses == 1
    gain = 0.05 * hard.sum() / hard.sum()
    spread = math.sqrt(2) / hard.mean() / math.sqrt(n)  # of the noise of two sides
    assert (interval.high - interval.low) / (2 * 1.96) == pytest.approx(spread, rel=0.1)
    assert interval.difference == pytest.approx(gain, abs=4 * spread)
    tracemalloc.start()
    again = paired_interval(objective_of("t"), *sides)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert again == interval and peak < 200e6
    assert intervals._counts.cache_info().misses == 1, "draws are made once"
