"""Time and memory of long studies, and what is lost to the limits that keep them short.

    OMP_NUM_THREADS=1 python benchmarks/load.py [--only asking report interval coverage quality]

Scores are functions of the weights, so no model is needed. Prints a Markdown table for each part:
seconds of asking for the next weights, of a report and of an interval, each measured in a process
of its own; how often 95 % intervals cover a known truth; and what the searches of two surrogates
miss: one fitted to the informative trials alone, as `optimer search` does beyond 100 trials, and
one fitted to all of them.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
from search import (
    Landscape,
    config_of,
    landscape_of,
    one_thread,
    optimer_trials,
    ranked,
    uniform_regrets,
)

from optimer_hf.report.page import write_report
from optimer_hf.scoring.objective import Objective
from optimer_hf.scoring.paired import paired_interval
from optimer_hf.scoring.scores import TermScore
from optimer_hf.searching.next_weights import Asker
from optimer_hf.study import gp as surrogate
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.directory import load_study, open_study
from optimer_hf.study.space import anchors, from_unit
from optimer_hf.study.trials import Candidate, Trial

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

TRIALS, VECTORS = (200, 500, 1000, 2000), (4, 16)
REPORT_TRIALS, REPORT_VECTORS, REPORT_TERMS, REPORT_ITEMS = 1000, 4, 3, 40
INTERVAL_ITEMS = 100_000
SAMPLES = 2000
QUALITY_TRIALS, QUALITY_SEEDS = 200, 3
QUALITY_KINDS, QUALITY_VECTORS = ("smooth", "rugged"), (4, 8, 16)
RIPPLE, WAVES = 0.15, 12.0  # of rugged landscapes: share of the range of a term, radians a unit


@dataclass(frozen=True)
class Options:
    """How much is run."""

    seeds: int
    processes: int


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table, each as soon as its row is there."""
    yield f"\n| {' | '.join(columns)} |"
    yield f"|{' --- |' * len(columns)}"
    for row in rows:
        yield f"| {' | '.join(row)} |"


def measured_alone(function: Callable[..., float], *arguments: int) -> tuple[float, float]:
    """Return the seconds that a function returns and the peak memory in MB of a process of its own,
    with all that it imports.
    """
    with multiprocessing.get_context("spawn").Pool(1, initializer=one_thread) as pool:
        seconds = pool.apply(function, arguments)
        return seconds, pool.apply(peak_megabytes)


