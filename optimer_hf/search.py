"""Running a study: SMAC asks for weights, a resident model answers with scores.

A StudyConfig comes in, a finished Study goes out. Anchors (base, each vector alone, uniform
average) run first. A killed study goes on as if nothing had happened, because each ask depends only
on the recorded trials and the trial's number. What a reader would not guess: SMAC's own run history
is scratch in a temporary directory; its files are neither append-only nor safe to kill.
"""

import logging
import math
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np

from optimer_hf.convert import resolve_base
from optimer_hf.errors import ConfigError, EvaluationError, ModelError
from optimer_hf.evaluate import Evaluator, Term, TermScore, combine
from optimer_hf.progress import Meter
from optimer_hf.resident import ResidentModel, default_device
from optimer_hf.study import (
    Study,
    StudyConfig,
    Trial,
    VectorConfig,
    from_unit,
    locked,
    open_study,
    surrogate_of,
    to_unit,
)
from optimer_hf.surrogate import WeightedSum, log_expected_improvement, maximise
from optimer_hf.vector import open_vector

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

logger = logging.getLogger(__name__)

ANCHOR_WEIGHT = 0.7


class Pool(Protocol):
    """What a study needs to run a trial: set weights, score terms; tests give a function of the
    weights instead.
    """

    def score(
        self, weights: Mapping[str, float], terms: Sequence[Term], limits: Mapping[str, int | None]
    ) -> tuple[dict[str, TermScore], dict[str, float], int]:
        """Return scores by term label, seconds by phase, and tokens read."""
        ...


class ResidentPool:
    """The real pool: a resident model and the harness."""

    def __init__(self, config: StudyConfig) -> None:
        """Open base, vectors and tasks; every mismatch is found here, before the first trial."""
        from transformers import AutoTokenizer

        base = resolve_base(config.base_model)
        self.vectors = [
            open_vector(name, _source(name, vector), base)
            for name, vector in config.vectors.items()
        ]
        self.base = base
        self._resident = ResidentModel(
            base, self.vectors, dtype=config.dtype, device=default_device()
        )
        tokenizer = AutoTokenizer.from_pretrained(base.path)
        objectives = [config.objective] + ([config.test] if config.test is not None else [])
        self._evaluator = Evaluator(self._resident.model, tokenizer, objectives)

    def score(
        self, weights: Mapping[str, float], terms: Sequence[Term], limits: Mapping[str, int | None]
    ) -> tuple[dict[str, TermScore], dict[str, float], int]:
        """Merge in place and evaluate."""
        started = perf_counter()
        self._resident.set_weights(weights)
        merged = perf_counter()
        forward, tokens = self._evaluator.forward_seconds, self._evaluator.n_tokens
        scores = self._evaluator.evaluate(terms, limits=limits)
        seconds = {
            "merge": merged - started,
            "evaluate": perf_counter() - merged,
            "forward": self._evaluator.forward_seconds - forward,
        }
        return scores, seconds, self._evaluator.n_tokens - tokens


def _source(name: str, vector: VectorConfig) -> str:
    if vector.source is None:
        raise ConfigError(
            f"vectors.{name}.train: {vector.train!r} has to be trained first. Run `optimer run` on "
            "the recipe folder, "
            "or give a 'source'."
        )
    return vector.source


# -- asking ----------------------------------------------------------------------------------------


def anchors(config: StudyConfig) -> list[tuple[str, dict[str, float]]]:
    """Return the weight sets every search starts from: base, each vector alone, uniform average."""
    free = list(config.free)
    sets = [("base", dict.fromkeys(free, 0.0))]
    sets += [
        (f"{name} alone", {other: ANCHOR_WEIGHT * (other == name) for other in free})
        for name in free
    ]
    if len(free) > 1:
        sets.append(("average", dict.fromkeys(free, 1 / len(free))))
    result = []
    for origin, weights in sets:
        clipped = {name: float(np.clip(weights[name], *config.free[name])) for name in free}
        if origin == "base":  # every gain is relative to it, whatever the bounds
            clipped = weights
        result.append((origin, clipped | config.fixed))
    return result


