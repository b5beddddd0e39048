"""Run a study: choose weights, score them, log both."""

import contextlib
import logging
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from time import perf_counter

from optimer_hf.errors import ConfigError, EvaluationError, StudyError
from optimer_hf.files.staging import scratch_directory, write_text
from optimer_hf.progress import Meter
from optimer_hf.scoring.formatting import Unit
from optimer_hf.scoring.objective import Objective, is_feasible
from optimer_hf.scoring.tasks import warn_of_other_weights, warn_of_reported_benchmarks
from optimer_hf.searching.next_weights import Asker
from optimer_hf.searching.runner import InProcess, Runner, Slots
from optimer_hf.searching.samplers import (
    NOT_KNOWN,
    SamplerAsker,
    describe_sampler,
    sampler_of,
)
from optimer_hf.searching.tracking import Tracker
from optimer_hf.study.config import LARGEST_SEARCH, StudyConfig
from optimer_hf.study.directory import (
    Inputs,
    Study,
    lock_directory,
    open_study,
    warn_of_uninformative_items,
)
from optimer_hf.study.gradients import (
    N_PLACES,
    N_TO_FIT,
    cost_ratio,
    n_trials_saved,
    needs_places,
    next_anchor,
    takes_gradients,
)
from optimer_hf.study.plugins import Sampler, refuse_missing_plugins
from optimer_hf.study.prediction import PREDICTION, predict
from optimer_hf.study.records import Rules, mistake_of_gain, mistakes_of_score
from optimer_hf.study.screening import keeps_all, screen_of, searched_part
from optimer_hf.study.space import anchors
from optimer_hf.study.trials import (
    INPUTS_FILE,
    SAMPLER,
    STUDY_FILE,
    TRIALS_FILE,
    Candidate,
    Trial,
    TrialLog,
    rules_of,
)

logger = logging.getLogger(__name__)


# -- for a new objective ---------------------------------------------------------------------------


def search_on(
    study: Study,
    target: Objective,
    directory: Path,
    n_trials: int,
    *,
    runner: Runner | None = None,
) -> Study:
    """Search for a new objective, starting from the trials of a study, and return the new study.

    Its directory begins with the recorded trials. `n_trials` new ones follow, the first of them at
    the predicted weights. Raises StudyError when that is more than LARGEST_SEARCH trials.
    """
    seeds = _seeds(study, target)
    earlier = TrialLog(directory / TRIALS_FILE, repair=False).trials_at("search")
    n_seeds = _n_seeds(earlier, seeds) if earlier else len(seeds)
    if n_seeds + n_trials > LARGEST_SEARCH:
        raise StudyError(
            f"{directory}: found {n_seeds} recorded trials and {n_trials} more, expected at most "
            f"{LARGEST_SEARCH} together. Ask for fewer."
        )
    config = _config_for(study, target, n_seeds + n_trials)
    with lock_directory(directory):
        opened = open_study(config, directory)
        if not opened.log.trials:
            if digests := study.read_inputs():  # first, so that new trials score the same
                digests.pop(SAMPLER, None)
                Inputs(digests=digests).write(directory / INPUTS_FILE)
            text = "".join(f"{trial.to_json()}\n" for trial in seeds)
            write_text(opened.log.path, text)
    first = {n_seeds: (PREDICTION, predict(study, target).weights)}
    return search(config, directory, runner=runner, planned=first)


def _config_for(study: Study, target: Objective, n_trials: int) -> StudyConfig:
    """Return the config of a search for another objective that has `n_trials` in all."""
    settings = {
        "n_trials": n_trials,
        "surrogate": "per_term",
        "sampler": None,
        "pareto": False,
        "spread": False,
    }
    changes = {
        "objective": target.model_dump(),
        "test": None,
        "retarget": {},
        "search": study.config.search.model_dump() | settings,
    }
    return StudyConfig.model_validate(study.config.model_dump() | changes)


