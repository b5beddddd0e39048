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
    weight: float = Field(ge=-1e4, le=1e4)


class RecipeFile(VersionedFile):
    """recipe.yaml: all that is needed to build the merge, and the evidence for it.

    `tokenizer_source`: the vector or the model whose tokenizer the merge has, if not the base's.
    """

    name: str
    base_model: ReferenceText
    dtype: Literal["bfloat16", "float16", "float32"]
    vectors: dict[str, Ingredient]
    tokenizer_source: TokenizerSource = None
    objective: dict[str, Any]
    scores: dict[str, Any]
    study: dict[str, Any]
    ledger: dict[str, Any] = {}
    versions: dict[str, str] = {}
    derived_from: str | None = None  # the recipe it continues: org/name@commit

    @property
    def weights(self) -> dict[str, float]:
        """Weight of every vector."""
        return {name: ingredient.weight for name, ingredient in self.vectors.items()}

    @property
    def tokenizer_reference(self) -> str | None:
        """The model whose tokenizer the merge has; None: the base."""
        sources = {name: vector.source for name, vector in self.vectors.items()}
        return tokenizer_reference(self.tokenizer_source, sources)


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
