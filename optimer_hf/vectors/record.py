"""vector.json: what a distribution vector is and which base it belongs to."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError

from optimer_hf.errors import ConfigError, ModelError
from optimer_hf.files.model import FileModel, VersionedFile
from optimer_hf.files.reading import read_json
from optimer_hf.models.layout import VECTOR_FILE, ResolvedModel, weight_digests
from optimer_hf.vectors.training_record import (
    CorpusRecord,
    PartialCorpus,
    PartialRun,
    RunRecord,
)

QUANTISED = "int8"


# -- vector.json -----------------------------------------------------------------------------------


class BaseRecord(FileModel):
    """The base model that a vector was trained from; `files` has the sha256 of its weights."""

    reference: str
    commit: str | None = None
    files: dict[str, str]

    @classmethod
    def of(cls, base: ResolvedModel) -> Self:
        """Return the record of a base; hashes its weights."""
        return cls(reference=base.reference, commit=base.commit, files=weight_digests(base.path))


def _is_none(value: object) -> bool:
    return value is None


class VectorFile(VersionedFile):
    """vector.json: what the vector is, where it comes from and how large it is.

    Only deltas have `dtype`, `block_size`, the relative errors of the stored delta (in total and by
    tensor) and `source_files` (the sha256 of the weights that it was extracted from). If a delta
    has a tokenizer of its own, `added_tokens` are those that the base lacks: their rows are stored
    whole.
    """

    name: str
    kind: Literal["adapter", "delta", "checkpoint"]
    base: BaseRecord
    source_files: dict[str, str] | None = None
    dtype: str | None = None
    block_size: int | None = Field(default=None, gt=0, le=2**20)
    added_tokens: list[str] | None = Field(default=None, exclude_if=_is_none)
    norm: float
    relative_norm: float
    relative_error: float | None = None
    relative_errors: dict[str, float] | None = None
    corpus: CorpusRecord | PartialCorpus | None = None
    training: RunRecord | PartialRun | None = None
    versions: dict[str, str] = {}


def read_record(path: Path) -> VectorFile | None:
    """Return the vector.json in a directory, or None if there is none."""
    file = path / VECTOR_FILE
    if not file.exists():
        return None
    try:
        return VectorFile.model_validate(read_json(file))
    except (ConfigError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise ModelError(f"{file}: not a vector.json of format version 1 ({reason}).") from None
