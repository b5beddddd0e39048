"""A study on disk: its config, inputs, trials and decisions, and what follows from them."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import Timeout
from pydantic import model_validator

from optimer_hf.errors import StudyError
from optimer_hf.files.digest import differences
from optimer_hf.files.disk import naming_disk_errors
from optimer_hf.files.locks import locking, remove_dead_locks
from optimer_hf.files.model import VersionedFile
from optimer_hf.files.paths import drop_folders
from optimer_hf.files.staging import make_directory
from optimer_hf.files.text import quote
from optimer_hf.scoring.intervals import Interval
from optimer_hf.scoring.objective import Asked, combine, is_feasible
from optimer_hf.scoring.paired import paired_interval
from optimer_hf.scoring.scores import TermScore
from optimer_hf.study import tables
from optimer_hf.study.config import LARGEST_WEIGHT, StudyConfig
from optimer_hf.study.records import check_trials
from optimer_hf.study.space import ROUNDING, to_unit
from optimer_hf.study.surrogate import fit_surrogate
from optimer_hf.study.trials import (
    DECISIONS_FILE,
    ENGINE,
    INPUTS_FILE,
    OF_TEST,
    SAMPLER,
    SEALED_FILE,
    STUDY_FILE,
    TRIALS_FILE,
    ChosenRow,
    Decision,
    DecisionLog,
    Fidelity,
    Trial,
    TrialLog,
    rules_of,
)

if TYPE_CHECKING:
    from pandas import DataFrame

logger = logging.getLogger(__name__)


NOT_COMPARED = "Scores of two engines are never compared, since they round differently."
ALIKE_SHARE = 0.8  # of a term's items, above which a warning says that they tell nothing


# -- the study directory ---------------------------------------------------------------------------


class Inputs(VersionedFile):
    """inputs.json: digests of what the trials scored, by the field of the study that names it."""

    digests: dict[str, str]

    @model_validator(mode="before")
    @classmethod
    def _without_folder(cls, data: Any) -> Any:
        """Drop a field that version 0.1.0 wrote, the folder of the study."""
        return {k: v for k, v in data.items() if k != "folder"} if isinstance(data, dict) else data


@dataclass(frozen=True)
class Study:
    """A study directory: its config and its trials."""

    directory: Path
    config: StudyConfig
    log: TrialLog
    decisions: DecisionLog

    def __repr__(self) -> str:
        return f"Study({self.directory.name!r}, {tables.summary(self)})"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the base and the best trials, gains over the base."""
        return tables.study_html(self)

    @property
    def trials(self) -> list[Trial]:
        """The trials of the search, in the order they finished; the first one is the base."""
        return self.log.trials_at("search")

    @property
    def best_trial(self) -> Trial:
        """The best trial. Its scores are those of re-scoring, if other trials were re-scored, too.

        Raises StudyError while it is not decided.
        """
        decision = self.decision
        if decision is None or decision.incumbent is None:
            raise StudyError(
                f"{self.directory}: the search is not finished. Run `optimer search` again."
            )
        candidates = self._candidates() or self.trials
        return next(trial for trial in candidates if trial.number == decision.incumbent)

    @property
    def best_weights(self) -> dict[str, float]:
        """The weight of every vector in the best trial."""
        return dict(self.best_trial.weights)

    @property
    def has_best_trial(self) -> bool:
        """Whether the best trial is decided."""
        decision = self.decision
        return decision is not None and decision.incumbent is not None

    def to_dataframe(self, fidelity: Fidelity = "search") -> "DataFrame":
        """Return a pandas DataFrame with a row for every trial, indexed by its number.

        Columns: origin, status, objective (larger is better; NaN where a trial crashed), feasible,
        and `weight/NAME`, `score/TERM`, `gain/TERM` (over the base; losses relative, accuracies as
        a difference) and `seconds/PHASE`. `fidelity="rescore"` gives the trials scored again.
        """
        return tables.trials_frame(self, fidelity)

    def read_inputs(self) -> dict[str, str]:
        """Return digests of what the trials scored, by field; none for a study that did not record
        them.
        """
        file = self.directory / INPUTS_FILE
        if not file.exists() or not self.log.trials:
            return {}
        digests = Inputs.read(file).digests
        if (self.directory / SEALED_FILE).exists():
            return digests
        return {name: text for name, text in digests.items() if not name.startswith(OF_TEST)}

    def record_inputs(self, digests: Mapping[str, str]) -> None:
        """Record digests of what a pool scores, by field, and where the files of the config are
        now. Raises StudyError, as `check_inputs` does, if they are not what the trials scored.
        """
        self.check_inputs(digests)
        if not self.names_recorded_files():
            _record_config(self.config, self.directory / STUDY_FILE)
        file = self.directory / INPUTS_FILE
        if self.log.trials and digests and not file.exists():
            logger.warning(
                "%s: an earlier version did not record what its trials scored; the weights and "
                "items that are there now are taken to be the same",
                self.directory,
            )
        record = Inputs(digests={**self.read_inputs(), **digests})
        if not file.exists() or Inputs.read(file) != record:
            record.write(file)

    def check_inputs(self, digests: Mapping[str, str]) -> None:
        """Raise StudyError if weights or items, given as digests by field, are not those that the
        trials scored.
        """
        known = self.read_inputs()
        if ENGINE in known and digests.get(ENGINE, known[ENGINE]) != known[ENGINE]:
            raise StudyError(
                f"{self.directory}: {known[ENGINE]} scored its trials, and this is "
                f"{digests[ENGINE]}. {NOT_COMPARED} Install that version again, or search again in "
                "another study directory."
            )
        if SAMPLER in known and digests.get(SAMPLER, known[SAMPLER]) != known[SAMPLER]:
            raise StudyError(
                f"{self.directory}: {known[SAMPLER]} chose the weights of its trials, and this is "
                f"{digests[SAMPLER]}. Go on with the same code, or search again in another study "
                "directory."
            )
        changed = sorted(name for name in known.keys() & digests if known[name] != digests[name])
        if changed:
            of_test = all(name.startswith(OF_TEST) for name in changed)
            what = "items that its sealed rows" if of_test else "weights or items that its trials"
            raise StudyError(
                f"{self.directory}: {', '.join(changed)}: not the {what} scored. Restore them, or "
                "search again in another study directory."
            )

    def names_recorded_files(self) -> bool:
        """Whether the config names its files as study.json does. If they are elsewhere now,
        `check_inputs` has to prove that they are the same.
        """
        return StudyConfig.read_record(self.directory / STUDY_FILE).identity == self.config.identity

    @property
    def base(self) -> dict[str, TermScore]:
        """Scores of the base on the search items."""
        return self.log.first("search").terms

    @property
    def baseline(self) -> str:
        """What gains are relative to: the base, with the fixed vectors, which every trial has."""
        along = ", ".join(f"{name} at {weight:g}" for name, weight in self.config.fixed.items())
        return f"the base with {along}" if along else "the base"

    @property
    def at_bounds(self) -> list[str]:
        """The searched weights of the best trial that are at the end of their bounds, but not 0."""
        best = self.best_trial.weights
        free = self.config.free.items()
        return [
            name
            for name, ends in free
            if best[name] != 0 and any(abs(best[name] - end) <= ROUNDING for end in ends)
        ]

    @property
    def rescored_base(self) -> dict[str, TermScore]:
        """Scores of the base on the re-scoring items."""
        return self.log.first("rescore").terms

    @property
    def decision(self) -> Decision | None:
        """The last decision about the search trials that are there; None if there is none."""
        return self.decisions.about(self.log)

    @property
    def is_searched(self) -> bool:
        """Whether all trials of the search have run."""
        done = {trial.number for trial in self.trials}
        return len(done) >= self.config.search.n_trials and done >= set(
            range(self.config.search.n_trials)
        )

    @property
    def is_finished(self) -> bool:
        """Whether all trials and re-scorings have run, and the best trial is decided."""
        if not self.is_searched:
            return False
        decision = self.decision
        is_decided = decision is not None and decision.incumbent is not None
        return is_decided and not self.trials_to_rescore()

    def trials_to_rescore(self) -> list[Trial]:
        """Return the trials that still have to be re-scored, as was decided: the base, then the
        best few.
        """
        decision = self.decision
        if decision is None:
            return []
        done = {trial.number for trial in self.log.trials_at("rescore")}
        searched = {trial.number: trial for trial in self.trials}
        return [searched[number] for number in decision.rescore if number not in done]

    def decide(self, *, to_disk: bool) -> None:
        """Decide what is still open: once all trials have run, which ones to re-score; once those
        are scored, which one is the best. Only the holder of the lock may write `to_disk`.

        Early versions wrote no decisions; their studies are decided when they are read.
        """
        if not self.is_searched:
            return
        decision = self.decision
        if decision is None:
            decision = Decision(self.log.digest(), self._numbers_to_rescore())
            self.decisions.add(decision, to_disk=to_disk)
        if decision.incumbent is None and not self.trials_to_rescore():
            decision = replace(decision, incumbent=self.best_so_far().number)
            self.decisions.add(decision, to_disk=to_disk)

    def decide_row(
        self, row: ChosenRow, choose: Callable[[], dict[str, float]]
    ) -> dict[str, float]:
        """Return the weights of a row of the sealed test. They are chosen once, from the trials
        there are, and written to disk; only the holder of the lock may call this.
        """
        decision, key = self.decision, row.key()
        if decision is None:
            return choose()
        if key not in decision.rows:
            decision = replace(decision, rows=decision.rows | {key: choose()})
            self.decisions.add(decision, to_disk=True)
        return decision.rows[key]

    def take_best_so_far(self) -> None:
        """Take the best trial so far for the best one, in this process only: for a study that is
        still running.
        """
        if (decision := self.decision) is None or decision.incumbent is None:
            rescore = decision.rescore if decision is not None else []
            decision = Decision(self.log.digest(), rescore, self.best_so_far().number)
            self.decisions.add(decision, to_disk=False)

    def _numbers_to_rescore(self) -> list[int]:
        """Return the numbers of the base and the best few. If as many trials were re-scored after
        the last search trial, those are taken.
        """
        if self.config.search.rescore_top == 0:
            return []
        last = max(i for i, trial in enumerate(self.log.trials) if trial.fidelity == "search")
        again = [trial.number for trial in self.log.trials[last + 1 :]]
        if len(again) == 1 + self.config.search.rescore_top and again[0] == 0:
            return again
        best = [trial.number for trial in self.rank_trials()[: self.config.search.rescore_top]]
        return list(dict.fromkeys([0, *best]))

    def terms_to_rescore(self) -> list[Asked]:
        """Return the terms that re-scoring has to score; other terms keep their scores from the
        search. If the base was re-scored already, by whatever version, its items are used again.
        """
        searched, rescored = (
            {label: len(score.items) for label, score in trials[0].terms.items()} if trials else {}
            for trials in (self.trials, self.log.trials_at("rescore"))
        )
        to_score = []
        for term in self.config.objective.terms_at("rescore"):
            limit = self.config.rescore_limit_of(term)
            if term.function is not None:
                is_known = self.config.keeps_search_scores(term, None)
            else:
                n_items = searched.get(term.label)
                n_again = rescored.get(term.label, n_items)
                is_known = self.config.keeps_search_scores(term, n_items) and n_again == n_items
                if term.label in rescored:
                    limit = n_again
            if not is_known:
                to_score.append(Asked(term, limit))
        return to_score

    def with_search_scores(self, rescored: Trial) -> Trial:
        """Return a re-scored trial, completed with the scores that it keeps from the search."""
        if rescored.status == "crashed":
            return rescored
        (searched,) = (t for t in self.trials if t.number == rescored.number)
        scores = {
            label: replace(score, taken_over=True) for label, score in searched.terms.items()
        } | rescored.terms
        labels = [term.label for term in self.config.objective.terms_at("rescore")]
        return replace(rescored, terms={label: scores[label] for label in labels})

    def rank_trials(self) -> list[Trial]:
        """Return the search trials that did not crash, best first; those that break a constraint
        come last. They are ranked by posterior mean, which is less noisy than a single score.
        """
        trials = self.trials
        points = to_unit(self.config, [t.weights for t in trials])
        order = np.argsort(-fit_surrogate(self.config, trials).ranking(points), kind="stable")
        return [trials[index] for index in order if trials[index].status == "ok"]

    def _candidates(self) -> list[Trial]:
        """Return the re-scored trials that may be the best; none while that is the base alone."""
        rescored = self.log.trials_at("rescore")
        if len(rescored) < 2:
            return []
        base = rescored[0].terms  # it keeps every constraint
        objective = self.config.objective
        return [t for t in rescored if t.status == "ok" and is_feasible(objective, t.terms, base)]

    def best_so_far(self) -> Trial:
        """Return the best trial of those that keep all constraints: by value if any were re-scored,
        otherwise by posterior mean.
        """
        objective = self.config.objective
        if candidates := self._candidates():
            base = self.rescored_base
            return max(candidates, key=lambda trial: combine(objective, trial.terms, base))
        return next(t for t in self.rank_trials() if is_feasible(objective, t.terms, self.base))

    def value(self, trial: Trial) -> float:
        """Return the value of the objective for a trial that did not crash; larger is better."""
        base = self.base if trial.fidelity == "search" else self.rescored_base
        return combine(self.config.objective, trial.terms, base)

    def over_base(self, trial: Trial) -> Interval:
        """Return by how much a trial beats the base on the items of its fidelity."""
        base = self.log.first(trial.fidelity).terms
        return paired_interval(self.config.objective, trial.terms, base, base)

    def over_next(self) -> tuple[Trial, Interval] | None:
        """Return the second-best trial that was scored on the same items, and by how much the best
        one beats it; None if there is no other trial.
        """
        best, objective = self.best_trial, self.config.objective
        base = self.log.first(best.fidelity).terms
        others = [
            trial
            for trial in self.log.trials_at(best.fidelity)
            if trial.status == "ok"
            and trial.number != best.number
            and is_feasible(objective, trial.terms, base)
        ]
        if not others:
            return None
        other = max(others, key=lambda trial: combine(objective, trial.terms, base))
        return other, paired_interval(objective, best.terms, other.terms, base)


