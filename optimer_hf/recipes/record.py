"""recipe.yaml and its lock."""

from typing import Any, Literal

from pydantic import Field

from optimer_hf.files.model import FileModel, VersionedFile
from optimer_hf.files.reference import ReferenceText, TokenizerSource, tokenizer_reference
from optimer_hf.models.layout import MAX_SHARD_SIZE

LOCK = "recipe.lock.json"  # beside a built model
MERGE_CONFIG, MADE_HERE = "optimer.yml", "# Written beside a recipe by optimer-hf.\n"


class Ingredient(FileModel):
    """One vector of a recipe."""

    source: ReferenceText
    """Where the vector is: a directory, a Hub id at a commit (org/name@commit) or pypi:PACKAGE."""
    weight: float = Field(ge=-1e4, le=1e4)
    """Weight of the vector in the merge."""


class RecipeFile(VersionedFile):
    """recipe.yaml: everything needed to build the merge, and the evidence for it."""

    name: str
    """Name of the recipe."""
    base_model: ReferenceText
    """Model that the vectors are added to."""
    dtype: Literal["bfloat16", "float16", "float32"]
    """dtype of the merged model."""
    vectors: dict[str, Ingredient]
    """Vectors of the merge with their weights, by name."""
    tokenizer_source: TokenizerSource = None
    """Vector or model that the merge takes its tokenizer from. Default: the base."""
    objective: dict[str, Any]
    """What the search maximized; the fields of an objective."""
    scores: dict[str, Any]
    """Scores of the merge: in the search, re-scored, and on the sealed test. `optimer build` does
    not read them.
    """
    study: dict[str, Any]
    """Study that the weights come from: its digest, trials and seed."""
    ledger: dict[str, Any] = {}
    """Time, items and tokens that the search took."""
    versions: dict[str, str] = {}
    """Versions of the packages that the search ran with."""
    derived_from: str | None = None
    """Recipe that this one continues, as org/name@commit."""

    @property
    def weights(self) -> dict[str, float]:
        """Weight of every vector."""
        return {name: ingredient.weight for name, ingredient in self.vectors.items()}

    @property
    def tokenizer_reference(self) -> str | None:
        """The model whose tokenizer the merge has; None: the base."""
        return tokenizer_reference(self.tokenizer_source, self.sources)

    @property
    def sources(self) -> dict[str, str]:
        """Where the vectors are, by name."""
        return {name: vector.source for name, vector in self.vectors.items()}


class Lock(VersionedFile):
    """recipe.lock.json: file name -> sha256 of the weights of base, vectors and the built model,
    and of the tokenizer, if it is not the base's; `kinds` says which vectors are adapters, deltas
    and checkpoints, `max_shard_size` how large a file of the built model may be, in bytes.
    """

    base: dict[str, str]
    vectors: dict[str, dict[str, str]]
    kinds: dict[str, str] = {}
    tokenizer: dict[str, str] = {}
    weights: dict[str, float]
    dtype: str
    output: dict[str, str] = {}
    max_shard_size: int = Field(default=MAX_SHARD_SIZE, gt=0, le=2**50)
