"""slopes.py: tangents in the slices, and which vector would help if there were more of it."""

import numpy as np
import pytest

from optimer_hf.report.page import write_report
from optimer_hf.report.slopes import say_what_would_help, slopes_of_trials
from optimer_hf.scoring.formatting import Unit
from optimer_hf.searching.loop import search
from optimer_hf.searching.runner import InProcess
from tests.support.landscapes import GradientPool, config_of


def searched(directory, pool=GradientPool, **changes):
    settings = {"n_trials": 14, "rescore_top": 2, "gradients": "always"}
    config = config_of(search=settings | changes.pop("search", {}), **changes)
    return search(config, directory, runner=InProcess(pool))


def bounded(**bounds):
    return {
        name: {"source": f"a/{name}", "bounds": bounds.get(name, [0.0, 1.5])} for name in "wxyz"
    }


def advice(study) -> str:
    return say_what_would_help(study, slopes_of_trials(study), Unit.of(study.config.objective))


def test_slopes_are_those_of_the_value_along_each_weight(tmp_path):
    study = searched(tmp_path / "s")
    slopes = slopes_of_trials(study)
    assert sorted(slopes) == list(range(14))
    pool, asked = GradientPool(study.config), study.config.objective.asked_terms("search")
    trial = study.trials[5]
    for name in "wxyz":
        low, high = (
            study.value(
                type(trial)(
                    **vars(trial)
                    | {
                        "terms": pool.score(
                            trial.weights | {name: trial.weights[name] + move}, asked
                        ).terms
                    }
                )
            )
            for move in (-1e-5, 1e-5)
        )
        assert slopes[5][name] == pytest.approx((high - low) / 2e-5, abs=1e-7)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"vectors": bounded(x=[0.0, 0.2])},
            "More of x would help beyond the bounds (for 0.1 more",
        ),
        ({"vectors": bounded(y=[0.6, 1.5])}, "Less of y would help beyond the bounds"),
        ({"search": {"total": [0.2, 0.5]}}, "would help, but search.total allows no larger sum"),
        ({"search": {"n_trials": 2, "rescore_top": 0}}, "The objective is not level in"),
        ({"search": {"gradients": "never"}}, ""),
    ],
)
def test_the_report_says_which_vector_would_help(tmp_path, changes, expected):
    study = searched(tmp_path / "s", **changes)
    assert expected in advice(study) and bool(advice(study)) == bool(expected)


def test_the_slices_show_a_tangent_for_every_trial_nearby(tmp_path):
    lines = {}
    for gradients in ("always", "never"):
        study = searched(tmp_path / gradients, search={"gradients": gradients})
        panels = {p.name: p for p in write_report(study, tmp_path / "r.html", vectors=False)}
        figure = panels["slices"].figure
        axis = figure.axes[0]
        lines[gradients] = [line for line in axis.lines if line.get_linewidth() == 1.2]
        assert ("with their measured slopes" in panels["slices"].shows) == (gradients == "always")
        if gradients == "always":
            slopes = slopes_of_trials(study)
            drawn = [
                np.diff(line.get_ydata())[0] / np.diff(line.get_xdata())[0]
                for line in lines[gradients]
                if np.diff(line.get_xdata())[0]
            ]
            expected = [100 * slope["w"] for slope in slopes.values()]
            assert 0 < len(drawn) <= len(expected)
            assert all(np.isclose(each, expected, rtol=1e-6).any() for each in drawn)
            assert "search: gradients: 14.0 s" in panels["ledger"].shows
    assert not lines["never"]