def warn_of_uninformative_items(study: Study) -> None:
    """Log a warning for every term in which all trials score most items alike. Such items cost time
    and tell nothing.
    """
    trials = [trial for trial in study.trials if trial.status == "ok"]
    for label in trials[0].terms:
        columns = list(zip(*(trial.terms[label].items for trial in trials), strict=False))
        alike = sum(len(set(column)) == 1 for column in columns)
        if len(trials) > 2 and alike > ALIKE_SHARE * len(columns):
            logger.warning(
                "term %r: all trials score %d of %d items alike, so these items do not tell merges "
                "apart. Take harder or easier ones, or a continuous metric (bits_per_byte)",
                label,
                alike,
                len(columns),
            )


def open_study(config: StudyConfig, directory: Path, *, repair: bool = True) -> Study:
    """Open a study directory, or create it. `repair` cuts off a line that a crash left incomplete,
    which only the holder of the lock may do.

    The files of the config may be in other folders than recorded, see `names_recorded_files`.
    Raises StudyError, which names the fields that differ, if the directory holds another study.
    """
    file = directory / STUDY_FILE
    if not file.exists():
        _refuse_foreign_files(directory)
        config.write(file)
    recorded = StudyConfig.read_record(file)
    config = config.with_split_of(recorded)
    ours, theirs = config.identity, recorded.identity
    differing = differences(ours, theirs)
    # before the trials: a search that runs may decide between the two, and would seem to contradict
    decisions = DecisionLog(directory / DECISIONS_FILE, repair=repair)
    log = TrialLog(directory / TRIALS_FILE, repair=repair)
    has_moved_files = (
        bool(differing and log.trials)
        and (directory / INPUTS_FILE).exists()
        and not differences(drop_folders(ours), drop_folders(theirs))
    )
    study = Study(directory, config, log, decisions)
    if not differing or has_moved_files:
        _check_record(study, max(recorded.search.n_trials, config.search.n_trials))
    if not differing and repair and recorded != config:  # more trials, other baselines
        _record_config(config, file)
    if differing and not log.trials:  # nothing was spent on the other config
        config.write(file)
    elif differing and not has_moved_files:
        fields = {field for field in ours | theirs if ours.get(field) != theirs.get(field)}
        has_other_objective = fields == {"objective"}
        hint = " `optimer retarget` answers other objectives from its trials."
        reason = f" {NOT_COMPARED}"
        raise StudyError(
            f"{directory}: holds a study of another config; these fields differ: "
            f"{'; '.join(differing)}. Give another study directory, or restore the config."
            f"{hint * has_other_objective}{reason * ('engine' in fields)}"
        )
    return study


