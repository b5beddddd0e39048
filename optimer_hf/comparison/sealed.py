"""Score the baselines and the merge of a finished study on its sealed test.

Each weight set is scored once; `sealed.jsonl` keeps every row with its scores for the next time. A
row whose weights were chosen after sealed scores had been seen is marked.
"""

import gc
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args

from optimer_hf.comparison import baselines
from optimer_hf.comparison.attempts import choose_attempts
from optimer_hf.comparison.mixtures_file import read_mixtures
from optimer_hf.comparison.result import Comparison
from optimer_hf.comparison.rows import (
    OF_ATTEMPTS,
    OF_MIXTURES,
    Contender,
    RowKind,
    SealedRow,
    check_titles,
    order_rows,
    title_of,
)
from optimer_hf.comparison.sealed_file import SealedLog, give_scores
from optimer_hf.errors import ConfigError, EvaluationError, ModelError
from optimer_hf.files.digest import digest
from optimer_hf.files.reference import absolute_reference
from optimer_hf.files.text import first_line, slug
from optimer_hf.progress import Meter, announce
from optimer_hf.scoring.objective import Objective
from optimer_hf.searching.engine import keep_engine
from optimer_hf.searching.faults import is_environmental
from optimer_hf.searching.loop import search
from optimer_hf.searching.runner import InProcess
from optimer_hf.searching.trial import Pool, ResidentPool, base_of_study, run_trial
from optimer_hf.study.config import By, MergeMethod, StudyConfig, VectorConfig
from optimer_hf.study.directory import Study, load_study, lock_directory
from optimer_hf.study.prediction import best_scale, predict
from optimer_hf.study.space import ROUNDING
from optimer_hf.study.trials import ENGINE, OF_TEST, Candidate, ChosenRow
from optimer_hf.vectors.delta import allow_any_norm

logger = logging.getLogger(__name__)

SCALED = "the mixture"  # name of the vector in the search for its scale
NEEDED = (  # kinds of rows without which nothing is compared, and those that a run has trained for
    *("base", "fixed", "merge", "retargeted"),
    *OF_MIXTURES,
    *OF_ATTEMPTS,
)
MADE_HERE = ("method", "random")  # kinds of rows whose models nobody trained


@dataclass(frozen=True)
class _Sealing:
    """A sealed test that is open: where its rows go, the weights that were chosen before it was
    opened, and those of the rows that it needs, both by key. `reasons` gets those of the baselines
    that cannot be scored, by key.
    """

    study: Study
    log: SealedLog
    planned: frozenset[str]
    needed: frozenset[str]
    reasons: dict[str, str] = field(default_factory=dict)

    def leave_out(self, contender: Contender, what: str, reason: str) -> None:
        """Leave a row out that cannot be `what`. Raises EvaluationError if it is needed."""
        if contender.key in self.needed:
            raise EvaluationError(
                f"sealed test: row {contender.title!r} cannot be {what}: {reason}"
            )
        logger.warning("sealed test: %s is left out: %s", contender.title, reason)
        self.reasons[contender.key] = f"it cannot be {what} ({reason})"


def list_own_contenders(study: Study) -> list[Contender]:
    """Return the rows with weights of the study's own pool: the base, each vector alone at 1.0 and
    at its best scale, the average, the sum, weights that somebody has guessed, the merge, and the
    re-targeted merges.
    """
    config = study.config
    free, fixed, parts = list(config.free), config.fixed, config.free_parts
    nothing = dict.fromkeys(free, 0.0)
    rows = [Contender("base", "", nothing | dict.fromkeys(fixed, 0.0))]
    if fixed:
        rows.append(Contender("fixed", "", nothing | fixed))
    for name, own in parts.items():
        rows.append(Contender("alone", name, nothing | dict.fromkeys(own, 1.0) | fixed))
    for name in parts:
        choose = partial(best_scale, study, name)
        weights = study.decide_row(ChosenRow("best_scale", name), choose)
        rows.append(Contender("best_scale", name, weights))
    singles = config.free_singles  # a mixture holds their text again
    if len(singles) > 1:
        own = [weight for name in singles for weight in parts[name]]
        average = nothing | dict.fromkeys(own, 1 / len(singles)) | fixed
        rows.append(Contender("average", "", average))
        rows.append(Contender("sum", "", nothing | dict.fromkeys(own, 1.0) | fixed))
    for name, given in config.baselines.weights.items():
        rows.append(Contender("weights", name, config.fill_weights(given)))
    best = study.best_trial.weights
    rows = [replace(row, weights=best) if _equals(row.weights, best) else row for row in rows]
    rows.append(Contender("merge", "", best))
    for name, target in config.retarget.items():
        row = ChosenRow("retargeted", name, target)
        weights = study.decide_row(row, partial(_predict_weights, study, name, target))
        rows.append(Contender("retargeted", name, weights))
    return rows


