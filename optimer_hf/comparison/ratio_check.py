"""Compare what a search predicts for mixture ratios with what mixtures at those ratios scored.

A study comes in whose run has trained attempts at a mixture; pairs of numbers and their rank
correlation go out. The surrogate of the search predicts the merge whose weights are the shares of
a mixture (they sum to 1), from the recorded trials alone. Both numbers are gains on the items of
the search, and no sealed score is read. DeMix (arXiv 2602.00747) and MergeMix (arXiv 2601.17858)
report such correlations for mixtures at billions of tokens.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from optimer_hf.comparison.mixtures_file import recorded_shares
from optimer_hf.errors import StudyError
from optimer_hf.scoring.formatting import Unit
from optimer_hf.study.directory import Study, load_study
from optimer_hf.study.space import to_unit
from optimer_hf.study.surrogate import fit_surrogate

FEWEST_MIXTURES = 4  # an interval needs more than three
NORMAL_975 = 1.959964  # quantile of the normal distribution


@dataclass(frozen=True)
class RatioCheck:
    """The shares of some mixtures, the gain that the search predicts for the merge with those
    weights and the gain that each mixture has, both in `unit`, and Spearman's rank correlation of
    the two (None: all predictions or all mixtures are alike) with its 95 % interval (None: all
    ranks agree, or all disagree).
    """

    shares: list[dict[str, float]]
    predicted: list[float]
    measured: list[float]
    correlation: float | None
    interval: tuple[float, float] | None
    unit: Unit


def check_ratios(study: Study) -> RatioCheck | None:
    """Return the check for the largest number of attempts that the study has scored; None if fewer
    than FEWEST_MIXTURES have shares within the bounds of the search.
    """
    for n, shares in sorted(recorded_shares(study.directory).items(), reverse=True):
        scored = _find_scores(study, n)
        if n >= FEWEST_MIXTURES and scored is not None:
            return _check(study, shares, scored)
    return None


def _find_scores(study: Study, n: int) -> Study | None:
    """Return the study that scored n attempts; None if they are not all there."""
    scored = []
    for directory in study.directory.glob(f"searches/attempts-{n}-*"):
        with suppress(StudyError):  # not finished
            scored.append(load_study(directory))
    return scored[0] if len(scored) == 1 else None  # of two, one is of other models


def _check(study: Study, shares: Sequence[dict[str, float]], attempts: Study) -> RatioCheck | None:
    by_number = {trial.number: trial for trial in attempts.trials if trial.status == "ok"}
    nothing, parts = dict.fromkeys(study.config.free, 0.0), study.config.free_parts
    merges = {
        i: nothing | {part: share for name, share in own.items() for part in parts.get(name, [])}
        for i, own in enumerate(shares)
        if i + 1 in by_number
    }
    kept = [i for i, merge in merges.items() if _is_within(study.config.free, merge)]
    if len(kept) < FEWEST_MIXTURES:
        return None
    points = to_unit(study.config, [nothing, *(merges[i] for i in kept)])
    means, _ = fit_surrogate(study.config, study.trials).predict(points)
    predicted = (means[1:] - means[0]).tolist()
    value_of_base = attempts.value(attempts.trials[0])
    measured = [attempts.value(by_number[i + 1]) - value_of_base for i in kept]
    correlation = rank_correlation(predicted, measured)
    interval = correlation_interval(correlation, len(kept))
    unit = Unit.of(attempts.config.objective)
    return RatioCheck([shares[i] for i in kept], predicted, measured, correlation, interval, unit)


def _is_within(bounds: Mapping[str, tuple[float, float]], weights: Mapping[str, float]) -> bool:
    """Whether a search could try weights; its predictions of others would be extrapolated."""
    return all(low <= weights[name] <= high for name, (low, high) in bounds.items())


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation; ties share the mean of their ranks. None if all numbers
    of one side are equal.
    """
    from scipy.stats import spearmanr

    if len(set(first)) == 1 or len(set(second)) == 1:
        return None
    return float(spearmanr(first, second).statistic)


def correlation_interval(correlation: float | None, n: int) -> tuple[float, float] | None:
    """Return the 95 % interval of a rank correlation of n pairs, by Fisher's transformation with
    the standard error of Bonett & Wright (Psychometrika 2000); None if it is 1, -1 or not there.
    """
    if correlation is None or abs(correlation) > 1 - 1e-12:
        return None
    error = math.sqrt((1 + correlation**2 / 2) / (n - 3))
    ends = (math.atanh(correlation) + sign * NORMAL_975 * error for sign in (-1, 1))
    low, high = map(math.tanh, ends)
    return low, high
