"""A finished study -> every baseline and the merge on the sealed test, with paired intervals, as a
table, JSON and a figure.

Each weight set is scored on the sealed test once and kept in `sealed.jsonl`; asking again reads it
from there. A row whose weights were chosen after sealed scores had been seen is marked.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from optimer_hf import baselines
from optimer_hf.errors import ConfigError, EvaluationError
from optimer_hf.evaluate import Interval, Objective, TermScore, combine, gains, paired_interval
from optimer_hf.files import markdown_table, slug
from optimer_hf.progress import Meter
from optimer_hf.retarget import best_scale, predict, retargeted
from optimer_hf.search import search
from optimer_hf.study import (
    Baselines,
    SearchConfig,
    Study,
    StudyConfig,
    Trial,
    TrialLog,
    VectorConfig,
    locked,
)
from optimer_hf.trial import Pool, ResidentPool, run_trial

logger = logging.getLogger(__name__)

MERGE = "searched merge"


@dataclass(frozen=True)
class Row:
    """One weight set on the sealed test."""

    name: str
    weights: dict[str, float]
    scores: dict[str, TermScore]
    chosen_after_seal: bool

    @property
    def is_baseline(self) -> bool:
        """Whether the merge is compared with it: all but the merge and re-targeted merges."""
        return self.name != MERGE and not self.name.startswith("re-targeted")


@dataclass(frozen=True)
class Comparison:
    """All rows, first the base, and the objective they are compared by."""

    rows: list[Row]
    objective: Objective
    retarget: Mapping[str, Mapping[str, float]]

    @property
    def base(self) -> Row:
        """The base model."""
        return self.rows[0]

    @property
    def merge(self) -> Row:
        """The searched merge."""
        return next(row for row in self.rows if row.name == MERGE)

    def value(self, row: Row, objective: Objective | None = None) -> float:
        """Return the value of a row under an objective (None: that of the study)."""
        return combine(objective or self.objective, row.scores, self.base.scores)

    def best_baseline(self, objective: Objective | None = None) -> Row:
        """Return the best of the others by its sealed value: the hardest one to beat."""
        return max(
            (row for row in self.rows if row.is_baseline),
            key=lambda row: self.value(row, objective),
        )

    def interval(self, row: Row, other: Row, objective: Objective | None = None) -> Interval:
        """Return value(row) - value(other) with its paired 95 % interval."""
        return paired_interval(
            objective or self.objective, row.scores, other.scores, self.base.scores
        )

    def term_interval(self, row: Row, label: str) -> Interval:
        """Return the gain of a row over the base on one term, with its interval."""
        return self.interval(row, self.base, retargeted(self.objective, {label: 1.0}))


def candidates(study: Study) -> dict[str, dict[str, float]]:
    """Return every row's weights by name: base, each alone at 1.0 and at its best scale, average,
    sum, merge.
    """
    config = study.config
    free, fixed = list(config.free), config.fixed
    rows = {"base": dict.fromkeys(free, 0.0) | dict.fromkeys(fixed, 0.0)}
    if fixed:
        rows["fixed vectors alone"] = dict.fromkeys(free, 0.0) | fixed
    for name in free:
        rows[f"{name} at 1.0"] = {other: float(other == name) for other in free} | fixed
    for name in free:
        weights = best_scale(study, name)
        rows[f"{name} at its best scale, {weights[name]:g}"] = weights
    if len(free) > 1:
        rows["uniform average"] = dict.fromkeys(free, 1 / len(free)) | fixed
        rows["uniform sum"] = dict.fromkeys(free, 1.0) | fixed
    rows[MERGE] = study.incumbent.weights
    for name, weights in config.retarget.items():
        rows[f"re-targeted to {name}"] = predict(study, weights).weights
    return rows


def compare(study: Study, *, pool: Callable[[StudyConfig], Pool] = ResidentPool) -> Comparison:
    """Score all candidates on the sealed test and return them; scored ones are read, not scored
    again.

    Raises ConfigError when the study has no `test`, EvaluationError when a row cannot be scored.
    """
    objective = study.config.test
    if objective is None:
        raise ConfigError(
            f"{study.directory}: study.yaml has no `test:` section, so there is nothing sealed to "
            "compare on."
        )
    if study.config.baselines.mixtures:
        logger.warning("mixtures of `baselines` are trained by `optimer run`; they are left out")
    scratch = study.directory / "scratch"
    with locked(study.directory):
        shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
        log = TrialLog(study.directory / "sealed.jsonl")
        found = {_key(trial.weights): trial for trial in log.trials}
        wanted = _weight_rows(study, objective, log, found, pool)
        for model in baselines.models(study):
            wanted[model.name] = model.weights
            if _key(model.weights) not in found:
                sources = model.make(scratch)
                row = {model.name: model.weights}
                _score(study, objective, row, log, found, pool(_with_pool(study.config, sources)))
        shutil.rmtree(scratch, ignore_errors=True)
    opened_at = log.trials[0].number
    rows = [
        Row(name, weights, found[_key(weights)].terms, found[_key(weights)].number > opened_at)
        for name, weights in _in_order(wanted).items()
    ]
    return Comparison(rows, objective, study.config.retarget)


def _weight_rows(
    study: Study,
    objective: Objective,
    log: TrialLog,
    found: dict[str, Trial],
    pool: Callable[[StudyConfig], Pool],
) -> dict[str, dict[str, float]]:
    """Score all rows that are weights of the study's own pool, which is opened at most once, and
    return their weights.
    """

    @cache
    def opened() -> Pool:
        return pool(study.config)

    wanted = candidates(study)
    for name, settings in study.config.baselines.searches.items():
        config = _searched_otherwise(study.config, settings.model_dump())
        directory = study.directory / "searches" / slug(name)
        wanted[name] = search(config, directory, pool=lambda _: opened()).incumbent.weights
    missing = {_key(weights): name for name, weights in wanted.items()}
    unscored = {name: wanted[name] for key, name in missing.items() if key not in found}
    if unscored:
        _score(study, objective, unscored, log, found, opened())
    return wanted


def _searched_otherwise(config: StudyConfig, settings: dict[str, Any]) -> StudyConfig:
    limit = settings.pop("limit")
    changes: dict[str, Any] = {
        "search": SearchConfig(**settings),
        "test": None,
        "retarget": {},
        "baselines": Baselines(),
    }
    if limit is not None:
        terms = [term.model_copy(update={"limit": None}) for term in config.objective.terms]
        changed = {"limit": limit, "terms": terms}
        changes["objective"] = config.objective.model_copy(update=changed)
    return config.model_copy(update=changes)


def _with_pool(config: StudyConfig, sources: Mapping[str, str]) -> StudyConfig:
    vectors = {name: VectorConfig(source=source) for name, source in sources.items()}
    return config.model_copy(update={"vectors": vectors})


def _in_order(wanted: Mapping[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return the rows with the merge, and what it was re-targeted to, behind all baselines."""
    last = [name for name in wanted if name == MERGE or name.startswith("re-targeted")]
    first = [name for name in wanted if name not in last]
    return {name: wanted[name] for name in [*first, *last]}