def _seeds(study: Study, target: Objective) -> list[Trial]:
    """Return the search trials of a study with their scores of the terms of a new objective,
    numbered without gaps, which a search by several workers can leave.
    """
    labels = {term.label for term in target.terms_at("search")}
    in_order = sorted(study.trials, key=lambda trial: trial.number)
    return [
        replace(
            trial,
            number=number,
            terms={label: score for label, score in trial.terms.items() if label in labels},
            gradients={label: each for label, each in trial.gradients.items() if label in labels},
        )
        for number, trial in enumerate(in_order)
    ]


def _n_seeds(earlier: Sequence[Trial], seeds: Sequence[Trial]) -> int:
    """Return how many recorded trials a search for a new objective began with: the number of its
    prediction or, if several workers have not finished that one, the first number that is missing.
    """
    numbers = {trial.number for trial in earlier}
    first_open = next(number for number in count() if number not in numbers)
    inherited = {trial.number for trial in seeds if trial.origin == PREDICTION}
    own = {trial.number for trial in earlier if trial.origin == PREDICTION} - inherited
    return min(own, default=first_open)


# -- a study ---------------------------------------------------------------------------------------


def search(
    config: StudyConfig,
    directory: Path,
    *,
    runner: Runner | None = None,
    planned: Mapping[int, tuple[str, Mapping[str, float]]] | None = None,
    ask: Sampler | None = None,
    warns: bool = True,
) -> Study:
    """Run a study to its end and return it; trials that are on disk are not run again.

    `runner` runs the trials: `InProcess()` (the default), or `Workers(...)`, processes of this
    machine or of a Dask cluster. `planned` sets origin and weights of trials, by number. `ask`
    chooses the weights after the first, common trials, in place of the surrogate. Without `warns`,
    nothing is said of the choice of items and trials, as by a baseline, whose study has said it.

    Raises OptimerError for anything wrong with the config before the first trial. A trial that
    fails is recorded as crashed, and the search goes on. It ends with an EvaluationError if the
    base cannot be scored, if all anchors crash, or if the machine is at fault (see `run_trial`).
    """
    if ask is not None and config.search.gradients != "never":
        raise ConfigError(
            f"search.gradients: found {config.search.gradients!r}, but only the surrogate uses "
            "gradients, and `ask` chooses the weights. Leave one of them out."
        )
    is_new = not directory.exists()
    with lock_directory(directory), _leaving_no_idle_study(directory, is_new=is_new):
        study = open_study(config, directory)
        config = study.config
        study.decide(to_disk=True)
        if study.is_finished and study.names_recorded_files():
            logger.info("search: %d trials are recorded, nothing to do", len(study.trials))
            return study
        sampler = sampler_of(config, ask)
        refuse_missing_plugins(config)
        tracker = Tracker(config.search.report_to, directory)  # raises before anything is loaded
        with (runner or InProcess()).open(config) as slots, tracker:
            study.record_inputs(slots.digest_inputs() | _digest_sampler(study, sampler))
            if warns:
                _warn_of_config(config)
            _run_search(study, slots, planned or {}, tracker, sampler)
            study.decide(to_disk=True)
            _run_rescore(study, slots)
            study.decide(to_disk=True)
    if warns:
        warn_of_uninformative_items(study)
    return study


@contextlib.contextmanager
def _leaving_no_idle_study(directory: Path, *, is_new: bool) -> Iterator[None]:
    """If a search ends in an error before its first trial, remove the records that it began, and
    its directory if that `is_new`. The directory is held by this process.
    """
    written = [
        file for name in (STUDY_FILE, INPUTS_FILE) if not (file := directory / name).exists()
    ]
    try:
        yield
    except BaseException:
        if not (directory / TRIALS_FILE).exists():
            with contextlib.suppress(OSError):
                for file in written:
                    file.unlink(missing_ok=True)
                if is_new and [path.name for path in directory.iterdir()] == [".lock"]:
                    (directory / ".lock").unlink()
                    directory.rmdir()
        raise


