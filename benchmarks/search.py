"""Our search against Optuna's TPE, CMA-ES, random search and stock SMAC, side by side in one run.

    pip install optuna cma
    python benchmarks/search.py [--seeds 20] [--only NAME ...] [--processes 2] [--others FILE]

Scores are functions of the weights, so no model is needed: synthetic landscapes (a seed is a
landscape), and real pools whose recorded trials are interpolated. Regret is the share, in %, of the
gain from the base to the best point of the box that the recommended weights miss; it is computed on
noise-free scores. Every sampler searches the box [0, 1]^d and recommends its best observed point;
ours alone starts from the anchors, sees the terms, and recommends by posterior mean. What a reader
would not guess: the best point is sought numerically after the samplers have run, from their
recommendations, too, and a run fails where one of them beats it.
"""

import argparse
import contextlib
import json
import logging
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from time import perf_counter, process_time
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy.interpolate import RBFInterpolator
from scipy.optimize import minimize
from scipy.stats import bootstrap, norm, rankdata
from threadpoolctl import threadpool_limits

from optimer_hf.scoring.objective import Asked
from optimer_hf.scoring.scores import TermScore
from optimer_hf.searching.loop import search
from optimer_hf.searching.next_weights import Asker
from optimer_hf.searching.runner import InProcess
from optimer_hf.searching.trial import Scored
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.directory import Study
from optimer_hf.study.gradients import N_PLACES, next_anchor, takes_gradients
from optimer_hf.study.prediction import predict
from optimer_hf.study.screening import searched_part
from optimer_hf.study.space import anchors
from optimer_hf.study.trials import Candidate, DecisionLog, Trial, TrialLog

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]
    Scores = Callable[[Array], Array]

N_TERMS, N_ITEMS = 4, 100
N_ITEMS_SEARCH = 33  # a fixed third of the items
DIMENSIONS = (4, 8)
KINDS = ("smooth", "cliff", "accuracy")
CHECKPOINTS, TPE_TRIALS = (20, 50), 100
BAR = f"tpe@{TPE_TRIALS}"
RETARGET_TRIALS, N_OBJECTIVES = 60, 5
RETARGET_BARS = {("smooth", 4): 1, ("smooth", 8): 3, ("accuracy", 4): 3, ("accuracy", 8): 8}
ITEMS_BAR = 1 / 5
GRADIENT_ITEMS_BAR, MOST_WITH_GRADIENTS = 1 / 20, 16  # of TPE's items; trials
ASKING_BAR = 0.3  # CPU seconds
ASKED = ((8, 100, False), (4, 2000, True), (16, 2000, True))  # vectors, trials, with gradients
GRADIENT_COST = 2.5  # forwards that a trial with gradients takes
GRADIENT_BUDGETS = (20, 40)  # forwards
GRADIENT_BARS = {(4, 20): 1.0, (8, 20): 1 / 2, (16, 40): 1 / 5}  # of the regret without
WORTH_TRIALS, WORTH_FACTORS = (4, 8), (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10)
GRADIENT_DIMENSIONS = (4, 8, 16)
LARGE_DIMENSIONS, N_DOMAINS = (16, 32, 64), 8  # vectors of a large pool, and what they are of
LARGE_ARMS: tuple[tuple[bool, int | Literal["", "auto"]], ...] = (
    (False, ""),
    (False, 8),
    (False, "auto"),
    (True, ""),
    (True, 8),
)  # with gradients, and the screen; with gradients `auto` leaves nothing out
GRADIENT_STEP = 0.01  # of a weight, by which a recorded gradient becomes a point
REACHED, REACHED_BAR = 2.0, 1 / 2  # % of regret, and the share of the forwards until there
POOLS = Path(__file__).parent / "real_pool.json"


# -- landscapes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Landscape:
    """Scores of every term over the box [0, 1]^d, and how they are observed.

    `scores` maps points [n, d] to noise-free scores [n, n_terms]; `observe` draws the items of one
    evaluation of one point [d], [n_terms, n_items], whose means are the observed scores.
    `gradient_noise` [n_terms, 1] is the standard deviation of an observed derivative. `companion`
    are scores of the items of a search that have gradients where accuracies have none.
    """

    d: int
    scores: "Scores"
    observe: "Callable[[Array, np.random.Generator], Array]"
    higher_is_better: bool
    gradient_noise: "float | Array" = 0.0
    companion: "Scores | None" = None

    def gains(self, points: "Array") -> "Array":
        """Return the noise-free gain of every term over the base, [n, n_terms]: points for
        accuracies, relative for losses.
        """
        base = self.scores(np.zeros((1, self.d)))
        return self.relative_to_base(self.scores(points), base)

    def gradients(self, point: "Array") -> "Array":
        """Return the noise-free derivatives of the scores at a point [d], [n_terms, d]: central
        differences, which are exact to about nine digits.
        """
        steps = 1e-5 * np.eye(self.d)
        scores = self.scores(np.vstack([point + steps, point - steps]))
        return (scores[: self.d] - scores[self.d :]).T / 2e-5

    def relative_to_base(self, scores: "Array", base: "Array") -> "Array":
        """Return gains of scores over those of the base."""
        return scores - base if self.higher_is_better else (base - scores) / base

    def observed_value(self, point: "Array", rng: np.random.Generator) -> float:
        """Return one noisy value of the uniform objective: what samplers without terms see."""
        observed = self.observe(point, rng).mean(axis=1)
        base = self.scores(np.zeros((1, self.d)))[0]
        return float(self.relative_to_base(observed, base).mean())


def owners(rng: np.random.Generator, d: int) -> "Array":
    """Return which vectors are made for which term, 0 or 1, [n_terms, d]."""
    own = np.zeros((N_TERMS, d))
    own[np.arange(d) % N_TERMS, rng.permutation(d)] = 1.0
    return own


def softplus(values: "Array", width: float) -> "Array":
    """Return max(values, 0) with its corner rounded."""
    return width * np.logaddexp(0, values / width)


def valley(rng: np.random.Generator, d: int) -> "Scores":
    """Return losses shaped as on the real pool: steep near the base, flat around sum 1, rising.

    Every vector helps every term (exponential decay), its own term more; pairs of vectors clash;
    the rise beyond sum 1 has exponent 1.5.
    """
    own, size = owners(rng, d), (N_TERMS, d)
    shared = rng.uniform(0.5, 1.2, size)
    special = rng.uniform(0.0, 0.15, size) + own * rng.uniform(1.0, 2.0, size)
    clash = 0.3 * np.triu(rng.random((N_TERMS, d, d)) * (rng.random((N_TERMS, d, d)) < 0.3), 1)
    level, rise = rng.uniform(1.8, 2.6, N_TERMS), rng.uniform(0.08, 0.25, N_TERMS)
    drop, decay = rng.uniform(0.3, 0.7, N_TERMS), rng.uniform(0.2, 0.4, N_TERMS)
    reward = rng.uniform(0.3, 0.8, N_TERMS)

    def losses(points: "Array") -> "Array":
        beyond = softplus(points.sum(axis=1, keepdims=True) - 1.0, 0.15)
        clashes = np.einsum("ni,tij,nj->nt", points, clash, points)
        gained = drop * np.exp(-(points @ shared.T) / decay)
        gained += reward * np.exp(-2.0 * (points @ special.T))
        return np.asarray(level + gained + rise * beyond**1.5 + clashes)

    return losses


def skewed(rng: np.random.Generator, d: int) -> "Scores":
    """Return losses that grow with a power other than 2 of a distance that is steeper on one side,
    in directions that mix the vectors, with a ripple; a term feels its own vectors most.
    """
    own, size = owners(rng, d), (N_TERMS, d)
    optima = rng.normal(0.03, 0.05, size) + own * rng.uniform(0.1, 0.7, size) * (4 / d) ** 0.6
    mixing = (0.4 + 0.7 * own)[:, None] * np.eye(d) + 0.12 * rng.normal(size=(N_TERMS, d, d))
    skew = rng.uniform(-0.5, 0.5, size)
    power = np.where(rng.random(N_TERMS) < 0.5, 1.3, 2.7) + rng.uniform(-0.2, 0.3, N_TERMS)
    level, depth = rng.uniform(1.5, 2.5, N_TERMS), rng.uniform(0.4, 1.0, N_TERMS)
    waves, phase = rng.normal(size=size) * 5 / np.sqrt(d), rng.uniform(0, 2 * np.pi, N_TERMS)

    def losses(points: "Array") -> "Array":
        moved = np.einsum("tij,ntj->nti", mixing, points[:, None] - optima)
        moved = moved + skew * (np.sqrt(moved**2 + 0.01) - 0.1)
        distance = np.sqrt((moved**2).sum(-1) + 4e-4)
        ripple = 0.04 * depth * np.sin(points @ waves.T + phase)
        return np.asarray(level + depth * distance**power + ripple)

    return losses