def _score(
    study: Study,
    objective: Objective,
    rows: Mapping[str, dict[str, float]],
    log: TrialLog,
    found: dict[str, Trial],
    pool: Pool,
) -> None:
    """Score rows on the sealed test, each written to disk before the next."""
    for trial in _scored(study, objective, rows, pool):
        log.append(trial)
        found[_key(trial.weights)] = trial


def _scored(
    study: Study, objective: Objective, rows: Mapping[str, dict[str, float]], pool: Pool
) -> Iterator[Trial]:
    terms = objective.at("rescore")
    limits = {term.label: objective.limit_of(term) for term in terms}
    n_trials = len(
        study.log.trials
    )  # the seal remembers how much of the search was known when a row was chosen
    with Meter("sealed test", len(rows), "rows") as meter:
        for name, weights in rows.items():
            trial = run_trial(
                pool, Trial(n_trials, name, "sealed", weights, "ok", {}, {}), terms, limits
            )
            if trial.status == "crashed":
                raise EvaluationError(f"sealed test: row {name!r} cannot be scored: {trial.error}")
            yield trial
            meter.advance(1)


def _key(weights: Mapping[str, float]) -> str:
    return json.dumps(
        {name: round(weight, 6) + 0.0 for name, weight in weights.items()}, sort_keys=True
    )


# -- tables ----------------------------------------------------------------------------------------


