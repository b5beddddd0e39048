"""A study: SMAC ask/tell over the weights of a pool, every trial evaluated on a resident model.

A StudyConfig comes in, `trials.jsonl` goes out: append-only, fsynced, and the whole state of the
study. Anchors (base, each vector alone, uniform average) run first. A killed study goes on as if
nothing had happened, because each ask depends only on the recorded trials and the trial's number.
What a reader would not guess: SMAC's own run history is scratch in a temporary directory; its files
are neither append-only nor safe to kill.
"""

import contextlib
import fcntl
import json
import logging
import math
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import numpy as np
from pydantic import Field, model_validator

from optimer_hf.convert import resolve_model
from optimer_hf.errors import ConfigError, EvaluationError, ModelError, StudyError
from optimer_hf.evaluate import Evaluator, Objective, Scores, Term, TermScore, combine, gains
from optimer_hf.files import FileModel, ReferenceText, VersionedFile, digest, write_text
from optimer_hf.progress import Meter
from optimer_hf.resident import ResidentModel, default_device
from optimer_hf.surrogate import (
    GaussianProcess,
    WeightedSum,
    fit,
    log_expected_improvement,
    maximise,
)
from optimer_hf.vector import open_vector

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

logger = logging.getLogger(__name__)

ANCHOR_WEIGHT = 0.7
Fidelity = Literal["search", "rescore", "sealed"]


class VectorConfig(FileModel):
    """One vector of the pool: where it is, or which training run of the recipe folder makes it."""

    source: ReferenceText | None = None
    train: str | None = None
    bounds: tuple[float, float] = (0.0, 1.5)
    fixed: float | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.source is None) == (self.train is None):
            raise ValueError(
                "give exactly one of 'source' (a directory or Hub id) and 'train' (a train file of "
                "the recipe folder)"
            )
        if self.bounds[0] >= self.bounds[1]:
            raise ValueError(
                f"bounds {list(self.bounds)} are empty; give [low, high] with low < high, or "
                "'fixed'"
            )
        return self


class SearchConfig(FileModel):
    """How long and how carefully to search."""

    n_trials: int = Field(default=30, gt=0)
    seed: int = 0
    rescore_top: int = Field(default=3, ge=0)
    rescore_limit: int | None = Field(default=None, gt=0)


class StudyConfig(VersionedFile):
    """study.yaml: base, pool, objective, sealed test, and other objectives to answer from the same
    trials.
    """

    base_model: ReferenceText
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    vectors: dict[str, VectorConfig] = Field(min_length=1)
    objective: Objective
    test: Objective | None = None
    retarget: dict[str, dict[str, float]] = {}
    search: SearchConfig = SearchConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if all(vector.fixed is not None for vector in self.vectors.values()):
            raise ValueError("vectors: every vector is fixed, so there is nothing to search")
        recorded = {term.label for term in self.objective.terms}
        for name, weights in self.retarget.items():
            for label in weights:
                if label not in recorded:
                    raise ValueError(
                        f"retarget.{name}: no term {label!r} is recorded; terms: {sorted(recorded)}"
                    )
                if self.test is not None and label not in {term.label for term in self.test.terms}:
                    raise ValueError(
                        f"retarget.{name}: the test has no term {label!r} to measure it on"
                    )
        return self

    @property
    def identity(self) -> dict[str, Any]:
        """What must not change while a study goes on: everything but the number of trials."""
        data = self.model_dump(mode="json")
        del data["search"]["n_trials"]
        return data

    @property
    def free(self) -> dict[str, tuple[float, float]]:
        """Bounds of the vectors whose weight is searched."""
        return {
            name: vector.bounds for name, vector in self.vectors.items() if vector.fixed is None
        }

    @property
    def fixed(self) -> dict[str, float]:
        """Weights of the vectors that are always in the merge."""
        return {
            name: vector.fixed for name, vector in self.vectors.items() if vector.fixed is not None
        }


