"""A study as a DataFrame, as one line, and as the HTML table that a notebook shows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from optimer_hf.errors import ConfigError
from optimer_hf.files.text import did_you_mean, html_table, markdown_table, summarize_numbers
from optimer_hf.scoring.formatting import OF_TERMS, Unit
from optimer_hf.scoring.objective import gains, is_feasible
from optimer_hf.study.trials import ITEMS_OF, Fidelity, Trial

if TYPE_CHECKING:
    from pandas import DataFrame

    from optimer_hf.study.directory import Study

N_SHOWN = 5  # trials below the base


@dataclass(frozen=True)
class TrialRow:
    """A trial with what a table shows of it: the value of its objective (NaN if it crashed) and its
    gains over the base, by term, which are larger for better trials.
    """

    trial: Trial
    objective: float
    is_feasible: bool
    gains: dict[str, float]
    is_best: bool = False

    @property
    def is_sound(self) -> bool:
        """Whether the trial was scored."""
        return self.trial.status == "ok"

    @property
    def columns(self) -> dict[str, Any]:
        """The columns of Study.to_dataframe."""
        trial = self.trial
        columns: dict[str, Any] = {
            "origin": trial.origin,
            "status": trial.status,
            "objective": self.objective,
            "feasible": self.is_feasible,
        }
        columns |= {f"weight/{name}": weight for name, weight in trial.weights.items()}
        columns |= {f"score/{label}": score.score for label, score in trial.terms.items()}
        columns |= {f"gain/{label}": gain for label, gain in self.gains.items()}
        return columns | {f"seconds/{phase}": seconds for phase, seconds in trial.seconds.items()}

    def to_json(self) -> dict[str, Any]:
        """Return the columns as JSON values, after `trial` and `best`; None for no number."""
        columns = {"trial": self.trial.number, "best": self.is_best} | self.columns
        return {name: None if _is_nan(value) else value for name, value in columns.items()}


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _row_of(study: "Study", trial: Trial, base: Trial, *, is_best: bool = False) -> TrialRow:
    is_sound = trial.status == "ok"
    return TrialRow(
        trial,
        study.value(trial) if is_sound else math.nan,
        is_sound and is_feasible(study.config.objective, trial.terms, base.terms),
        gains(trial.terms, base.terms),
        is_best,
    )


def trials_frame(study: "Study", fidelity: Fidelity) -> "DataFrame":
    """Return a DataFrame with a row for every trial of one fidelity; see Study.to_dataframe."""
    from pandas import DataFrame, Index

    trials = study.log.trials_at(fidelity)
    rows = [_row_of(study, trial, trials[0]).columns for trial in trials]
    return DataFrame(rows, index=Index([trial.number for trial in trials], name="trial"))


def list_trials(
    study: "Study", fidelity: Fidelity = "search", *, sort: str = "objective"
) -> list[TrialRow]:
    """Return a row for every trial of one fidelity, sorted.

    `sort` is trial (as they ran), objective (best first; those that break a constraint after the
    others), or a term (by its gain, largest first). Crashed trials come last. Raises ConfigError
    for any other name.
    """
    trials, best = study.log.trials_at(fidelity), study.best_trial.number
    base = trials[0] if trials else study.trials[0]
    known = ["trial", "objective", *base.terms]
    if sort not in known:
        raise ConfigError(f"--sort {sort!r}: no such column.{did_you_mean(sort, known)}")
    rows = [_row_of(study, trial, base, is_best=trial.number == best) for trial in trials]
    if sort == "trial":
        return sorted(rows, key=lambda row: row.trial.number)

    def rank(row: TrialRow) -> tuple[bool, bool, float]:
        is_by_objective = sort == "objective"
        value = row.objective if is_by_objective else row.gains.get(sort, math.nan)
        return not row.is_sound, is_by_objective and not row.is_feasible, -value

    return sorted(rows, key=rank)


def trials_to_markdown(study: "Study", rows: Sequence[TrialRow]) -> str:
    """Return rows of `list_trials` as a Markdown table: weights, gains over the base, seconds."""
    base = study.log.first(rows[0].trial.fidelity if rows else "search")
    weights = [f"weight {name}" for name in study.config.weight_names]
    header = ["trial", "origin", *weights, *base.terms]
    lines = [_cells_of_row(study, row, base) for row in rows]
    return markdown_table([*header, "objective", "seconds"], lines)


def _cells_of_row(study: "Study", row: TrialRow, base: Trial) -> list[str]:
    """Return a row as text; `base` was scored on the same items."""
    trial, unit = row.trial, Unit.of(study.config.objective)
    mark = "" if row.is_feasible or not row.is_sound else " (breaks a constraint)"
    seconds = sum(trial.seconds.get(phase, 0.0) for phase in ("merge", "evaluate"))
    return [
        f"{trial.number}{' *' * row.is_best}",
        trial.origin,
        *(f"{trial.weights[name]:.3g}" for name in study.config.weight_names),
        *(OF_TERMS.show(row.gains[label]) if row.is_sound else "" for label in base.terms),
        unit.show(row.objective - study.value(base)) + mark if row.is_sound else "crashed",
        f"{seconds:.1f}",
    ]


def summary(study: "Study") -> str:
    """Return the state of a study in one line: how many trials have run, and the best weights."""
    n_run, n_trials = len(study.trials), study.config.search.n_trials
    text = f"{n_run} of {n_trials} trials" if n_run < n_trials else f"{n_run} trials"
    if study.has_best_trial:
        return f"{text}, best {summarize_numbers(study.best_weights)}"
    return f"{text}, not finished"


def study_html(study: "Study") -> str:
    """Return the base and the best trials of a study as an HTML table."""
    trials = study.trials
    name = study.directory.resolve().name
    if not trials:
        return html_table(f"Study {name}: no trial yet", ["trial"], [])
    base = trials[0]
    sound = [trial for trial in trials[1:] if trial.status == "ok"]
    kept = [t for t in sound if is_feasible(study.config.objective, t.terms, base.terms)]
    shown = sorted(kept, key=study.value, reverse=True)[:N_SHOWN]
    caption = f"Study {name}: {summary(study)}"
    if study.has_best_trial:
        best = study.best_trial
        scored = best.fidelity if study.terms_to_rescore() else "search"
        caption += f" (trial {best.number}, chosen on {ITEMS_OF[scored]})"
    header = ["trial", "origin", *base.weights, *base.terms, "objective"]
    return html_table(caption, header, [_cells(study, trial, base) for trial in [base, *shown]])


def _cells(study: "Study", trial: Trial, base: Trial) -> list[str]:
    """Return a trial as text, with its gains over the base; the base itself with its scores."""
    unit = Unit.of(study.config.objective)
    each = gains(trial.terms, base.terms)
    scores = [
        f"{score.score:.4g}" if trial is base else OF_TERMS.show(each[label])
        for label, score in trial.terms.items()
    ]
    return [
        str(trial.number),
        trial.origin,
        *(f"{weight:.3g}" for weight in trial.weights.values()),
        *scores,
        unit.show(study.value(trial) - study.value(base)),
    ]
