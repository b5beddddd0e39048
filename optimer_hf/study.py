"""What a search is and what it recorded: the config, the trials, and the surrogate fitted to them.

study.yaml comes in as a StudyConfig; a study directory holds it beside `trials.jsonl`, which is
append-only, fsynced, and the whole state. What a reader would not guess: nothing here runs a trial,
so a study can be read, ranked and re-targeted without a model.
"""

import contextlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

import numpy as np
from filelock import Timeout
from pydantic import Field, TypeAdapter
from scipy.special import log_ndtr

from optimer_hf.checkpoint import tokenizer_files, weights_fingerprint
from optimer_hf.errors import StudyError
from optimer_hf.evaluate import (
    STRICT_RECORD,
    Objective,
    Scores,
    Term,
    TermScore,
    combine,
    feasible,
    gains,
    headroom,
    paired_interval,
)
from optimer_hf.faults import was_environmental
from optimer_hf.files import (
    FileModel,
    Mistake,
    ReferenceText,
    RelativeText,
    TokenizerSource,
    VersionedFile,
    differences,
    digest,
    first_line,
    locking,
    make_directory,
    naming_disk_errors,
    relocated,
    remove_dead_locks,
    shown,
    tokenizer_reference,
    without_folders,
    write_text,
)
from optimer_hf.intervals import Interval
from optimer_hf.record import Rules, append_line, check_trials, read_lines
from optimer_hf.surrogate import GaussianProcess, WeightedSum, fit, informative

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

logger = logging.getLogger(__name__)

LARGEST_WEIGHT = 1000.0  # of a vector; merges break far below
LARGEST_SEARCH, LARGEST_LIMIT = 10_000, 10**7  # trials; items
MOST_VECTORS, NARROWEST = 1000, 1e-3
ALIKE_SHARE = 0.8  # of the items of a term that may tell nothing apart
EDGE = 0.125  # standard deviations; the base lies on the edge of a constraint of 0
LONGEST_NAME = 200  # characters of a vector's name
MergeMethod = Literal["ties", "dare_ties", "model_stock"]
BASE, FIXED_ALONE, MERGE = "base", "fixed vectors alone", "searched merge"
AVERAGE, SUM, RANDOM = "uniform average", "uniform sum", "random vectors of equal norm"
RETARGETED = "re-targeted to "
# rows of every comparison, beside those that a vector or a target names
ROWS = {BASE, FIXED_ALONE, AVERAGE, SUM, MERGE, RANDOM, *get_args(MergeMethod)}
Weight = Annotated[float, Field(ge=-LARGEST_WEIGHT, le=LARGEST_WEIGHT)]
LARGEST_TOTAL = LARGEST_WEIGHT * MOST_VECTORS
Total = Annotated[float, Field(ge=-LARGEST_TOTAL, le=LARGEST_TOTAL)]
Share = Annotated[float, Field(ge=-1e6, le=1e6)]  # below 0 it is refused by what it is for
Fidelity = Literal["search", "rescore", "sealed"]
ITEMS_OF: dict[Fidelity, str] = {  # what a score is of, by fidelity
    "search": "the items of the search",
    "rescore": "the items on which the best trials were scored again",
    "sealed": "the sealed test",
}
STUDY_FILE, INPUTS_FILE = "study.json", "inputs.json"
TRIALS_FILE, DECISIONS_FILE, SEALED_FILE = "trials.jsonl", "decisions.jsonl", "sealed.jsonl"
OF_TEST = "test."  # digests of the items of the sealed test


class VectorConfig(FileModel):
    """One vector of the pool: where it is, or which training run of the recipe folder makes it."""

    source: ReferenceText | None = None
    train: RelativeText | None = None
    bounds: tuple[Weight, Weight] = (0.0, 1.5)
    fixed: Weight | None = None

    def mistakes(self) -> Iterator[Mistake]:
        if (self.source is None) == (self.train is None):
            yield (
                (),
                "give exactly one of 'source' (a directory or Hub id) and 'train' (a train file "
                "of the recipe folder)",
            )
        low, high = self.bounds
        if low < high < low + NARROWEST:
            told = f"bounds {[low, high]} are closer than {NARROWEST:g}; give 'fixed' instead"
            yield ("bounds",), told
        if low >= high:
            yield (
                ("bounds",),
                f"bounds {list(self.bounds)} are empty; give [low, high] with low < high, or "
                "'fixed'",
            )


class SearchConfig(FileModel):
    """How long, how and how carefully to search.

    `surrogate`: a Gaussian process per term (ours, inside SMAC), SMAC's own process of the combined
    value, SMAC's random forest, or none. `total`: bounds of the sum of the searched weights, which
    makes the search one over directions and scales. `pareto`: spread the trials along the front of
    the terms, another weighting of them for each (after ParEGO; Knowles, IEEE TEVC 2006), instead
    of seeking the one optimum of the objective. `spread`: do so with every other trial from the
    twentieth on, which makes a study ready for other objectives and, where scores are noisy, keeps
    it from settling on a lucky place (`per_term` only). `report_to`: where trials are shown as they
    come, by the names of the HF Trainer's `report_to` (tensorboard, wandb, ...).
    """

    n_trials: int = Field(default=30, gt=0, le=LARGEST_SEARCH)
    surrogate: Literal["per_term", "black_box", "random_forest", "random"] = "per_term"
    total: tuple[Total, Total] | None = None
    pareto: bool = False
    spread: bool = True
    seed: int = Field(default=0, ge=0, lt=2**32)
    rescore_top: int = Field(default=3, ge=0, le=LARGEST_SEARCH)
    rescore_limit: int | None = Field(default=None, gt=0, le=LARGEST_LIMIT)
    report_to: list[str] = []