def peak_megabytes() -> float:
    """Return the most memory that this process has held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


# -- a record --------------------------------------------------------------------------------------


def record(
    n_trials: int, n_vectors: int, n_terms: int = 2, n_items: int = 20, *, gradients: bool = False
) -> tuple[StudyConfig, list[Trial]]:
    """Return a study of a smooth landscape and trials of it: anchors, then random blends."""
    names = [f"v{index}" for index in range(n_vectors)]
    tasks = [f"t{index}" for index in range(n_terms)]
    config = StudyConfig.model_validate(
        {
            "base_model": "a/b",
            "vectors": {name: {"source": f"a/{name}"} for name in names},
            "objective": {"terms": [{"task": task, "metric": "loss"} for task in tasks]},
            "search": {"n_trials": n_trials + 1},  # one is still to come
        }
    )
    rng, planned = np.random.default_rng(0), anchors(config)
    optima = {task: 0.3 * rng.random(n_vectors) for task in tasks}
    trials = []
    for number in range(n_trials):
        blend = rng.dirichlet(np.ones(n_vectors)) * rng.uniform(0, 1.2)
        weights = planned[number][1] if number < len(planned) else from_unit(config, blend)
        point = np.array(list(weights.values()))
        scores, slopes = {}, {}
        for task, optimum in optima.items():
            slopes[task] = dict(zip(names, map(float, 2 * (point - optimum)), strict=True))
            losses = 3 + ((point - optimum) ** 2).sum() + 0.01 * rng.normal(size=n_items)
            scores[task] = TermScore([(float(loss), 1.0) for loss in losses], False)
        candidate = Candidate(number, "planned", weights, with_gradients=gradients)
        trials.append(candidate.to_trial(scores, {}, 0, slopes if gradients else {}))
    return config, trials


# -- asking, reports, intervals --------------------------------------------------------------------


def seconds_to_ask(n_trials: int, n_vectors: int, gradients: bool) -> float:
    """Return the CPU-seconds of the second ask after `n_trials`: the first one imports SMAC."""
    config, trials = record(n_trials + 1, n_vectors, gradients=gradients)
    with tempfile.TemporaryDirectory() as scratch:
        asker = Asker(config, Path(scratch))
        for trial in trials[:-1]:
            asker.tell(trial)
        asker.ask(n_trials)
        started = process_time()
        asker.tell(trials[-1])
        asker.ask(n_trials + 1)
        return process_time() - started


def asking(options: Options) -> Iterator[str]:
    """An ask with two terms, without gradients and with one in every trial."""
    sizes = [
        (n_trials, n_vectors, gradients)
        for gradients in (False, True)
        for n_vectors in VECTORS
        for n_trials in TRIALS
    ]
    costs = ((size, measured_alone(seconds_to_ask, *size)) for size in sizes)
    yield from table(
        ["trials", "vectors", "gradients", "CPU-seconds of an ask", "peak memory (MB)"],
        ([*map(str, size), f"{cost:.2f}", f"{memory:.0f}"] for size, (cost, memory) in costs),
    )


def seconds_to_report() -> float:
    """Return the seconds in which a study is opened and its report written."""
    config, trials = record(REPORT_TRIALS, REPORT_VECTORS, REPORT_TERMS, REPORT_ITEMS)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "study"
        open_study(config, directory)
        lines = "".join(f"{trial.to_json()}\n" for trial in trials)
        (directory / "trials.jsonl").write_text(lines, encoding="utf-8")
        started = perf_counter()
        study = load_study(directory, unfinished=True)
        write_report(study, Path(folder) / "report.html", vectors=False)
        return perf_counter() - started


def report(options: Options) -> Iterator[str]:
    """A report of a long study, without the cosines of its vectors."""
    seconds, memory = measured_alone(seconds_to_report)
    sizes = (REPORT_TRIALS, REPORT_VECTORS, REPORT_TERMS, REPORT_ITEMS)
    yield from table(
        ["trials", "vectors", "terms", "items", "seconds of a report", "peak memory (MB)"],
        [[*map(str, sizes), f"{seconds:.2f}", f"{memory:.0f}"]],
    )


def objective_of(*tasks: str) -> Objective:
    """Return the mean of the accuracies of tasks."""
    terms = [{"task": task, "metric": "acc"} for task in tasks]
    return Objective.model_validate({"terms": terms, "combine": "weighted_mean"})


def term_score(values: "Array") -> TermScore:
    """Return items that count alike."""
    return TermScore([(float(value), 1.0) for value in values], True)


def seconds_of_an_interval(n_items: int) -> float:
    """Return the seconds of a paired interval of two terms, the first in its process."""
    rng, objective = np.random.default_rng(0), objective_of("t", "u")
    sides = [{task: term_score(rng.normal(mean, 1, n_items)) for task in "tu"} for mean in (1, 0)]
    started = perf_counter()
    paired_interval(objective, sides[0], sides[1], sides[1])
    return perf_counter() - started


def interval(options: Options) -> Iterator[str]:
    """An interval of two long terms."""
    seconds, memory = measured_alone(seconds_of_an_interval, INTERVAL_ITEMS)
    yield from table(
        ["terms", "items each", "seconds of an interval", "peak memory (MB)"],
        [["2", f"{INTERVAL_ITEMS:,}", f"{seconds:.2f}", f"{memory:.0f}"]],
    )


# -- coverage --------------------------------------------------------------------------------------


def solve(rng: np.random.Generator, n_items: int, share: float) -> "Array":
    """Return 1.0 for items that are solved, each with a probability of `share`, and 0.0."""
    return (rng.random(n_items) < share).astype(np.float64)


Draw = Callable[[np.random.Generator, int], tuple["Array", "Array"]]
WORLDS: dict[str, tuple[Draw, float]] = {  # items of two sides; the mean of their differences
    "normal": (lambda rng, n: (rng.normal(1, 1, n), np.zeros(n)), 1.0),
    "skewed": (lambda rng, n: (rng.exponential(1, n), np.zeros(n)), 1.0),
    "right or wrong": (lambda rng, n: (solve(rng, n, 0.6), solve(rng, n, 0.4)), 0.2),
    "rarely wrong": (lambda rng, n: (solve(rng, n, 0.97), solve(rng, n, 0.9)), 0.07),
}


def covered(world: str, n_items: int) -> float:
    """Return the share of intervals that hold the truth."""
    (draw, truth), objective = WORLDS[world], objective_of("t")
    rng, n_covered = np.random.default_rng(n_items), 0
    for _ in range(SAMPLES):
        first, second = ({"t": term_score(side)} for side in draw(rng, n_items))
        interval = paired_interval(objective, first, second, second)
        n_covered += interval.low <= truth <= interval.high
    return n_covered / SAMPLES


def coverage(options: Options) -> Iterator[str]:
    """Simulated coverage of the paired 95 % intervals."""
    sizes = (10, 20, 50, 200)
    shares = ([world, *(f"{100 * covered(world, n):.1f} %" for n in sizes)] for world in WORLDS)
    yield from table(["differences", *(f"{n} items" for n in sizes)], shares)


# -- quality of a search ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One search of one landscape, with a surrogate of at most `n_kept` trials."""

    kind: str
    d: int
    seed: int
    n_kept: int