def by_domain(
    family: "Callable[[np.random.Generator, int], Scores]", rng: np.random.Generator, d: int
) -> "Scores":
    """Return losses of a large pool: several vectors for each of N_DOMAINS, some better than
    others, each with an error of its own that adds to every loss.
    """
    of_domains = family(rng, N_DOMAINS)
    shares = np.zeros((N_DOMAINS, d))
    shares[np.arange(d) % N_DOMAINS, np.arange(d)] = rng.uniform(0.2, 1.0, d)
    shares += 0.05 * rng.normal(size=shares.shape)
    error = rng.uniform(0.0, 0.5, d)

    def losses(points: "Array") -> "Array":
        return of_domains(points @ shares.T) + (points**2 @ error)[:, None]

    return losses


FAMILIES: dict[str, Callable[[np.random.Generator, int], "Scores"]] = {
    "valley": valley,
    "skewed": skewed,
}


def family_of(seed: int) -> str:
    """Return the family of a seed: they alternate."""
    return list(FAMILIES)[seed % len(FAMILIES)]


def synthetic(kind: str, d: int, seed: int) -> Landscape:
    """Return the landscape of a seed."""
    rng = np.random.default_rng([seed, d, zlib.crc32(b"optimer-hf")])
    family = FAMILIES[family_of(seed)]
    smooth = family(rng, d) if kind != "domains" else by_domain(family, rng, d)
    probes = np.random.default_rng(0).random((2048, d))
    if kind in ("accuracy", "items"):
        return accuracy(smooth, d, rng, fixed_items=kind == "items")
    deviation = 0.01 * float(smooth(probes).mean(axis=1).std()) * np.sqrt(N_TERMS * N_ITEMS)
    edge = rng.uniform(1.7, 1.9)

    def with_cliff(points: "Array") -> "Array":
        beyond = np.maximum(points.sum(axis=1, keepdims=True) - edge, 0.0)
        return np.asarray(smooth(points) + 3.0 * np.tanh((beyond / 0.3) ** 2))

    scores = with_cliff if kind == "cliff" else smooth

    def observe(point: "Array", rng: np.random.Generator) -> "Array":
        noise = deviation * rng.normal(size=(N_TERMS, N_ITEMS))
        return np.asarray(scores(point[None])[0][:, None] + noise)

    share = deviation / np.sqrt(N_ITEMS) / smooth(probes).std(axis=0)[:, None]
    noise = share * root_mean_square_slope(smooth, d, probes[:64])
    return Landscape(d, scores, observe, higher_is_better=False, gradient_noise=noise)


def root_mean_square_slope(scores: "Scores", d: int, points: "Array") -> "Array":
    """Return the size of a derivative of every term at points, [n_terms, 1]."""
    noiseless = Landscape(d, scores, lambda point, rng: np.empty(0), higher_is_better=False)
    slopes = np.array([noiseless.gradients(point) for point in points])
    return np.asarray(np.sqrt((slopes**2).mean(axis=(0, 2)))[:, None])


def accuracy(smooth: "Scores", d: int, rng: np.random.Generator, *, fixed_items: bool) -> Landscape:
    """Return accuracies: an item is solved when its loss is below its threshold.

    An item's loss is that of its term plus a linear function of the weights of its own; a few items
    are always or never solved. The population's accuracy has a closed form. Each evaluation sees
    other items (binomial noise), or the same `fixed_items`.
    """
    base = smooth(np.zeros((1, d)))[0]
    reachable = base - smooth(blends(np.random.default_rng(0), 4096, d)).min(axis=0)
    middle, width, own_slope = base - 0.6 * reachable, 0.3 * reachable, 0.15 * reachable
    low, high = rng.uniform(0.1, 0.3, N_TERMS), rng.uniform(0.6, 0.9, N_TERMS)

    def scores(points: "Array") -> "Array":
        spread = np.sqrt(width**2 + (points**2).sum(axis=1, keepdims=True) * own_slope**2)
        return np.asarray(low + (high - low) * norm.cdf((middle - smooth(points)) / spread))

    luck = rng.random((N_TERMS, N_ITEMS))
    slopes = own_slope[:, None, None] * rng.normal(size=(N_TERMS, N_ITEMS, d))
    thresholds = middle[:, None] + width[:, None] * rng.normal(size=(N_TERMS, N_ITEMS))

    def observe(point: "Array", rng: np.random.Generator) -> "Array":
        if not fixed_items:
            drawn = rng.random((N_TERMS, N_ITEMS))
            return np.asarray(drawn < scores(point[None])[0][:, None], np.float64)
        solved = smooth(point[None])[0][:, None] + slopes @ point <= thresholds
        solved = (luck < low[:, None]) | (solved & (luck < high[:, None]))
        return np.asarray(solved, np.float64)

    def log_probability(points: "Array") -> "Array":
        shown = thresholds[:, :N_ITEMS_SEARCH] - smooth(points)[..., None]
        shown = shown - np.einsum("tid,nd->nti", slopes[:, :N_ITEMS_SEARCH], points)
        return np.asarray(-np.logaddexp(0, -shown / width[:, None]).mean(axis=2))

    return Landscape(d, scores, observe, higher_is_better=True, companion=log_probability)


def recorded(name: str) -> Landscape:
    """Return a recorded real pool, each term interpolated exactly: by a thin-plate spline or, where
    gradients were recorded, by a cubic one that has these as well.
    """
    scores = interpolate(json.loads(POOLS.read_text(encoding="utf-8"))[name]["points"])
    return Landscape(
        scores.y.shape[1], scores, lambda point, rng: scores(point[None])[0][:, None], False
    )


def interpolate(recorded: Sequence[Mapping[str, Any]]) -> RBFInterpolator:
    """Return the spline through recorded points. A gradient is a second point on every side, a
    short step further.
    """
    points = np.array([point["weights"] for point in recorded])
    losses = np.array([point["losses"] for point in recorded])
    if "gradients" not in recorded[0]:
        return RBFInterpolator(points, losses, kernel="thin_plate_spline")
    gradients = np.array([point["gradients"] for point in recorded])  # [n, n_terms, d]
    d = points.shape[1]
    beside = (points[:, None] + GRADIENT_STEP * np.eye(d)).reshape(-1, d)
    there = losses[:, None] + GRADIENT_STEP * np.swapaxes(gradients, 1, 2)
    all_losses = np.vstack([losses, there.reshape(-1, losses.shape[1])])
    return RBFInterpolator(np.vstack([points, beside]), all_losses, kernel="cubic")


def error_of(pool: Mapping[str, Any]) -> float:
    """Return the median error of the interpolation at recorded points that it was not given, in %
    of the best recorded gain.
    """
    points = pool["points"]
    base = np.array(points[0]["losses"])  # it comes first
    gains = [float((1 - np.array(point["losses"]) / base).mean()) for point in points]
    errors = []
    for left_out in range(1, len(points)):
        spline = interpolate([*points[:left_out], *points[left_out + 1 :]])
        predicted = spline(np.array(points[left_out]["weights"])[None])[0]
        errors.append(abs(float((1 - predicted / base).mean()) - gains[left_out]))
    return 100 * float(np.median(errors) / max(gains))


def landscape_of(kind: str, d: int, seed: int) -> Landscape:
    """Return a synthetic landscape, or for other kinds the recorded pool of that name."""
    return synthetic(kind, d, seed) if kind in (*KINDS, "items", "domains") else recorded(kind)


# -- regret ----------------------------------------------------------------------------------------


def blends(rng: np.random.Generator, n: int, d: int) -> "Array":
    """Return random blends with sums up to 2, inside the box."""
    return np.minimum(rng.dirichlet(np.full(d, 0.7), n) * rng.uniform(0, 2, (n, 1)), 1.0)


def best_value(value: "Callable[[Array], Array]", d: int, starts: "Array") -> float:
    """Return the maximum of a noise-free value over the box: L-BFGS-B from the best random points
    and from `starts`, then shrinking random steps.
    """
    rng = np.random.default_rng(0)
    scattered = np.vstack([rng.random((4096, d)), blends(rng, 4096, d)])
    starts = np.vstack([scattered[np.argsort(-value(scattered))[:8]], starts])
    bounds = [(0.0, 1.0)] * d
    climbed = [minimize(lambda x: -value(x[None])[0], x, bounds=bounds).x for x in starts]
    points = np.vstack([starts, climbed])
    best = points[np.argmax(value(points))]
    for number in range(20):
        steps = 0.1 * 0.7**number * rng.normal(size=(256, d)) * (rng.random((256, d)) < 0.6)
        near = np.vstack([best, np.clip(best + steps, 0, 1)])
        best = near[np.argmax(value(near))]
    return float(value(best[None])[0])


def regrets(landscape: Landscape, term_weights: "Array", points: "Array") -> list[float]:
    """Return the regret of points in % of the gain base -> optimum; the base itself has 100."""

    def value(at: "Array") -> "Array":
        return landscape.gains(at) @ term_weights

    best = best_value(value, landscape.d, points)
    regrets = 100 * (1 - value(points) / best)
    assert regrets.min() >= -0.5, f"a recommendation beats the optimum by {-regrets.min():.2f} %"
    return [float(regret) for regret in regrets]


