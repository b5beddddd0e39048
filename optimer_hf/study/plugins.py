"""Samplers and baselines that other packages add, as entry points.

A package declares them in its pyproject.toml: `[project.entry-points."optimer.samplers"]`. A study
names them. What a study from elsewhere names is only ever looked up among the packages that are
installed here.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimer_hf.errors import ConfigError, StudyError
from optimer_hf.files.layered import Origin
from optimer_hf.files.model import list_mistakes
from optimer_hf.files.paths import Place
from optimer_hf.files.text import did_you_mean, field_path, first_line, quote
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.trials import Trial

if TYPE_CHECKING:
    import numpy as np

    from optimer_hf.study.directory import Study

SAMPLERS, BASELINES = "optimer.samplers", "optimer.baselines"


@dataclass(frozen=True)
class Request:
    """What a sampler knows when it chooses the weights of trial `number`.

    `bounds` has the lowest and highest weight of each vector that is searched. `trials` are those
    that finished, the base first, and `values` their values of the objective: larger is better,
    None for a trial that crashed. `pending` are the weights of trials that still run. `rng` is
    seeded by study and trial, so that a resumed search asks for the same weights.
    """

    number: int
    bounds: Mapping[str, tuple[float, float]]
    trials: Sequence[Trial]
    values: Sequence[float | None]
    pending: Sequence[Mapping[str, float]]
    rng: "np.random.Generator"


Sampler = Callable[[Request], Mapping[str, float]]
Baseline = Callable[["Study"], Mapping[str, float] | str | Path]


def load_sampler(name: str) -> Sampler:
    """Return the installed sampler of a name; raise ConfigError if there is none."""
    sampler: Sampler = _load(SAMPLERS, "search.sampler", name)
    return sampler


def load_baseline(name: str) -> Baseline:
    """Return the installed baseline of a name; raise ConfigError if there is none."""
    baseline: Baseline = _load(BASELINES, "baselines.plugins", name)
    return baseline


def refuse_missing_plugins(config: StudyConfig, origin: Origin | None = None) -> None:
    """Raise ConfigError if a study, read from `origin` if that is given, names a sampler or
    baseline that is not installed. Nothing is imported.
    """
    others = config.baselines.searches.items()
    samplers: list[tuple[Place, str | None]] = [(("search", "sampler"), config.search.sampler)]
    samplers += [(("baselines", "searches", n, "sampler"), each.sampler) for n, each in others]
    named = [(at, SAMPLERS, name) for at, name in samplers if name is not None]
    named += [(("baselines", "plugins"), BASELINES, name) for name in config.baselines.plugins]
    for place, group, name in named:
        try:
            _find(group, field_path(place), name)
        except ConfigError as error:
            if origin is None:
                raise
            raise ConfigError(list_mistakes(origin, [(place, str(error))])) from None


def check_weights(
    weights: Any, bounds: Mapping[str, tuple[float, float]], who: str
) -> dict[str, float]:
    """Return the weights that `who` chose.

    Raises StudyError unless they are a number within its bounds for each vector.
    """
    expected = f"Expected a weight for each of {', '.join(bounds)}, within its bounds"
    if not isinstance(weights, Mapping) or set(weights) != set(bounds):
        raise StudyError(f"{who} returned {quote(weights)}. {expected}.")
    for name, (low, high) in bounds.items():
        try:
            is_within = low - 1e-9 <= float(weights[name]) <= high + 1e-9
        except (TypeError, ValueError):
            is_within = False
        if not is_within:
            found = f"{name}: {quote(weights[name])}, but its bounds are {low:g} and {high:g}"
            raise StudyError(f"{who} returned {found}. {expected}.")
    return {name: float(weights[name]) for name in bounds}


def _find(group: str, field: str, name: str) -> EntryPoint:
    installed = {each.name: each for each in entry_points(group=group)}
    if name not in installed:
        hint = did_you_mean(name, list(installed)) if installed else " None is installed."
        raise ConfigError(
            f"{field}: found {quote(name)}, expected an entry point of the group {group!r}.{hint} "
            "Install the package that has it."
        )
    return installed[name]


def _load(group: str, field: str, name: str) -> Any:
    entry = _find(group, field, name)
    try:
        return entry.load()
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(f"{field}: {entry.value} cannot be imported ({reason}).") from error