def _warn_of_config(config: StudyConfig) -> None:
    """Log a warning for items that prove less than they seem to, and if all trials are those that
    every search starts with.
    """
    warn_of_reported_benchmarks(config.objective, config.test)
    if config.test is not None:
        warn_of_other_weights(config.objective, config.test)
    first, text = len(anchors(config)), "vectors alone and their average, which every search"
    if takes_gradients(config, []):
        if config.search.gradients != "always":
            return  # what the gradients of the base say decides
        first, text = min(N_TO_FIT, first), "the average, which every search with gradients"
    if config.search.n_trials <= first and config.free:
        logger.warning(
            "search.n_trials: %d trials are the base, %s starts with. From %d on, weights are "
            "searched",
            config.search.n_trials,
            text,
            first + 1,
        )


def _digest_sampler(study: Study, sampler: tuple[str, Sampler] | None) -> dict[str, str]:
    """Return what inputs.json records of the code that chooses weights: nothing of the surrogate,
    unless another code has chosen before.
    """
    known = study.read_inputs().get(SAMPLER)
    if sampler is None and known is None:
        return {}
    text = describe_sampler(sampler)
    if known is None and any(trial.origin == "surrogate" for trial in study.trials):
        logger.warning("%s: the surrogate chose weights so far, and now %s", study.directory, text)
    elif known == text and text.endswith(NOT_KNOWN):
        logger.warning("%s: whether %s is the same as before is not known", study.directory, text)
    return {SAMPLER: text}


def _run_search(
    study: Study,
    slots: Slots,
    planned: Mapping[int, tuple[str, Mapping[str, float]]],
    tracker: Tracker,
    sampler: tuple[str, Sampler] | None,
) -> None:
    config = study.config
    done = {trial.number for trial in study.trials}
    asked = config.objective.asked_terms("search")
    waiting = deque(number for number in range(config.search.n_trials) if number not in done)
    running: dict[int, Candidate] = {}
    if done and waiting:
        logger.info("search: going on from trial %d of %d", waiting[0], config.search.n_trials)
        _say_what_is_searched(study)
    best, rules = _Best(study), _rules(study)
    with (
        Meter("search", config.search.n_trials, "trials", done=len(done)) as meter,
        scratch_directory("optimer-smac-") as scratch,
    ):
        plan = _Plan(study, scratch, planned, sampler)
        while waiting or running:
            while waiting and len(running) < slots.count_slots():
                if running and plan.waits_for_first():
                    break
                candidate = plan.next_candidate(waiting.popleft(), list(running.values()))
                running[candidate.number] = candidate
                slots.submit(candidate, asked)
            finished = _crash_if_unusable(rules, slots.next_finished())
            del running[finished.number]
            _check_sound(study, finished)
            study.log.append(finished)
            _say_what_gradients_tell(study, finished)
            rules.add(finished)
            plan.tell(finished)
            best.take(finished)
            meter.advance(1, _note(study, finished, best.value))
            tracker.log(finished.number, _figures(study, finished, best.value))


class _Plan:
    """Chooses what to try next: an anchor, planned weights, or what the surrogate or a sampler
    proposes.
    """

    def __init__(
        self,
        study: Study,
        scratch: Path,
        planned: Mapping[int, tuple[str, Mapping[str, float]]],
        sampler: tuple[str, Sampler] | None,
    ) -> None:
        self._study, self._scratch = study, scratch
        self._planned = dict(planned)
        self._sampler = sampler
        self._asker: Asker | SamplerAsker | None = None

    def waits_for_first(self) -> bool:
        """Whether other trials wait for the first: gains are relative to the base, so it runs
        alone, and the gradients of the first two choose the vectors of a large pool.
        """
        config, trials = self._study.config, self._study.trials
        return not trials or (len(trials) < N_PLACES and needs_places(config, trials))

    def next_candidate(self, number: int, running: Sequence[Candidate]) -> Candidate:
        """Return the candidate for trial `number`, given those that are still running."""
        trials = self._study.trials
        searched = searched_part(self._study.config, trials)
        takes = takes_gradients(searched, trials)
        others = [candidate.weights for candidate in running]
        planned = self._planned.get(number) or next_anchor(searched, number, trials, others)
        if planned is not None:
            origin, weights = planned[0], dict(planned[1])
            return Candidate(number, origin, weights, seconds={"ask": 0.0}, with_gradients=takes)
        if self._asker is None:
            self._asker = self._open_asker()
            for trial in self._study.log.trials_at("search"):
                self._asker.tell(trial)
        started = perf_counter()
        weights = self._asker.ask(number, others)
        seconds = {"ask": perf_counter() - started}
        origin = "surrogate" if self._sampler is None else f"sampler {self._sampler[0]}"
        return Candidate(number, origin, weights, seconds=seconds, with_gradients=takes)

    def _open_asker(self) -> Asker | SamplerAsker:
        if self._sampler is None:
            return Asker(self._study.config, self._scratch)
        return SamplerAsker(self._study.config, *self._sampler)

    def tell(self, trial: Trial) -> None:
        """Report a finished trial to the asker, which reads the log if it is made later."""
        if self._asker is not None:
            self._asker.tell(trial)


