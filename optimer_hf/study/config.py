"""What a study is: the fields of a study file."""

import os
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from optimer_hf.files.digest import digest
from optimer_hf.files.model import FileModel, Mistake, VersionedFile
from optimer_hf.files.reference import (
    ReferenceText,
    RelativeText,
    TokenizerSource,
    tokenizer_reference,
)
from optimer_hf.scoring.objective import Objective, Term

LARGEST_WEIGHT = 1000.0  # of a vector; merges break far below
LARGEST_SEARCH, LARGEST_LIMIT = 10_000, 10**7  # trials; items
MOST_VECTORS, NARROWEST = 1000, 1e-3
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


def _with_fields(value: Any) -> Any:
    """Return the fields of a vector that is given as its source alone."""
    return {"source": value} if isinstance(value, str | os.PathLike) else value


# a text stands for {"source": text}
VectorEntry = Annotated[
    VectorConfig, BeforeValidator(_with_fields, json_schema_input_type=str | VectorConfig)
]


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

    `vectors` gives every vector by name as its source (`math: you/gemma-math`) or, where more is to
    be said, as the fields of a VectorConfig.

    `tokenizer_source`: whose tokenizer, chat template and generation config score and ship with the
    merge: `base` (the default), a vector of the pool, or a model. It has to give the tokens of the
    base their ids.
    """

    base_model: ReferenceText
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    vectors: dict[str, VectorEntry] = Field(min_length=1, max_length=MOST_VECTORS)
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
