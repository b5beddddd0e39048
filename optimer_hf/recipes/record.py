"""The records of a recipe: recipe.yaml and its lock."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    PrivateAttr,
    SerializationInfo,
    field_serializer,
    field_validator,
    model_validator,
)

from optimer_hf.comparison.ledger import Ledger
from optimer_hf.files.model import FileModel, Mistake, VersionedFile
from optimer_hf.files.reference import (
    AnyPath,
    ReferenceText,
    TokenizerSource,
    name_of_reference,
    tokenizer_reference,
)
from optimer_hf.files.text import summarize_numbers
from optimer_hf.merging.mergekit_pool import BASE_FIELD, INT8, ON_UNREAD, UNREAD, VECTORS
from optimer_hf.models.layout import MAX_SHARD_SIZE
from optimer_hf.models.union import AddedToken, Vocabulary
from optimer_hf.scoring.objective import Objective
from optimer_hf.study.config import Share
from optimer_hf.study.trials import Fidelity
from optimer_hf.vectors.groups import Groups, confusable_names
from optimer_hf.vectors.record import QUANTISED

LOCK = "recipe.lock.json"  # beside a built model
MERGE_CONFIG, MADE_HERE = "optimer.yml", "# Written beside a recipe by optimer-hf.\n"

TITLES: dict[Fidelity, str] = {  # of what a merge scored
    "search": "items of the search",
    "rescore": "re-scored items",
    "sealed": "sealed test",
}
VANILLA_CONFIG = "mergekit_config.yml"  # for mergekit alone, if it can make the merge
DELTAS = "deltas"  # the folder of vectors that only such a config reads
LOCAL_RUN = "# The paths are those of this machine. Run: "  # it begins so, before its command,
HUB_RUN = "# Run: "  # or so if it was published
RUN_OF_0_1_0 = "# Paths are of this machine. Run: "
BEGINNINGS = tuple(f"{run}mergekit-yaml " for run in (LOCAL_RUN, HUB_RUN, RUN_OF_0_1_0))


def path_beside(recipe: Path, name: str) -> Path:
    """Return where a file or folder of a recipe lies: `name` beside a recipe.yaml, and beside
    chat.yaml `chat.NAME`, so that several recipes can share a folder.
    """
    own = name if recipe.stem == "recipe" else f"{recipe.stem}.{name}"
    return recipe.resolve().parent / own


MOST_LAYERS = 10_000
Weight = Annotated[float, Field(ge=-1e4, le=1e4)]
COMMIT = "0123456789abcdef0123456789abcdef01234567"  # in examples
PINNED = f"you/gemma-3-270m-math@{COMMIT}"


def _is_base(vocabulary: Vocabulary) -> bool:
    return vocabulary == "base"


class Ingredient(FileModel):
    """One vector of a recipe."""

    source: ReferenceText = Field(examples=[PINNED])
    """Where the vector is: a directory, a Hub id at a commit (org/name@commit) or pypi:PACKAGE."""
    weight: Weight | None = Field(
        default=None, examples=[0.62], json_schema_extra={"unit": "weight"}
    )
    """Weight of the vector in the merge."""
    weights: dict[str, Weight] | None = Field(
        default=None,
        min_length=2,
        examples=[{"self_attn": 0.3, "mlp": 0.5, "else": 0.1}],
        json_schema_extra={"unit": "weight"},
    )
    """Instead of `weight`, that of each group of tensors: a tensor belongs to the first group that
    is a part of its name, and `else` is the rest. Or layers.1, layers.2, ...: that many groups of
    neighbouring layers, the first with what is in no layer; layers.0:8, layers.8:24: the same with
    their ends. Or gradient.1, gradient.2, ...: weights along the layers, interpolated between them.
    Or all three, in this order: layers.0:8/mlp/gradient.1.
    """
    mixture: dict[str, Share] | None = Field(
        default=None,
        examples=[{"math": 2, "code": 1}],
        json_schema_extra={"unit": "share"},
        exclude_if=lambda value: value is None,
    )
    """Shares of the other vectors' text that the vector was trained on, by vector, if it was."""

    def mistakes(self) -> Iterator[Mistake]:
        if (self.weight is None) == (self.weights is None):
            fault = "it is missing" if self.weight is None else "'weights' is there, too"
            yield ("weight",), f"{fault}; give the weight, or in 'weights' that of each group"
        elif self.groups is not None:
            for key, message in self.groups.mistakes(list(self.weights or ())):
                yield ("weights", key) if key else ("weights",), message

    @property
    def groups(self) -> Groups | None:
        """How the vector is split; None: it is whole."""
        return None if self.weights is None else Groups.of_keys(self.weights)

    def weights_of(self, name: str) -> dict[str, float]:
        """Return the weights of the vector under its `name`: one, or that of each group."""
        if self.groups is None or self.weights is None:
            return {name: self.weight or 0.0}
        names = self.groups.names_of(name)
        return {names[key]: weight for key, weight in self.weights.items()}

    @property
    def is_used(self) -> bool:
        """Whether a weight is not zero."""
        return any(self.weights_of("").values())

    @property
    def weights_text(self) -> str:
        """The weight as text, or those of the groups."""
        if self.weights is None:
            return f"{self.weight:.4g}"
        return summarize_numbers(self.weights)