def _refuse_foreign_files(directory: Path) -> None:
    if directory.exists() and any(path.name[0] != "." for path in directory.iterdir()):
        raise StudyError(
            f"{directory}: is not empty and holds no study. Give another study directory."
        )


def _record_config(config: StudyConfig, file: Path) -> None:
    """Replace the recorded config, but keep its number of trials if that is larger."""
    longest = max(StudyConfig.read_record(file).search.n_trials, config.search.n_trials)
    search = config.search.model_copy(update={"n_trials": longest})
    config.model_copy(update={"search": search}).write(file)


def _check_record(study: Study, n_trials: int) -> None:
    """Raise StudyError for anything in the record of a study that contradicts its config or the
    rest of the record; `n_trials` is that of the longest search in its directory.
    """
    config, directory = study.config, study.directory
    check_trials(study.log.path, study.log.trials, rules_of(config, n_trials))
    if (directory / INPUTS_FILE).exists():
        Inputs.read(directory / INPUTS_FILE)
    if (decision := study.decision) is None:
        return
    for message in _mistakes_of_decision(study, decision):
        line = study.decisions.decisions.index(decision) + 1
        raise StudyError(
            f"{study.decisions.path}:{line}: {message}. Remove the line: what it decided is decided"
            " again."
        )


def _mistakes_of_decision(study: Study, decision: Decision) -> Iterator[str]:
    """Yield what contradicts the config and the trials of a study: found and expected."""
    sound = {trial.number for trial in study.trials if trial.status == "ok"}
    candidates = {trial.number for trial in study._candidates()} or sound
    names = set(study.config.weight_names)
    for row, weights in decision.rows.items():
        if weights.keys() != names:
            yield f"found weights of {sorted(weights)} for {row!r}, expected {sorted(names)}"
        for vector, weight in weights.items():
            if not abs(weight) <= LARGEST_WEIGHT:
                yield f"found {vector} at {weight!r}, expected at most {LARGEST_WEIGHT:g}"
    for number in (*decision.rescore, decision.incumbent or 0):
        if number not in sound:
            yield f"found trial {quote(number)}, expected one that was scored"
    if decision.incumbent is not None and decision.incumbent not in candidates:
        yield (
            f"found incumbent {decision.incumbent}, expected one that was scored again and keeps "
            "every constraint"
        )