# -- trials ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One evaluation of one weight set; `seconds` are merge, evaluate, forward (a part of evaluate)
    and ask.
    """

    number: int
    origin: str
    fidelity: Fidelity
    weights: dict[str, float]
    status: Literal["ok", "crashed"]
    terms: dict[str, TermScore]
    seconds: dict[str, float]
    n_tokens: int = 0
    error: str | None = None

    def to_json(self) -> str:
        """Return the trial as one line of trials.jsonl."""
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> "Trial":
        """Read a line of trials.jsonl."""
        data = json.loads(line)
        data["terms"] = {
            label: TermScore(**{**term, "items": [(a, b) for a, b in term["items"]]})
            for label, term in data["terms"].items()
        }
        return cls(**data)


class TrialLog:
    """trials.jsonl: append-only, one fsync a trial; a line torn by a crash is cut off when it is
    opened.
    """

    def __init__(self, path: Path) -> None:
        """Read what is there; raise StudyError for damage that is not a torn last line."""
        self.path = path
        self.trials: list[Trial] = []
        if not path.exists():
            return
        lines = path.read_bytes().split(b"\n")
        whole = 0
        for number, line in enumerate(lines[:-1], start=1):
            try:
                self.trials.append(Trial.from_json(line.decode()))
            except (ValueError, TypeError, KeyError):
                raise StudyError(
                    f"{path}:{number}: not a trial. Remove the damaged line to go on without that "
                    "trial."
                ) from None
            whole += len(line) + 1
        if lines[-1]:
            logger.warning("%s: the last line was torn by a crash and is dropped", path.name)
            with open(path, "r+b") as file:
                file.truncate(whole)

    def append(self, trial: Trial) -> None:
        """Write one trial to disk before returning."""
        with open(self.path, "ab") as file:
            file.write(trial.to_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.trials.append(trial)

    def of(self, fidelity: Fidelity) -> list[Trial]:
        """Return the trials of one fidelity, in the order they ran."""
        return [trial for trial in self.trials if trial.fidelity == fidelity]


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

        base = resolve_model(config.base_model)
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
        result.append((origin, clipped | config.fixed))
    return result


def columns(config: StudyConfig, trials: Sequence[Trial]) -> "Array":
    """Return what the surrogate learns, [n_trials, n_columns]: a gain per counting term, or the
    value for `worst`.

    Crashed trials and very bad ones are set to a floor, five times the best gain below the base: a
    Gaussian process takes no infinities, and how bad a broken merge is does not matter.
    """
    base = trials[0].terms
    counting = [term for term in config.objective.at("search") if term.weight > 0]
    per_term = config.objective.combine != "worst"
    n_columns = len(counting) if per_term else 1
    table = np.full((len(trials), n_columns), -np.inf)
    for row, trial in enumerate(trials):
        if trial.status == "ok":
            each = _surrogate_gains(config.objective, trial.terms, base)
            values = [each[term.label] for term in counting]
            table[row] = values if per_term else [combine(config.objective, trial.terms, base)]
    floor = -5 * max(float(table.max()), 0.01)
    return np.asarray(np.maximum(table, floor))


def _surrogate_gains(objective: Objective, scores: Scores, base: Scores) -> dict[str, float]:
    """Return gains in the unit that `combine` averages: weighted_mean takes losses as they are, not
    relative ones.
    """
    each = gains(scores, base)
    if objective.combine != "weighted_mean":
        return each
    return {
        label: g if base[label].higher_is_better else g * abs(base[label].score)
        for label, g in each.items()
    }


def surrogate_of(config: StudyConfig, trials: Sequence[Trial]) -> WeightedSum:
    """Fit the posterior of the objective to trials whose first one is the base."""
    table = columns(config, trials)
    points = to_unit(config, [trial.weights for trial in trials])
    counting = [term.weight for term in config.objective.at("search") if term.weight > 0]
    weights = np.array(counting) / sum(counting) if table.shape[1] > 1 else np.ones(1)
    processes: list[GaussianProcess] = [fit(points, column) for column in table.T]
    return WeightedSum(processes, weights)


def to_unit(config: StudyConfig, weight_sets: Sequence[Mapping[str, float]]) -> "Array":
    """Scale the free weights by their bounds to [0, 1]."""
    low, high = np.array(list(config.free.values())).T
    points = np.array([[weights[name] for name in config.free] for weights in weight_sets])
    return np.asarray((points - low) / (high - low), dtype=np.float64)


def from_unit(config: StudyConfig, point: "Array") -> dict[str, float]:
    """Return the full weight set of a point in [0, 1]^d, rounded to 4 digits, which is all that
    YAML should show.
    """
    low, high = np.array(list(config.free.values())).T
    values = low + point * (high - low)
    return {
        name: round(float(value), 4) for name, value in zip(config.free, values, strict=True)
    } | config.fixed


class Asker:
    """SMAC behind a function: told every trial, asked for the next weights.

    SMAC runs the loop (run history, encoder, config selector); surrogate, acquisition function and
    its maximiser are ours, plugged into SMAC's extension points.
    """

    def __init__(self, config: StudyConfig) -> None:
        """Build the facade in a scratch directory that goes away with this object."""
        self._config = config
        self._scratch = tempfile.TemporaryDirectory(prefix="optimer-smac-")
        self._trials: list[Trial] = []
        self._facade, self._space = _facade(config, Path(self._scratch.name), self._trials)

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


# -- the study -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """A study directory: its config and its trials."""

    directory: Path
    config: StudyConfig
    log: TrialLog

    @property
    def base(self) -> dict[str, TermScore]:
        """Scores of the base on the search items."""
        return self.log.of("search")[0].terms

    @property
    def rescored_base(self) -> dict[str, TermScore]:
        """Scores of the base on the re-scoring items."""
        return self.log.of("rescore")[0].terms

    @property
    def is_finished(self) -> bool:
        """Whether all trials and re-scorings have run."""
        return len(self.log.of("search")) >= self.config.search.n_trials and not self.to_rescore()

    def to_rescore(self) -> list[Trial]:
        """Return the trials that still have to be scored on the re-scoring items: the base, then
        the best few.
        """
        if self.config.search.rescore_top == 0:
            return []
        done = {trial.number for trial in self.log.of("rescore")}
        chosen = [self.log.of("search")[0], *self.ranked()[: self.config.search.rescore_top]]
        return [
            trial
            for trial in {trial.number: trial for trial in chosen}.values()
            if trial.number not in done
        ]

    def ranked(self) -> list[Trial]:
        """Return the sound search trials, best first by posterior mean (one observation is noisy,
        the mean less so).
        """
        trials = self.log.of("search")
        mean, _ = surrogate_of(self.config, trials).predict(
            to_unit(self.config, [t.weights for t in trials])
        )
        order = np.argsort(-mean, kind="stable")
        return [trials[index] for index in order if trials[index].status == "ok"]

    @property
    def incumbent(self) -> Trial:
        """The best trial: by value among the re-scored ones, by posterior mean when none was
        re-scored.
        """
        rescored = [trial for trial in self.log.of("rescore") if trial.status == "ok"]
        if len(rescored) > 1:
            return max(
                rescored,
                key=lambda trial: combine(self.config.objective, trial.terms, self.rescored_base),
            )
        return self.ranked()[0]

    def value(self, trial: Trial) -> float:
        """Return the objective of a sound trial, relative to the base at the same fidelity."""
        base = self.base if trial.fidelity == "search" else self.rescored_base
        return combine(self.config.objective, trial.terms, base)


def open_study(config: StudyConfig, directory: Path) -> Study:
    """Create a study directory, or open the one that is there.

    Raises StudyError when it holds another study; the message names the fields that differ.
    """
    file = directory / "study.json"
    if not file.exists():
        if directory.exists() and any(
            not path.name.startswith(".") for path in directory.iterdir()
        ):
            raise StudyError(
                f"{directory}: is not empty and holds no study. Give another study directory."
            )
        write_text(file, config.model_dump_json(indent=2))
    recorded = json.loads(file.read_text(encoding="utf-8"))
    found, expected = StudyConfig.model_validate(recorded).identity, config.identity
    differing = [field for field in expected if found.get(field) != expected[field]]
    if differing:
        raise StudyError(
            f"{directory}: holds a study of another config; these fields differ: "
            f"{', '.join(differing)}. "
            "Give another study directory, or restore the config."
        )
    return Study(directory, config, TrialLog(directory / "trials.jsonl"))


def load_study(directory: Path) -> Study:
    """Open an existing study with the config it was made with."""
    file = directory / "study.json"
    if not file.exists():
        raise StudyError(
            f"{directory}: holds no study (no study.json). Run `optimer search STUDY.yaml "
            f"{directory}` first."
        )
    return open_study(StudyConfig.read(file), directory)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the study for this process; raise StudyError when a live process holds it."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StudyError(
                f"{directory}: another process is running this study. Wait for it, or stop it."
            ) from None
        yield


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
    with Meter("search", n_trials, "trials", done=len(done)) as meter:
        for number in range(len(done), n_trials):
            started = perf_counter()
            if number < len(planned):
                origin, weights = planned[number]
            else:
                if asker is None:
                    asker = Asker(config)
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


def study_digest(config: StudyConfig) -> str:
    """Return the digest that names a study in recipes."""
    return digest(config.identity)
