"""Finished trials -> the weights to try next, by SMAC. No other file imports SMAC.

SMAC is only asked and told: an Asker hands it a surrogate, an acquisition function and a maximiser
of ours, or takes one of its stock facades as it is.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from ConfigSpace import Configuration, ConfigurationSpace, Float
from smac import BlackBoxFacade, HyperparameterOptimizationFacade, Scenario
from smac.acquisition.function.abstract_acquisition_function import AbstractAcquisitionFunction
from smac.acquisition.maximizer.abstract_acquisition_maximizer import AbstractAcquisitionMaximizer
from smac.facade.abstract_facade import AbstractFacade
from smac.main.config_selector import ConfigSelector
from smac.model.abstract_model import AbstractModel
from smac.runhistory.dataclasses import TrialInfo, TrialValue
from threadpoolctl import ThreadpoolController

from optimer_hf.scoring.objective import combine
from optimer_hf.study.acquisition import climb, log_expected_improvement, maximise
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.gp import choose_informative
from optimer_hf.study.gradients import has_all_gradients, n_trials_worth
from optimer_hf.study.screening import searched_part
from optimer_hf.study.space import columns_of, embed, from_unit, to_unit, within_total
from optimer_hf.study.surrogate import Surrogate, columns, fit_surrogate
from optimer_hf.study.trials import Trial

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]


USUAL_TOTAL, TOTAL_DEVIATION = 1.2, 0.5  # sum of the weights in good merges
PRIOR_TRIALS = 30  # the prior counts as this many trials
CAUTION, NEAR = 0.5, 0.02  # of trials with gradients: standard deviations; side of the unit box
N_NEIGHBOURS = 100
SPREAD_FROM, SPREAD_EVERY = 20, 2  # from this trial on, every second one


@dataclass
class AskState:
    """What our components of SMAC know: finished trials, weights that run, the next number."""

    config: StudyConfig
    trials: list[Trial] = field(default_factory=list)
    pending: list[dict[str, float]] = field(default_factory=list)
    number: int = 0
    _fitted: tuple[tuple[int, int], Surrogate] | None = None

    def surrogate(self) -> Surrogate:
        """Return the surrogate, fitted once for each number of trials and each preference."""
        spreads = _is_for_random_preference(self.config, self.number)
        state = (len(self.trials), self.number if spreads else 0)
        if self._fitted is None or self._fitted[0] != state:
            rng = np.random.default_rng([self.config.search.seed, self.number, 1])
            n_terms = sum(term.weight > 0 for term in self.config.objective.terms_at("search"))
            preference = rng.dirichlet(np.ones(n_terms)) if spreads else None
            self._fitted = state, fit_surrogate(self.config, self.trials, preference)
        return self._fitted[1]


def _is_for_random_preference(config: StudyConfig, number: int) -> bool:
    """Whether trial `number` is chosen for a random weighting of the terms: with `pareto` every one
    is, with `spread` every second one, once the optimum of the objective is roughly known.
    """
    if config.search.pareto:
        return True
    in_turn = number >= SPREAD_FROM and number % SPREAD_EVERY == 0
    n_terms = sum(term.weight > 0 for term in config.objective.terms_at("search"))
    has_several = n_terms > 1 and config.objective.combine != "worst"
    return config.search.spread and in_turn and has_several


class SurrogateModel(AbstractModel):
    """Our surrogate as a model of SMAC, which ignores SMAC's combined costs."""

    def __init__(self, record: AskState, space: ConfigurationSpace) -> None:
        super().__init__(space, seed=record.config.search.seed)
        self._record = record

    def _train(self, X: "Array", y: "Array") -> Self:  # noqa: N803  # SMAC's names
        self._is_trained = True
        return self

    @property
    def posterior(self) -> Surrogate:
        """The surrogate as it is now."""
        return self._record.surrogate()

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
        """Return constants: SMAC looks for its best trial with this, but nobody asks for that
        trial.
        """
        return np.zeros((len(X), 1)), np.ones((len(X), 1))


