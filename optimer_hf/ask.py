"""Which weights to try next: SMAC behind a function that is told trials and asked for weights.

Finished trials and the number of the next one come in, weights go out. Anchors (base, each vector
alone, uniform average) are planned ahead. What a reader would not guess: every answer depends only
on the trials told and the number asked for, so that a resumed search needs no replayed randomness.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from optimer_hf.evaluate import combine
from optimer_hf.study import StudyConfig, Trial, columns, from_unit, to_unit, within_total
from optimer_hf.surrogate import informative

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
        if origin != "base":  # every gain is relative to it, whatever the bounds
            point = np.clip(to_unit(config, [weights]), 0, 1)
            weights = from_unit(config, within_total(config, point)[0])
        result.append((origin, weights | config.fixed))
    return result


class Asker:
    """Told every finished trial, asked for the next weights.

    SMAC is made anew for every ask: it compares each configuration with all others that it knows,
    which takes minutes at a thousand, and our components need none of what it would remember.
    """

    def __init__(self, config: StudyConfig, scratch: Path) -> None:
        """Prepare SMAC; it writes its own files into `scratch`, where nobody reads them."""
        from optimer_hf.smac_parts import Record

        self._config, self._scratch = config, scratch
        self._record = Record(config)

    def tell(self, trial: Trial) -> None:
        """Record a finished trial; the first one is the base."""
        self._record.trials.append(trial)

    def ask(self, number: int, pending: Sequence[Mapping[str, float]] = ()) -> dict[str, float]:
        """Return the weights to try as trial `number`, while `pending` weights are still being
        evaluated.
        """
        from threadpoolctl import threadpool_limits

        self._record.number, self._record.pending = number, [dict(weights) for weights in pending]
        if self._config.search.surrogate == "random":
            rng = np.random.default_rng([self._config.search.seed, number])
            point = within_total(self._config, rng.random((1, len(self._config.free))))[0]
            return from_unit(self._config, point)
        with threadpool_limits(1):  # matrices of twenty rows: threads cost more than they bring
            info = self._facade().ask()
        return from_unit(self._config, np.asarray(info.config.get_array()))

    def _facade(self) -> Any:
        """Return a facade that knows what it needs: ours the base, so that it does not draw at
        random; one of SMAC's own all trials, or as many as the surrogate would look at.
        """
        from optimer_hf.smac_parts import facade_of, stock_facade_of

        trials = [trial for trial in self._record.trials if not trial.is_blameless]
        if self._config.search.surrogate == "per_term":
            facade, known = facade_of(self._record, self._scratch), trials[:1]
        else:
            facade = stock_facade_of(self._record, self._scratch)
            points = to_unit(self._config, [trial.weights for trial in trials])
            values = columns(self._config, trials).mean(axis=1, keepdims=True)
            known = [trials[index] for index in informative(points, values)]
        for trial in known:
            self._tell(facade, trial)
        return facade

    def _tell(self, facade: Any, trial: Trial) -> None:
        """Tell SMAC the cost of a trial; a crashed one gets a finite cost, an infinite one would
        break the model.
        """
        from ConfigSpace import Configuration
        from smac.runhistory.dataclasses import TrialInfo, TrialValue

        point = np.clip(to_unit(self._config, [trial.weights])[0], 0, 1)
        configuration = Configuration(facade.scenario.configspace, vector=point)
        cost = self._cost(trial) if trial.status == "ok" else self._cost_of_crashed()
        facade.tell(TrialInfo(config=configuration, seed=0), TrialValue(cost=cost), save=False)

    def _cost(self, trial: Trial) -> float:
        return -combine(self._config.objective, trial.terms, self._record.trials[0].terms)

    def _cost_of_crashed(self) -> float:
        sound = [trial for trial in self._record.trials if trial.status == "ok"]
        return max(self._cost(trial) for trial in sound) + 0.5
