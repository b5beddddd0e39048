"""Two Dask workers against one, on the real model: the same number of trials of a finished study.

    optimer run recipes/gemma-3-270m-demo --short
    python benchmarks/workers.py [--study runs/.../study] [--trials 10] [--seeds 3]

Both arms run the study's config on a cluster of single-threaded processes, without re-scoring, from
an empty directory; seconds exclude loading the models, which a first trial does on every worker.
The best value is that of the incumbent, on the same items in both arms. Arms alternate, seed by
seed; medians.
"""

import argparse
import json
import logging
import tempfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

from distributed import Client, LocalCluster

from optimer_hf.scoring.objective import Asked
from optimer_hf.searching.loop import search
from optimer_hf.searching.workers import Cluster, Workers
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.space import anchors
from optimer_hf.study.trials import Candidate


@dataclass(frozen=True)
class Warm:
    """Runs trials on a cluster that is open and warm."""

    cluster: Cluster

    def open(self, config: StudyConfig) -> AbstractContextManager[Cluster]:
        """Return the cluster, and leave it open."""
        return nullcontext(self.cluster)


def warm_up(config: StudyConfig, cluster: Cluster, n_workers: int) -> None:
    """Let every worker open its pool, and pay for first calls, with a trial each of the base."""
    asked = [Asked(term, 1) for term in config.objective.terms_at("search")]
    base = anchors(config)[0][1]
    for number in range(n_workers):
        cluster.submit(Candidate(number, "base", base), asked)
    for _ in range(n_workers):
        cluster.next_finished()


def run(config: StudyConfig, n_workers: int) -> dict[str, float]:
    """Run the study on n_workers single-threaded processes; return seconds, trials a minute and the
    best value.
    """
    with (
        LocalCluster(
            n_workers=n_workers,
            threads_per_worker=1,
            dashboard_address="127.0.0.1:0",
            memory_limit=0,
        ) as local,
        Client(local),
        tempfile.TemporaryDirectory() as folder,
    ):
        address = local.scheduler_address
        with Workers(scheduler=address).open(config) as cluster:
            warm_up(config, cluster, n_workers)
            started = perf_counter()
            study = search(config, Path(folder) / "study", runner=Warm(cluster))
            seconds = perf_counter() - started
    per_minute = 60 * len(study.trials) / seconds
    return {"seconds": seconds, "per_minute": per_minute, "value": study.value(study.best_trial)}


def main() -> None:
    """Run both arms in turn and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", type=Path, default=Path("runs/gemma-3-270m-demo-short/study"))
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    config = StudyConfig.read(options.study / "study.json")
    by_n_workers: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    print(f"{options.trials} trials, one thread a worker, {options.seeds} seeds")
    print("seed  trials/min, 1 and 2 workers  ratio  best value, 1 and 2 workers")
    for seed in range(options.seeds):
        settings = config.search.model_copy(
            update={"n_trials": options.trials, "rescore_top": 0, "seed": seed}
        )
        asked = config.model_copy(update={"search": settings, "test": None, "retarget": {}})
        for n_workers, arm in by_n_workers.items():
            arm.append(run(asked, n_workers))
        one, two = by_n_workers[1][-1], by_n_workers[2][-1]
        print(
            f"{seed:4}  {one['per_minute']:10.1f} {two['per_minute']:10.1f} "
            f"{two['per_minute'] / one['per_minute']:12.2f}x  "
            f"{one['value']:+10.4f} {two['value']:+10.4f}",
            flush=True,
        )
    pairs = list(zip(by_n_workers[1], by_n_workers[2], strict=True))
    ratio = median(two["per_minute"] / one["per_minute"] for one, two in pairs)
    difference = median(two["value"] - one["value"] for one, two in pairs)
    print(f"throughput {ratio:.2f}x (bar 1.6x), best value {difference:+.4f} (medians of pairs)")
    print(json.dumps(by_n_workers))


if __name__ == "__main__":
    main()