class Composition(VersionedFile):
    """What is merged: a base, vectors with their weights, and a tokenizer."""

    name: str = Field(examples=["my-merge"])
    """Name of the recipe."""
    base_model: ReferenceText = Field(examples=[f"google/gemma-3-270m@{COMMIT}"])
    """Model that the vectors are added to."""
    dtype: Literal["bfloat16", "float16", "float32"] = Field(examples=["bfloat16"])
    """dtype of the merged model."""
    vectors: dict[str, Ingredient] = Field(
        examples=[
            {
                "math": {
                    "source": PINNED,
                    "weight": 0.62,
                }
            }
        ]
    )
    """Vectors of the merge with their weights, by name."""
    n_layers: int | None = Field(
        default=None,
        ge=1,
        le=MOST_LAYERS,
        exclude_if=lambda number: number is None,
        examples=[24],
        json_schema_extra={"unit": "layers"},
    )
    """Number of layers of the base, where weights are those of groups of layers."""
    tokenizer_source: TokenizerSource = Field(default=None, examples=["chat"])
    """Vector or model that the merge takes its tokenizer from. Default: the base."""
    vocabulary: Vocabulary = Field(default="base", exclude_if=_is_base, examples=["union"])
    """Tokens that the merge has: those of the base, or with union those of the vectors, too. The
    lock says which vectors the rows of the added tokens come from.
    """

    def mistakes(self) -> Iterator[Mistake]:
        split = [name for name, each in self.vectors.items() if each.weights is not None]
        for name, message in confusable_names(split, self.vectors):
            yield ("vectors", name), message

    @property
    def weights(self) -> dict[str, float]:
        """All weights by name: `math`, or `math.mlp` of a group."""
        return {
            weight: value
            for name, ingredient in self.vectors.items()
            for weight, value in ingredient.weights_of(name).items()
        }

    @property
    def groups(self) -> dict[str, Groups]:
        """How the vectors that have several weights are split, by vector."""
        named = self.vectors.items()
        return {name: each.groups for name, each in named if each.groups is not None}

    @property
    def sources(self) -> dict[str, str]:
        """The reference of every vector, by name."""
        return {name: vector.source for name, vector in self.vectors.items()}

    @property
    def mixtures(self) -> dict[str, Mapping[str, float]]:
        """The shares of each vector that was trained on the text of others, by name."""
        named = self.vectors.items()
        return {name: vector.mixture for name, vector in named if vector.mixture is not None}

    @property
    def tokenizer_reference(self) -> str | None:
        """The model that the merge takes its tokenizer from (None: the base)."""
        return tokenizer_reference(self.tokenizer_source, self.sources)


