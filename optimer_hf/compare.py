"""A finished study -> every baseline and the merge on the sealed test, with paired intervals, as a
table, JSON and a figure.

Each weight set is scored on the sealed test once and kept in `sealed.jsonl`; asking again reads it
from there. A row whose weights were chosen after sealed scores had been seen is marked.
"""

import gc
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from optimer_hf import baselines
from optimer_hf.errors import ConfigError, EvaluationError
from optimer_hf.evaluate import (
    OF_TERMS,
    Objective,
    TermScore,
    Unit,
    combine,
    gains,
    paired_interval,
    said_of,
    shown_value,
)
from optimer_hf.files import VersionedFile, digest, markdown_table, slug
from optimer_hf.intervals import Interval
from optimer_hf.progress import Meter
from optimer_hf.retarget import best_scale, predict, retargeted
from optimer_hf.search import search
from optimer_hf.study import (
    AVERAGE,
    BASE,
    FIXED_ALONE,
    MERGE,
    OF_TEST,
    RETARGETED,
    SEALED_FILE,
    SUM,
    Study,
    StudyConfig,
    Trial,
    TrialLog,
    VectorConfig,
    locked,
)
from optimer_hf.trial import Pool, ResidentPool, run_trial

logger = logging.getLogger(__name__)

AT_BEST_SCALE = " at its best scale"


def titled(name: str, chosen_after_seal: bool) -> str:
    """Return the name of a row, marked when it was chosen after sealed scores had been seen."""
    return name + " (chosen after the seal was opened)" * chosen_after_seal


@dataclass(frozen=True)
class Row:
    """One weight set on the sealed test."""

    name: str
    weights: dict[str, float]
    scores: dict[str, TermScore]
    chosen_after_seal: bool

    @property
    def title(self) -> str:
        """The name, marked when the row was chosen after sealed scores had been seen."""
        return titled(self.name, self.chosen_after_seal)

    @property
    def is_baseline(self) -> bool:
        """Whether the merge is compared with it: all but the merge and re-targeted merges."""
        return self.name != MERGE and not self.name.startswith(RETARGETED)


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


class Seal(VersionedFile):
    """sealed.json: the rows chosen before the first sealed score was seen, by name."""

    rows: dict[str, str]


def candidates(study: Study) -> dict[str, dict[str, float]]:
    """Return every row's weights by name: base, each alone at 1.0 and at its best scale, average,
    sum, merge.
    """
    config = study.config
    free, fixed = list(config.free), config.fixed
    rows = {BASE: dict.fromkeys(free, 0.0) | dict.fromkeys(fixed, 0.0)}
    if fixed:
        rows[FIXED_ALONE] = dict.fromkeys(free, 0.0) | fixed
    for name in free:
        rows[f"{name} at 1.0"] = {other: float(other == name) for other in free} | fixed
    for name in free:
        weights = study.row(f"{name}{AT_BEST_SCALE}", partial(best_scale, study, name))
        rows[f"{name}{AT_BEST_SCALE}, {weights[name]:g}"] = weights
    if len(free) > 1:
        rows[AVERAGE] = dict.fromkeys(free, 1 / len(free)) | fixed
        rows[SUM] = dict.fromkeys(free, 1.0) | fixed
    rows[MERGE] = study.incumbent.weights
    for name, target in config.retarget.items():
        asked = f"{RETARGETED}{name} {json.dumps(target, sort_keys=True)}"
        rows[f"{RETARGETED}{name}"] = study.row(asked, partial(_predicted, study, target))
    return rows


def _predicted(study: Study, target: Mapping[str, float]) -> dict[str, float]:
    return predict(study, target).weights


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

    @cache
    def opened() -> Pool:
        found = pool(study.config)
        study.go_on_with(found.inputs)
        return found

    with locked(study.directory):
        models = {model.name: model for model in baselines.models(study)}
        wanted = _rows(study, models, opened)
        log = TrialLog(study.directory / SEALED_FILE)
        planned = _planned(study.directory, log.trials, wanted)
        found = {_key(trial.weights): trial for trial in log.trials}
        missing = {_key(weights): name for name, weights in wanted.items()}
        rows = {wanted_name: wanted[wanted_name] for wanted_name in missing.values()}
        unscored = {name: weights for name, weights in rows.items() if _key(weights) not in found}
        own = {name: weights for name, weights in unscored.items() if name not in models}
        if own:
            found |= _score(study, objective, own, log, opened())
        opened.cache_clear()
        with _scratch_of(study) as scratch:
            for name in (name for name in unscored if name in models):
                gc.collect()  # the harness holds its model, the one before, in a cycle
                made = _with_pool(study.config, models[name].make(scratch))
                found |= _score_other(study, objective, {name: wanted[name]}, log, pool, made)
    return Comparison(
        [
            Row(name, weights, found[_key(weights)].terms, _key(weights) not in planned)
            for name, weights in wanted.items()
        ],
        objective,
        study.config.retarget,
    )


