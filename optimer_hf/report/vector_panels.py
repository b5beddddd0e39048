"""Panels about the vectors: their angles, their training, and what everything cost."""

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from optimer_hf.comparison.ledger import Ledger
from optimer_hf.errors import OptimerError
from optimer_hf.files.text import show_seconds, signed
from optimer_hf.merging.geometry_cache import read_or_measure
from optimer_hf.merging.geometry_file import GEOMETRY
from optimer_hf.report.drawing import COLOURS, Panel, make_figure
from optimer_hf.report.evidence import Evidence
from optimer_hf.vectors.training_record import PartialRun, RunRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

NEARLY_PARALLEL = 0.2  # cosine
FEWEST_VECTORS = 2  # in a table of cosines
FEWEST_POINTS = 2  # of a line
FEWEST_STAGES = 2  # that took time
LEAST_SHARE = 0.01  # of the time, below which a stage has no bar
LEAST_MINUTES = 2  # of the longest stage, below which an axis has seconds


def cosines_panel(evidence: Evidence) -> Panel | None:
    """Show the angles between the vectors; None if a vector or the base cannot be read any more.

    The vectors are read unless the study has kept their angles.
    """
    study, config = evidence.study, evidence.study.config
    sources = {name: str(vector.source) for name, vector in config.vectors.items()}
    if len(sources) < FEWEST_VECTORS:
        return None
    try:
        kept = study.directory / GEOMETRY
        measured = read_or_measure(
            sources,
            config.base_model,
            config.dtype,
            kept,
            config.vocabulary,
            config.tokenizer_reference,
        )
    except OptimerError as error:
        logger.warning("the report leaves out the cosines: %s", error)
        return None
    names = list(sources)
    table = np.eye(len(names))
    for a, b, value in measured.cosines:
        table[names.index(a), names.index(b)] = table[names.index(b), names.index(a)] = value
    a, b, value = max(measured.cosines, key=lambda pair: abs(pair[2]))
    relation = _describe_angle(value, is_only=len(measured.cosines) == 1)
    return Panel(
        "cosines",
        "Angles between the vectors",
        f"{a} and {b} (cosine {signed(value, 2)}) {relation}.",
        "Cosines: " + "; ".join(f"{a}, {b} {signed(v, 3)}" for a, b, v in measured.cosines) + ".",
        _draw_cosines(names, table),
    )


def _draw_cosines(names: Sequence[str], table: NDArray[np.float64]) -> "Figure":
    """Return a square of cosines [n, n] whose shades show their size, and colours their sign."""
    figure, axes = make_figure(1.0 + 0.45 * len(names))
    axes[0].set(xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5))
    for i, j in itertools.product(range(len(names)), repeat=2):
        shade = {"color": COLOURS[int(table[i, j] < 0)], "alpha": 0.6 * abs(table[i, j])}
        axes[0].bar(j, 1, width=1, bottom=i - 0.5, linewidth=0, **shade)
        axes[0].text(j, i, signed(table[i, j], 2), ha="center", va="center")
    axes[0].set_xticks(range(len(names)), names)
    axes[0].set_yticks(range(len(names)), names)
    return figure


def _describe_angle(largest: float, *, is_only: bool) -> str:
    """Say how the two vectors with the largest cosine relate."""
    if largest > NEARLY_PARALLEL:
        return "point in similar directions, so their weights compete"
    if largest < -NEARLY_PARALLEL:
        return "work against each other"
    return "are nearly orthogonal" + ("" if is_only else ", and so are all others")