class Asker:
    """SMAC behind a function: told every trial, asked for the next weights.

    SMAC runs the loop (run history, encoder, config selector); surrogate, acquisition function and
    its maximiser are ours, plugged into SMAC's extension points.
    """

    def __init__(self, config: StudyConfig, scratch: Path) -> None:
        """Build the facade; SMAC writes its own files into `scratch`, where nobody reads them."""
        self._config = config
        self._trials: list[Trial] = []
        self._facade, self._space = _facade(config, scratch, self._trials)

    def tell(self, trial: Trial) -> None:
        """Record a finished trial; a crashed one gets a finite cost, an infinite one would break
        the model.
        """
        from ConfigSpace import Configuration
        from smac.runhistory.dataclasses import TrialInfo, TrialValue

        self._trials.append(trial)
        point = np.clip(to_unit(self._config, [trial.weights])[0], 0, 1)
        configuration = Configuration(self._space, vector=point)
        base = self._trials[0].terms
        cost = -combine(self._config.objective, trial.terms, base) if trial.status == "ok" else 1.0
        self._facade.tell(
            TrialInfo(config=configuration, seed=0), TrialValue(cost=cost), save=False
        )

    def ask(self) -> dict[str, float]:
        """Return the weights to evaluate next."""
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1):  # matrices of twenty rows: threads cost more than they bring
            info = self._facade.ask()
        return from_unit(self._config, np.asarray(info.config.get_array()))


def _facade(config: StudyConfig, scratch: Path, trials: list[Trial]) -> tuple[Any, Any]:
    """Return SMAC's black-box facade with our components, and its space of unit weights."""
    from ConfigSpace import Configuration, ConfigurationSpace, Float
    from smac import BlackBoxFacade, Scenario
    from smac.acquisition.function.abstract_acquisition_function import AbstractAcquisitionFunction
    from smac.acquisition.maximizer.abstract_acquisition_maximizer import (
        AbstractAcquisitionMaximizer,
    )
    from smac.main.config_selector import ConfigSelector
    from smac.model.abstract_model import AbstractModel

    class Surrogate(AbstractModel):
        """One process per term, read from the trials; SMAC's combined cost only decides when to
        refit.
        """

        posterior: WeightedSum

        def _train(self, X: "Array", y: "Array") -> Self:  # noqa: N803  # SMAC's names
            self.posterior = surrogate_of(config, trials)
            self._is_trained = True
            return self

        def _predict(
            self,
            X: "Array",  # noqa: N803
            covariance_type: str | None = "diagonal",
        ) -> tuple["Array", "Array | None"]:
            mean, variance = self.posterior.predict(X)
            if covariance_type is None:
                return -mean[:, None], None
            return -mean[:, None], (np.sqrt(variance) if covariance_type == "std" else variance)[
                :, None
            ]

        def predict_marginalized(self, X: "Array") -> tuple["Array", "Array"]:  # noqa: N803
            mean, variance = self.posterior.predict(X)
            return -mean[:, None], variance[:, None]

    class LogExpectedImprovement(AbstractAcquisitionFunction):
        """log EI over the best posterior mean among the trials: observed scores are noisy."""

        eta = math.inf

        @property
        def name(self) -> str:
            return "log expected improvement"

        def _update(self, **kwargs: Any) -> None:
            self.eta = float(np.asarray(kwargs["eta"]).reshape(-1)[0])

        def _compute(self, X: "Array") -> "Array":  # noqa: N803
            assert isinstance(self.model, Surrogate)
            mean, variance = self.model.posterior.predict(X)
            return log_expected_improvement(mean, variance, -self.eta)[:, None]

    class Maximiser(AbstractAcquisitionMaximizer):
        """Vectorised; its randomness depends on the seed and the trial's number only, so a resumed
        study repeats it.
        """

        def maximize(
            self,
            previous_configs: list[Configuration],
            n_points: int | None = None,
            random_design: Any = None,
        ) -> Iterator[Configuration]:
            assert self.acquisition_function is not None
            rng = np.random.default_rng([config.search.seed, len(trials)])
            model = self.acquisition_function.model
            assert isinstance(model, Surrogate)
            seen = to_unit(config, [trial.weights for trial in trials])
            best = seen[np.argsort(-model.posterior.predict(seen)[0])[:5]]
            acquisition = self.acquisition_function
            found = maximise(
                lambda x: np.asarray(acquisition._compute(x))[:, 0], len(config.free), rng, best
            )
            jittered = np.clip(found + 0.02 * rng.normal(size=found.shape), 0, 1)
            return iter(
                [Configuration(self._configspace, vector=vector) for vector in (found, jittered)]
            )

        def _maximize(self, previous_configs: list[Configuration], n_points: int) -> list[Any]:
            raise NotImplementedError("maximize() is overridden")

    space = ConfigurationSpace(seed=config.search.seed)
    space.add([Float(name, (0.0, 1.0)) for name in config.free])
    scenario = Scenario(
        space, deterministic=True, n_trials=10**6, output_directory=scratch, seed=config.search.seed
    )
    facade = _open_facade(BlackBoxFacade)(
        scenario,
        _unused_target,
        model=Surrogate(space, seed=config.search.seed),
        acquisition_function=LogExpectedImprovement(),
        acquisition_maximizer=Maximiser(space, challengers=1, seed=config.search.seed),
        initial_design=BlackBoxFacade.get_initial_design(scenario, n_configs=0),
        random_design=BlackBoxFacade.get_random_design(scenario, probability=1e-9),
        config_selector=ConfigSelector(scenario, retrain_after=1),
        intensifier=BlackBoxFacade.get_intensifier(scenario, max_config_calls=1),
        overwrite=True,  # SMAC asks on stdin when it finds an old run
        logging_level=False,
    )
    logging.getLogger("smac").setLevel(
        logging.ERROR
    )  # it warns that the initial design is empty: the anchors are ours
    return facade, space


