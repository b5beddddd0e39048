"""summary.py: a study in a few lines."""

from optimer_hf.comparison.summary import study_lines
from optimer_hf.searching.loop import search
from optimer_hf.searching.runner import InProcess
from tests.support.landscapes import FunctionPool, config_of


def test_a_weight_at_the_end_of_its_bounds_is_named(tmp_path):
    vectors = {name: {"source": f"a/{name}", "fixed": 0.1} for name in "xyz"}
    for high in (0.1, 1.5):  # the best weight of w is between them
        config = config_of(
            vectors={"w": {"source": "a/w", "bounds": [0.0, high]}} | vectors,
            search={"n_trials": 6, "rescore_top": 0},
        )
        study = search(config, tmp_path / f"{high}", runner=InProcess(FunctionPool))
        said = "at the end of its bounds, so wider ones may help: w"
        assert (said in [*study_lines(study)]) == (high == 0.1)