def losses_panel(evidence: Evidence) -> Panel | None:
    """Show the training loss of every vector over tokens; None if none is recorded."""
    runs = _training_runs(evidence)
    series = {name: run.losses for name, run in runs.items() if run.losses}
    series = {name: losses for name, losses in series.items() if len(losses) >= FEWEST_POINTS}
    if not series:
        return None
    figure = _draw_over_tokens(series, runs, "training loss, nats a token", {})
    parts = {n: max(len(values) // 5, 1) for n, values in series.items()}
    ends = {n: (np.mean(v[: parts[n]]), np.mean(v[-parts[n] :])) for n, v in series.items()}
    changes = ", ".join(f"{name} {first:.2f} to {last:.2f}" for name, (first, last) in ends.items())
    return Panel(
        "losses",
        "Loss along continual pre-training",
        f"Means of the first and the last fifth: {changes}. Each step sees new text, so only a "
        "drop beyond the scatter counts; the scores show what was learned.",
        f"Training loss of {', '.join(series)} over tokens.",
        figure,
    )


def norms_panel(evidence: Evidence) -> Panel | None:
    """Show the norm of every vector over the tokens of its training; None if none is recorded."""
    runs = _training_runs(evidence)
    series = {name: run.norms for name, run in runs.items() if run.norms and any(run.norms)}
    series = {name: norms for name, norms in series.items() if len(norms) >= FEWEST_POINTS}
    if not series:
        return None
    steps = {name: runs[name].norm_steps for name in series}
    figure = _draw_over_tokens(series, runs, "norm of the vector", steps)
    shares = {n: values[-1] / max(values[len(values) // 2], 1e-30) for n, values in series.items()}
    most = max(shares, key=lambda name: shares[name])
    return Panel(
        "norms",
        "Growth of the vectors",
        f"In the second half of its training {most} grew most, by "
        f"{100 * (shares[most] - 1):.0f} %.",
        "Norm over tokens, at the end: "
        + ", ".join(f"{name} {values[-1]:.3g}" for name, values in series.items())
        + ".",
        figure,
    )


def _training_runs(evidence: Evidence) -> dict[str, RunRecord | PartialRun]:
    """Return the training of each vector, for those whose vector.json says how long it was."""
    runs = {name: record.training for name, record in evidence.records.items()}
    return {name: run for name, run in runs.items() if run and run.n_steps and run.n_tokens}


def _draw_over_tokens(
    series: Mapping[str, Sequence[float]],
    runs: Mapping[str, RunRecord | PartialRun],
    label: str,
    steps: Mapping[str, Sequence[int] | None],
) -> "Figure":
    """Draw values over the tokens read, at the given steps or (None) evenly spread."""
    figure, axes = make_figure(2.6)
    for name, values in series.items():
        n_steps, n_tokens = runs[name].n_steps or 1, runs[name].n_tokens or 0
        at = steps.get(name) or np.linspace(0, n_steps, len(values) + 1)[1:]
        x = np.asarray(at) * n_tokens / n_steps
        axes[0].plot(x, values, label=name)
    axes[0].set_xlabel("tokens")
    axes[0].set_ylabel(label)
    figure.legend(loc="outside upper left", ncols=4)
    return figure


# -- cost ------------------------------------------------------------------------------------------


def ledger_panel(evidence: Evidence) -> Panel | None:
    """Show how long each stage took; None unless there are several to compare."""
    stages = _stages_of(evidence)
    if len(stages) < FEWEST_STAGES:
        return None
    total = sum(stages.values())
    shown = {stage: s for stage, s in stages.items() if s >= LEAST_SHARE * total}
    if rest := total - sum(shown.values()):
        shown["everything else"] = rest
    figure, axes = make_figure(0.8 + 0.28 * len(shown))
    unit, size = ("minutes", 60) if max(shown.values()) >= LEAST_MINUTES * 60 else ("seconds", 1)
    axes[0].barh(range(len(shown)), [seconds / size for seconds in shown.values()], height=0.6)
    axes[0].set_yticks(range(len(shown)), list(shown))
    axes[0].invert_yaxis()
    axes[0].set_xlabel(unit)
    most = max(stages, key=lambda stage: stages[stage])
    return Panel(
        "ledger",
        "Time by stage",
        f"{show_seconds(total)} in all, {100 * stages[most] / total:.0f} % of it for "
        f"{most}.{_say_what_mixtures_cost(evidence.ledger)}",
        "; ".join(f"{stage}: {seconds:.1f} s" for stage, seconds in stages.items()) + ".",
        figure,
    )


def _stages_of(evidence: Evidence) -> dict[str, float]:
    """Return the seconds of the stages that took some, by what was done."""
    spent = evidence.ledger
    runs = [record.training for record in evidence.records.values()]
    stages = {"training the vectors": sum(run.seconds or 0.0 for run in runs if run is not None)}
    for stage, cost in (("search", spent.search), ("scoring again", spent.rescore)):
        if cost is not None:
            stages |= {
                f"{stage}: choosing weights": cost.ask,
                f"{stage}: merging": cost.merge,
                f"{stage}: running the model": cost.forward,
                f"{stage}: gradients": cost.backward,
                f"{stage}: rest of the evaluation": cost.harness,
            }
    return {stage: seconds for stage, seconds in stages.items() if seconds > 0}


def _say_what_mixtures_cost(spent: Ledger) -> str:
    """Return what as many data mixtures would have cost, as a sentence; nothing if not known."""
    if (mixtures := spent.data_mixture) is None:
        return ""
    return (
        f" As many data mixtures would have cost {mixtures.ratio_search_only} times the search, or "
        f"{mixtures.ratio_end_to_end} times the search and the training of the vectors."
    )