def _equals(weights: Mapping[str, float], best: Mapping[str, float]) -> bool:
    """Whether weights are those of the merge but for the digits that a trial's are rounded to. The
    two would differ in nothing but rounding, alike on every item, which a test finds significant.
    """
    return all(abs(weights[name] - weight) <= ROUNDING for name, weight in best.items())


def _predict_weights(study: Study, name: str, target: Mapping[str, float]) -> dict[str, float]:
    prediction = predict(study, target)
    if prediction.note:
        logger.warning("retarget %r: not predicted: %s", name, prediction.note)
    return prediction.weights


def compare(
    study: Study,
    *,
    mixtures: Mapping[str, str] | None = None,
    pool: Callable[[StudyConfig], Pool] = ResidentPool,
) -> Comparison:
    """Score all rows on the sealed test and return them. Rows that were scored before are read.

    `mixtures` maps the names of `baselines.mixtures` to the trained models (None: those that a run
    of the study has trained). Raises ConfigError if the study has no `test`, or two rows the same
    title; EvaluationError if the base, a merge or a mixture that a run has trained cannot be
    scored. Other baselines that cannot are `left_out`.
    """
    mixtures = read_mixtures(study.directory) if mixtures is None else mixtures
    objective = _find_test(study)
    check_titles(study.config, str(study.directory))

    @cache
    def open_pool() -> Pool:
        with announce("sealed test: opening base, vectors and tasks"):
            own = pool(study.config)
        study.record_inputs(own.inputs)
        return own

    with lock_directory(study.directory), keep_engine():
        of_plugins, models_of_plugins = baselines.list_plugins(study)
        models = baselines.list_models(study, mixtures, of_plugins=models_of_plugins)
        log = SealedLog(study.directory, study.config)
        searches = _run_searches(study, open_pool)
        models += _fit_mixtures(study, models, pool, close_pool=open_pool.cache_clear)
        recalled = _recall_mixtures(study, models, log)
        contenders = _list_contenders(study, [*searches, *of_plugins, *models, *recalled])
        needed = frozenset(each.key for each in contenders if each.kind in NEEDED)
        sealing = _Sealing(study, log, log.open_seal(contenders), needed)
        to_score = _list_unscored(contenders, log)
        built = {each.key: each for each in models}
        own = [each for each in to_score if each.key not in built]
        if own:
            _score(sealing, own, open_pool())
        open_pool.cache_clear()
        others = [(each, built[each.key]) for each in to_score if each.key in built]
        _score_models(sealing, others, pool)
        scored = {row.key: row for row in log.scored}
        rows = [give_scores(each, scored[each.key]) for each in contenders if each.key in scored]
        log.append_equals(rows)
        left_out = log.record_left_out(contenders, sealing.reasons)
    ordered = order_rows(rows, study.config)
    return Comparison(ordered, objective, study.config.retarget, left_out)


def compare_study(
    study_dir: Path, *, everything: bool = False, models: Sequence[str] = ()
) -> Comparison:
    """Score the baselines and the merge of the finished study in a directory on its sealed test.

    `everything` adds all merge methods and random vectors; `models` adds models, each as a text
    NAME=MODEL. Raises ConfigError for another text before anything is scored.
    """
    study = load_study(study_dir)
    added = dict(_parse_model(text) for text in models)
    known = study.config.baselines
    changes: dict[str, Any] = {"models": known.models | added}
    if everything:
        changes |= {"merge_methods": [*get_args(MergeMethod)], "random_vectors": True}
    wanted = known.model_copy(update=changes)
    return compare(replace(study, config=study.config.model_copy(update={"baselines": wanted})))


def _parse_model(text: str) -> tuple[str, str]:
    """Return the name and the reference in a text NAME=MODEL."""
    name, _, source = text.partition("=")
    if not (name and source):
        raise ConfigError(f"--model {text!r}: expected NAME=MODEL.")
    return name, absolute_reference(source, Path.cwd())