def _open_facade(black_box: type) -> type:
    """Return SMAC's black-box facade without its rule that the model must be one of its own
    processes.
    """
    from smac.facade.abstract_facade import AbstractFacade

    return type("OptimerFacade", (black_box,), {"_validate": AbstractFacade._validate})


def _unused_target(config: Any, seed: int = 0) -> float:
    raise AssertionError("SMAC is only asked and told")


# -- running ---------------------------------------------------------------------------------------


def search(
    config: StudyConfig, directory: Path, *, pool: Callable[[StudyConfig], Pool] = ResidentPool
) -> Study:
    """Run a study to its end and return it; trials that are on disk already are not run again.

    Raises OptimerError for anything wrong with the config before the first trial. A trial that
    fails is recorded as crashed and the search goes on, unless the base itself cannot be scored.
    """
    with locked(directory):
        study = open_study(config, directory)
        if study.is_finished:
            logger.info(
                "search: %d trials are recorded, nothing to do", len(study.log.of("search"))
            )
            return study
        runner = pool(config)
        _run_search(study, runner)
        _run_rescore(study, runner)
    return study


def _run_search(study: Study, pool: Pool) -> None:
    config, n_trials = study.config, study.config.search.n_trials
    done = study.log.of("search")
    terms = config.objective.at("search")
    limits = {term.label: config.objective.limit_of(term) for term in terms}
    planned = anchors(config)
    asker: Asker | None = None
    with (
        Meter("search", n_trials, "trials", done=len(done)) as meter,
        tempfile.TemporaryDirectory(prefix="optimer-smac-") as scratch,
    ):
        for number in range(len(done), n_trials):
            started = perf_counter()
            if number < len(planned):
                origin, weights = planned[number]
            else:
                if asker is None:
                    asker = Asker(config, Path(scratch))
                    for trial in study.log.of("search"):
                        asker.tell(trial)
                started = perf_counter()
                origin, weights = "surrogate", asker.ask()
            asked = perf_counter() - started
            trial = run_trial(
                pool,
                Trial(number, origin, "search", weights, "ok", {}, {"ask": asked}),
                terms,
                limits,
            )
            if number == 0 and trial.status == "crashed":
                raise EvaluationError(f"the base model itself cannot be scored: {trial.error}")
            study.log.append(trial)
            if asker is not None:
                asker.tell(trial)
            meter.advance(1, _note(study, trial))


def _note(study: Study, trial: Trial) -> str:
    if trial.status == "crashed":
        return "crashed"
    best = max(study.value(t) for t in study.log.of("search") if t.status == "ok")
    return f"{study.value(trial):+.4f}, best {best:+.4f}"


def _run_rescore(study: Study, pool: Pool) -> None:
    """Score the base and the best few on more items, with the terms that joined for this."""
    config = study.config
    terms = config.objective.at("rescore")
    limits = {
        term.label: config.search.rescore_limit
        if term.limit is None or not term.rescore_only
        else term.limit
        for term in terms
    }
    remaining, done = study.to_rescore(), len(study.log.of("rescore"))
    with Meter("re-score", done + len(remaining), "trials", done=done) as meter:
        for trial in remaining:
            again = replace(trial, fidelity="rescore", terms={}, seconds={}, n_tokens=0)
            rescored = run_trial(pool, again, terms, limits)
            if trial.number == 0 and rescored.status == "crashed":
                raise EvaluationError(
                    f"the base model itself cannot be scored again: {rescored.error}"
                )
            study.log.append(rescored)
            meter.advance(1)


def run_trial(
    pool: Pool, trial: Trial, terms: Sequence[Term], limits: Mapping[str, int | None]
) -> Trial:
    """Return the trial with its scores; a failure is recorded with its traceback, not raised."""
    try:
        scores, seconds, n_tokens = pool.score(trial.weights, terms, limits)
    except ModelError:
        raise
    except Exception as error:  # one bad weight set must not end a search of hours
        text = f"{type(error).__name__}: {error}\n{traceback.format_exc(limit=-3)}"
        logger.warning("trial %d crashed: %s", trial.number, error)
        return replace(trial, status="crashed", error=text)
    rounded = {phase: round(value, 4) for phase, value in (trial.seconds | seconds).items()}
    return replace(trial, terms=scores, seconds=rounded, n_tokens=n_tokens)
