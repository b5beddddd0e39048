"""Ask a sampler of a user for the next weights, in place of the surrogate."""

import hashlib
import inspect
from collections.abc import Mapping, Sequence

import numpy as np

from optimer_hf.errors import OptimerError, StudyError
from optimer_hf.files.text import first_line
from optimer_hf.scoring.objective import combine
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.plugins import Request, Sampler, check_weights, load_sampler
from optimer_hf.study.space import from_unit, to_unit, within_total
from optimer_hf.study.trials import Trial

NOT_KNOWN = "(source not known)"


def sampler_of(config: StudyConfig, ask: Sampler | None) -> tuple[str, Sampler] | None:
    """Return name and function of the sampler that a search uses: the one that the caller gave, or
    the one that the study names; None: the surrogate chooses.

    Raises ConfigError for a sampler that is not installed.
    """
    if ask is not None:
        return getattr(ask, "__name__", type(ask).__name__), ask
    if config.search.sampler is not None:
        return config.search.sampler, load_sampler(config.search.sampler)
    return None


def describe_sampler(sampler: tuple[str, Sampler] | None) -> str:
    """Return module and name of a sampler and the sha256 of its source, or that this is not known,
    as in a shell.
    """
    if sampler is None:
        return "the surrogate"
    function = sampler[1]
    code = function if inspect.isroutine(function) else type(function)
    where = f"{code.__module__}:{code.__qualname__}"
    try:
        source = inspect.getsource(code)
    except (OSError, TypeError):
        return f"{where} {NOT_KNOWN}"
    return f"{where} (sha256 of its source {hashlib.sha256(source.encode()).hexdigest()})"


class SamplerAsker:
    """Takes every finished trial, and asks a sampler for the next weights."""

    def __init__(self, config: StudyConfig, name: str, sampler: Sampler) -> None:
        self._config, self._name, self._sampler = config, name, sampler
        self._trials: list[Trial] = []

    def tell(self, trial: Trial) -> None:
        """Record a finished trial; the first one is the base."""
        self._trials.append(trial)

    def ask(self, number: int, pending: Sequence[Mapping[str, float]] = ()) -> dict[str, float]:
        """Return the weights to try as trial `number`, moved into `search.total` and rounded.

        Raises StudyError, which names the sampler, if it fails or returns anything else.
        """
        who, config = f"sampler {self._name!r}", self._config
        request = Request(
            number,
            dict(config.free),
            list(self._trials),
            [self._value(trial) for trial in self._trials],
            [dict(weights) for weights in pending],
            np.random.default_rng([config.search.seed, number]),
        )
        try:
            chosen = self._sampler(request)
        except OptimerError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise StudyError(
                f"{who} failed with {reason}. A sampler gets a Request and returns a weight for "
                f"each of {', '.join(config.free)}."
            ) from error
        weights = check_weights(chosen, config.free, who)
        return from_unit(config, within_total(config, to_unit(config, [weights]))[0])

    def _value(self, trial: Trial) -> float | None:
        if trial.status != "ok":
            return None
        return combine(self._config.objective, trial.terms, self._trials[0].terms)
