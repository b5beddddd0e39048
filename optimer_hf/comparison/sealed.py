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
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from optimer_hf.comparison import baselines
from optimer_hf.comparison.rows import AT_BEST_SCALE, Comparison, Row
from optimer_hf.errors import ConfigError, EvaluationError
from optimer_hf.files.digest import digest
from optimer_hf.files.model import VersionedFile
from optimer_hf.files.text import slug
from optimer_hf.progress import Meter
from optimer_hf.scoring.objective import Objective
from optimer_hf.searching.loop import search
from optimer_hf.searching.pool import Pool, ResidentPool, run_trial
from optimer_hf.study.config import (
    AVERAGE,
    BASE,
    FIXED_ALONE,
    MERGE,
    RETARGETED,
    SUM,
    StudyConfig,
    VectorConfig,
)
from optimer_hf.study.directory import Study, locked
from optimer_hf.study.prediction import best_scale, predict
from optimer_hf.study.trials import OF_TEST, SEALED_FILE, Trial, TrialLog

logger = logging.getLogger(__name__)


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