def _score_other(
    study: Study,
    objective: Objective,
    rows: Mapping[str, dict[str, float]],
    log: TrialLog,
    pool: Callable[[StudyConfig], Pool],
    config: StudyConfig,
) -> dict[str, Trial]:
    """Score rows of a pool of other vectors, which is dropped before the next one is made.

    Raises StudyError when all else is not what the study has: base, tokenizer and sealed items.
    """
    opened = pool(config)
    common = {
        key: digest
        for key, digest in opened.inputs.items()
        if key.startswith(OF_TEST) or key in ("base_model", "tokenizer_source")
    }
    study.check_inputs(common)
    return _score(study, objective, rows, log, opened)


@contextmanager
def _scratch_of(study: Study) -> Iterator[Path]:
    """Return where models of baselines are built, empty before and gone afterwards."""
    scratch = study.directory.resolve() / "scratch"  # seen from the YAML of mergekit
    try:
        shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def recorded(study: Study) -> Comparison | None:
    """Return the rows that were scored so far, without scoring any; None while the incumbent is not
    among them.
    """
    trials = TrialLog(study.directory / SEALED_FILE, repair=False).trials
    if study.config.test is None or not trials:
        return None
    planned = _planned(study.directory, trials, {})
    found = {
        trial.origin: Row(
            trial.origin, trial.weights, trial.terms, _key(trial.weights) not in planned
        )
        for trial in trials
    }
    base = next((row for row in found.values() if not any(row.weights.values())), None)
    merge = found.get(MERGE)
    if base is None or merge is None or _key(merge.weights) != _key(study.incumbent.weights):
        return None
    targets = [row for name, row in found.items() if name.startswith(RETARGETED)]
    # of rows with equal weights one was scored, under the name of the last
    others = [row for row in found.values() if row is not base and row.is_baseline]
    retarget = {
        name: weights
        for name, weights in study.config.retarget.items()
        if f"{RETARGETED}{name}" in found
    }
    rows = [replace(base, name=BASE), *others, merge, *targets]
    return Comparison(rows, study.config.test, retarget)


def _rows(
    study: Study, models: Mapping[str, baselines.Model], opened: Callable[[], Pool]
) -> dict[str, dict[str, float]]:
    """Return the weights of every row, the merge and what it was re-targeted to behind all others;
    other searches run here, before anything sealed is scored.

    Raises ConfigError when two rows are called alike.
    """
    own = candidates(study)
    last = [name for name in own if name == MERGE or name.startswith(RETARGETED)]
    taken = [*own, *study.config.baselines.searches, *models]
    for name in taken:
        if taken.count(name) > 1 or (name.startswith(RETARGETED) and name not in own):
            raise ConfigError(f"baselines: {name!r} is the name of another row. Give another name.")
    found = {name: weights for name, weights in own.items() if name not in last}
    for name, settings in study.config.baselines.searches.items():
        config = study.config.searched_otherwise(settings)
        folder = f"{slug(name)}-{digest(settings.model_dump(mode='json'))[:6]}"
        directory = study.directory / "searches" / folder
        found[name] = search(config, directory, pool=lambda _: opened()).incumbent.weights
    found |= {name: model.weights for name, model in models.items()}
    return found | {name: own[name] for name in last}


def _planned(
    directory: Path, trials: Sequence[Trial], wanted: Mapping[str, dict[str, float]]
) -> frozenset[str]:
    """Return the rows that were chosen before the seal was opened; they are written down at the
    first opening, before the first score.
    """
    file = directory / "sealed.json"
    if not file.exists():
        first = [trial for trial in trials if trial.number == trials[0].number]
        rows = {trial.origin: trial.weights for trial in first} or dict(wanted)
        Seal(rows={name: _key(weights) for name, weights in rows.items()}).write(file)
    return frozenset(Seal.read(file).rows.values())


def _with_pool(config: StudyConfig, sources: Mapping[str, str]) -> StudyConfig:
    vectors = {name: VectorConfig(source=source) for name, source in sources.items()}
    changes = {"vectors": vectors, "tokenizer_source": config.tokenizer_reference}
    return config.model_copy(update=changes)


def _score(
    study: Study,
    objective: Objective,
    rows: Mapping[str, dict[str, float]],
    log: TrialLog,
    pool: Pool,
) -> dict[str, Trial]:
    """Score rows on the sealed test, each on disk before the next; return them by key."""
    found = {}
    for trial in _scored(study, objective, rows, pool):
        log.append(trial)
        found[_key(trial.weights)] = trial
    return found


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
                reason = str(trial.error).partition("\n")[0]
                raise EvaluationError(f"sealed test: row {name!r} cannot be scored: {reason}")
            yield trial
            meter.advance(1)