def uniform_regrets(landscape: Landscape, points: Sequence["Array"]) -> list[float]:
    """Return the regret of points under equal weights of all terms."""
    n_terms = landscape.scores(np.zeros((1, landscape.d))).shape[1]
    return regrets(landscape, np.full(n_terms, 1 / n_terms), np.array(points))


# -- samplers --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Observations:
    """What a sampler that sees one noisy value a trial has tried."""

    points: list["Array"]
    values: list[float]

    def recommended(self, n_trials: int) -> "Array":
        """Return the best observed point of the first trials."""
        return self.points[int(np.argmax(self.values[:n_trials]))]


def noise_of(sampler: str, seed: int) -> np.random.Generator:
    """Return the observation noise of one run."""
    return np.random.default_rng([seed, zlib.crc32(sampler.encode())])


def observe_all(
    sampler: str, landscape: Landscape, seed: int, points: Iterable["Array"]
) -> Observations:
    """Evaluate points in order; a generator of points may look at the values in between."""
    rng, observations = noise_of(sampler, seed), Observations([], [])
    for point in points:
        observations.points.append(point)
        observations.values.append(landscape.observed_value(point, rng))
    return observations


def random_search(landscape: Landscape, seed: int, n_trials: int) -> Observations:
    """Try uniform points of the box."""
    points = np.random.default_rng([seed, 1]).random((n_trials, landscape.d))
    return observe_all("random", landscape, seed, points)


def optuna_tpe(landscape: Landscape, seed: int, n_trials: int) -> Observations:
    """Run Optuna's TPE with its defaults."""
    import optuna

    return run_optuna("tpe", optuna.samplers.TPESampler(seed=seed), landscape, seed, n_trials)


def optuna_gp(landscape: Landscape, seed: int, n_trials: int) -> Observations:
    """Run Optuna's Gaussian process with its defaults."""
    import optuna

    return run_optuna("gpsampler", optuna.samplers.GPSampler(seed=seed), landscape, seed, n_trials)


def run_optuna(
    name: str, sampler: Any, landscape: Landscape, seed: int, n_trials: int
) -> Observations:
    """Run a sampler of Optuna."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=sampler, direction="maximize")
    rng, observations = noise_of(name, seed), Observations([], [])
    for _ in range(n_trials):
        trial = study.ask()
        point = np.array([trial.suggest_float(f"w{i}", 0, 1) for i in range(landscape.d)])
        observations.points.append(point)
        observations.values.append(landscape.observed_value(point, rng))
        study.tell(trial, observations.values[-1])
    return observations


def qlognei(landscape: Landscape, seed: int, n_trials: int) -> Observations:
    """Run BoTorch's noisy expected improvement over its default process, after 2 d Sobol points (at
    most half of the trials).
    """
    import torch
    from botorch.acquisition.logei import qLogNoisyExpectedImprovement
    from botorch.fit import fit_gpytorch_mll
    from botorch.models import SingleTaskGP
    from botorch.models.transforms import Standardize
    from botorch.optim import optimize_acqf
    from gpytorch.mlls import ExactMarginalLogLikelihood

    d = landscape.d
    sobol: Any = torch.quasirandom.SobolEngine
    first = sobol(d, scramble=True, seed=seed).draw(min(2 * d, n_trials // 2), dtype=torch.double)
    rng, observations = noise_of("qlognei", seed), Observations([], [])
    torch.manual_seed(seed)
    bounds = torch.stack([torch.zeros(d), torch.ones(d)]).double()
    for number in range(n_trials):
        if number < len(first):
            point = first[number].numpy()
        else:
            tried = torch.tensor(np.array(observations.points))
            values = torch.tensor(observations.values).double()[:, None]
            model = SingleTaskGP(tried, values, outcome_transform=Standardize(1))
            fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
            chosen, _ = optimize_acqf(
                qLogNoisyExpectedImprovement(model, tried),
                bounds,
                q=1,
                num_restarts=4,
                raw_samples=128,
            )
            point = chosen[0].detach().numpy()
        observations.points.append(point)
        observations.values.append(landscape.observed_value(point, rng))
    return observations


def cma_es(landscape: Landscape, seed: int, n_trials: int) -> Observations:
    """Run CMA-ES from the uniform average, the best start that one knows, with step 0.2."""
    import cma

    options = {"bounds": [0, 1], "seed": seed + 1, "verbose": -9}
    strategy = cma.CMAEvolutionStrategy(np.full(landscape.d, 1 / landscape.d), 0.2, options)
    rng, observations = noise_of("cma", seed), Observations([], [])
    while len(observations.points) < n_trials:
        population = [np.array(point) for point in strategy.ask()]
        values = [landscape.observed_value(point, rng) for point in population]
        strategy.tell(population, [-value for value in values])
        observations.points.extend(population)
        observations.values.extend(values)
    return observations


def stock_smac(facade_name: str, landscape: Landscape, seed: int, n_trials: int) -> Observations:
    """Run an unchanged SMAC facade through ask and tell, with its own initial design.

    `n_trials` is its real budget: told that it has a million, it would take its whole Sobol design
    (8 or 10 points a dimension) before the first ask of its model.
    """
    import smac
    from ConfigSpace import ConfigurationSpace, Float
    from smac.runhistory.dataclasses import TrialValue

    names = [f"w{i}" for i in range(landscape.d)]
    space = ConfigurationSpace(seed=seed)
    space.add([Float(name, (0.0, 1.0)) for name in names])
    rng, observations = noise_of(facade_name, seed), Observations([], [])
    with tempfile.TemporaryDirectory() as scratch:
        scenario = smac.Scenario(
            space,
            deterministic=True,
            n_trials=n_trials,
            seed=seed,
            output_directory=Path(scratch),
        )
        facade = getattr(smac, facade_name)(
            scenario, unused_target, overwrite=True, logging_level=False
        )
        for _ in range(n_trials):
            info = facade.ask()
            observations.points.append(np.array([info.config[name] for name in names]))
            observations.values.append(landscape.observed_value(observations.points[-1], rng))
            facade.tell(info, TrialValue(cost=-observations.values[-1]), save=False)
    return observations


def unused_target(config: Any, seed: int = 0) -> float:
    """Stand where SMAC wants a function; it is only asked and told."""
    raise AssertionError("SMAC is only asked and told")


def smac_gp(landscape: Landscape, seed: int, n_trials: int) -> Observations:
    """Run SMAC's black-box facade, a Gaussian process."""
    return stock_smac("BlackBoxFacade", landscape, seed, n_trials)


def smac_forest(landscape: Landscape, seed: int, n_trials: int) -> Observations:
    """Run SMAC's facade for hyperparameters, a random forest."""
    return stock_smac("HyperparameterOptimizationFacade", landscape, seed, n_trials)


OTHERS = {"tpe": optuna_tpe, "cma": cma_es, "random": random_search}
MODELS = {"gpsampler": optuna_gp, "qlognei": qlognei}  # that the arm with gradients compares with
STOCK_SMAC = {"smac-gp": smac_gp, "smac-forest": smac_forest}


def recommended_by(name: str, job: "Job") -> dict[tuple[str, int], "Array"]:
    """Return what another sampler recommends at the checkpoints, [d] each; a line of `job.others`,
    if given, keeps it.
    """
    counts: tuple[int, ...] = CHECKPOINTS
    if name in MODELS or job.d >= LARGE_DIMENSIONS[0]:
        counts = GRADIENT_BUDGETS
    counts = (*counts, TPE_TRIALS) if name == "tpe" else counts
    key = f"{name} {job.kind} {job.d} {job.seed}"
    kept = kept_by_others(job.others)
    if key not in kept:
        landscape = landscape_of(job.kind, job.d, job.seed)
        observed = (OTHERS | MODELS | STOCK_SMAC)[name](landscape, job.seed, max(counts))
        kept[key] = [[round(w, 6) for w in observed.recommended(n)] for n in counts]
        keep(job.others, key, kept[key])
    return {(name, n): np.array(point) for n, point in zip(counts, kept[key], strict=True)}


@cache
def kept_by_others(file: Path | None) -> dict[str, list[list[float]]]:
    """Return recommendations that an earlier run kept."""
    return read_kept(file)


# -- ours ------------------------------------------------------------------------------------------


def config_of(
    landscape: Landscape,
    seed: int,
    n_trials: int,
    *,
    gradients: bool = False,
    screen: int | Literal["auto"] | None = None,
) -> StudyConfig:
    """Return a study of a landscape: its terms with equal weights, its box, nothing re-scored."""
    n_terms = landscape.scores(np.zeros((1, landscape.d))).shape[1]
    metric = "acc" if landscape.higher_is_better else "loss"
    return StudyConfig.model_validate(
        {
            "base_model": "a/base",
            "vectors": {
                f"v{i}": {"source": f"a/v{i}", "bounds": [0.0, 1.0]} for i in range(landscape.d)
            },
            "objective": {"terms": [{"task": f"t{t}", "metric": metric} for t in range(n_terms)]},
            "search": {
                "n_trials": n_trials,
                "seed": seed,
                "rescore_top": 0,
                "gradients": "always" if gradients else "never",
                "screen": screen,
            },
        }
    )