class SearchBaseline(SearchConfig):
    """Another search to compare with, by other settings: `limit` items a term instead of the
    objective's.
    """

    limit: int | None = Field(default=None, gt=0, le=LARGEST_LIMIT)


class MixtureBaseline(FileModel):
    """A data mixture that `optimer run` trains to compare with: shares by vector (or those that its
    weights read as), with the tokens of all vectors together or of one.
    """

    shares: dict[str, Share] | Literal["uniform", "searched"] = "uniform"
    budget: Literal["all", "one"] = "all"

    def mistakes(self) -> Iterator[Mistake]:
        shares = self.shares.values() if isinstance(self.shares, dict) else [1.0]
        if not sum(shares) > 0 or min(shares) < 0:
            yield ("shares",), "shares must be >= 0, and one > 0"


class Baselines(FileModel):
    """What to compare the merge with beyond weights of its own pool.

    `models` are adapters or checkpoints trained from the base, by what to call them; random
    vectors are merged with the weights of the incumbent, and drawn, as DARE's masks are, by the
    seed of the search.
    """

    merge_methods: list[MergeMethod] = []
    random_vectors: bool = False
    searches: dict[str, SearchBaseline] = {}
    models: dict[str, ReferenceText] = {}
    mixtures: dict[str, MixtureBaseline] = {}


