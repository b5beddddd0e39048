"""Summarize a searched study, as JSON values and as the lines that follow its merge config."""

from collections.abc import Iterator
from typing import Any

from optimer_hf.comparison.costs import ledger_of_study
from optimer_hf.comparison.ledger import describe_ledger
from optimer_hf.files.text import markdown_table
from optimer_hf.scoring.formatting import OF_TERMS, Unit, describe_interval
from optimer_hf.study.directory import Study
from optimer_hf.study.prediction import front
from optimer_hf.study.trials import ITEMS_OF

N_SHOWN = 12  # points of a front that a table shows


def study_to_json(study: Study) -> dict[str, Any]:
    """Return the best weights, their value and intervals, the Pareto front and the ledger as JSON
    values.
    """
    best = study.best_trial
    choices = [
        {"trial": choice.trial.number, "weights": choice.trial.weights, "gains": choice.gains}
        for choice in front(study)
    ]
    summary = {
        "weights": best.weights,
        "value": study.value(best),
        "trial": best.number,
        "over_base": study.over_base(best).to_json(),
    }
    if (other := study.over_next()) is not None:
        summary["over_next"] = {"trial": other[0].number} | other[1].to_json()
    return summary | {"front": choices, "ledger": ledger_of_study(study).to_json()}


def headline(study: Study) -> str:
    """Return which trial is the best of how many, and its gain."""
    best = study.best_trial
    scored = best.fidelity if study.terms_to_rescore() else "search"
    gain = Unit.of(study.config.objective).show(study.over_base(best).difference)
    return (
        f"best of {len(study.trials)} trials: number {best.number} ({best.origin}), "
        f"{gain} over {study.baseline} on {ITEMS_OF[scored]}"
    )


def study_lines(study: Study) -> Iterator[str]:
    """Yield the paired 95 % intervals, the Pareto front and the ledger of a study as text."""
    best, unit = study.best_trial, Unit.of(study.config.objective)
    yield f"minus {study.baseline}: {describe_interval(study.over_base(best), unit, is_gain=True)}"
    if (other := study.over_next()) is not None:
        trial, interval = other
        margin = describe_interval(interval, unit, is_gain=False)
        yield f"minus the next best, trial {trial.number}: {margin}"
    if study.at_bounds:
        yield f"at the end of its bounds, so wider ones may help: {', '.join(study.at_bounds)}"
    yield from front_lines(study)
    yield "\nwhere the time went:"
    for stage, taken, done in describe_ledger(ledger_of_study(study)):
        yield f"* {stage}: {taken}{f' ({done})' if done else ''}"


def front_lines(study: Study) -> Iterator[str]:
    """Yield the Pareto front as a table, numbered for `optimer recipe --pick`; nothing if there is
    only one term.
    """
    choices = front(study)
    if not choices or len(choices[0].gains) < 2:
        return
    unit = f"gains over {study.baseline}, losses relative, accuracies in points"
    yield f"Pareto front: no trial beats one of these in every term ({unit})"
    numbers = [*range(len(choices))]
    if len(choices) > N_SHOWN:
        numbers = [n * (len(choices) - 1) // (N_SHOWN - 1) for n in range(N_SHOWN)]
        yield f"{N_SHOWN} of its {len(choices)} points; --format json has all"
    rows = [
        [
            str(n + 1),
            str(choices[n].trial.number),
            *map(OF_TERMS.show, choices[n].gains.values()),
        ]
        for n in numbers
    ]
    yield markdown_table(["pick", "trial", *choices[0].gains], rows)
