"""A study as a DataFrame, as one line, and as the HTML table that a notebook shows."""

import math
from collections.abc import Mapping, Sequence
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


def trials_frame(study: "Study", fidelity: Fidelity) -> "DataFrame":
    """Return a DataFrame with a row for every trial of one fidelity; see Study.to_dataframe."""
    from pandas import DataFrame, Index

    trials = study.log.trials_at(fidelity)
    rows = [_row(study, trial, trials[0]) for trial in trials]
    return DataFrame(rows, index=Index([trial.number for trial in trials], name="trial"))


def list_trials(
    study: "Study", fidelity: Fidelity = "search", *, sort: str = "objective"
) -> list[dict[str, Any]]:
    """Return a row for every trial of one fidelity, sorted; the columns are those of
    Study.to_dataframe, after `trial` and `best`.

    `sort` is trial (as they ran), objective (best first; those that break a constraint after the
    others), or a term (by its gain, largest first). Crashed trials come last. Raises ConfigError
    for any other name.
    """
    trials, best = study.log.trials_at(fidelity), study.best_trial.number
    base = trials[0] if trials else study.trials[0]
    known = ["trial", "objective", *base.terms]
    if sort not in known:
        raise ConfigError(f"--sort {sort!r}: no such column.{did_you_mean(sort, known)}")
    rows = [
        {"trial": trial.number, "best": trial.number == best} | _row(study, trial, base)
        for trial in trials
    ]
    if sort == "trial":
        return sorted(rows, key=lambda row: row["trial"])
    key = "objective" if sort == "objective" else f"gain/{sort}"

    def rank(row: dict[str, Any]) -> tuple[bool, bool, float]:
        breaks = sort == "objective" and not row["feasible"]
        return row["status"] != "ok", breaks, -row.get(key, math.nan)

    return sorted(rows, key=rank)


def trials_to_markdown(study: "Study", rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of `list_trials` as a Markdown table: weights, gains over the base, seconds."""
    vectors, unit = list(study.config.vectors), Unit.of(study.config.objective)
    terms = list(study.trials[0].terms)
    base = study.value(study.trials[0])
    lines = []
    for row in rows:
        is_sound = row["status"] == "ok"
        mark = "" if row["feasible"] or not is_sound else " (breaks a constraint)"
        gains_shown = [OF_TERMS.show(row[f"gain/{each}"]) if is_sound else "" for each in terms]
        seconds = sum(v for k, v in row.items() if k in ("seconds/merge", "seconds/evaluate"))
        lines.append(
            [
                f"{row['trial']}{' *' * row['best']}",
                row["origin"],
                *(f"{row[f'weight/{name}']:.3g}" for name in vectors),
                *gains_shown,
                unit.show(row["objective"] - base) + mark if is_sound else "crashed",
                f"{seconds:.1f}",
            ]
        )
    weights = [f"weight {name}" for name in vectors]
    header = ["trial", "origin", *weights, *terms, "objective", "seconds"]
    return markdown_table(header, lines)


def _row(study: "Study", trial: Trial, base: Trial) -> dict[str, Any]:
    is_sound = trial.status == "ok"
    row: dict[str, Any] = {
        "origin": trial.origin,
        "status": trial.status,
        "objective": study.value(trial) if is_sound else math.nan,
        "feasible": is_sound and is_feasible(study.config.objective, trial.terms, base.terms),
    }
    row |= {f"weight/{name}": weight for name, weight in trial.weights.items()}
    row |= {f"score/{label}": score.score for label, score in trial.terms.items()}
    row |= {f"gain/{label}": gain for label, gain in gains(trial.terms, base.terms).items()}
    row |= {f"seconds/{phase}": seconds for phase, seconds in trial.seconds.items()}
    return row


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
        caption += f" (trial {best.number}, chosen on {ITEMS_OF[best.fidelity]})"
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