def table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the sealed-test table: value, then gain over the base per term in
    percent.
    """
    labels = list(comparison.base.scores)
    limits = {
        term.label: comparison.objective.limit_of(term) for term in comparison.objective.scored
    }
    marked = [f"{x} (first {limits[x]})" if limits[x] is not None else x for x in labels]
    header = ["weights", *marked, "objective"]
    lines = []
    for row in comparison.rows:
        each = gains(row.scores, comparison.base.scores)
        mark = " (chosen after the seal was opened)" if row.chosen_after_seal else ""
        if row is comparison.base:
            cells = [f"{row.scores[label].score:.4f}" for label in labels]
        else:
            cells = [f"{100 * each[label]:+.2f} %" for label in labels]
        lines.append([row.name + mark, *cells, f"{100 * comparison.value(row):+.2f} %"])
    return header, lines


def verdicts(comparison: Comparison) -> list[str]:
    """Return what the sealed test says, a sentence per objective: merge against the best of the
    others.
    """
    rows: dict[str, tuple[Row, Objective | None]] = {MERGE: (comparison.merge, None)}
    for name, weights in comparison.retarget.items():
        row = next(row for row in comparison.rows if row.name == f"re-targeted to {name}")
        rows[row.name] = (row, retargeted(comparison.objective, weights))
    sentences = []
    for name, (row, objective) in rows.items():
        other = comparison.best_baseline(objective)
        interval = comparison.interval(row, other, objective)
        if not interval.excludes_zero:
            verdict = "not told apart at 95 %"
        else:
            verdict = "better" if interval.low > 0 else "worse"
        if objective is not None:
            verdict += "; the best scales are those for the study's own objective"
        sentences.append(
            f"{name} minus the best of the others ({other.name}): {100 * interval.difference:+.2f} "
            "points "
            f"[{100 * interval.low:+.2f}, {100 * interval.high:+.2f}], paired 95 % interval: "
            f"{verdict}."
        )
    return sentences


def to_markdown(comparison: Comparison) -> str:
    """Return table and verdicts as Markdown."""
    header, lines = table(comparison)
    notes = "\n".join(f"* {sentence}" for sentence in verdicts(comparison))
    return (
        "Sealed test. First row: scores of the base; other rows: gain over the base "
        "(losses relative, accuracies in points).\n\n"
        f"{markdown_table(header, lines)}\n{notes}\n"
    )


def intervals_to_markdown(comparison: Comparison) -> str:
    """Return the paired 95 % interval of every gain over the base, in percent, as Markdown."""
    labels = list(comparison.base.scores)
    lines = []
    for row in comparison.rows:
        if row is not comparison.base:
            found = [comparison.term_interval(row, label) for label in labels]
            cells = [f"[{100 * gain.low:+.2f}, {100 * gain.high:+.2f}]" for gain in found]
            lines.append([row.name, *cells])
    return markdown_table(["weights", *labels], lines)


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Return everything as JSON values, with the interval of every row per term."""
    labels = list(comparison.base.scores)
    rows = []
    for row in comparison.rows:
        rows.append(
            {
                "name": row.name,
                "weights": row.weights,
                "chosen_after_seal": row.chosen_after_seal,
                "value": comparison.value(row),
                "terms": {
                    label: {
                        "score": row.scores[label].score,
                        "gain": asdict(comparison.term_interval(row, label)),
                    }
                    for label in labels
                },
            }
        )
    return {"rows": rows, "verdicts": verdicts(comparison)}


def write_figure(comparison: Comparison, path: Path) -> None:
    """Write the value of every row, in percent over the base, with its paired 95 % interval, as a
    figure; the suffix of `path` says the format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = sorted(comparison.rows[1:], key=comparison.value)
    found = [comparison.interval(row, comparison.base) for row in rows]
    figure = Figure(figsize=(8, 1.2 + 0.3 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for at, (row, interval) in enumerate(zip(rows, found, strict=True)):
        middle = 100 * interval.difference
        sides = [[middle - 100 * interval.low], [100 * interval.high - middle]]
        axes.errorbar(
            middle,
            at,
            xerr=[[max(side[0], 0)] for side in sides],
            fmt="o",
            color="tab:gray" if row.is_baseline else "tab:red",
            capsize=3,
        )
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("sealed objective over the base, in percent, with paired 95 % intervals")
    figure.savefig(path)
