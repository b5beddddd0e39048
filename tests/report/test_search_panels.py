"""search_panels.py: what a report says of the trials of a search."""

import pytest

from optimer_hf.report.drawing import use_style
from optimer_hf.report.evidence import Evidence, read_evidence
from optimer_hf.report.search_panels import progress_panel, slices_panel
from optimer_hf.scoring.objective import is_feasible
from optimer_hf.searching.loop import search
from optimer_hf.searching.runner import InProcess
from tests.support.landscapes import FunctionPool, config_of


@pytest.fixture(scope="module")
def evidence(tmp_path_factory) -> Evidence:
    """A search in which a constraint is broken, and no vector may be left out."""
    config = config_of(
        vectors={name: {"source": f"a/{name}", "bounds": [0.1, 1.0]} for name in "wxyz"},
        objective={
            "terms": [{"task": name, "metric": "loss"} for name in "tu"],
            "constraints": [{"task": "q", "metric": "loss", "max_relative_to_base": 0.02}],
        },
        search={"n_trials": 6, "rescore_top": 0},
    )
    directory = tmp_path_factory.mktemp("panels") / "s"
    return read_evidence(search(config, directory, runner=InProcess(FunctionPool)))


def test_progress_is_that_of_the_trials_that_keep_all_constraints(evidence):
    study = evidence.study
    kept = [t for t in evidence.trials if is_feasible(study.config.objective, t.terms, study.base)]
    best = max(kept, key=study.value)
    assert study.value(best) < max(map(study.value, evidence.trials)), "a better one breaks it"
    with use_style():
        panel = progress_panel(evidence)
    assert panel is not None
    assert "Trials that break a constraint do not count." in panel.conclusion
    assert f"The search score of trial {best.number} is" in panel.conclusion
    assert f"the best gain so far, {evidence.unit.show(evidence.gain(best))} at" in panel.shows


def test_nothing_is_said_of_leaving_out_what_may_not_be_left_out(evidence):
    with use_style():
        panel = slices_panel(evidence)
    assert panel is not None
    assert "leaving it out" not in panel.conclusion
