"""union.json: which tokens a base was given that it lacks, and which vectors their rows come from.

With `vocabulary: union`, a merge starts from a copy of its base whose embedding and head have a row
for every token of the vectors. This file lies in such a copy.
"""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field

from optimer_hf.files.digest import digest
from optimer_hf.files.model import FileModel, VersionedFile

UNION_FILE = "union.json"
Vocabulary = Literal["base", "union"]  # whose tokens a merge has: those of the base, or of all


class AddedToken(FileModel):
    """A token that the base lacks: its id in the merge, and the vectors whose rows for it were
    averaged; none if no vector has a row, which is then zero.
    """

    id: int = Field(ge=0, lt=2**25)
    vectors: list[str]


class UnionRecord(VersionedFile):
    """union.json. `base` has the sha256 of the weights files of the base as it was, `fingerprint`
    their `weights_fingerprint`, and `added` its new tokens in the order of their ids.
    """

    base: dict[str, str]
    fingerprint: str
    added: dict[str, AddedToken]

    @classmethod
    def of(cls, path: Path) -> Self | None:
        """Return the record in a model directory, or None if the model is as it was published."""
        file = path / UNION_FILE
        return cls.read(file) if file.exists() else None

    def digest_tokens(self) -> str:
        """Return a digest of the added tokens and of where they come from."""
        return digest({token: each.model_dump() for token, each in self.added.items()})
