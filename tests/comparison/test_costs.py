"""costs.py: where the time went, and what data mixtures would have cost."""

import pytest

from optimer_hf.comparison.costs import (
    ledger_of_study,
    mixture_cost,
    training_cost,
    trial_cost,
)
from optimer_hf.comparison.ledger import TrialCost
from optimer_hf.searching.loop import search
from optimer_hf.searching.runner import InProcess
from optimer_hf.study.trials import Trial
from optimer_hf.vectors.record import BaseRecord, VectorFile
from optimer_hf.vectors.training_record import RunRecord, Speed
from tests.support.landscapes import FunctionPool, config_of


def test_trials_are_summed_by_phase():
    seconds = {"ask": 0.5, "merge": 0.25, "evaluate": 4.0, "forward": 3.5}
    trial = Trial(0, "x", "search", {}, "ok", {}, seconds, n_tokens=10)
    cost = trial_cost([trial, trial])
    assert cost.n == 2 and cost.tokens == 20
    assert cost.seconds == 9.5
    assert (cost.ask, cost.merge, cost.forward, cost.harness) == (1, 0.5, 7, 1)
    assert cost.overhead_share == pytest.approx(1 - 7 / 9.5, abs=1e-4)


def test_backward_passes_are_a_phase_of_their_own_and_only_where_there_are_some():
    seconds = {"ask": 0.5, "merge": 0.25, "evaluate": 9.0, "forward": 3.5, "backward": 5.0}
    with_gradients = Trial(0, "x", "search", {}, "ok", {}, seconds)
    without = Trial(1, "x", "search", {}, "ok", {}, seconds | {"backward": 0.0, "evaluate": 4.0})
    cost = trial_cost([with_gradients, without])
    assert (cost.forward, cost.backward, cost.harness, cost.seconds) == (7, 5, 1, 14.5)
    assert cost.overhead_share == pytest.approx(1 - 12 / 14.5, abs=1e-4)
    assert "backward" in cost.model_dump() and "backward" not in trial_cost([without]).model_dump()


def test_items_are_counted_over_terms_and_trials(tmp_path):
    study = search(config_of(), tmp_path / "s", runner=InProcess(FunctionPool))
    ledger = ledger_of_study(study)
    assert ledger.search.items == 12 * 3 * 4  # trials, terms, items
    assert ledger.rescore.n == 3
    assert ledger.data_mixture is None  # nobody knows what training these vectors took


def test_a_mixture_attempt_trains_on_all_tokens_and_is_evaluated_once():
    cost = mixture_cost(1000.0, 60.0, TrialCost(n=20, seconds=50.0))
    assert cost.model_dump() == {
        "attempts": 20,
        "seconds": 20 * 1000 + 50,
        "ratio_search_only": round(20050 / 60, 1),
        "ratio_end_to_end": round(20050 / 1060, 1),
    }


def test_vectors_that_say_what_they_took_are_compared_with_mixtures(tmp_path):
    for name in "wxyz":
        (tmp_path / name).mkdir()
        record = VectorFile(
            name=name,
            kind="adapter",
            base=BaseRecord(reference="a/b", files={}),
            norm=1.0,
            relative_norm=0.1,
            training={"seconds": 100.0, "n_tokens": 1000},
        )
        record.write(tmp_path / name / "vector.json")
    vectors = {name: {"source": str(tmp_path / name)} for name in "wxyz"}
    study = search(config_of(vectors=vectors), tmp_path / "s", runner=InProcess(FunctionPool))
    mixtures = ledger_of_study(study).data_mixture
    assert mixtures.attempts == 12
    assert mixtures.seconds >= 12 * 400
    assert mixtures.ratio_end_to_end < mixtures.ratio_search_only
    vectors["z"] |= {"mixture": {"w": 1.0}}  # its training is no attempt, but part of the pool's
    mixed = search(config_of(vectors=vectors), tmp_path / "m", runner=InProcess(FunctionPool))
    cost = ledger_of_study(mixed).data_mixture
    assert 12 * 300 <= cost.seconds < 12 * 400
    assert cost.ratio_end_to_end == pytest.approx(cost.seconds / 400, rel=0.05)


@pytest.mark.parametrize(
    ("shares", "mean"), [([0.2, 0.4], 0.35), ([0.2, None], None), ([None, None], None)]
)
def test_the_mfu_of_several_runs_is_their_mean_over_time(shares, mean):
    runs = [
        RunRecord(
            block_size=32,
            max_tokens=None,
            lora=None,
            trainer={},
            seed=0,
            mixed_precision="bf16",
            n_steps=1,
            n_tokens=32,
            losses=[],
            seconds=seconds,
            speed=Speed(mfu=share),
        )
        for seconds, share in zip((10.0, 30.0), shares, strict=True)
    ]
    assert training_cost(runs).mfu == mean
    assert training_cost([run.model_copy(update={"speed": None}) for run in runs]).mfu is None
