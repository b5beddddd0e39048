"""Weights <-> points of the unit box, and the weights that every search starts from."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from optimer_hf.study.config import StudyConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


WEIGHT_DIGITS = 4  # after the point, in the weights of a trial
ROUNDING = 0.5 * 10**-WEIGHT_DIGITS  # the most that it changes a weight


def to_unit(config: StudyConfig, weight_sets: Sequence[Mapping[str, float]]) -> "Array":
    """Return the free weights, scaled by their bounds to [0, 1], as points [n, d]."""
    free = config.free
    low, high = np.array(list(free.values())).T
    points = np.array([[weights[name] for name in free] for weights in weight_sets])
    points = points.reshape(-1, len(free))
    return np.asarray((points - low) / (high - low), dtype=np.float64)


def from_unit(config: StudyConfig, point: "Array") -> dict[str, float]:
    """Return all weights at a point [d] of the unit box, rounded to WEIGHT_DIGITS, which
    is all that YAML should show.
    """
    low, high = np.array(list(config.free.values())).T
    values = low + point * (high - low)
    return {
        name: round(float(value), WEIGHT_DIGITS)
        for name, value in zip(config.free, values, strict=True)
    } | config.fixed


def within_total(config: StudyConfig, points: "Array") -> "Array":
    """Return points [n, d] of the unit box, moved towards a corner until their weights sum to what
    `search.total` allows.
    """
    if config.search.total is None:
        return points
    low, high = np.array(list(config.free.values())).T
    total = (low + points * (high - low)).sum(axis=1, keepdims=True)
    least, most = config.search.total
    down = (most - low.sum()) / np.maximum(total - low.sum(), 1e-12)  # towards the low corner
    up = (least - total) / np.maximum(high.sum() - total, 1e-12)  # towards the high corner
    raised = points + np.clip(up, 0, 1) * (1 - points)
    return np.asarray(np.where(total > most, points * np.clip(down, 0, 1), raised))


def columns_of(config: StudyConfig, searched: StudyConfig) -> list[int]:
    """Return where the weights of a part of a study are among its free ones."""
    return [number for number, name in enumerate(config.free) if name in searched.free]


def embed(config: StudyConfig, searched: StudyConfig, points: "Array") -> "Array":
    """Return points [n, d] of all free weights for points of the searched ones; the others rest."""
    if len(searched.free) == len(config.free):
        return points
    resting = to_unit(config, [dict.fromkeys(config.free, 0.0) | searched.fixed])
    whole = np.repeat(resting, len(points), axis=0)
    whole[:, columns_of(config, searched)] = points
    return whole


ANCHOR_WEIGHT = 0.7


def anchors(
    config: StudyConfig, *, average_first: bool = False
) -> list[tuple[str, dict[str, float]]]:
    """Return origin and weights of the trials that every search starts with: the base, each vector
    alone at ANCHOR_WEIGHT, and the uniform average; or the average before the single vectors. The
    searched groups of a vector have one weight there, as far as bounds and total allow.
    """
    free, parts = list(config.free), config.free_parts
    alone = [
        (f"{name} alone", {other: ANCHOR_WEIGHT * (other in own) for other in free})
        for name, own in parts.items()
    ]
    average = [("average", dict.fromkeys(free, 1 / len(parts)))] if len(parts) > 1 else []
    first, second = (average, alone) if average_first else (alone, average)
    sets = [("base", dict.fromkeys(free, 0.0)), *first, *second]
    result = []
    for origin, weights in sets:
        if origin != "base":  # every gain is relative to it, whatever the bounds
            point = np.clip(to_unit(config, [weights]), 0, 1)
            weights = from_unit(config, within_total(config, point)[0])
        result.append((origin, weights | config.fixed))
    return result