def point_of(weights: Mapping[str, float]) -> "Array":
    """Return weights as a point."""
    return np.array(list(weights.values()))


def term_scores(landscape: Landscape, items: "Array") -> dict[str, TermScore]:
    """Return observed items [n_terms, n_items] as a trial records them."""
    return {
        f"t{t}": TermScore([(float(item), 1.0) for item in row], landscape.higher_is_better)
        for t, row in enumerate(items)
    }


def term_gradients(
    landscape: Landscape, weights: Mapping[str, float], rng: np.random.Generator
) -> dict[str, dict[str, float]]:
    """Return observed gradients as a trial records them. Their noise is as large a share of their
    size as that of a score is of the scores' standard deviation.
    """
    slopes = landscape.gradients(point_of(weights))
    slopes = slopes + landscape.gradient_noise * rng.normal(size=slopes.shape)
    return {
        f"t{t}": dict(zip(weights, map(float, row), strict=True)) for t, row in enumerate(slopes)
    }


def gradient_trials(
    landscape: Landscape, config: StudyConfig, *, n_items: int = N_ITEMS
) -> list[Trial]:
    """Run our search without a study directory, on the first items of every term, with gradients
    in every trial or, where the study takes none, in those that a screen waits for.
    """
    trials, rng = list[Trial](), noise_of("optimer", config.search.seed)
    of_gradients = noise_of("gradients", config.search.seed)
    with tempfile.TemporaryDirectory() as scratch:
        asker = Asker(config, Path(scratch))
        for number in range(config.search.n_trials):
            planned = next_anchor(searched_part(config, trials), number, trials)
            origin, weights = planned or ("surrogate", asker.ask(number))
            scores = term_scores(landscape, landscape.observe(point_of(weights), rng)[:, :n_items])
            takes = takes_gradients(config, trials)
            gradients = term_gradients(landscape, weights, of_gradients) if takes else {}
            candidate = Candidate(number, origin, weights, with_gradients=takes)
            trials.append(candidate.to_trial(scores, {}, 0, gradients))
            asker.tell(trials[-1])
    return trials


def optimer_trials(
    landscape: Landscape, config: StudyConfig, *, n_items: int = N_ITEMS, n_workers: int = 1
) -> list[Trial]:
    """Run our search without a study directory, on the first items of every term.

    With several workers, whose trials take equally long, a trial is asked for while the ones before
    it still run.
    """
    planned, trials = anchors(config), list[Trial]()
    rng, n_told = noise_of("optimer", config.search.seed), 0
    with tempfile.TemporaryDirectory() as scratch:
        asker = Asker(config, Path(scratch))
        for number in range(config.search.n_trials):
            if number - n_told == n_workers:
                asker.tell(trials[n_told])
                n_told += 1
            if number < len(planned):
                origin, weights = planned[number]
            else:
                running = [trial.weights for trial in trials[n_told:]]
                origin, weights = "surrogate", asker.ask(number, running)
            scores = term_scores(landscape, landscape.observe(point_of(weights), rng)[:, :n_items])
            trials.append(Trial(number, origin, "search", weights, "ok", scores, {}))
    return trials


def ranked(config: StudyConfig, trials: Sequence[Trial]) -> list["Array"]:
    """Return the points of trials, best first by posterior mean, as a study ranks them."""
    log = TrialLog(Path("never-written") / "trials.jsonl")
    log.trials = list(trials)
    decisions = DecisionLog(log.path.with_name("decisions.jsonl"))
    study = Study(log.path.parent, config, log, decisions)
    return [point_of(trial.weights) for trial in study.rank_trials()]