def _find_test(study: Study) -> Objective:
    """Return the objective of the sealed test. Raises ConfigError if there is none."""
    if study.config.test is None:
        raise ConfigError(
            f"{study.directory}: study.yaml has no `test:` section, so there is no sealed test to "
            "compare on. Add one, and search again."
        )
    return study.config.test


def _list_unscored(contenders: Sequence[Contender], log: SealedLog) -> list[Contender]:
    """Return one contender for each weight set without scores: the last of those that have it."""
    known = {row.key for row in log.rows}
    last = {each.key: each for each in contenders}
    return [each for each in last.values() if each.key not in known]


def _score_models(
    sealing: _Sealing,
    contenders: Sequence[tuple[Contender, baselines.ModelContender]],
    pool: Callable[[StudyConfig], Pool],
) -> None:
    """Build each model that is not a merge of the study's pool, and score it."""
    with _scratch_directory(sealing.study) as scratch:

        def open_pool(model: baselines.ModelContender) -> Pool:
            with allow_any_norm() if model.kind in MADE_HERE else nullcontext():
                return pool(with_pool(sealing.study.config, model.make(scratch), model.splits))

        for contender, model in contenders:
            gc.collect()  # the harness keeps the previous model alive in a cycle
            _score_model(sealing, contender, partial(open_pool, model))  # which nothing holds then


def _score_model(sealing: _Sealing, contender: Contender, open_pool: Callable[[], Pool]) -> None:
    """Build a model that is not a merge of the study's pool, and score it; leave it out if it
    cannot be built.

    Raises StudyError unless base, tokenizer and sealed items are those of the study.
    """
    try:
        pool = open_pool()
    except Exception as error:
        if is_environmental(error) and not isinstance(error, ModelError):
            raise
        sealing.leave_out(contender, "built", f"{type(error).__name__}: {first_line(error)}")
        return
    common = {
        key: digest
        for key, digest in pool.inputs.items()
        if key.startswith(OF_TEST) or key in ("base_model", "tokenizer_source", ENGINE)
    }
    sealing.study.check_inputs(common)
    _score(sealing, [contender], pool)


@contextmanager
def _scratch_directory(study: Study) -> Iterator[Path]:
    """Yield an empty directory to build baselines in, and remove it afterwards."""
    scratch = study.directory.resolve() / "scratch"  # the YAML for mergekit names it
    try:
        shutil.rmtree(scratch, ignore_errors=True)  # left by a process that was killed
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _run_searches(study: Study, open_pool: Callable[[], Pool]) -> list[Contender]:
    """Run the other searches among the baselines, before anything is scored on the sealed test, and
    return their rows.
    """
    searches = []
    for name, settings in study.config.baselines.searches.items():
        config = study.config.with_other_search(settings)
        folder = f"{slug(name)}-{digest(settings.model_dump(mode='json'))[:6]}"
        directory = study.directory / "searches" / folder
        runner = InProcess(lambda _: open_pool())
        best = search(config, directory, runner=runner, warns=False).best_trial
        searches.append(Contender("other_search", name, best.weights))
    return searches


def _list_contenders(study: Study, others: Sequence[Contender]) -> list[Contender]:
    """Return every row to score, `others` among them; the merge and the re-targeted merges come
    last.
    """
    own = list_own_contenders(study)
    baseline, last = (
        [each for each in own if each.is_baseline == is_baseline] for is_baseline in (True, False)
    )
    return [*baseline, *others, *last]


# -- mixtures --------------------------------------------------------------------------------------


def _fit_mixtures(
    study: Study,
    models: Sequence[baselines.ModelContender],
    pool: Callable[[StudyConfig], Pool],
    *,
    close_pool: Callable[[], None],
) -> list[baselines.ModelContender]:
    """Return the rows that are chosen on the items of the search: the best of several attempts at
    a mixture, and mixtures at their best scale. Before, the pool of the study is closed, so that
    there is one model at a time.
    """
    fitted: list[baselines.ModelContender] = []
    if study.config.baselines.attempts:
        close_pool()
        fitted += choose_attempts(study, pool)
    if to_scale := _list_to_scale(study, [*models, *fitted]):
        close_pool()
        fitted += [_scale_mixture(study, model, pool) for model in to_scale]
    return fitted