class Score(FileModel):
    """What a merge scored at one fidelity."""

    value: float = Field(examples=[0.063], json_schema_extra={"unit": "that of the objective"})
    """Value of the objective; larger is better."""
    summary: str | None = Field(
        default=None, examples=["+6.26 % [+5.60, +6.91], paired 95 % interval: better"]
    )
    """The gain over the base with its interval, in words."""
    terms: dict[str, float] = Field(
        examples=[{"math": 0.9601}], json_schema_extra={"unit": "that of the metric"}
    )
    """Score of every term, in the unit of its metric."""
    higher_is_better: dict[str, bool] = Field(default={}, examples=[{"math": False}])
    """Direction of every term; not in recipes of 0.1.0."""
    metrics: dict[str, str] = Field(
        default={}, examples=[{"law": "bits_per_byte"}], exclude_if=lambda metrics: not metrics
    )
    """Metric of each term that the objective does not have, as a term of the test only."""
    verdicts: list[str] | None = Field(
        default=None, examples=[["searched merge minus the best of the others: +0.85 points"]]
    )
    """The merge against the best of the others, in words; of the sealed test only."""


class Search(FileModel):
    """The study that weights come from."""

    sha256: str = Field(examples=["9f86d081" * 8])
    """Digest of everything that decides its trials."""
    n_trials: int = Field(examples=[30], json_schema_extra={"unit": "trials"})
    """Number of trials of the search."""
    seed: int = Field(examples=[0])
    """Seed of the search."""
    incumbent: int = Field(examples=[16])
    """Number of the trial with these weights."""


class Evidence(FileModel):
    """Why these weights: what the search maximized, how the merge scored, and what it took. A
    recipe that a person wrote has none.
    """

    objective: Objective | None = Field(
        default=None,
        examples=[{"terms": [{"task": "gsm8k", "metric": "exact_match,flexible-extract"}]}],
    )
    """What the search maximized; the fields of an objective."""
    scores: dict[Fidelity, Score] = Field(
        default={}, examples=[{"search": {"value": 0.063, "terms": {"math": 0.9601}}}]
    )
    """Scores of the merge: in the search, re-scored, and on the sealed test. `optimer build` does
    not read them.
    """
    study: Search | None = Field(
        default=None,
        examples=[{"sha256": "9f86d081" * 8, "n_trials": 30, "seed": 0, "incumbent": 16}],
    )
    """Study that the weights come from: its digest, trials and seed."""
    ledger: Ledger = Field(default=Ledger(), examples=[{"search": {"n": 30, "seconds": 123.1}}])
    """Time, items and tokens that the search took."""

    @field_validator("objective", "study", mode="before")
    @classmethod
    def _none_if_empty(cls, value: Any) -> Any:
        return value or None  # version 0.1.0 took `{}`

    @field_serializer("objective")
    def _without_defaults(
        self, objective: Objective | None, info: SerializationInfo
    ) -> dict[str, Any] | None:
        if objective is None:
            return None
        return objective.model_dump(mode=info.mode, exclude_defaults=True, context=info.context)

    @property
    def metrics(self) -> dict[str, str]:
        """Metric of every term of the objective, and of those that only the test has, by label."""
        terms = [] if self.objective is None else self.objective.scored_terms
        of_test = self.scores["sealed"].metrics if "sealed" in self.scores else {}
        return of_test | {term.label: term.metric for term in terms}


class Recipe(Evidence, Composition):
    """recipe.yaml: everything that is needed to build the merge, and the evidence for it."""

    versions: dict[str, str] = Field(default={}, examples=[{"torch": "2.13.0"}])
    """Versions of the packages that the search ran with."""
    derived_from: str | None = Field(default=None, examples=[f"you/my-merge@{COMMIT}"])
    """Recipe that this one continues, as org/name@commit."""
    _path: Path | None = PrivateAttr(default=None)

    @classmethod
    def read(cls, path: AnyPath) -> Self:
        """Read a recipe as `VersionedFile.read` does. It remembers its path."""
        recipe = super().read(path)
        recipe._path = Path(path)
        return recipe

    @property
    def path(self) -> Path | None:
        """File that the recipe was read from; its lock lies beside it."""
        return self._path

    def __repr__(self) -> str:
        weights = summarize_numbers(self.weights)
        return f"Recipe({self.name!r}, {name_of_reference(self.base_model)} + {weights})"

    def __str__(self) -> str:
        """Return a line for each thing that decides the merge, and what it scored."""
        lines = {
            "base": name_of_reference(self.base_model),
            "weights": summarize_numbers(self.weights, most=20),
            "dtype": self.dtype,
            "tokenizer": self.tokenizer_source,
            "vocabulary": None if self.vocabulary == "base" else self.vocabulary,
            "searched for": ", ".join(
                f"{term.label} ({term.metric})" for term in self.objective.scored_terms
            )
            if self.objective
            else None,
        }
        lines |= {TITLES[fidelity]: score.summary for fidelity, score in self.scores.items()}
        sealed = self.scores.get("sealed")
        if sealed is not None and sealed.verdicts:
            lines["against baselines"] = sealed.verdicts[0]
        lines["file"] = None if self.path is None else str(self.path)
        shown = [f"  {title}: {text}" for title, text in lines.items() if text]
        return "\n".join([f"recipe {self.name!r}", *shown])