class FeasibleImprovement(AbstractAcquisitionFunction):
    """The sum of log EI, the log probability to keep every constraint (Gardner et al., ICML 2014),
    and a log prior that fades with the number of trials (Hvarfner et al., ICLR 2022, eq. 6).

    EI is over the best posterior mean among the trials, since observed scores are noisy. The prior
    says what is known of merges: weights whose sum is far beyond 1 break the model. Without it, the
    first proposals go to far corners of the box, where nothing was measured.
    """

    posterior: Surrogate
    best: float
    log_prior: Callable[["Array"], "Array"]

    @property
    def name(self) -> str:
        return "log expected feasible improvement"

    def _update(self, **kwargs: Any) -> None:
        pass  # the maximiser sets posterior, best and prior for every ask

    def _compute(self, X: "Array") -> "Array":  # noqa: N803
        mean, variance = self.posterior.predict(X)
        improvement = log_expected_improvement(mean, variance, self.best)
        total = improvement + self.posterior.log_feasibility(X) + self.log_prior(X)
        return np.asarray(total)[:, None]


def log_prior_of_total(config: StudyConfig, n_trials: float, points: "Array") -> "Array":
    """Return the log prior [n] of points [n, d] after n_trials, or what is worth as many: a
    half-normal density of how far the sum of the absolute weights is beyond USUAL_TOTAL. Of a
    vector with groups that sum takes the mean weight, a fixed group as 0.
    """
    low, high = np.array(list(config.free.values())).T
    of_vectors = [vector.weights_of(name) for name, vector in config.vectors.items()]
    n_groups = {weight: len(own) for own in of_vectors for weight in own}
    shares = np.abs(low + points * (high - low)) / [n_groups[weight] for weight in config.free]
    total = shares.sum(axis=1)
    beyond = np.maximum(total - USUAL_TOTAL, 0) / TOTAL_DEVIATION
    return np.asarray(-0.5 * beyond**2 * PRIOR_TRIALS / n_trials)


def _cautious(acquisition: FeasibleImprovement, points: "Array") -> "Array":
    """Return what is expected of points [n, d] minus CAUTION standard deviations, and more where
    the prior of the total is low.

    Gradients tell of the surroundings, so that a search need not look there to learn, which is
    what expected improvement does: it spends every second trial far away.
    """
    return acquisition.posterior.ranking(points, CAUTION - acquisition.log_prior(points))


def _find_largest(
    config: StudyConfig,
    searched: StudyConfig,
    rng: np.random.Generator,
    near: "Array",
    acquisition: Callable[["Array"], "Array"],
    *,
    climbs: bool,
    upper: Callable[["Array"], "Array"] | None = None,
) -> "Array":
    """Return the point of the searched weights where an acquisition over all free weights is
    largest; `upper` is a bound of it that costs less.
    """

    def value(points: "Array") -> "Array":
        return acquisition(embed(config, searched, points))

    allowed = partial(within_total, searched)
    bound = None if upper is None else lambda points: upper(embed(config, searched, points))
    best = maximise(value, len(searched.free), rng, near, allowed=allowed, bound=bound)
    return climb(value, best, allowed=allowed) if climbs else best


def _is_near(point: "Array", tried: "Array") -> bool:
    """Whether a point [d] of the unit box is so near one of those that were tried [n, d] that
    another trial there would tell little.
    """
    return bool(np.sqrt(((tried - point) ** 2).sum(axis=1)).min() < NEAR)


