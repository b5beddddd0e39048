"""The first screen of a report: what the study found, the weights, and the command to build it.

The sealed score leads. The search score chose the weights, so it flatters them; it comes second,
and by its own name.
"""

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from optimer_hf.comparison.result import Comparison, say_left_out
from optimer_hf.comparison.rows import SealedRow
from optimer_hf.report.evidence import Evidence
from optimer_hf.scoring.formatting import Unit
from optimer_hf.scoring.intervals import FEWEST, Interval

ROOM = 0.02  # of a bar's track, beside the ends of the intervals


@dataclass(frozen=True)
class Bar:
    """A difference as a bar from 0, with its interval; places are percentages of the track."""

    label: str
    text: str
    detail: str
    zero: float
    end: float
    low: float | None
    high: float | None
    is_leading: bool
    is_certain: bool

    @property
    def left(self) -> float:
        """Where the bar begins."""
        return min(self.zero, self.end)

    @property
    def width(self) -> float:
        """How wide the bar is."""
        return abs(self.end - self.zero)


@dataclass(frozen=True)
class WeightBar:
    """The weight of a vector as a bar from 0 within the widest bounds; places are percentages."""

    name: str
    text: str
    note: str
    zero: float
    left: float
    width: float


@dataclass(frozen=True)
class Command:
    """Commands, one a line, and what they are for."""

    purpose: str
    text: str


@dataclass(frozen=True)
class Answer:
    """The verdict in one sentence, with bars and notes, the weights, and what to run next."""

    verdict: str
    bars: list[Bar]
    notes: list[str]
    weights: list[WeightBar]
    commands: list[Command]


def answer_of(evidence: Evidence) -> Answer:
    """Return the first screen of a report."""
    comparison = evidence.comparison
    return Answer(
        verdict=_why_no_verdict(evidence) if comparison is None else verdict_of(comparison),
        bars=[] if comparison is None else _bars(comparison),
        notes=list(_notes(evidence)),
        weights=list(_weight_bars(evidence)),
        commands=list(_commands(evidence)),
    )


# -- the verdict -----------------------------------------------------------------------------------


def verdict_of(comparison: Comparison) -> str:
    """Return what the sealed test says about the merge and the best baseline, as one sentence."""
    best = comparison.best_baseline()
    interval = comparison.interval(comparison.merge, best)
    n_baselines = sum(row.is_baseline for row in comparison.rows)
    other = f"the best of {n_baselines} baselines ({name_of(best)})"
    unit = Unit.of(comparison.objective).telling_from_zero(interval.difference)
    by = unit.show_difference(abs(interval.difference)).removeprefix("+")
    match interval.answer:
        case "better":
            return f"The merge beats {other} by {by} on the sealed test."
        case "worse":
            return f"The merge is worse than {other}, by {by} on the sealed test."
        case "too few items to tell":
            return (
                f"Too few items for a verdict: the sealed test has {interval.n_fewest} of "
                f"{interval.fewest_in!r}, and {FEWEST} are needed."
            )
        case "no significant difference":
            return f"The merge and {other} do not differ significantly on the sealed test."
        case "equal on every item":
            return f"The merge equals {other} on every item of the sealed test."
        case _:
            return f"The sealed test gives no interval for the merge against {other}."


def name_of(row: SealedRow) -> str:
    """Return how a sentence calls a row."""
    return "the base" if row.kind == "base" else row.title


def _why_no_verdict(evidence: Evidence) -> str:
    study = evidence.study
    if not study.is_finished:
        return (
            f"The search is not finished: {len(study.trials)} of {study.config.search.n_trials} "
            "trials have run. These are the best weights so far."
        )
    if study.config.test is None:
        return "Not tested: the study has no sealed test, so nothing here is free of its search."
    return "Not tested yet: the merge has not been scored on the sealed test of the study."