def find_study(directory: Path) -> Path | None:
    """Return a directory itself or its study/, as runs and pulls have one, whichever holds a study;
    None if neither does.
    """
    places = (directory, directory / "study")
    return next((place for place in places if (place / STUDY_FILE).exists()), None)


def load_study(directory: Path, *, unfinished: bool = False) -> Study:
    """Open an existing study, or the one in the directory of a run, with its recorded config.

    Raises StudyError for a directory without a study, and for a search that is not finished; with
    `unfinished`, one that has scored the base will do.
    """
    if (found := find_study(directory)) is None:
        raise StudyError(
            f"{directory}: holds no study (no study.json)."
            + (hint_of_seeds(directory) or f" Run `optimer search STUDY.yaml {directory}` first.")
        )
    directory = found
    study = open_study(StudyConfig.read_record(found / STUDY_FILE), found, repair=False)
    if unfinished and not study.trials:
        raise StudyError(f"{directory}: has no trial yet. Run `optimer search` first.")
    study.decide(to_disk=False)
    if unfinished:
        study.take_best_so_far()
    if not unfinished and not study.is_finished:
        raise StudyError(f"{directory}: the search is not finished. Run `optimer search` again.")
    return study


def hint_of_seeds(directory: Path) -> str:
    """Return what to give instead of a directory of `optimer run --seeds`; else an empty text."""
    runs = sorted(path.parent for path in directory.glob("seed-*/study"))
    return f" It holds whole runs: give one of them, e.g. {runs[0]}." if runs else ""


@contextlib.contextmanager
def lock_directory(directory: Path) -> Iterator[None]:
    """Hold a directory for this process; raise StudyError if another process holds it."""
    make_directory(directory)
    with contextlib.ExitStack() as stack:
        try:
            with naming_disk_errors(directory, "Nothing was changed"):
                stack.enter_context(locking(directory / ".lock"))
        except Timeout:
            raise StudyError(
                f"{directory}: another process is working in it. Wait for it, or stop it."
            ) from None
        remove_dead_locks(directory)
        yield
