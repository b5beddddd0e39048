"""space.py: anchors, and the unit box."""

import numpy as np
import pytest

from optimer_hf.study.space import anchors, from_unit, to_unit
from tests.support.landscapes import config_of


def test_a_search_starts_from_base_each_vector_alone_and_the_average():
    points = anchors(config_of())
    assert [origin for origin, _ in points] == [
        "base",
        "w alone",
        "x alone",
        "y alone",
        "z alone",
        "average",
    ]
    assert points[0][1] == dict.fromkeys("wxyz", 0.0)
    assert points[2][1] == {"w": 0.0, "x": 0.7, "y": 0.0, "z": 0.0}
    assert points[5][1] == dict.fromkeys("wxyz", 0.25)


def test_anchors_stay_inside_the_bounds():
    vectors = {
        "w": {"source": "a/w", "bounds": [0.0, 0.5]},
        "x": {"source": "a/x", "bounds": [0.1, 1.0]},
    }
    assert [weights for _, weights in anchors(config_of(vectors=vectors))] == [
        {"w": 0.0, "x": 0.0},  # the base itself: every gain is relative to it
        {"w": 0.5, "x": 0.1},
        {"w": 0.0, "x": 0.7},
        {"w": 0.5, "x": 0.5},
    ]


def test_a_single_vector_has_no_average():
    assert [origin for origin, _ in anchors(config_of(vectors={"w": {"source": "a/w"}}))] == [
        "base",
        "w alone",
    ]


def test_unit_points_and_weights_convert_both_ways():
    config = config_of(
        vectors={
            "w": {"source": "a/w", "bounds": [-0.5, 1.5]},
            "f": {"source": "a/f", "fixed": 0.3},
            "x": {"source": "a/x"},
        }
    )
    weights = from_unit(config, np.array([0.25, 1.0]))
    assert weights == {"w": 0.0, "x": 1.5, "f": 0.3}
    assert to_unit(config, [weights]) == pytest.approx(np.array([[0.25, 1.0]]))
