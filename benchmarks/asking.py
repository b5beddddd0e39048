"""CPU-seconds of asking for the next weights, by trials and vectors: `python benchmarks/asking.py`.

A record of a smooth landscape with two terms is told and asked of twice; the second ask counts, the
first one imports SMAC. One thread.
"""

import tempfile
from pathlib import Path
from time import process_time

import numpy as np

from optimer_hf.scoring.scores import TermScore
from optimer_hf.searching.smac import Asker
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.space import anchors, from_unit
from optimer_hf.study.trials import Trial

SIZES = (200, 500, 1000, 2000)
VECTORS = (4, 16)
N_ITEMS = 20


def record(n_trials: int, n_vectors: int) -> tuple[StudyConfig, list[Trial]]:
    """Return a study and trials of it: anchors, then blends drawn at random."""
    names = [f"v{index}" for index in range(n_vectors)]
    config = StudyConfig.model_validate(
        {
            "base_model": "a/b",
            "vectors": {name: {"source": f"a/{name}"} for name in names},
            "objective": {"terms": [{"task": task, "metric": "loss"} for task in "tu"]},
        }
    )
    rng, planned = np.random.default_rng(0), anchors(config)
    optima = {task: 0.3 * rng.random(n_vectors) for task in "tu"}
    trials = []
    for number in range(n_trials):
        blend = rng.dirichlet(np.ones(n_vectors)) * rng.uniform(0, 1.2)
        weights = planned[number][1] if number < len(planned) else from_unit(config, blend)
        point = np.array(list(weights.values()))
        scores = {}
        for task, optimum in optima.items():
            losses = 3 + ((point - optimum) ** 2).sum() + 0.01 * rng.normal(size=N_ITEMS)
            scores[task] = TermScore([(float(loss), 1.0) for loss in losses], False)
        trials.append(Trial(number, "planned", "search", weights, "ok", scores, {}))
    return config, trials


def seconds_to_ask(n_trials: int, n_vectors: int) -> float:
    """Return the CPU-seconds of an ask after `n_trials`."""
    config, trials = record(n_trials + 1, n_vectors)
    with tempfile.TemporaryDirectory() as scratch:
        asker = Asker(config, Path(scratch))
        for trial in trials[:-1]:
            asker.tell(trial)
        asker.ask(n_trials)
        started = process_time()
        asker.tell(trials[-1])
        asker.ask(n_trials + 1)
        return process_time() - started


if __name__ == "__main__":
    print("trials  vectors  CPU-seconds of an ask")
    for n_vectors in VECTORS:
        for n_trials in SIZES:
            print(f"{n_trials:6d}  {n_vectors:7d}  {seconds_to_ask(n_trials, n_vectors):.2f}")