def _key(weights: Mapping[str, float]) -> str:
    return json.dumps(
        {name: round(weight, 6) + 0.0 for name, weight in weights.items()}, sort_keys=True
    )


# -- tables ----------------------------------------------------------------------------------------


def table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the sealed-test table: gain over the base per term in percent, then
    of the objective in its unit; terms under a `limit` say how many items were scored.
    """
    labels = list(comparison.base.scores)
    objective, base = comparison.objective, comparison.base.scores
    limited = {term.label for term in objective.scored if objective.limit_of(term) is not None}
    marked = [f"{x} ({len(base[x].items)} items)" if x in limited else x for x in labels]
    header = ["weights", *marked, "objective"]
    lines = []
    for row in comparison.rows:
        each = gains(row.scores, comparison.base.scores)
        if row is comparison.base:
            cells = [f"{row.scores[label].score:.4f}" for label in labels]
        else:
            cells = [OF_TERMS.show(each[label]) for label in labels]
        is_base = row is comparison.base
        value = shown_value(objective, row.scores, comparison.base.scores, is_base=is_base)
        lines.append([row.title, *cells, value])
    return header, lines


def verdicts(comparison: Comparison) -> list[str]:
    """Return what the sealed test says, a sentence per objective: merge against the best of the
    others.
    """
    rows: dict[str, tuple[Row, Objective | None]] = {MERGE: (comparison.merge, None)}
    for name, weights in comparison.retarget.items():
        row = next(row for row in comparison.rows if row.name == f"{RETARGETED}{name}")
        rows[row.name] = (row, retargeted(comparison.objective, weights))
    sentences = []
    for name, (row, objective) in rows.items():
        other = comparison.best_baseline(objective)
        interval = comparison.interval(row, other, objective)
        said = said_of(interval, Unit.of(objective or comparison.objective), is_gain=False)
        if objective is not None:
            said += "; the best scales are those for the study's own objective"
        sentences.append(f"{name} minus the best of the others ({other.name}): {said}.")
    return sentences


def to_markdown(comparison: Comparison) -> str:
    """Return table and verdicts as Markdown."""
    header, lines = table(comparison)
    notes = "\n".join(f"* {sentence}" for sentence in verdicts(comparison))
    own = " The objective is the study's own for re-targeted merges, too; below they are by theirs."
    unit = Unit.of(comparison.objective)
    mean = f" The objective is a mean in {unit.name}; a gain in it is larger when it is better."
    return (
        "Sealed test. First row: scores of the base; other rows: gain over the base "
        f"(losses relative, accuracies in points).{mean * bool(unit.name)}"
        f"{own * bool(comparison.retarget)}\n\n"
        f"{markdown_table(header, lines)}\n{notes}\n"
    )


def intervals_to_markdown(comparison: Comparison) -> str:
    """Return the paired 95 % interval of every gain over the base, in percent, as Markdown."""
    labels = list(comparison.base.scores)
    lines, kinds, few = [], set(), dict[str, str]()
    for row in comparison.rows:
        if row is not comparison.base:
            found = {label: comparison.term_interval(row, label) for label in labels}
            lines.append([row.title, *map(OF_TERMS.show_interval, found.values())])
            kinds |= {interval.kind for interval in found.values() if interval.kind != "none"}
            few |= {label: i.verdict for label, i in found.items() if i.has_few_items}
    notes = [f"* Kind of the intervals: {', '.join(sorted(kinds))}."] if kinds else []
    notes += [f"* {label}: {verdict}." for label, verdict in few.items()]
    return "\n".join([markdown_table(["weights", *labels], lines), *notes]).rstrip("\n") + "\n"


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Return everything as JSON values, with the interval of every row per term."""
    labels, unit = list(comparison.base.scores), Unit.of(comparison.objective)
    rows = []
    for row in comparison.rows:
        over_base = comparison.interval(row, comparison.base)
        rows.append(
            {
                "name": row.name,
                "weights": row.weights,
                "chosen_after_seal": row.chosen_after_seal,
                "value": comparison.value(row),
                "over_base": over_base.to_json(),
                "summary": f"over the base {said_of(over_base, unit, is_gain=True)}",
                "merge_minus": comparison.interval(comparison.merge, row).to_json(),
                "terms": {
                    label: {
                        "score": row.scores[label].score,
                        "n_items": len(row.scores[label].items),
                        "gain": comparison.term_interval(row, label).to_json(),
                    }
                    for label in labels
                },
            }
        )
    return {"rows": rows, "verdicts": verdicts(comparison)}