class Maximiser(AbstractAcquisitionMaximizer):
    """Our vectorised maximiser. Its random numbers depend only on the seed and the number of the
    trial, so that a resumed study repeats them.
    """

    def __init__(self, record: AskState, space: ConfigurationSpace) -> None:
        super().__init__(space, challengers=1, seed=record.config.search.seed)
        self._record = record

    def maximize(
        self,
        previous_configs: list[Configuration],
        n_points: int | None = None,
        random_design: Any = None,
    ) -> Iterator[Configuration]:
        record, acquisition = self._record, self.acquisition_function
        assert isinstance(acquisition, FeasibleImprovement)
        assert isinstance(acquisition.model, SurrogateModel)
        fitted, config = acquisition.model.posterior, record.config
        searched = searched_part(config, record.trials)
        pending = to_unit(config, record.pending)
        tried = np.vstack([fitted.points, pending])
        ranking = fitted.ranking(tried)
        acquisition.best = float(fitted.mean(tried)[np.argmax(ranking)])
        acquisition.posterior = fitted.condition_on(pending)
        n_trials = n_trials_worth(searched, record.trials)
        acquisition.log_prior = partial(log_prior_of_total, config, n_trials)
        rng = np.random.default_rng([config.search.seed, record.number])
        in_part = tried[:, columns_of(config, searched)]
        knows_surroundings = has_all_gradients(config, record.trials)
        find = partial(
            _find_largest,
            config,
            searched,
            rng,
            in_part[np.argsort(-ranking, kind="stable")[:5]],
            climbs=knows_surroundings,
        )
        best = None
        if knows_surroundings:
            best = find(partial(_cautious, acquisition), upper=acquisition.posterior.mean)
        if best is None or _is_near(best, in_part):
            best = find(lambda points: acquisition._compute(points)[:, 0])
        untried = self._step_off_tried(searched, best, rng)
        return iter([Configuration(self._configspace, vector=untried)])

    def _step_off_tried(
        self, searched: StudyConfig, best: "Array", rng: np.random.Generator
    ) -> "Array":
        """Return the point of all free weights for one of the searched, or one nearby if its
        weights were tried. SMAC would refuse those, and draw a random point with a generator whose
        state a resumed search does not repeat.
        """
        record = self._record
        known = [trial.weights for trial in record.trials] + record.pending
        point = best
        for step in range(N_NEIGHBOURS):
            weights = from_unit(searched, point)
            if weights not in known:
                return np.asarray(to_unit(record.config, [weights])[0])
            moved = best + 0.02 * 1.1**step * rng.normal(size=best.shape)
            point = within_total(searched, np.clip(moved, 0, 1)[None])[0]
        return np.asarray(embed(record.config, searched, point[None])[0])

    def _maximize(self, previous_configs: list[Configuration], n_points: int) -> list[Any]:
        raise NotImplementedError("maximize() is overridden")


class _Facade(BlackBoxFacade):
    """SMAC's black-box facade, but its model need not be one of SMAC's own processes."""

    def _validate(self) -> None:
        AbstractFacade._validate(self)


def unit_space(config: StudyConfig, seed: int) -> ConfigurationSpace:
    """Return SMAC's space of weights scaled to [0, 1]."""
    space = ConfigurationSpace(seed=seed)
    space.add([Float(name, (0.0, 1.0)) for name in config.free])
    return space


def facade_of(record: AskState, scratch: Path) -> Any:
    """Return SMAC's black-box facade with our components. It writes files into `scratch`, which
    nobody reads.
    """
    space = unit_space(record.config, record.config.search.seed)
    scenario = _scenario(space, scratch, record.config.search.seed)
    return _Facade(
        scenario,
        _refuse_to_run,
        model=SurrogateModel(record, space),
        acquisition_function=FeasibleImprovement(),
        acquisition_maximizer=Maximiser(record, space),
        random_design=BlackBoxFacade.get_random_design(scenario, probability=1e-9),
        config_selector=ConfigSelector(scenario, retrain_after=1),
        **_ask_and_tell_settings(BlackBoxFacade, scenario),
    )


def stock_facade_of(record: AskState, scratch: Path) -> Any:
    """Return one of SMAC's own facades as it comes, for one ask. Its seed depends on the number of
    the trial, since SMAC does not restore the state of its generators.
    """
    config = record.config
    facades = {"black_box": BlackBoxFacade, "random_forest": HyperparameterOptimizationFacade}
    seed = int(np.random.default_rng([config.search.seed, record.number]).integers(2**31))
    scenario = _scenario(unit_space(config, seed), scratch, seed)
    facade = facades[config.search.surrogate]
    return facade(scenario, _refuse_to_run, **_ask_and_tell_settings(facade, scenario))