class StudyConfig(VersionedFile):
    """study.yaml: base, pool, objective, sealed test, other objectives to answer from the same
    trials, and what to compare with.

    `tokenizer_source`: whose tokenizer, chat template and generation config score and ship with the
    merge: `base` (the default), a vector of the pool, or a model. It has to give the tokens of the
    base their ids.
    """

    base_model: ReferenceText
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    vectors: dict[str, VectorConfig] = Field(min_length=1, max_length=MOST_VECTORS)
    tokenizer_source: TokenizerSource = None
    objective: Objective
    test: Objective | None = None
    retarget: dict[str, dict[str, Share]] = {}
    search: SearchConfig = SearchConfig()
    baselines: Baselines = Baselines()

    def rescore_limit_of(self, term: Term) -> int | None:
        """Return how many items of a term re-scoring looks at (None: all): never fewer than the
        search.
        """
        if term.rescore_only and term.limit is not None:
            return term.limit
        limits = [self.search.rescore_limit]
        limits += [] if term.rescore_only else [self.objective.limit_of(term)]
        return None if None in limits else max(limit for limit in limits if limit is not None)

    def takes_over(self, term: Term, n_items: int | None) -> bool:
        """Whether re-scoring takes over the scores of a term, because the search has looked at all
        that it would look at; `n_items` are those of the term, as far as they are known.
        """
        if term.rescore_only:
            return False
        limit = self.objective.limit_of(term)
        has_seen_all = n_items is not None and limit is not None and n_items < limit
        return has_seen_all or limit == self.rescore_limit_of(term)

    def mistakes(self) -> Iterator[Mistake]:
        for name in self.vectors:
            if not name.isprintable() or not 0 < len(name.strip()) <= LONGEST_NAME:
                told = f"found {name[:80]!r}. Expected a name of visible characters"
                yield ("vectors", name), told
        for name in self.vectors:
            if re.fullmatch(r"[^./][^/]*", name) is None:  # directories are called so
                yield (
                    ("vectors", name),
                    f"found the name {name!r}. Expected one without '/' that does not begin with "
                    "'.'",
                )
        if all(vector.fixed is not None for vector in self.vectors.values()):
            yield ("vectors",), "every vector is fixed, so there is nothing to search"
            return
        yield from self._mistakes_of_search()
        yield from self._mistakes_of_test()
        yield from self._mistakes_of_retarget()
        yield from self._mistakes_of_baselines()

    def _mistakes_of_test(self) -> Iterator[Mistake]:
        if self.test is None:
            return
        searched = [(term.task_name, *term.hash_range) for term in self.objective.scored]
        for term in self.test.scored:
            group: list[Any] = self.test.terms if term in self.test.terms else self.test.constraints
            where = ("test", "terms" if group is self.test.terms else "constraints")
            place, shared = (*where, group.index(term)), term.task or term.text or term.function
            low, high = term.hash_range
            if any(name == term.task_name and low < b and a < high for name, a, b in searched):
                yield (
                    place,
                    f"objective and test share '{shared}': the sealed items would be ones the "
                    "search saw. Give the test its own file, or the two parts of the items: "
                    "hash_range [0, 0.5] and [0.5, 1]",
                )
        if self.objective.prompting != self.test.prompting:
            yield (
                ("test",),
                "objective and test must have the same apply_chat_template, fewshot_as_multiturn "
                "and system_instruction",
            )

    def _mistakes_of_retarget(self) -> Iterator[Mistake]:
        recorded = {term.label for term in self.objective.at("search")}
        tested = {term.label for term in self.test.terms} if self.test is not None else recorded
        for name, weights in self.retarget.items():
            if any(weight < 0 for weight in weights.values()) or not any(weights.values()):
                yield ("retarget", name), "weights must be >= 0, and one > 0"
            for label in weights:
                if label not in recorded:
                    told = f"no term {label!r} is recorded; terms: {sorted(recorded)}"
                    yield ("retarget", name, label), told
                elif label not in tested:
                    told = f"the test has no term {label!r} to measure it on"
                    yield ("retarget", name, label), told

    def searched_otherwise(self, settings: SearchBaseline) -> "StudyConfig":
        """Return the study with another search, without test and baselines of its own."""
        objective = self.objective.model_dump()
        if settings.limit is not None:
            objective["limit"] = settings.limit
            for term in (*objective["terms"], *objective["constraints"]):
                term["limit"] = None
        search = settings.model_dump(exclude={"limit"})
        search["total"] = search["total"] or self.search.total
        own = self.model_dump(exclude={"test", "retarget", "baselines"})
        return StudyConfig.model_validate(own | {"objective": objective, "search": search})

    def _mistakes_of_baselines(self) -> Iterator[Mistake]:
        for name, settings in self.baselines.searches.items():
            for where, told in self._mistakes_of_search(settings):
                yield ("baselines", "searches", name, *where[1:]), told
        names: set[str] = set()
        for group in ("searches", "models", "mixtures"):
            for name in getattr(self.baselines, group):
                if name in names:
                    told = f"two are called {name!r}; give each its own name"
                    yield ("baselines", group, name), told
                elif self._names_a_row(name):
                    told = f"{name!r} is the name of another row. Give another name"
                    yield ("baselines", group, name), told
                names.add(name)
        for name, mixture in self.baselines.mixtures.items():
            for vector in mixture.shares if isinstance(mixture.shares, dict) else ():
                if vector not in self.vectors:
                    told = f"no vector is called {vector!r}; vectors: {sorted(self.vectors)}"
                    yield ("baselines", "mixtures", name, "shares", vector), told

    def _names_a_row(self, name: str) -> bool:
        """Whether every comparison has, or may have, a row of this name."""
        of_vectors = tuple(f"{vector} at " for vector in self.vectors)
        return name in ROWS or name.startswith((RETARGETED, *of_vectors))

    def _mistakes_of_search(self, other: SearchConfig | None = None) -> Iterator[Mistake]:
        """Yield what is wrong with the search, or with another one over the same objective."""
        search = other or self.search
        total = search.total or self.search.total
        counting = [term for term in self.objective.at("search") if term.weight > 0]
        if search.pareto and (len(counting) < 2 or self.objective.combine == "worst"):
            yield (
                ("search", "pareto"),
                "a front needs two terms that count, and combine is not 'worst'",
            )
        if search.surrogate not in ("per_term", "random") and (
            total is not None or self.objective.constraints or search.pareto
        ):
            yield (
                ("search", "surrogate"),
                f"{search.surrogate!r} knows no total, constraints or pareto; use per_term",
            )
        if total is not None and (other is None or other.total is not None):
            lows, highs = zip(*self.free.values(), strict=True)
            low, high = total
            if min(lows) < 0 or not max(sum(lows), 0) <= low < high or low > sum(highs):
                yield (
                    ("search", "total"),
                    f"{list(total)} cannot be met; give [low, high] with 0 <= low < high, within "
                    "the sums that the bounds (none below 0) allow",
                )

    @property
    def identity(self) -> dict[str, Any]:
        """What must not change while a study goes on: all that decides its trials."""
        data = self.model_dump(mode="json", exclude={"retarget", "baselines"})
        del data["search"]["n_trials"], data["search"]["report_to"]
        if self.tokenizer_source is None:  # studies are older than the field
            del data["tokenizer_source"]
        return data

    @property
    def digest(self) -> str:
        """Digest of the identity; names the study in recipes."""
        return digest(self.identity)

    @property
    def tokenizer_reference(self) -> str | None:
        """The model whose tokenizer the merge has; None: the base."""
        sources = {name: vector.source for name, vector in self.vectors.items()}
        return tokenizer_reference(self.tokenizer_source, sources)

    @property
    def free(self) -> dict[str, tuple[float, float]]:
        """Bounds of the vectors whose weight is searched."""
        return {
            name: vector.bounds for name, vector in self.vectors.items() if vector.fixed is None
        }

    @property
    def fixed(self) -> dict[str, float]:
        """Weights of the vectors that are always in the merge."""
        return {
            name: vector.fixed for name, vector in self.vectors.items() if vector.fixed is not None
        }


