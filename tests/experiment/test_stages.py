"""stages.py: what a search takes, from the cost of an item."""

import pytest

from optimer_hf.experiment.stages import GRADIENT_COST, Probe, make_stages, term_key
from optimer_hf.progress import Cost
from tests.support.landscapes import config_of


@pytest.mark.parametrize(
    ("search", "engine", "factor"),
    [
        ({"gradients": "never"}, "transformers", 1),
        ({"gradients": "always"}, "transformers", GRADIENT_COST),
        ({"gradients": "auto"}, "transformers", GRADIENT_COST),
        ({"gradients": "auto"}, "vllm", 1),
        ({"gradients": "auto", "surrogate": "random"}, "transformers", 1),
    ],
)
def test_trials_with_gradients_are_planned_at_their_cost_and_rescoring_is_not(
    search, engine, factor
):
    config = config_of(search={"n_trials": 10, "rescore_top": 3, **search}, engine=engine)
    keys = [term_key(term) for term in config.objective.terms]
    probe = Probe(dict.fromkeys(keys, Cost(1.0, 2.0)), dict.fromkeys(keys, 9), {}, {}, Cost(0.5))
    trials, again = make_stages(config, {}, probe, is_run=False)
    assert trials.cost.seconds == 10 * (factor * 12 + 0.5)
    assert trials.work == "10 trials of 12 items" + ", with gradients" * (factor > 1)
    assert again.cost.seconds == 4 * (27 + 0.5)