def _is_empty(tokens: dict[str, AddedToken]) -> bool:
    return not tokens


class Lock(VersionedFile):
    """recipe.lock.json: the sha256 of each weights file of base, vectors and model (`output`) by
    name, and of each file of the tokenizer if that is not the base's. `added_tokens` are those of a
    union that the base lacks, with the vectors that their rows come from.

    `kinds` says which vectors are adapters, deltas or checkpoints, and `dtypes` how each delta is
    stored. `unread` are the models whose tensors mergekit alone does not find, as fields of the
    recipe: `base_model`, `vectors.math`. `max_shard_size` is the size limit for files of the built
    model, in bytes.
    """

    base: dict[str, str]
    vectors: dict[str, dict[str, str]]
    kinds: dict[str, str] = {}
    dtypes: dict[str, str] = {}
    unread: list[str] = Field(default=[], exclude_if=lambda fields: not fields)
    tokenizer: dict[str, str] = {}
    added_tokens: dict[str, AddedToken] = Field(default={}, exclude_if=_is_empty)
    weights: dict[str, float]
    dtype: str
    output: dict[str, str] = {}
    max_shard_size: int = Field(default=MAX_SHARD_SIZE, gt=0, le=2**50)

    @property
    def stored_kinds(self) -> dict[str, str]:
        """The kind of each vector, with those apart that mergekit cannot read: int8 deltas, and
        vectors whose tensors, or those of the base, it does not find.
        """
        quantised = [name for name, dtype in self.dtypes.items() if dtype == QUANTISED]
        unread = [name for name in self.kinds if f"{VECTORS}.{name}" in self.unread]
        kinds = self.kinds | dict.fromkeys(quantised, INT8) | dict.fromkeys(unread, UNREAD)
        return dict.fromkeys(kinds, ON_UNREAD) if BASE_FIELD in self.unread else kinds

    @model_validator(mode="before")
    @classmethod
    def _add_dtypes(cls, data: Any) -> Any:
        """Recognise int8 deltas by their files in locks of 0.1.0, which recorded no dtypes."""
        if not isinstance(data, dict) or "dtypes" in data:
            return data
        vectors = data.get("vectors")
        return data | {
            "dtypes": {
                name: QUANTISED
                for name, files in (vectors.items() if isinstance(vectors, dict) else ())
                if isinstance(files, dict) and any(str(x).startswith("vector") for x in files)
            }
        }


def tokenizer_note(source: str, ends: Any = None) -> str:
    """Return a comment for a config for mergekit alone: which files of `source` to copy beside what
    mergekit writes, and which tokens end an answer if no file of it says so, `ends` if they are
    known.

    The config itself names no tokenizer, because mergekit would cut the embedding to its tokens.
    """
    if ends is not None:
        return (
            f"# Copy tokenizer and chat template of {source} into OUT.\n# It has no "
            f"generation_config.json: set eos_token_id in OUT/generation_config.json to {ends}.\n"
        )
    stops = "If there is none, they are the EOS of its config.json and of its tokenizer, too."
    return (
        f"# Copy tokenizer, chat template and (if there is one) generation_config.json of {source} "
        "into OUT.\n# Tokens that end an answer are eos_token_id in OUT/generation_config.json. "
        f"{stops}\n"
    )