# -- trials ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One evaluation of one weight set; `seconds` are merge, evaluate, forward (a part of evaluate)
    and ask.
    """

    __pydantic_config__ = STRICT_RECORD

    number: int
    origin: str
    fidelity: Fidelity
    weights: dict[str, float]
    status: Literal["ok", "crashed"]
    terms: dict[str, TermScore]
    seconds: dict[str, float]
    n_tokens: int = 0
    error: str | None = None
    worker: str | None = None

    def to_json(self) -> str:
        """Return the trial as one line of trials.jsonl."""
        return json.dumps(asdict(self), ensure_ascii=False, allow_nan=False)

    @property
    def is_blameless(self) -> bool:
        """Whether it crashed by no fault of its weights, which earlier versions recorded, too."""
        return self.status == "crashed" and was_environmental(self.error or "")

    @classmethod
    def from_json(cls, line: str) -> "Trial":
        """Read a line of trials.jsonl."""
        return _TRIAL.validate_json(line)


_TRIAL = TypeAdapter(Trial)


class TrialLog:
    """trials.jsonl: append-only, one fsync a trial; a line torn by a crash is cut off when it is
    opened.
    """

    def __init__(self, path: Path, *, repair: bool = True) -> None:
        """Read what is there, see `read_lines`; raise StudyError for a line that is no trial."""
        self.path = path
        self.trials: list[Trial] = []
        for number, line in enumerate(read_lines(path, repair=repair), start=1):
            try:
                self.trials.append(Trial.from_json(line.decode()))
            except (ValueError, RecursionError, OverflowError) as error:
                raise StudyError(
                    f"{path}:{number}: not a trial ({first_line(error)}). Remove the damaged line "
                    "to go on without that trial."
                ) from None

    def append(self, trial: Trial) -> None:
        """Write one trial to disk before returning."""
        append_line(self.path, trial.to_json())
        self.trials.append(trial)

    def of(self, fidelity: Fidelity) -> list[Trial]:
        """Return the trials of one fidelity, in the order they ran."""
        return [trial for trial in self.trials if trial.fidelity == fidelity]

    def first(self, fidelity: Fidelity) -> Trial:
        """Return the first trial of one fidelity, the base."""
        return next(trial for trial in self.trials if trial.fidelity == fidelity)


# -- what was decided ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    """What was decided when the search was done: which trials are scored again, and, once they are,
    which is the best; numbers of trials. `trials` is a digest of the search trials it is about.

    `rows` are weights that the surrogate chose from these trials for the sealed test, by name.
    """

    __pydantic_config__ = STRICT_RECORD

    trials: str
    rescore: list[int]
    incumbent: int | None = None
    rows: dict[str, dict[str, float]] = field(default_factory=dict)


_DECISION = TypeAdapter(Decision)


class DecisionLog:
    """decisions.jsonl: append-only, a line for each decision, the last one about the trials counts.

    A decision is read and never made again: a later version may fit another surrogate.
    """

    def __init__(self, path: Path, *, repair: bool = True) -> None:
        """Read what is there, see `read_lines`; raise StudyError for a line that is none."""
        self.path = path
        self.decisions: list[Decision] = []
        for number, line in enumerate(read_lines(path, repair=repair), start=1):
            try:
                self.decisions.append(_DECISION.validate_json(line))
            except (ValueError, RecursionError, OverflowError) as error:
                raise StudyError(
                    f"{path}:{number}: not a decision ({first_line(error)}). Remove the line: what "
                    "it said is decided again."
                ) from None

    def add(self, decision: Decision, *, to_disk: bool) -> None:
        """Take a decision; `to_disk` writes it down before returning."""
        if to_disk:
            append_line(self.path, json.dumps(asdict(decision)))
        self.decisions.append(decision)

    def about(self, trials: Sequence[Trial]) -> Decision | None:
        """Return what was decided last about these search trials."""
        if not self.decisions:
            return None
        key = _digest_of(trials)
        return next((each for each in reversed(self.decisions) if each.trials == key), None)


def _digest_of(trials: Sequence[Trial]) -> str:
    return digest([[trial.number, trial.status, trial.weights] for trial in trials])


# -- the surrogate of the record -------------------------------------------------------------------


def to_unit(config: StudyConfig, weight_sets: Sequence[Mapping[str, float]]) -> "Array":
    """Scale the free weights by their bounds to [0, 1]."""
    low, high = np.array(list(config.free.values())).T
    points = np.array([[weights[name] for name in config.free] for weights in weight_sets])
    points = points.reshape(-1, len(config.free))
    return np.asarray((points - low) / (high - low), dtype=np.float64)


def from_unit(config: StudyConfig, point: "Array") -> dict[str, float]:
    """Return the full weight set of a point in [0, 1]^d, rounded to 4 digits, which is all that
    YAML should show.
    """
    low, high = np.array(list(config.free.values())).T
    values = low + point * (high - low)
    return {
        name: round(float(value), 4) for name, value in zip(config.free, values, strict=True)
    } | config.fixed


def within_total(config: StudyConfig, points: "Array") -> "Array":
    """Move points [n, d] of the box towards a corner until their weights sum to what `search.total`
    allows.
    """
    if config.search.total is None:
        return points
    low, high = np.array(list(config.free.values())).T
    total = (low + points * (high - low)).sum(axis=1, keepdims=True)
    least, most = config.search.total
    down = (most - low.sum()) / np.maximum(total - low.sum(), 1e-12)  # towards the low corner
    up = (least - total) / np.maximum(high.sum() - total, 1e-12)  # towards the high corner
    raised = points + np.clip(up, 0, 1) * (1 - points)
    return np.asarray(np.where(total > most, points * np.clip(down, 0, 1), raised))


def columns(config: StudyConfig, trials: Sequence[Trial]) -> "Array":
    """Return what the surrogate learns, [n_trials, n_columns]: a gain per counting term, or the
    value for `worst`.

    Crashed trials and broken ones are set to a floor, ten times the best gain (at least 0.5) below
    the base: a Gaussian process takes no infinities, and how bad a broken merge is does not matter.
    """
    base = trials[0].terms
    counting = [term for term in config.objective.at("search") if term.weight > 0]
    per_term = config.objective.combine != "worst"
    n_columns = len(counting) if per_term else 1
    table = np.full((len(trials), n_columns), -np.inf)
    for row, trial in enumerate(trials):
        if trial.status == "ok":
            each = _surrogate_gains(config.objective, trial.terms, base)
            values = [each[term.label] for term in counting]
            table[row] = values if per_term else [combine(config.objective, trial.terms, base)]
    return _floored(table)


def _floored(table: "Array") -> "Array":
    floor = -max(10 * float(table.max(initial=0.0)), 0.5)
    return np.asarray(np.maximum(table, floor))


def _surrogate_gains(objective: Objective, scores: Scores, base: Scores) -> dict[str, float]:
    """Return gains in the unit that `combine` averages: weighted_mean takes losses as they are, not
    relative ones.
    """
    each = gains(scores, base)
    if objective.combine != "weighted_mean":
        return each
    return {
        label: g if base[label].higher_is_better else g * abs(base[label].score)
        for label, g in each.items()
    }


@dataclass(frozen=True)
class Surrogate:
    """What the record says of weights that were not tried: the objective, and by constraint how far
    it is from being broken.
    """

    objective: WeightedSum
    constraints: Sequence[GaussianProcess] = ()

    @property
    def points(self) -> "Array":
        """The trials that it was fitted to, in [0, 1]^d."""
        return self.objective.processes[0].points

    def predict(self, points: "Array") -> tuple["Array", "Array"]:
        """Return posterior mean and variance of the objective at points [n, d] in [0, 1]."""
        return self.objective.predict(points)

    def log_feasibility(self, points: "Array") -> "Array":
        """Return the log of the probability that points keep every constraint, [n]."""
        total = np.zeros(len(points))
        for process in self.constraints:
            mean, variance = process.predict(points)
            total += log_ndtr(mean / np.sqrt(variance))
        return total

    def ranking(self, points: "Array", caution: float = 0.0) -> "Array":
        """Return the posterior mean of the objective less `caution` standard deviations; where a
        constraint is not expected to be kept by as many, far below it, and the lower the more
        likely it is broken.
        """
        kept = np.full(len(points), True)
        for process in self.constraints:
            mean, variance = process.predict(points)
            kept &= mean >= (caution - EDGE) * np.sqrt(variance)
        broken = np.maximum(self.log_feasibility(points), -1e5) - 1e6
        mean, variance = self.predict(points)
        return np.where(kept, mean - caution * np.sqrt(variance), broken)

    def conditioned(self, points: "Array") -> "Surrogate":
        """Return the surrogate as if points [n, d] were measured where it expects them: trials that
        still run are not asked for again.
        """
        if not len(points):
            return self
        return Surrogate(
            self.objective.conditioned(points),
            [process.conditioned(points) for process in self.constraints],
        )


def surrogate_of(
    config: StudyConfig, trials: Sequence[Trial], preference: "Array | None" = None
) -> Surrogate:
    """Fit the posterior of the objective and its constraints to trials whose first one is the base,
    of many to the `informative` ones.

    A `preference` [n_terms] weights the terms instead of the objective, each relative to how far
    its best trial is from the middle one. Trials that crashed by no fault of their weights say
    nothing.
    """
    trials = [trial for trial in trials if not trial.is_blameless]
    table = columns(config, trials)
    points = to_unit(config, [trial.weights for trial in trials])
    counting = [term.weight for term in config.objective.at("search") if term.weight > 0]
    weights = np.array(counting) / sum(counting) if table.shape[1] > 1 else np.ones(1)
    kept = informative(points, np.column_stack([table @ weights, table]))
    if preference is not None:
        weights = preference / np.maximum(table.max(axis=0) - np.median(table, axis=0), 1e-6)
    processes = [fit(points[kept], column[kept]) for column in table.T]
    limits = [fit(points[kept], column[kept]) for column in _headrooms(config, trials).T]
    return Surrogate(WeightedSum(processes, weights), limits)


def _headrooms(config: StudyConfig, trials: Sequence[Trial]) -> "Array":
    """Return the headroom of every constraint, [n_trials, n_constraints], with the same floor."""
    base = trials[0].terms
    known = [c for c in config.objective.constraints if c.label in base]
    table = np.full((len(trials), len(known)), -np.inf)
    for row, trial in enumerate(trials):
        if trial.status == "ok":
            table[row] = [headroom(c, trial.terms[c.label], base[c.label]) for c in known]
    return np.column_stack([_floored(column) for column in table.T]) if known else table


# -- the study directory ---------------------------------------------------------------------------


class Inputs(VersionedFile):
    """inputs.json: what the trials of a study scored, digests by the field that names it, and the
    folder in which the study lay then.
    """

    digests: dict[str, str]
    folder: str | None = None


def model_digests(
    base: Path, vectors: Mapping[str, Path], tokenizer: Path | None
) -> dict[str, str]:
    """Return digests of the weights of a study and of its tokenizer, if that is not the base's, for
    `Study.check_inputs`.
    """
    found = {"base_model": weights_fingerprint(base)} | {
        f"vectors.{name}": weights_fingerprint(path) for name, path in vectors.items()
    }
    if tokenizer is not None:
        found["tokenizer_source"] = digest(tokenizer_files(tokenizer))
    return found


@dataclass(frozen=True)
class Study:
    """A study directory: its config and its trials."""

    directory: Path
    config: StudyConfig
    log: TrialLog
    decisions: DecisionLog
    has_moved: bool = False

    @property
    def inputs(self) -> dict[str, str]:
        """What the trials scored, digests by field; empty for a study that did not record it."""
        file = self.directory / INPUTS_FILE
        if not file.exists() or not self.log.trials:
            return {}
        digests = Inputs.read(file).digests
        if (self.directory / SEALED_FILE).exists():
            return digests
        return {name: found for name, found in digests.items() if not name.startswith(OF_TEST)}

    def go_on_with(self, found: Mapping[str, str]) -> None:
        """Record what a pool scores, digests by field, and where the files of a study that has
        moved lie now. Raises StudyError as `check_inputs`.
        """
        self.check_inputs(found)
        if self.has_moved:
            _record_config(self.config, self.directory / STUDY_FILE)
        file, folder = self.directory / INPUTS_FILE, str(self.directory.resolve())
        if self.log.trials and found and not file.exists():
            logger.warning(
                "%s: does not know what its trials scored (of an earlier version); taken to be the "
                "weights and items that are there now",
                self.directory,
            )
        record = Inputs(digests={**self.inputs, **found}, folder=folder)
        if not file.exists() or Inputs.read(file) != record:
            record.write(file)

    def check_inputs(self, found: Mapping[str, str]) -> None:
        """Raise StudyError when weights or items, digests by field, are not those that the trials
        scored.
        """
        known = self.inputs
        changed = sorted(name for name in known.keys() & found if known[name] != found[name])
        if changed:
            of_test = all(name.startswith(OF_TEST) for name in changed)
            what = "items that its sealed rows" if of_test else "weights or items that its trials"
            raise StudyError(
                f"{self.directory}: {', '.join(changed)}: not the {what} scored. Restore them, or "
                "search again in another study directory."
            )

    @property
    def base(self) -> dict[str, TermScore]:
        """Scores of the base on the search items."""
        return self.log.first("search").terms

    @property
    def baseline(self) -> str:
        """What the gains of a search are over: fixed vectors are in every trial, the first too."""
        along = ", ".join(f"{name} at {weight:g}" for name, weight in self.config.fixed.items())
        return f"the base with {along}" if along else "the base"

    @property
    def rescored_base(self) -> dict[str, TermScore]:
        """Scores of the base on the re-scoring items."""
        return self.log.first("rescore").terms

    @property
    def decision(self) -> Decision | None:
        """What was decided about the search trials that are there."""
        return self.decisions.about(self.log.of("search"))

    @property
    def is_searched(self) -> bool:
        """Whether all trials of the search have run."""
        done = {trial.number for trial in self.log.of("search")}
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
        return is_decided and not self.to_rescore()

    def to_rescore(self) -> list[Trial]:
        """Return the trials that still have to be scored on the re-scoring items, as was decided:
        the base, then the best few.
        """
        decision = self.decision
        if decision is None:
            return []
        done = {trial.number for trial in self.log.of("rescore")}
        searched = {trial.number: trial for trial in self.log.of("search")}
        return [searched[number] for number in decision.rescore if number not in done]

    def decide(self, *, to_disk: bool) -> None:
        """Decide what can be decided now and was not: which trials to score again once all have
        run, which is the best once they are scored. `to_disk` is for the holder of the lock.

        A study of an earlier version, which wrote nothing down, is decided when it is read.
        """
        if not self.is_searched:
            return
        decision = self.decision
        if decision is None:
            trials = self.log.of("search")
            decision = Decision(_digest_of(trials), self._worth_rescoring())
            self.decisions.add(decision, to_disk=to_disk)
        if decision.incumbent is None and not self.to_rescore():
            decision = replace(decision, incumbent=self.best_so_far().number)
            self.decisions.add(decision, to_disk=to_disk)

    def row(self, name: str, choose: Callable[[], dict[str, float]]) -> dict[str, float]:
        """Return the weights of a row of the sealed test, chosen once from the trials there are and
        then written down, which is for the holder of the lock.
        """
        decision = self.decision
        if decision is None:
            return choose()
        if name not in decision.rows:
            rows = decision.rows | {name: choose()}
            self.decisions.add(replace(decision, rows=rows), to_disk=True)
            return rows[name]
        return decision.rows[name]

    def take_best_so_far(self) -> None:
        """Take the best trial so far as the incumbent of a study that still runs, in this process
        only.
        """
        if (decision := self.decision) is None or decision.incumbent is None:
            rescore = decision.rescore if decision is not None else []
            key, best = _digest_of(self.log.of("search")), self.best_so_far().number
            self.decisions.add(Decision(key, rescore, best), to_disk=False)

    def _worth_rescoring(self) -> list[int]:
        """Return the numbers of the base and the best few; those that were scored again after the
        last search trial, if there are as many.
        """
        if self.config.search.rescore_top == 0:
            return []
        last = max(i for i, trial in enumerate(self.log.trials) if trial.fidelity == "search")
        again = [trial.number for trial in self.log.trials[last + 1 :]]
        if len(again) == 1 + self.config.search.rescore_top and again[0] == 0:
            return again
        best = [trial.number for trial in self.ranked()[: self.config.search.rescore_top]]
        return list(dict.fromkeys([0, *best]))

    def rescore_plan(self) -> tuple[list[Term], dict[str, int | None]]:
        """Return the terms that re-scoring has to score, and how many items of each (None: all);
        the scores of the others are taken over. All trials meet on the items on which the base was
        re-scored, whatever version did it.
        """
        terms = self.config.objective.at("rescore")
        limits = {term.label: self.config.rescore_limit_of(term) for term in terms}
        searched, rescored = (
            {label: len(score.items) for label, score in trials[0].terms.items()} if trials else {}
            for trials in (self.log.of("search"), self.log.of("rescore"))
        )
        to_score = []
        for term in terms:
            if term.function is not None:
                is_known = self.config.takes_over(term, None)
            else:
                n_items = searched.get(term.label)
                n_again = rescored.get(term.label, n_items)
                is_known = self.config.takes_over(term, n_items) and n_again == n_items
                if term.label in rescored:
                    limits[term.label] = n_again
            if not is_known:
                to_score.append(term)
        return to_score, limits

    def with_searched(self, rescored: Trial) -> Trial:
        """Return a re-scored trial with the scores that it takes over from the search."""
        if rescored.status == "crashed":
            return rescored
        (searched,) = (t for t in self.log.of("search") if t.number == rescored.number)
        found = {
            label: replace(score, taken_over=True) for label, score in searched.terms.items()
        } | rescored.terms
        labels = [term.label for term in self.config.objective.at("rescore")]
        return replace(rescored, terms={label: found[label] for label in labels})

    def ranked(self) -> list[Trial]:
        """Return the sound search trials, best first by posterior mean (one observation is noisy,
        the mean less so); those that break a constraint come last.
        """
        trials = self.log.of("search")
        points = to_unit(self.config, [t.weights for t in trials])
        order = np.argsort(-surrogate_of(self.config, trials).ranking(points), kind="stable")
        return [trials[index] for index in order if trials[index].status == "ok"]

    @property
    def incumbent(self) -> Trial:
        """The best trial, as was decided, with its scores of re-scoring if others have some, too.

        Raises StudyError while it is not decided.
        """
        decision = self.decision
        if decision is None or decision.incumbent is None:
            raise StudyError(
                f"{self.directory}: the search is not finished. Run `optimer search` again."
            )
        candidates = self._candidates() or self.log.of("search")
        return next(trial for trial in candidates if trial.number == decision.incumbent)

    def _candidates(self) -> list[Trial]:
        """Return the re-scored trials that may be the best; none while only the base is one."""
        rescored = self.log.of("rescore")
        if len(rescored) < 2:
            return []
        base = rescored[0].terms  # it keeps every constraint
        objective = self.config.objective
        return [t for t in rescored if t.status == "ok" and feasible(objective, t.terms, base)]

    def best_so_far(self) -> Trial:
        """Return the best trial: by value among the re-scored ones, by posterior mean when none was
        re-scored.
        """
        objective = self.config.objective
        if candidates := self._candidates():
            base = self.rescored_base
            return max(candidates, key=lambda trial: combine(objective, trial.terms, base))
        return next(t for t in self.ranked() if feasible(objective, t.terms, self.base))

    def value(self, trial: Trial) -> float:
        """Return the objective of a sound trial, relative to the base at the same fidelity."""
        base = self.base if trial.fidelity == "search" else self.rescored_base
        return combine(self.config.objective, trial.terms, base)

    def over_base(self, trial: Trial) -> Interval:
        """Return how much better than the base a sound trial is, item by item, at its fidelity."""
        base = self.log.first(trial.fidelity).terms
        return paired_interval(self.config.objective, trial.terms, base, base)

    def over_next(self) -> tuple[Trial, Interval] | None:
        """Return the best of the other trials that met the incumbent on the same items, and how
        much better than it the incumbent is; None when there is no other.
        """
        best, objective = self.incumbent, self.config.objective
        base = self.log.first(best.fidelity).terms
        others = [
            trial
            for trial in self.log.of(best.fidelity)
            if trial.status == "ok"
            and trial.number != best.number
            and feasible(objective, trial.terms, base)
        ]
        if not others:
            return None
        other = max(others, key=lambda trial: combine(objective, trial.terms, base))
        return other, paired_interval(objective, best.terms, other.terms, base)


def say_what_tells_nothing(study: Study) -> None:
    """Log a warning for every term most of whose items all trials score alike: they cost time and
    carry no information.
    """
    trials = [trial for trial in study.log.of("search") if trial.status == "ok"]
    for label in trials[0].terms:
        columns = list(zip(*(trial.terms[label].items for trial in trials), strict=False))
        alike = sum(len(set(column)) == 1 for column in columns)
        if len(trials) > 2 and alike > ALIKE_SHARE * len(columns):
            logger.warning(
                "term %r: all trials score %d of %d items alike; such items tell nothing apart. "
                "Take harder or easier ones, or a continuous metric (bits_per_byte)",
                label,
                alike,
                len(columns),
            )


def open_study(config: StudyConfig, directory: Path, *, repair: bool = True) -> Study:
    """Create a study directory, or open the one that is there; see TrialLog for `repair`.

    One that differs in nothing but the folders of its files `has_moved`: `check_inputs` has to say
    that they are the same files. Raises StudyError when it holds another study; the message names
    the fields that differ.
    """
    file = directory / STUDY_FILE
    if not file.exists():
        if directory.exists() and any(
            not path.name.startswith(".") for path in directory.iterdir()
        ):
            raise StudyError(
                f"{directory}: is not empty and holds no study. Give another study directory."
            )
        write_text(file, config.model_dump_json(indent=2))
    recorded = StudyConfig.read(file)
    found, expected = recorded.identity, config.identity
    differing = differences(expected, found)
    log = TrialLog(directory / TRIALS_FILE, repair=repair)
    has_moved = (
        bool(differing and log.trials)
        and (directory / INPUTS_FILE).exists()
        and not differences(without_folders(expected), without_folders(found))
    )
    decisions = DecisionLog(directory / DECISIONS_FILE, repair=repair)
    study = Study(directory, config, log, decisions, has_moved)
    if not differing or has_moved:
        _check_record(study, max(recorded.search.n_trials, config.search.n_trials))
    if not differing and repair and recorded != config:  # more trials, other baselines
        _record_config(config, file)
    if differing and not log.trials:  # nothing was spent on the other config
        write_text(file, config.model_dump_json(indent=2))
    elif differing and not has_moved:
        asks_otherwise = all(text.startswith("objective.") for text in differing)
        raise StudyError(
            f"{directory}: holds a study of another config; these fields differ: "
            f"{'; '.join(differing)}. Give another study directory, or restore the config."
            + " `optimer retarget` answers other objectives from its trials."
            * asks_otherwise
        )
    return study


def _record_config(config: StudyConfig, file: Path) -> None:
    """Write a config over the one recorded; of the numbers of trials the larger one is kept."""
    longest = max(StudyConfig.read(file).search.n_trials, config.search.n_trials)
    search = config.search.model_copy(update={"n_trials": longest})
    write_text(file, config.model_copy(update={"search": search}).model_dump_json(indent=2))


def rules_of(config: StudyConfig, n_trials: int) -> Rules:
    """Return what a study of `n_trials` says of its trials."""
    fixed = {name: (weight, weight) for name, weight in config.fixed.items()}
    labels = {
        "search": [term.label for term in config.objective.at("search")],
        "rescore": [term.label for term in config.objective.at("rescore")],
    }
    return Rules(
        config.free | fixed, dict.fromkeys(config.free, 0.0) | config.fixed, labels, n_trials
    )


def _rules_of_sealed(config: StudyConfig) -> Rules:
    terms = config.test.at("rescore") if config.test is not None else []
    return Rules({}, {}, {"sealed": [term.label for term in terms]}, 0)


def _check_record(study: Study, n_trials: int) -> None:
    """Raise StudyError for anything in the record of a study that its config, or the rest of the
    record, contradicts; `n_trials` are those of the longest search in its directory.
    """
    config, directory = study.config, study.directory
    check_trials(study.log.path, study.log.trials, rules_of(config, n_trials))
    sealed = directory / SEALED_FILE
    if config.test is not None and sealed.exists():
        check_trials(sealed, TrialLog(sealed, repair=False).trials, _rules_of_sealed(config))
    if (directory / INPUTS_FILE).exists():
        Inputs.read(directory / INPUTS_FILE)
    decision = study.decision
    if decision is None:
        return
    sound = {trial.number for trial in study.log.of("search") if trial.status == "ok"}
    rescored = {trial.number for trial in study._candidates()} or sound
    at = f"{study.decisions.path}:{study.decisions.decisions.index(decision) + 1}"
    for name, weights in decision.rows.items():
        if weights.keys() != config.vectors.keys():
            raise StudyError(
                f"{at}: found weights of {sorted(weights)} for {name!r}, expected "
                f"{sorted(config.vectors)}. Remove the line: what it said is decided again."
            )
        for vector, weight in weights.items():
            if not abs(weight) <= LARGEST_WEIGHT:
                raise StudyError(
                    f"{at}: found {vector} at {weight!r}, expected at most {LARGEST_WEIGHT:g}. "
                    "Remove the line: what it said is decided again."
                )
    for number in (*decision.rescore, decision.incumbent or 0):
        if number not in sound:
            raise StudyError(
                f"{at}: found trial {shown(number)}, expected one that was scored. Remove the "
                "line: what it said is decided again."
            )
    if decision.incumbent is not None and decision.incumbent not in rescored:
        raise StudyError(
            f"{at}: found incumbent {decision.incumbent}, expected one that was scored again and "
            "keeps every constraint. Remove the line: what it said is decided again."
        )


def load_study(directory: Path, *, unfinished: bool = False) -> Study:
    """Open an existing study, or that of a run's directory, with the config it was made with;
    `unfinished` takes one that has scored the base.
    """
    if not (directory / STUDY_FILE).exists() and (directory / "study" / STUDY_FILE).exists():
        directory = directory / "study"
    file = directory / STUDY_FILE
    if not file.exists():
        raise StudyError(
            f"{directory}: holds no study (no study.json)."
            + (hint_of_seeds(directory) or f" Run `optimer search STUDY.yaml {directory}` first.")
        )
    study = open_study(_config_here(directory), directory, repair=False)
    if unfinished and not study.log.of("search"):
        raise StudyError(f"{directory}: has no trial yet. Run `optimer search` first.")
    study.decide(to_disk=False)
    if unfinished:
        study.take_best_so_far()
    if not unfinished and not study.is_finished:
        raise StudyError(f"{directory}: the search is not finished. Run `optimer search` again.")
    return study


def _config_here(directory: Path) -> StudyConfig:
    """Return the config of a study; where it has moved together with its files, with their places
    now.
    """
    config, file = StudyConfig.read(directory / STUDY_FILE), directory / INPUTS_FILE
    before = Inputs.read(file).folder if file.exists() else None
    if before is None or Path(before) == directory.resolve():
        return config
    data = config.model_dump(mode="json")
    return StudyConfig.model_validate(relocated(data, Path(before), directory.resolve()))


def hint_of_seeds(directory: Path) -> str:
    """Return what to give instead of the directory of `optimer run --seeds`, or nothing."""
    runs = sorted(path.parent for path in directory.glob("seed-*/study"))
    return f" It holds whole runs: give one of them, e.g. {runs[0]}." if runs else ""


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a directory for this process; raise StudyError when a live process holds it."""
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
