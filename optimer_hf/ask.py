"""Which weights to try next: SMAC behind a function that is told trials and asked for weights.

Finished trials and the number of the next one come in, weights go out. Anchors (base, each vector
alone, uniform average) are planned ahead. What a reader would not guess: every answer depends only
on the trials told and the number asked for, so that a resumed search needs no replayed randomness.
"""

import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from optimer_hf.evaluate import combine
from optimer_hf.study import StudyConfig, Trial, from_unit, surrogate_of, to_unit
from optimer_hf.surrogate import WeightedSum, log_expected_improvement, maximise

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

ANCHOR_WEIGHT = 0.7


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