def _list_to_scale(
    study: Study, models: Sequence[baselines.ModelContender]
) -> list[baselines.ModelContender]:
    """Return the mixtures for which a row at their best scale is wanted. The best of several
    attempts always has one, since the scale of a merge is searched, too.
    """
    wanted = study.config.baselines.mixtures
    scaled = {name for name, each in wanted.items() if each.scale == "searched"}
    return [
        each
        for each in models
        if each.kind == "attempts" or (each.kind == "mixture" and each.subject in scaled)
    ]


def _scale_mixture(
    study: Study, model: baselines.ModelContender, pool: Callable[[StudyConfig], Pool]
) -> baselines.ModelContender:
    """Return the row of a mixture at the scale that is best on the items of the search, as a search
    of its own finds it.
    """
    key, *_ = model.weights
    sources = model.make(study.directory)  # it is there already, so nothing is written
    sources[SCALED] = sources.pop(key)
    config = study.config.with_scale_search(sources, SCALED)
    name = model.subject if model.kind == "mixture" else model.title
    directory = study.directory / "searches" / f"scale-{slug(name)}-{digest(key)[:6]}"
    best = search(config, directory, runner=InProcess(pool), warns=False).best_trial
    weights = model.weights | {key: best.weights[SCALED]}
    kind: RowKind = "scaled_mixture" if model.kind == "mixture" else "scaled_attempts"
    return replace(model, kind=kind, weights=weights)


def _recall_mixtures(study: Study, models: Sequence[Contender], log: SealedLog) -> list[SealedRow]:
    """Return the recorded rows of the mixtures whose models are not here. Warns of mixtures that
    have none.
    """
    here = {(each.kind, each.subject) for each in models}
    wanted = [(OF_MIXTURES, name) for name in study.config.baselines.mixtures]
    wanted += [(OF_ATTEMPTS, str(n)) for n in study.config.baselines.attempts]
    recalled: list[SealedRow] = []
    for kinds, subject in ((k, s) for k, s in wanted if (k[0], s) not in here):
        rows = {row.kind: row for row in log.rows if row.kind in kinds and row.subject == subject}
        recalled.extend(rows.values())
        if not rows:
            named = f"mixture {subject!r}" if kinds == OF_MIXTURES else title_of(kinds[0], subject)
            logger.warning(
                "%s is left out, because it is not trained; `optimer run` on the recipe folder "
                "trains it",
                named,
            )
    return recalled


def with_pool(
    config: StudyConfig, sources: Mapping[str, str], splits: Mapping[str, By]
) -> StudyConfig:
    """Return the config of a study with another pool: name -> reference; `splits` has the groups of
    those that have weights by group. It keeps the base and the tokens of the study.
    """
    vectors = {
        name: VectorConfig(source=source, by=splits.get(name)) for name, source in sources.items()
    }
    changes: dict[str, Any] = {"vectors": vectors, "tokenizer_source": config.tokenizer_reference}
    if config.vocabulary == "union":
        base, tokenizer = base_of_study(config)
        changes |= {"base_model": str(base.path), "vocabulary": "base"}
        changes |= {"tokenizer_source": None} if tokenizer is None else {}
    return config.model_copy(update=changes)


def _score(sealing: _Sealing, contenders: Sequence[Contender], pool: Pool) -> None:
    """Score rows on the sealed test; each is on disk before the next."""
    study, log = sealing.study, sealing.log
    asked = _find_test(study).asked_terms("rescore")
    n_known = len(study.log.trials)
    name = f", {contenders[0].title}" if len(contenders) == 1 else ""
    with Meter(f"sealed test{name}", len(contenders), "rows") as meter:
        for each in contenders:
            trial = run_trial(pool, Candidate(n_known, each.title, each.weights), asked)
            row = SealedRow(
                each.kind,
                each.subject,
                each.weights,
                scores=trial.terms,
                chosen_after_seal=each.key not in sealing.planned,
                n_trials_known=n_known,
                seconds=trial.seconds,
                n_tokens=trial.n_tokens,
            )
            error = str(trial.error).partition("\n")[0] if trial.status == "crashed" else None
            if (reason := error or log.mistake_of(row)) is None:
                log.append(row)
            else:
                sealing.leave_out(each, "scored", reason)
            meter.advance(1)
