"""Two Dask workers against one, on the real model: the same number of trials of a finished study.

    optimer run recipes/gemma-3-270m-demo --short
    python benchmarks/workers.py [--study runs/gemma-3-270m-demo-short/study] [--trials 10]

Both arms run the study's config on a cluster of single-threaded processes, without re-scoring, from
an empty directory; seconds exclude loading the models, which a first trial does on every worker.
The best value is that of the incumbent, on the same items in both arms.
"""

import argparse
import json
import logging
import tempfile
from pathlib import Path
from time import perf_counter

from distributed import Client, LocalCluster

from optimer_hf.ask import anchors
from optimer_hf.search import search
from optimer_hf.study import StudyConfig, Trial
from optimer_hf.workers import Workers


def warm_up(config: StudyConfig, workers: Workers, n_workers: int) -> None:
    """Let every worker open its pool, and pay for first calls, with a trial each of the base."""
    terms = config.objective.at("search")
    base = anchors(config)[0][1]
    for number in range(n_workers):
        workers.submit(
            Trial(number, "base", "search", base, "ok", {}, {}),
            terms,
            {term.label: 1 for term in terms},
        )
    for _ in range(n_workers):
        workers.next_finished()


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
        ) as cluster,
        Client(cluster),
        tempfile.TemporaryDirectory() as folder,
    ):
        address = cluster.scheduler_address
        with Workers(config, scheduler=address) as workers:
            warm_up(config, workers, n_workers)
            started = perf_counter()
            study = search(config, Path(folder) / "study", runner=workers)
            seconds = perf_counter() - started
    per_minute = 60 * len(study.log.of("search")) / seconds
    return {"seconds": seconds, "per_minute": per_minute, "value": study.value(study.incumbent)}


def main() -> None:
    """Run both arms in turn and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--study", type=Path, default=Path("runs/gemma-3-270m-demo-short/study"))
    parser.add_argument("--trials", type=int, default=10)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    config = StudyConfig.read(options.study / "study.json")
    settings = config.search.model_copy(update={"n_trials": options.trials, "rescore_top": 0})
    config = config.model_copy(update={"search": settings, "test": None, "retarget": {}})
    found = {n_workers: run(config, n_workers) for n_workers in (1, 2)}
    print(f"{options.trials} trials, one thread a worker")
    for n_workers, arm in found.items():
        print(
            f"{n_workers} worker(s) {arm['seconds']:7.1f} s {arm['per_minute']:6.1f} trials/min, "
            f"best value {arm['value']:+.4f}"
        )
    ratio = found[2]["per_minute"] / found[1]["per_minute"]
    print(f"throughput {ratio:.2f}x (bar 1.6x)")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