def _say_what_gradients_tell(study: Study, finished: Trial) -> None:
    """Log what the gradients of a trial decide, if it is the first one that has them or the last
    one that a screen waits for; and a warning if the base has none.
    """
    config, trials = study.config, study.trials
    if finished.number == 0 and not finished.gradients and takes_gradients(config, []):
        name = "gradients" if config.search.gradients != "never" else "screen"
        logger.warning(
            "search.%s: found %r, but no term has a gradient at the base, so the search goes on "
            "with scores alone",
            name,
            getattr(config.search, name),
        )
    n_deciding = 1 if config.search.screen is None else N_PLACES
    deciding = [trial for trial in trials if trial.gradients][:n_deciding]
    if finished in deciding[-1:] and len(deciding) == n_deciding:
        _say_what_is_searched(study)
        _say_whether_gradients_pay(searched_part(config, trials), deciding)


def _say_whether_gradients_pay(searched: StudyConfig, trials: Sequence[Trial]) -> None:
    """Log how long the first of these trials with gradients took, what it is worth, and whether
    more of them follow.
    """
    if searched.search.gradients == "never":
        return
    logger.info(
        "search: with gradients a trial takes %.1f times as long and is worth %.1f without; %s",
        cost_ratio(trials[0]),
        n_trials_saved(searched, trials[0]),
        "it takes them" if takes_gradients(searched, trials) else "it goes on without them",
    )


def _say_what_is_searched(study: Study) -> None:
    """Log what the screen of a large pool has chosen, once it has."""
    screen = screen_of(study.config, study.trials)
    if keeps_all(study.config, study.trials):
        logger.info("search: the trials take gradients, so search.screen auto leaves nothing out")
    if screen is not None:
        logger.info(
            "search: the gradients of %s choose %d of %d vectors: %s; the others stay at 0",
            " and ".join(place.origin for place in screen.places),
            len(screen.kept),
            len(study.config.free),
            ", ".join(screen.kept),
        )


def _check_sound(study: Study, finished: Trial) -> None:
    """Raise EvaluationError if the base cannot be scored, or if all anchors have crashed."""
    if finished.status == "ok":
        return
    if finished.number == 0:
        raise EvaluationError(f"the base model itself cannot be scored: {_reason(finished)}")
    others = [trial for trial in study.trials if trial.number != 0]
    n_others = len(anchors(study.config)) - 1
    if len(others) == n_others - 1 and all(trial.status == "crashed" for trial in others):
        first = min([*others, finished], key=lambda trial: trial.number)
        raise EvaluationError(
            f"none of the {n_others} first merges can be scored; the first one: {_reason(first)}"
        )


def _reason(crashed: Trial) -> str:
    """Return the first line of the error of a crashed trial; `optimer -v` shows the traceback."""
    return str(crashed.error).partition("\n")[0]


def _rules(study: Study) -> Rules:
    """Return the rules for the trials to come, given those that are there."""
    longest = 1 + max((trial.number for trial in study.log.trials), default=0)
    rules = rules_of(study.config, max(study.config.search.n_trials, longest))
    for trial in study.log.trials:
        rules.add(trial)
    return rules