def _notes(evidence: Evidence) -> Iterator[str]:
    """Yield the search score in its own words, and whatever limits the verdict."""
    study, best = evidence.study, evidence.study.best_trial
    gain = evidence.unit.show(study.over_base(best).difference)
    is_again = best.fidelity == "rescore" and bool(study.terms_to_rescore())
    again = ", scored again on more items" * is_again
    yield (
        f"In the search it scored {gain} over {study.baseline} (trial {best.number} of "
        f"{len(study.trials)}{again}). That score chose the weights, so it flatters them"
        f"{'; the sealed score does not' * (evidence.comparison is not None)}."
    )
    comparison = evidence.comparison
    if comparison is not None and not study.is_finished:
        yield "The search is not finished."
    if comparison is not None and comparison.merge.chosen_after_seal:
        yield "The merge was chosen after the seal was opened."
    if comparison is not None:
        yield from say_left_out(comparison)


# -- bars ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Gain:
    """A gain of the merge as text, with as many decimals in `unit` as tell it from 0."""

    label: str
    text: str
    interval: Interval
    unit: Unit


def leading_gains(comparison: Comparison) -> list[Gain]:
    """Return the gains of the merge over the best baseline and over the base."""
    merge, best, base = comparison.merge, comparison.best_baseline(), comparison.base
    objective = Unit.of(comparison.objective)
    gains = []
    for row in [best] if best == base else [best, base]:
        interval = comparison.interval(merge, row)
        unit = objective.telling_from_zero(interval.difference)
        show = unit.show_difference if row == best else unit.show
        label = f"over {name_of(row)}{', the best baseline' * (row == best)}"
        gains.append(Gain(label, show(interval.difference), interval, unit))
    return gains


def _bars(comparison: Comparison) -> list[Bar]:
    """Return the gain over the best baseline and over the base, on one axis."""
    leading = leading_gains(comparison)
    values = [0.0]
    for interval in (gain.interval for gain in leading):
        ends = [] if interval.kind == "none" else [interval.low, interval.high]
        values += [interval.difference, *ends]
    low, span = min(values), max(max(values) - min(values), 1e-9)
    before, after = ROOM * (low < 0), ROOM * (max(values) > 0)

    def place(value: float) -> float:
        return round(100 * (before + (1 - before - after) * (value - low) / span), 2)

    return [_bar(gain, place, is_leading=index == 0) for index, gain in enumerate(leading)]


def _bar(gain: Gain, place: Callable[[float], float], *, is_leading: bool) -> Bar:
    interval, unit = gain.interval, gain.unit
    has_ends = interval.kind != "none"
    detail = f"95 % interval {unit.number(interval.low)} to {unit.number(interval.high)}"
    return Bar(
        label=gain.label,
        text=gain.text,
        detail=detail if has_ends else "no interval",
        zero=place(0.0),
        end=place(interval.difference),
        low=place(interval.low) if has_ends else None,
        high=place(interval.high) if has_ends else None,
        is_leading=is_leading,
        is_certain=interval.excludes_zero,
    )


def _weight_bars(evidence: Evidence) -> Iterator[WeightBar]:
    config, weights = evidence.study.config, evidence.study.best_trial.weights
    bounds = [*config.free.values(), *((w, w) for w in config.fixed.values())]
    low, high = min(0.0, *(a for a, _ in bounds)), max(0.0, *(b for _, b in bounds))
    span = max(high - low, 1e-9)
    for name, weight in weights.items():
        ends = sorted((0.0, weight))
        note = "fixed" if name in config.fixed else "left out" if weight == 0 else ""
        yield WeightBar(
            name=name,
            text=f"{weight:g}",
            note=note,
            zero=round(-100 * low / span, 2),
            left=round(100 * (ends[0] - low) / span, 2),
            width=round(100 * (ends[1] - ends[0]) / span, 2),
        )


# -- what to run -----------------------------------------------------------------------------------


def _commands(evidence: Evidence) -> Iterator[Command]:
    """Yield the commands that lead on, with the names of folders but not where they are."""
    study = evidence.study
    if not study.is_finished:
        return
    folder = shlex.quote(evidence.name)
    directory = study.directory.resolve()
    inside = shlex.quote(str(directory.relative_to(evidence.folder.parent)))
    if evidence.comparison is None and study.config.test is not None:
        yield Command("Test it", f"optimer compare {inside}")
    if (evidence.folder / "recipe.yaml").exists():
        yield Command(
            f"Build it, in the folder that has {evidence.name}", f"optimer build {folder} merged"
        )
    else:
        recipe = f"optimer recipe {inside} recipe.yaml"
        yield Command("Build it", f"{recipe}\noptimer build recipe.yaml merged")