def rugged(landscape: Landscape, seed: int) -> Landscape:
    """Return a landscape with ripples in directions of every term's own, a few along each axis."""
    rng = np.random.default_rng([seed, landscape.d])
    probes = landscape.scores(np.random.default_rng(0).random((2048, landscape.d)))
    n_terms, depth = probes.shape[1], RIPPLE * np.ptp(probes, axis=0)
    waves = WAVES * rng.normal(size=(n_terms, landscape.d)) / np.sqrt(landscape.d)
    phases = rng.uniform(0, 2 * np.pi, n_terms)

    def ripple(points: "Array") -> "Array":
        return np.asarray(depth * np.sin(points @ waves.T + phases))

    def observe(point: "Array", rng: np.random.Generator) -> "Array":
        return np.asarray(landscape.observe(point, rng) + ripple(point[None])[0][:, None])

    return replace(landscape, scores=lambda at: landscape.scores(at) + ripple(at), observe=observe)


def regret_of(job: Job) -> tuple[float, float]:
    """Return which share of the possible gain, in %, the recommended weights miss, and the
    CPU-seconds of the search.
    """
    landscape = landscape_of("smooth", job.d, job.seed)
    if job.kind == "rugged":
        landscape = rugged(landscape, job.seed)
    config, started = config_of(landscape, job.seed, QUALITY_TRIALS), process_time()
    with mock.patch.object(surrogate, "N_KEPT", job.n_kept):
        trials = optimer_trials(landscape, config)
        best = ranked(config, trials)[0]
    return uniform_regrets(landscape, [best])[0], process_time() - started


def quality(options: Options) -> Iterator[str]:
    """Regret after 200 trials, of the bounded fit and of the full one."""
    rows = [(kind, d) for d in QUALITY_VECTORS for kind in QUALITY_KINDS]
    fits = (surrogate.N_KEPT, QUALITY_TRIALS)
    jobs = [
        Job(kind, d, seed, n_kept)
        for kind, d in rows
        for seed in range(options.seeds)
        for n_kept in fits
    ]
    with multiprocessing.get_context("spawn").Pool(options.processes, one_thread) as pool:
        regrets = zip(jobs, pool.imap(regret_of, jobs), strict=True)
        yield from table(
            ["landscape", "vectors", "regret (%), bounded", "full", "each seed", "CPU-s", "full"],
            (
                summary(kind, d, [next(regrets) for _ in range(2 * options.seeds)])
                for kind, d in rows
            ),
        )


def summary(kind: str, d: int, runs: Sequence[tuple[Job, tuple[float, float]]]) -> list[str]:
    """Return a row: medians over the seeds, and every pair of bounded and full fit."""
    bounded, full = ([result for _, result in runs[place::2]] for place in (0, 1))
    pairs = [f"{one[0]:.2f}/{other[0]:.2f}" for one, other in zip(bounded, full, strict=True)]
    regrets = [f"{statistics.median(run[0] for run in fit):.2f}" for fit in (bounded, full)]
    seconds = [f"{statistics.median(run[1] for run in fit):.0f}" for fit in (bounded, full)]
    return [kind, str(d), *regrets, ", ".join(pairs), *seconds]


PARTS: dict[str, Any] = {
    function.__name__: function for function in (asking, report, interval, coverage, quality)
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=QUALITY_SEEDS, help="Seeds per landscape.")
    parser.add_argument("--processes", type=int, default=1, help="Processes for the quality part.")
    parsed = parser.parse_args()
    for name in parsed.only:
        for line in PARTS[name](Options(parsed.seeds, parsed.processes)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