def _crash_if_unusable(rules: Rules, finished: Trial) -> Trial:
    """Return a finished trial; as a crashed one if its scores are too large or not finite.

    Raises EvaluationError for scores that cannot be compared with those of the base, because then
    no trial of this search can.
    """
    base = rules.first(finished.fidelity)
    for label, term in finished.terms.items():
        wrong = next(mistakes_of_score(term), None)
        if wrong is None and base is not None and label in base.terms:
            wrong = mistake_of_gain(term, base.terms[label])
        if wrong is not None:
            error = f"EvaluationError: term {label!r}: {wrong}"
            return replace(finished, status="crashed", terms={}, gradients={}, error=error)
    for wrong in rules.mistakes(finished):
        is_crashed_base = base is None and finished.status != "ok"  # `_check_sound` says so
        if not is_crashed_base:
            raise EvaluationError(
                f"trial {finished.number}: {wrong}. A pool or function has to score the same items "
                "of the same terms every time."
            )
    return finished


class _Best:
    """The best value so far among the trials that break no constraint."""

    def __init__(self, study: Study) -> None:
        self._study, self.value = study, -math.inf
        for trial in study.trials:
            self.take(trial)

    def take(self, trial: Trial) -> None:
        """Take a trial that is in the log into account."""
        if trial.status == "ok" and is_feasible(
            self._study.config.objective, trial.terms, self._study.base
        ):
            self.value = max(self.value, self._study.value(trial))


def _note(study: Study, trial: Trial, best: float) -> str:
    if trial.status == "crashed":
        return "crashed"
    unit, base = Unit.of(study.config.objective), study.value(study.log.first("search"))
    return f"{unit.show(study.value(trial) - base)}, best {unit.show(best - base)}"


def _figures(study: Study, trial: Trial, best: float) -> dict[str, float]:
    """Return what a tracking tool shows of a trial: its weights and, unless it crashed, its
    scores.
    """
    figures = {f"weight/{name}": weight for name, weight in trial.weights.items()}
    if trial.status == "ok":
        figures |= {"objective": study.value(trial), "best": best}
        figures |= {f"score/{label}": score.score for label, score in trial.terms.items()}
    return figures


def _run_rescore(study: Study, slots: Slots) -> None:
    """Score the base and the best few on more items, and on the terms that are for re-scoring only.
    Scores that the search measured on the same items are kept.
    """
    remaining, done = deque(study.trials_to_rescore()), len(study.log.trials_at("rescore"))
    if not remaining:
        return
    asked = study.terms_to_rescore()
    if not asked:
        logger.info("re-score: the search scored the same items, so its scores are kept")
        for trial in remaining:
            again = replace(_rescore_candidate(trial).to_trial({}, {}, 0), worker=trial.worker)
            study.log.append(study.with_search_scores(again))
        return
    n_running, rules = 0, _rules(study)
    with Meter("re-score", done + len(remaining), "trials", done=done) as meter:
        while remaining or n_running:
            while remaining and n_running < slots.count_slots():
                if n_running and not study.log.trials_at("rescore"):
                    break  # the base first, as in the search
                slots.submit(_rescore_candidate(remaining.popleft()), asked)
                n_running += 1
            rescored = _complete_rescored(study, rules, slots.next_finished())
            n_running -= 1
            if rescored.number == 0 and rescored.status == "crashed":
                raise EvaluationError(
                    f"the base model itself cannot be scored again: {_reason(rescored)}"
                )
            study.log.append(rescored)
            rules.add(rescored)
            meter.advance(1)


def _complete_rescored(study: Study, rules: Rules, trial: Trial) -> Trial:
    """Return a re-scored trial with the scores that it keeps from the search, crashed if they are
    unusable.
    """
    return _crash_if_unusable(rules, study.with_search_scores(trial))


def _rescore_candidate(trial: Trial) -> Candidate:
    return Candidate(trial.number, trial.origin, trial.weights, "rescore")
