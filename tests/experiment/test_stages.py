"""stages.py: what a search takes, from the cost of an item."""

import pytest

from optimer_hf.experiment.stages import (
    GRADIENT_COST,
    Probe,
    make_stages,
    term_key,
    training_key,
    warn_of_unknown_tokens,
)
from optimer_hf.progress import Cost
from optimer_hf.training.config import TrainConfig
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


@pytest.mark.parametrize(
    ("trainer", "max_tokens", "n_tokens"),
    [
        ({}, 320, 320),
        ({"num_train_epochs": 2.5}, 320, 800),
        ({"max_steps": 7, "num_train_epochs": 3}, 320, 7 * 32),
        ({"max_steps": 7, "per_device_train_batch_size": 2}, None, 7 * 2 * 32),
        ({"max_steps": 7, "per_device_train_batch_size": "auto"}, 320, 7 * 32),
        ({"max_steps": -1, "gradient_accumulation_steps": 4}, 320, 320),
    ],
)
def test_a_training_is_planned_with_all_tokens_that_it_reads(trainer, max_tokens, n_tokens):
    training = TrainConfig(
        name="aaa",
        base_model="org/base",
        corpus="a.jsonl",
        block_size=32,
        max_tokens=max_tokens,
        trainer=trainer,
    )
    config = config_of(search={"n_trials": 1, "rescore_top": 0})
    keys = [term_key(term) for term in config.objective.terms]
    costs = dict.fromkeys(keys, Cost())
    probe = Probe(costs, dict.fromkeys(keys, 9), {training_key(training): Cost(0.5)}, {})
    (stage,) = make_stages(config, {"aaa": training}, probe, is_run=False)
    assert (stage.work, stage.cost.seconds) == (f"{n_tokens:,} tokens", 0.5 * n_tokens)
    assert not list(warn_of_unknown_tokens({"aaa": training}))


def test_a_training_whose_length_is_not_known_is_named():
    training = TrainConfig(name="aaa", base_model="org/base", corpus="a.jsonl")
    (warning,) = warn_of_unknown_tokens({"aaa": training})
    assert warning == "train aaa: has no max_tokens, so its time is not in the plan"