# -- what is measured ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """How much is run, and where what others recommend is kept."""

    seeds: int
    smac_seeds: int
    paired_seeds: int
    processes: int
    others: Path | None = None
    kept: Path | None = None
    rows: Sequence[str] = ()
    gradient_cost: float = GRADIENT_COST

    def chosen(self, rows: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
        """Return the rows (kind, number of vectors) that `--rows` names, or all."""
        return [(kind, d) for kind, d in rows if not self.rows or f"{kind}-{d}" in self.rows]


@dataclass(frozen=True)
class Job:
    """One landscape and one seed, run in one process; with stock SMAC where it takes part."""

    kind: str
    d: int
    seed: int
    with_smac: bool = False
    others: Path | None = None
    with_gradients: bool = False
    gradient_cost: float = GRADIENT_COST
    sampler: str = ""

    @property
    def key(self) -> str:
        """What the result depends on, but for our code."""
        settings = " with SMAC" * self.with_smac + " with gradients" * self.with_gradients
        if self.gradient_cost != GRADIENT_COST:
            settings += f" at {self.gradient_cost:g}"
        return f"{self.kind} {self.d} {self.seed}{settings}"


def run_jobs(
    name: str,
    function: Callable[[Job], dict[str, Any]],
    jobs: Sequence[Job],
    processes: int,
    kept: Path | None = None,
) -> list[dict[str, Any]]:
    """Run jobs in one or more processes, each on one thread, and return their results in order. A
    file `kept` takes every result as it comes; those that are there are not run again.
    """
    started, keys = perf_counter(), [f"{name} {job.key}" for job in jobs]
    results = read_kept(kept)
    todo = [(key, job) for key, job in zip(keys, jobs, strict=True) if key not in results]
    with multiprocessing.get_context("spawn").Pool(processes, initializer=one_thread) as pool:
        ended = pool.imap_unordered(partial(run_job, function), todo)
        for number, (key, result) in enumerate(ended, start=1):
            results[key] = result
            keep(kept, key, result)
            seconds = perf_counter() - started
            print(f"\r{name}: {number}/{len(todo)}, {seconds:.0f} s", end="", file=sys.stderr)
    print(file=sys.stderr)
    return [results[key] for key in keys]


def run_job(
    function: Callable[[Job], dict[str, Any]], keyed: tuple[str, Job]
) -> tuple[str, dict[str, Any]]:
    """Return the result of a job beside its key."""
    key, job = keyed
    return key, function(job)


def keep(file: Path | None, key: str, value: Any) -> None:
    """Append a line to a file in one write, so that several runs can share it; what a killed run
    left of a line stays a line of its own.
    """
    if file is None:
        return
    with open(file, "ab+", buffering=0) as kept:
        kept.seek(max(kept.seek(0, os.SEEK_END) - 1, 0))
        is_torn = kept.read(1) not in (b"", b"\n")
        kept.write(("\n" * is_torn + json.dumps({key: value}) + "\n").encode())


def read_kept(file: Path | None) -> dict[str, Any]:
    """Return what a file keeps, by key; a torn line is skipped."""
    kept: dict[str, Any] = {}
    lines = file.read_text(encoding="utf-8").splitlines() if file and file.exists() else []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            kept |= json.loads(line)
    return kept


def one_thread() -> None:
    """Keep a worker to one thread, and quiet: SMAC and scikit-learn warn about stock SMAC."""
    threadpool_limits(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def compare_samplers(job: Job) -> dict[str, Any]:
    """Return the regret of every sampler at the checkpoints on one landscape."""
    landscape = landscape_of(job.kind, job.d, job.seed)
    config = config_of(landscape, job.seed, max(CHECKPOINTS))
    trials = optimer_trials(landscape, config)
    recommended = {("optimer", n): ranked(config, trials[:n])[0] for n in CHECKPOINTS}
    for name in OTHERS | STOCK_SMAC if job.with_smac else OTHERS:
        recommended |= recommended_by(name, job)
    regrets = uniform_regrets(landscape, list(recommended.values()))
    return {
        "kind": job.kind,
        "d": job.d,
        "seed": job.seed,
        "regret": {f"{name}@{n}": r for (name, n), r in zip(recommended, regrets, strict=True)},
    }


def samplers(options: Options) -> dict[str, Any]:
    """Regret of our search and of others after 20 and 50 trials on synthetic landscapes."""
    print(f"\nsamplers: regret in % of the gain, medians; {options.seeds} landscapes a row")
    return compare(options, [(kind, d) for d in DIMENSIONS for kind in KINDS], "samplers")


def against_tpe(job: Job) -> dict[str, Any]:
    """Return our regret at the first checkpoint and TPE's at the end of its trials."""
    landscape = landscape_of(job.kind, job.d, job.seed)
    config = config_of(landscape, job.seed, CHECKPOINTS[0])
    ours = ranked(config, optimer_trials(landscape, config))[0]
    theirs = recommended_by("tpe", job)["tpe", TPE_TRIALS]
    regrets = uniform_regrets(landscape, [ours, theirs])
    return {"kind": job.kind, "d": job.d, "seed": job.seed, "regret": regrets}


def against_one_worker(job: Job) -> dict[str, Any]:
    """Return our regret at the last checkpoint with two workers, and with one."""
    landscape = landscape_of(job.kind, job.d, job.seed)
    config = config_of(landscape, job.seed, CHECKPOINTS[-1])
    points = [
        ranked(config, optimer_trials(landscape, config, n_workers=n_workers))[0]
        for n_workers in (2, 1)
    ]
    regrets = uniform_regrets(landscape, points)
    return {"kind": job.kind, "d": job.d, "seed": job.seed, "regret": regrets}


def paired(options: Options) -> dict[str, Any]:
    """Our regret at 20 trials against TPE's at 100, on enough landscapes to tell them apart: those
    that have a bar.
    """
    print(f"\npaired: ours at {CHECKPOINTS[0]} trials against {BAR}", end="")
    rows = [(kind, d) for d in DIMENSIONS for kind in KINDS if kind != "accuracy"]
    return compare_pairs(options, "paired", against_tpe, rows, options.paired_seeds)


def parallel(options: Options) -> dict[str, Any]:
    """Our regret with two workers, who ask while the other's trial runs, against one's; what
    is recommended lies before the cliff, so cliffs would say the same as smooth landscapes.
    """
    print(f"\nparallel: two workers against one, at {CHECKPOINTS[-1]} trials", end="")
    rows = [(kind, d) for d in DIMENSIONS for kind in KINDS if kind != "cliff"] + pool_rows()
    return compare_pairs(options, "parallel", against_one_worker, rows, options.seeds)


def compare_pairs(
    options: Options,
    name: str,
    function: Callable[[Job], dict[str, Any]],
    rows: Sequence[tuple[str, int]],
    n_seeds: int,
) -> dict[str, Any]:
    """Run one comparison on landscapes; print medians and their difference with its interval."""
    print(": median regret in %, and the difference with its 95 % bootstrap interval; ", end="")
    print(f"{n_seeds} landscapes a row")
    rows = options.chosen(rows)
    jobs = [
        Job(kind, d, seed, others=options.others) for kind, d in rows for seed in range(n_seeds)
    ]
    results = run_jobs(name, function, jobs, options.processes, options.kept)
    table = {}
    for kind, d in rows:
        both = np.array([r["regret"] for r in results if (r["kind"], r["d"]) == (kind, d)]).T
        ours, theirs = np.median(both, axis=1)
        interval = bootstrap(
            both, median_difference, paired=True, method="percentile", rng=np.random.default_rng(0)
        ).confidence_interval
        table[f"{kind} {d}"] = [float(value) for value in (ours, theirs, *interval)]
        print(f"  {kind}, {d} vectors: {ours:.2f} against {theirs:.2f} ", end="")
        print(f"(bar: no more{missed(ours, theirs)}), {ours - theirs:+.2f} ", end="")
        print(f"[{interval.low:+.2f}, {interval.high:+.2f}]; ", end="")
        print(f"lower on {(both[0] < both[1]).mean():.0%} of the landscapes")
    return {"table": table, "runs": results}


def median_difference(a: "Array", b: "Array", axis: int = -1) -> "Array":
    """Return the median of a less that of b."""
    return np.asarray(np.median(a, axis=axis) - np.median(b, axis=axis))


def real(options: Options) -> dict[str, Any]:
    """The same on recorded real pools."""
    print("\nreal: recorded pools, each term interpolated by a thin-plate spline; a seed is a run")
    pools = json.loads(POOLS.read_text(encoding="utf-8"))
    for name, _ in pool_rows():
        pool = pools[name]
        print(f"  {name}: {len(pool['points'])} recorded points; one that is left out is ", end="")
        print(f"predicted within {error_of(pool):.1f} % of the best recorded gain (median)")
    return compare(options, pool_rows(), "real")


def row_names() -> list[str]:
    """Return what `--rows` chooses from: kind and number of vectors."""
    rows = [(kind, d) for kind in (*KINDS, "items") for d in DIMENSIONS] + pool_rows()
    rows += [(kind, d) for kind, d in gradient_rows() if (kind, d) not in rows]
    rows += [("domains", d) for d in LARGE_DIMENSIONS]
    return [f"{kind}-{d}" for kind, d in rows]


def gradient_rows() -> list[tuple[str, int]]:
    """Return the rows whose scores have gradients: those that are losses."""
    rows = [(kind, d) for d in GRADIENT_DIMENSIONS for kind in ("smooth", "cliff")]
    return rows + pool_rows(with_gradients=False) + pool_rows(with_gradients=True)


def pool_rows(*, with_gradients: bool = False) -> list[tuple[str, int]]:
    """Return name and number of vectors of every pool recorded with gradients, or without."""
    pools = json.loads(POOLS.read_text(encoding="utf-8"))
    return [
        (name, len(pool["vectors"]))
        for name, pool in pools.items()
        if ("gradients" in pool["points"][0]) == with_gradients
    ]


def compare(options: Options, rows: Sequence[tuple[str, int]], name: str) -> dict[str, Any]:
    """Run all samplers on landscapes; print medians and ranks beside TPE's at 100 trials."""
    rows = options.chosen(rows)
    jobs = [
        Job(kind, d, seed, with_smac=seed < options.smac_seeds, others=options.others)
        for seed in range(options.seeds)
        for kind, d in rows
    ]
    runs = run_jobs(name, compare_samplers, jobs, options.processes, options.kept)
    columns = list({column: None for result in runs for column in result["regret"]})
    print(f"  {'':19}" + "".join(f"{column:>{len(column) + 2}}" for column in columns))
    table = {}
    for kind, d in rows:
        results = [r for r in runs if (r["kind"], r["d"]) == (kind, d)]
        table[f"{kind} {d}"] = print_row(f"{kind}, {d} vectors", results, columns)
        if kind in KINDS:
            for family in FAMILIES:
                some = [r for r in results if family_of(r["seed"]) == family]
                table[f"{kind} {d} {family}"] = print_row(f"  {family}", some, columns)
    print(f"  bar: no more than {BAR}; ", end="")
    return {"regret": table, "rank": print_ranks(runs), "runs": runs}


def print_row(
    label: str, results: Sequence[Mapping[str, Any]], columns: Sequence[str]
) -> dict[str, float]:
    """Print and return the median regret of every column over the runs that have it."""
    row = {}
    for column in columns:
        values = [r["regret"][column] for r in results if column in r["regret"]]
        if values:
            row[column] = statistics.median(values)
    width = {column: len(column) + 2 for column in columns}
    cells = "".join(f"{row[c]:{width[c]}.2f}" if c in row else " " * width[c] for c in columns)
    above = [str(n) for n in CHECKPOINTS if row and row[f"optimer@{n}"] > row[BAR]]
    if row:
        print(f"  {label:19}{cells}" + f"  above {BAR} at {', '.join(above)}" * bool(above))
    return row


def print_ranks(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Print and return the median rank at the last checkpoint over the runs in which every sampler
    took part.
    """
    columns = {column: None for result in results for column in result["regret"]}
    compared = [column for column in columns if column.endswith(f"@{CHECKPOINTS[-1]}")]
    complete = [r["regret"] for r in results if all(column in r["regret"] for column in compared)]
    ranks = np.array([rankdata([regret[c] for c in compared]) for regret in complete])
    medians = dict(zip(compared, np.median(ranks, axis=0), strict=True))
    by_sampler = {column.split("@")[0]: float(rank) for column, rank in medians.items()}
    print(f"median rank at {CHECKPOINTS[-1]} trials over {len(ranks)} runs (bar 1): ", end="")
    print(", ".join(f"{name} {rank:g}" for name, rank in by_sampler.items()))
    return by_sampler


def spend_items(job: Job) -> dict[str, Any]:
    """Return the items that TPE and our search evaluate, on one landscape of fixed items.

    Ours is stopped after every number of trials in turn; each stop pays for the trials so far and
    for re-scoring the base and the best three on all items, and recommends the best of the three.
    """
    landscape = landscape_of("items", job.d, job.seed)
    observed = optuna_tpe(landscape, job.seed, TPE_TRIALS)
    theirs = [observed.recommended(n) for n in range(1, TPE_TRIALS + 1)]
    config = config_of(landscape, job.seed, max(CHECKPOINTS))
    trials = optimer_trials(landscape, config, n_items=N_ITEMS_SEARCH)
    first, rng = len(anchors(config)), np.random.default_rng(0)
    ours = []
    for n in range(first, len(trials) + 1):
        best = ranked(config, trials[:n])[:3]
        ours.append(max(best, key=lambda point: landscape.observed_value(point, rng)))
    regrets = uniform_regrets(landscape, [*ours, *theirs])
    our_regrets, their_regrets = regrets[: len(ours)], regrets[len(ours) :]
    rescored = (3 + 1) * N_TERMS * N_ITEMS
    costs = [n * N_TERMS * N_ITEMS_SEARCH + rescored for n in range(first, len(trials) + 1)]
    target = their_regrets[-1]
    reached = (c for c, r in zip(costs, our_regrets, strict=True) if r <= target)
    tpe_first = next(n for n, r in enumerate(their_regrets, start=1) if r <= target)
    return {
        "d": job.d,
        "seed": job.seed,
        "tpe_regret": target,
        "tpe_items": TPE_TRIALS * N_TERMS * N_ITEMS,
        "tpe_first_items": tpe_first * N_TERMS * N_ITEMS,
        "optimer_items": next(reached, None),
        "optimer_regrets": dict(zip(costs, our_regrets, strict=True)),
    }


def spend_items_with_gradients(job: Job) -> dict[str, Any]:
    """Return the share of the items of TPE's trials after which a search with gradients is as good,
    on one landscape: on a third of the items, nothing re-scored. Accuracies are searched by the
    log-probabilities of the right answers.
    """
    landscape = searched = landscape_of(job.kind, job.d, job.seed)
    more_noise = math.sqrt(N_ITEMS / N_ITEMS_SEARCH)
    if landscape.companion is not None:
        scores = landscape.companion
        searched = Landscape(
            job.d, scores, lambda point, rng: scores(point[None])[0][:, None], True
        )
    searched = replace(searched, gradient_noise=searched.gradient_noise * more_noise)
    config = config_of(searched, job.seed, MOST_WITH_GRADIENTS, gradients=True)
    trials = gradient_trials(searched, config, n_items=N_ITEMS_SEARCH)
    counts = range(2, len(trials) + 1)
    ours = [ranked(config, trials[:n])[0] for n in counts]
    theirs = recommended_by("tpe", job)["tpe", TPE_TRIALS]
    *regrets, target = uniform_regrets(landscape, [*ours, theirs])
    each = job.gradient_cost * N_ITEMS_SEARCH / (TPE_TRIALS * N_ITEMS)  # share of a trial
    reached = (n * each for n, regret in zip(counts, regrets, strict=True) if regret <= target)
    return {
        "kind": job.kind,
        "d": job.d,
        "seed": job.seed,
        "share": next(reached, None),
        "tpe_regret": target,
        "regrets": {f"{n * each:.4f}": r for n, r in zip(counts, regrets, strict=True)},
    }


def gradient_items(options: Options) -> dict[str, Any]:
    """Items evaluated until a search with gradients on a third of them is as good as TPE."""
    print(f"\ngradient_items: share of the items of {TPE_TRIALS} trials of TPE after which ours ")
    print(f"  with gradients on {N_ITEMS_SEARCH} of {N_ITEMS} a term is as good; ", end="")
    print(f"{options.seeds} landscapes a row")
    rows = options.chosen((kind, d) for kind in ("smooth", "items") for d in DIMENSIONS)
    jobs = [
        Job(kind, d, seed, others=options.others, gradient_cost=options.gradient_cost)
        for seed in range(options.seeds)
        for kind, d in rows
    ]
    name, function = "gradient_items", spend_items_with_gradients
    results = run_jobs(name, function, jobs, options.processes, options.kept)
    table = {}
    for kind, d in rows:
        runs = [run for run in results if (run["kind"], run["d"]) == (kind, d)]
        shares = [run["share"] or math.inf for run in runs]
        ratio, target = statistics.median(shares), statistics.median(r["tpe_regret"] for r in runs)
        medians = {c: statistics.median(r["regrets"][c] for r in runs) for c in runs[0]["regrets"]}
        together = next((float(c) for c, r in medians.items() if r <= target), math.inf)
        within = [c for c in medians if float(c) <= GRADIENT_ITEMS_BAR]
        table[f"{kind} {d}"] = {"ratio": ratio, "together": together, "tpe_regret": target}
        label = "accuracy by its companion" if kind == "items" else "loss"
        print(
            f"  {label}, {d} vectors: {ratio:.3f}, median of runs (bar {GRADIENT_ITEMS_BAR:g}",
            end="",
        )
        print(
            f"{missed(ratio, GRADIENT_ITEMS_BAR)}); {together:.3f} until the median is TPE's, ",
            end="",
        )
        print(f"{target:.2f} %; {medians[within[-1]]:.2f} % at {within[-1]}")
    return {"table": table, "runs": results}


def summary_of(runs: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Return medians over runs as shares of the items of TPE's trials; None is never."""
    whole, n_runs = runs[0]["tpe_items"], len(runs)
    target = statistics.median(run["tpe_regret"] for run in runs)
    medians = {
        cost: statistics.median(run["optimer_regrets"][cost] for run in runs)
        for cost in runs[0]["optimer_regrets"]
    }
    reached = sorted(run["optimer_items"] or math.inf for run in runs)
    each = statistics.median(reached) / whole
    together = next((cost for cost, r in medians.items() if r <= target), math.inf) / whole
    return {
        "tpe_regret": target,
        "optimer_regret": list(medians.values())[-1],
        "ratio": each if each < math.inf else None,
        "ratio_of_medians": together if together < math.inf else None,
        "reached": sum(run["optimer_items"] is not None for run in runs) / n_runs,
        "tpe_first": statistics.median(run["tpe_first_items"] for run in runs) / whole,
    }


def items(options: Options) -> dict[str, Any]:
    """Items evaluated until our search on a third of the items is as good as TPE's 100 trials."""
    dimensions = [d for _, d in options.chosen(("items", d) for d in DIMENSIONS)]
    jobs = [Job("items", d, seed) for d in dimensions for seed in range(options.seeds)]
    results = run_jobs("items", spend_items, jobs, options.processes, options.kept)
    print(
        f"\nitems: those evaluated until as good as {TPE_TRIALS} trials of TPE, which take", end=""
    )
    print(
        f" {results[0]['tpe_items']:,}; ours on {N_ITEMS_SEARCH} of {N_ITEMS} a term, 3 re-scored"
    )
    table = {}
    for d in dimensions:
        row = table[d] = summary_of([run for run in results if run["d"] == d])
        print(f"  {d} vectors: {share(row['ratio'])} of them, median of runs", end="")
        print(f" (bar {share(ITEMS_BAR)}{missed(row['ratio'], ITEMS_BAR)})", end="")
        print(f"; {row['reached']:.0%} of the runs get there within {max(CHECKPOINTS)} trials")
        print(f"    {share(row['ratio_of_medians'])} until the median regret is TPE's, ", end="")
        print(f"{row['tpe_regret']:.2f} %; at the end {row['optimer_regret']:.2f} %")
        print(f"    TPE itself was there for the first time after {share(row['tpe_first'])}")
    return {"table": table, "runs": results}


def share(value: float | None) -> str:
    """Return a share as text."""
    return "never" if value is None else f"{value:.3f}"


def missed(value: float | None, bar: float) -> str:
    """Return a mark for a value above its bar."""
    return ", missed" if value is None or value > bar else ""


def compare_with_gradients(job: Job) -> dict[str, Any]:
    """Return the regret with and without gradients, and of other samplers, after equal costs."""
    landscape = landscape_of(job.kind, job.d, job.seed)
    without = optimer_trials(landscape, config_of(landscape, job.seed, max(GRADIENT_BUDGETS)))
    n_trials = count_with_gradients(max(GRADIENT_BUDGETS), job.gradient_cost)
    config = config_of(landscape, job.seed, n_trials, gradients=True)
    told = gradient_trials(landscape, config)
    recommended = {}
    for budget in GRADIENT_BUDGETS:
        n = count_with_gradients(budget, job.gradient_cost)
        recommended["gradients", budget] = ranked(config, told[:n])[0]
        recommended["values", budget] = ranked(config, without[:budget])[0]
    for name in OTHERS | MODELS | STOCK_SMAC:
        if name in OTHERS or takes_part(name, job):
            recommended |= recommended_by(name, job)
    regrets = uniform_regrets(landscape, list(recommended.values()))
    result = {f"{name}@{n}": r for (name, n), r in zip(recommended, regrets, strict=True)}
    run: dict[str, Any] = {"kind": job.kind, "d": job.d, "seed": job.seed, "regret": result}
    if job.kind not in KINDS:
        run["until"] = {
            "values": cost_until(landscape, config, without, 1.0),
            "gradients": cost_until(landscape, config, told, job.gradient_cost),
        }
    return run


def with_models(run: dict[str, Any], job: Job) -> dict[str, Any]:
    """Return a result with the slow samplers that recommended after it was kept."""
    later = [m for m in MODELS if takes_part(m, job) and not any(m in c for c in run["regret"])]
    if not later:
        return run
    recommended = {key: point for m in later for key, point in recommended_by(m, job).items()}
    regrets = uniform_regrets(landscape_of(job.kind, job.d, job.seed), list(recommended.values()))
    added = {f"{m}@{n}": r for (m, n), r in zip(recommended, regrets, strict=True)}
    return run | {"regret": run["regret"] | added}


def takes_part(name: str, job: Job) -> bool:
    """Whether a slow sampler runs on a landscape: with stock SMAC, or where `--others` keeps it."""
    return job.with_smac or f"{name} {job.kind} {job.d} {job.seed}" in kept_by_others(job.others)


def count_with_gradients(budget: float, cost: float) -> int:
    """Return how many trials with gradients a budget of forwards pays for."""
    return int(budget / cost)


def worth_of_gradients(job: Job) -> dict[str, Any]:
    """Return the regret after WORTH_TRIALS with gradients, and after WORTH_FACTORS times as many
    without.
    """
    landscape = landscape_of(job.kind, job.d, job.seed)
    most = int(max(WORTH_TRIALS) * max(WORTH_FACTORS))
    without = optimer_trials(landscape, config_of(landscape, job.seed, most))
    config = config_of(landscape, job.seed, max(WORTH_TRIALS), gradients=True)
    told = gradient_trials(landscape, config)
    recommended = {}
    for n in WORTH_TRIALS:
        recommended[f"gradients@{n}"] = ranked(config, told[:n])[0]
        for factor in WORTH_FACTORS:
            recommended[f"values@{n * factor:g}"] = ranked(config, without[: int(n * factor)])[0]
    regrets = uniform_regrets(landscape, list(recommended.values()))
    result = dict(zip(recommended, regrets, strict=True))
    return {"kind": job.kind, "d": job.d, "seed": job.seed, "regret": result}


def worth(options: Options) -> dict[str, Any]:
    """How many trials without gradients reach what one with them does."""
    print("\nworth: trials without gradients whose median regret is no larger, for one with them; ")
    print(f"  {options.seeds} landscapes a row")
    rows = options.chosen(gradient_rows())
    jobs = [Job(kind, d, seed) for seed in range(options.seeds) for kind, d in rows]
    runs = run_jobs("worth", worth_of_gradients, jobs, options.processes, options.kept)
    table = {}
    for kind, d in rows:
        regrets = [r["regret"] for r in runs if (r["kind"], r["d"]) == (kind, d)]
        medians = {c: statistics.median(r[c] for r in regrets) for c in regrets[0]}
        print(f"  {kind}, {d} vectors: ", end="")
        for n in WORTH_TRIALS:
            target = medians[f"gradients@{n}"]
            reached = (f for f in WORTH_FACTORS if medians[f"values@{n * f:g}"] <= target)
            factor = table[f"{kind} {d} {n}"] = next(reached, math.inf)
            text = f"{factor:g}" if factor < math.inf else f"more than {max(WORTH_FACTORS)}"
            print(f"{text} at {n} ({target:.2f} %); ", end="")
        print()
    return {"table": table, "medians": runs}


def cost_until(
    landscape: Landscape, config: StudyConfig, trials: Sequence[Trial], cost: float
) -> float:
    """Return the forwards after which what is recommended has a regret of REACHED % or less."""
    counts = range(2, len(trials) + 1)
    points = [ranked(config, trials[:n])[0] for n in counts]
    regrets = uniform_regrets(landscape, points)
    return next((n * cost for n, r in zip(counts, regrets, strict=True) if r <= REACHED), math.inf)


def recommend(job: Job) -> dict[str, Any]:
    """Let one sampler recommend, which `job.others` keeps."""
    return {"counts": [n for _, n in recommended_by(job.sampler, job)]}


def others(options: Options) -> dict[str, Any]:
    """Let the samplers that gradients is compared with recommend, slow ones too, for `--others`."""
    kept, rows = kept_by_others(options.others), options.chosen(gradient_rows())
    jobs = [
        Job(kind, d, seed, others=options.others, sampler=name)
        for seed in range(options.seeds)
        for kind, d in rows
        for name in OTHERS | MODELS
        if f"{name} {kind} {d} {seed}" not in kept
    ]
    print(f"\nothers: {len(jobs)} runs of other samplers, kept in {options.others}")
    run_jobs("others", recommend, jobs, options.processes)
    return {}


def gradients(options: Options) -> dict[str, Any]:
    """Our search with gradients against ours without, at equal cost in forwards."""
    print("\ngradients: regret in % of the gain at equal cost; one with gradients costs ", end="")
    print(f"{options.gradient_cost:g} forwards; medians; {options.seeds} landscapes a row")
    rows = options.chosen(gradient_rows())
    jobs = [
        Job(
            kind,
            d,
            seed,
            with_smac=seed < options.smac_seeds,
            others=options.others,
            gradient_cost=options.gradient_cost,
        )
        for seed in range(options.seeds)
        for kind, d in rows
    ]
    runs = run_jobs("gradients", compare_with_gradients, jobs, options.processes, options.kept)
    runs = [with_models(run, job) for run, job in zip(runs, jobs, strict=True)]
    return {"table": print_medians(rows, runs, verdict_on), "runs": runs}


def compare_large(job: Job) -> dict[str, Any]:
    """Return the regret in a large pool after equal costs: without gradients, with them, and with
    them over the vectors that a screen keeps.
    """
    landscape = landscape_of(job.kind, job.d, job.seed)
    recommended = {}
    for gradients, screen in LARGE_ARMS:
        name = ("gradients" if gradients else "values") + (f"-screen-{screen}" if screen else "")
        cost, extra = (job.gradient_cost, 0.0) if gradients else (1.0, 0.0)
        if screen and not gradients:  # the two places take gradients
            extra = N_PLACES * (job.gradient_cost - 1)
        counts = [int((budget - extra) / cost) for budget in GRADIENT_BUDGETS]
        config = config_of(
            landscape, job.seed, max(counts), gradients=gradients, screen=screen or None
        )
        run = gradient_trials if gradients or screen else optimer_trials
        trials = run(landscape, config)
        for budget, n in zip(GRADIENT_BUDGETS, counts, strict=True):
            recommended[name, budget] = ranked(config, trials[:n])[0]
    for name in OTHERS:
        recommended |= recommended_by(name, job)
    regrets = uniform_regrets(landscape, list(recommended.values()))
    result = {f"{name}@{n}": r for (name, n), r in zip(recommended, regrets, strict=True)}
    return {"kind": job.kind, "d": job.d, "seed": job.seed, "regret": result}


def large(options: Options) -> dict[str, Any]:
    """Large pools, several vectors for each domain: with a screen, with all, without gradients."""
    print(f"\nlarge: several vectors for each of {N_DOMAINS} domains; regret in % of the gain at ")
    print(f"  equal cost; one with gradients costs {options.gradient_cost:g} forwards; ", end="")
    print(f"medians; {options.seeds} landscapes a row")
    rows = options.chosen(("domains", d) for d in LARGE_DIMENSIONS)
    jobs = [
        Job(kind, d, seed, others=options.others, gradient_cost=options.gradient_cost)
        for seed in range(options.seeds)
        for kind, d in rows
    ]
    runs = run_jobs("large", compare_large, jobs, options.processes, options.kept)
    return {"table": print_medians(rows, runs, lambda *_: ""), "runs": runs}


def print_medians(
    rows: Sequence[tuple[str, int]],
    runs: Sequence[Mapping[str, Any]],
    verdict: Callable[[str, int, Sequence[Mapping[str, Any]], Mapping[str, float]], str],
) -> dict[str, dict[str, float]]:
    """Print a line of median regrets for every row, each with its verdict, and return them."""
    columns = list({column: None for result in runs for column in result["regret"]})
    print(f"  {'':19}" + "".join(f"{column:>{len(column) + 2}}" for column in columns))
    table = {}
    for kind, d in rows:
        results = [r for r in runs if (r["kind"], r["d"]) == (kind, d)]
        having = {c: [r["regret"][c] for r in results if c in r["regret"]] for c in columns}
        medians = {c: statistics.median(values) for c, values in having.items() if values}
        table[f"{kind} {d}"] = medians
        cells = "".join(
            f"{medians[c]:{len(c) + 2}.2f}" if c in medians else " " * (len(c) + 2) for c in columns
        )
        print(f"  {f'{kind}, {d} vectors':19}{cells}{verdict(kind, d, results, medians)}")
        some = {c: len(values) for c, values in having.items() if 0 < len(values) < len(results)}
        if some:
            print("    of fewer landscapes: " + ", ".join(f"{c} {n}" for c, n in some.items()))
    return table


def verdict_on(
    kind: str, d: int, results: Sequence[Mapping[str, Any]], medians: Mapping[str, float]
) -> str:
    """Return the comparison of a row with its bar, as text."""
    if kind not in KINDS:
        with_them, without = (
            statistics.median(r["until"][arm] for r in results) for arm in ("gradients", "values")
        )
        ratio = with_them / without
        text = f"{with_them:g} forwards until {REACHED:g} %, without {without:g}"
        return f"  {text} (bar {REACHED_BAR:g}{missed(ratio, REACHED_BAR)})"
    (budget, bar) = next((b, bar) for (n, b), bar in GRADIENT_BARS.items() if n == d)
    ratio = medians[f"gradients@{budget}"] / medians[f"values@{budget}"]
    return f"  {ratio:.2f} of the regret at {budget} (bar {bar:g}{missed(ratio, bar)})"


class LandscapePool:
    """Scores weights by a landscape: what a study needs instead of a model."""

    inputs: dict[str, str] = {}

    def __init__(self, landscape: Landscape, seed: int) -> None:
        self.landscape, self.rng = landscape, noise_of("optimer", seed)
        self.of_gradients = noise_of("gradients", seed)

    def score(
        self, weights: Mapping[str, float], asked: Sequence[Asked], *, gradients: bool = False
    ) -> Scored:
        """Observe the landscape once."""
        observed = self.landscape.observe(point_of(weights), self.rng)
        slopes = term_gradients(self.landscape, weights, self.of_gradients) if gradients else {}
        scores = term_scores(self.landscape, observed)
        return Scored(scores, {"merge": 0.0, "evaluate": 0.0}, 0, slopes)


def retarget_study(job: Job) -> dict[str, Any]:
    """Return the regret of weights predicted for random objectives from one recorded study."""
    landscape = landscape_of(job.kind, job.d, job.seed)
    n_trials = RETARGET_TRIALS
    if job.with_gradients:
        n_trials = count_with_gradients(n_trials, job.gradient_cost)
    config = config_of(landscape, job.seed, n_trials, gradients=job.with_gradients)
    objectives = np.random.default_rng([job.seed, 2]).dirichlet(np.ones(N_TERMS), N_OBJECTIVES)
    predicted, kept = [], []
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "study"
        runner = InProcess(lambda _: LandscapePool(landscape, job.seed))
        study = search(config, directory, runner=runner)
        incumbent = point_of(study.best_trial.weights)
        for objective in objectives:
            named = {f"t{t}": float(weight) for t, weight in enumerate(objective)}
            point = point_of(predict(study, named).weights)
            new, old = regrets(landscape, objective, np.array([point, incumbent]))
            predicted.append(new)
            kept.append(old)
    return {"kind": job.kind, "d": job.d, "seed": job.seed, "regret": predicted, "incumbent": kept}


def retarget(options: Options) -> dict[str, Any]:
    """Regret of weights predicted for new objectives from recorded trials, no new ones: 60 of them,
    and of losses also as many as these pay for with gradients.
    """
    rows = options.chosen((kind, d) for kind in ("smooth", "accuracy", "items") for d in DIMENSIONS)
    jobs = [
        Job(kind, d, seed, with_gradients=has_them, gradient_cost=options.gradient_cost)
        for seed in range(options.seeds)
        for kind, d in rows
        for has_them in ((False, True) if kind == "smooth" else (False,))  # accuracies have none
    ]
    results = run_jobs("retarget", retarget_study, jobs, options.processes, options.kept)
    n_trials = count_with_gradients(RETARGET_TRIALS, options.gradient_cost)
    print(
        f"\nretarget: regret in % for new objectives after {RETARGET_TRIALS} trials, or after the "
    )
    print(f"  {n_trials} with gradients that these pay for; medians, their 95 % bootstrap ", end="")
    print(f"intervals; {options.seeds} studies a row")
    table = {}
    for kind, d in rows:
        of_row = [
            (job.with_gradients, result)
            for job, result in zip(jobs, results, strict=True)
            if (job.kind, job.d) == (kind, d)
        ]
        for has_them in dict.fromkeys(each for each, _ in of_row):
            runs = [result for each, result in of_row if each == has_them]
            label = {"smooth": "loss", "items": "accuracy, fixed items"}.get(kind, kind)
            label += ", with gradients" * has_them
            table[f"{d} vectors, {label}"] = print_predicted(label, kind, d, runs)
    return {"table": table, "runs": results}


def print_predicted(
    label: str, kind: str, d: int, runs: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Print and return the median regret of what is predicted, next to the old incumbent's."""
    regrets_of = np.array([run["regret"] for run in runs])
    predicted, interval = float(np.median(regrets_of)), median_interval(regrets_of)
    kept = statistics.median(regret for run in runs for regret in run["incumbent"])
    bar = RETARGET_BARS.get((kind, d))
    note = "no bar" if bar is None else f"bar {bar}{missed(predicted, bar)}"
    print(
        f"  {label:21} {d} vectors {predicted:6.2f} [{interval[0]:.2f}, {interval[1]:.2f}] ", end=""
    )
    print(f"({note}); old incumbent {kept:6.2f}")
    return {"predicted": predicted, "interval": interval, "incumbent": kept}


def median_interval(by_study: "Array") -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median of [n_studies, n], studies drawn whole: what
    is asked of one study is not independent.
    """
    drawn = np.random.default_rng(0).integers(len(by_study), size=(10_000, len(by_study)))
    medians = np.median(by_study[drawn].reshape(len(drawn), -1), axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return float(low), float(high)


def asking(options: Options) -> dict[str, Any]:
    """CPU seconds of an ask after many recorded trials, with 4 terms, on one core."""
    print(f"\nasking: CPU seconds of an ask, {N_TERMS} terms, one core")
    table = {}
    for d, n_trials, with_gradients in ASKED:
        seconds = seconds_of_asks(d, n_trials, max(3, options.seeds // 4), with_gradients)
        median = statistics.median(seconds)
        name = f"{d} vectors, {n_trials:,} trials" + ", all with gradients" * with_gradients
        table[name] = seconds
        print(f"  {name}: {median:.3f} (of {len(seconds)}: ", end="")
        bar = missed(median, ASKING_BAR) if with_gradients else ""
        print(f"{min(seconds):.3f} to {max(seconds):.3f}; bar {ASKING_BAR:g}{bar})")
    return {"seconds": table}


def seconds_of_asks(d: int, n_trials: int, n_asks: int, with_gradients: bool) -> list[float]:
    """Return the CPU seconds of asks after so many recorded trials and a few more."""
    landscape, rng = landscape_of("smooth", d, 0), noise_of("optimer", 0)
    config = config_of(landscape, 0, n_trials, gradients=with_gradients)
    points = [point_of(weights) for _, weights in anchors(config)]
    points.extend(blends(rng, n_trials + n_asks - len(points), d))
    seconds = []
    with threadpool_limits(1), tempfile.TemporaryDirectory() as scratch:
        asker = Asker(config, Path(scratch))
        for number, point in enumerate(points):
            weights = dict(zip(config.free, map(float, point), strict=True))
            scores = term_scores(landscape, landscape.observe(point, rng))
            slopes = term_gradients(landscape, weights, rng) if with_gradients else {}
            candidate = Candidate(number, "told", weights, with_gradients=with_gradients)
            asker.tell(candidate.to_trial(scores, {}, 0, slopes))
            if number + 1 >= n_trials:
                started = process_time()
                asker.ask(number + 1)
                seconds.append(process_time() - started)
    return seconds[1:]  # the first one imports


MEASUREMENTS = {
    function.__name__: function
    for function in (
        samplers,
        paired,
        parallel,
        real,
        items,
        retarget,
        asking,
        others,
        gradients,
        worth,
        gradient_items,
        large,
    )
}


def check_installed() -> None:
    """Stop with what to install where Optuna or cma is missing."""
    try:
        import cma  # noqa: F401
        import optuna  # noqa: F401
    except ImportError as error:
        sys.exit(f"error: {error}. Run `pip install optuna cma`; only this benchmark needs them.")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--smac-seeds", type=int, default=20, help="Stock SMAC is slow.")
    parser.add_argument("--paired-seeds", type=int, default=100)
    parser.add_argument("--without-smac", action="store_true", help="Leave stock SMAC out.")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--others",
        type=Path,
        help="Keep what the other samplers recommend, which does not depend on our code, and take "
        "from here what an earlier run kept.",
    )
    parser.add_argument(
        "--kept",
        type=Path,
        help="Keep the result of every landscape, and take from here what an earlier run of the "
        "same code kept. Runs may share the file, and files may be joined.",
    )
    parser.add_argument("--quick", action="store_true", help="Two seeds and no stock SMAC.")
    parser.add_argument(
        "--gradient-cost",
        type=float,
        default=GRADIENT_COST,
        help="Forwards that a trial with gradients takes.",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=MEASUREMENTS,
        default=[name for name in MEASUREMENTS if name != "others"],
    )
    parser.add_argument(
        "--rows", nargs="+", choices=row_names(), default=[], help="Only these landscapes."
    )
    parsed = parser.parse_args()
    check_installed()
    if "others" in parsed.only and parsed.others is None:
        parser.error("--only others: say with --others where to keep what they recommend.")
    if min(parsed.seeds, parsed.paired_seeds) < 2:
        parser.error("--seeds and --paired-seeds: an interval needs two or more.")
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"  # inherited by the processes of the pool
    options = Options(
        seeds=2 if parsed.quick else parsed.seeds,
        smac_seeds=0 if parsed.without_smac or parsed.quick else parsed.smac_seeds,
        paired_seeds=2 if parsed.quick else parsed.paired_seeds,
        processes=parsed.processes,
        others=parsed.others,
        kept=parsed.kept,
        rows=parsed.rows,
        gradient_cost=parsed.gradient_cost,
    )
    print(f"{options.seeds} seeds ({options.smac_seeds} for stock SMAC), medians")
    measured = {name: MEASUREMENTS[name](options) for name in parsed.only}
    if "samplers" in measured and "real" in measured:
        print("\nsamplers and real together: ", end="")
        measured["both"] = {
            "rank": print_ranks(measured["samplers"]["runs"] + measured["real"]["runs"])
        }
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