def _scenario(space: ConfigurationSpace, scratch: Path, seed: int) -> Scenario:
    return Scenario(space, deterministic=True, n_trials=10**6, output_directory=scratch, seed=seed)


def _ask_and_tell_settings(facade: Any, scenario: Scenario) -> dict[str, Any]:
    """Return the settings of a facade that is only asked and told."""
    logger = logging.getLogger("smac")
    if logger.level != logging.ERROR:  # it warns of an empty initial design; we have anchors
        # once, not at every ask: a signal that raises inside setLevel would leave logging locked
        logger.setLevel(logging.ERROR)
    return {
        "initial_design": facade.get_initial_design(scenario, n_configs=0),
        "intensifier": facade.get_intensifier(scenario, max_config_calls=1),
        "overwrite": True,  # SMAC prompts on stdin when it finds an old run
        "logging_level": False,
    }


def _refuse_to_run(config: Any, seed: int = 0) -> float:
    raise AssertionError("SMAC is only asked and told")


class Asker:
    """Takes every finished trial, and proposes the next weights.

    It makes a new SMAC for every ask. SMAC compares each configuration with all others that it
    knows, which takes minutes at a thousand of them, and our components need none of that.
    """

    def __init__(self, config: StudyConfig, scratch: Path) -> None:
        """Prepare for SMAC, which writes files into `scratch` that nobody reads."""
        self._config, self._scratch = config, scratch
        self._record = AskState(config)
        self._threads = ThreadpoolController()  # it looks through all libraries that are loaded

    def tell(self, trial: Trial) -> None:
        """Record a finished trial; the first one is the base."""
        self._record.trials.append(trial)

    def ask(self, number: int, pending: Sequence[Mapping[str, float]] = ()) -> dict[str, float]:
        """Return the weights to try as trial `number`, while `pending` weights are being
        evaluated.
        """
        self._record.number, self._record.pending = number, [dict(weights) for weights in pending]
        if self._config.search.surrogate == "random":
            rng = np.random.default_rng([self._config.search.seed, number])
            point = within_total(self._config, rng.random((1, len(self._config.free))))[0]
            return from_unit(self._config, point)
        with self._threads.limit(
            limits=1
        ):  # for matrices of twenty rows, threads cost more than they save
            info = self._facade().ask()
        return from_unit(self._config, np.asarray(info.config.get_array()))

    def _facade(self) -> Any:
        """Return a facade that has been told what it needs. Ours needs the base, or it would draw
        at random; one of SMAC's own gets all trials, or those that a surrogate would be fitted to.
        """
        trials = [trial for trial in self._record.trials if not trial.is_blameless]
        if self._config.search.surrogate == "per_term":
            facade, known = facade_of(self._record, self._scratch), trials[:1]
        else:
            facade = stock_facade_of(self._record, self._scratch)
            points = to_unit(self._config, [trial.weights for trial in trials])
            values = columns(self._config, trials).mean(axis=1, keepdims=True)
            known = [trials[index] for index in choose_informative(points, values)]
        for trial in known:
            self._tell(facade, trial)
        return facade

    def _tell(self, facade: Any, trial: Trial) -> None:
        """Tell SMAC the cost of a trial. A crashed one gets a finite cost, since an infinite one
        would break the model.
        """
        point = np.clip(to_unit(self._config, [trial.weights])[0], 0, 1)
        configuration = Configuration(facade.scenario.configspace, vector=point)
        cost = self._cost(trial) if trial.status == "ok" else self._cost_of_crashed()
        facade.tell(TrialInfo(config=configuration, seed=0), TrialValue(cost=cost), save=False)

    def _cost(self, trial: Trial) -> float:
        return -combine(self._config.objective, trial.terms, self._record.trials[0].terms)

    def _cost_of_crashed(self) -> float:
        sound = [trial for trial in self._record.trials if trial.status == "ok"]
        return max(self._cost(trial) for trial in sound) + 0.5
