"""Match the rows of a vector's embedding and head with those of its base by token.

The base has a row for every token of the pool (`vocabulary: union`); the vector has rows for its
own tokens, in its own order. Tokens that it lacks do not move.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from optimer_hf.errors import VocabularyError
from optimer_hf.models.aligned import AlignedTensors
from optimer_hf.models.checkpoint import Checkpoint, LoadedTensors
from optimer_hf.models.layout import has_tokenizer
from optimer_hf.models.loader import read_tokenizer
from optimer_hf.models.names import vocabulary_names
from optimer_hf.models.union import UnionRecord
from optimer_hf.vectors.forms import LowRank, Trained
from optimer_hf.vectors.int8 import SCALES
from optimer_hf.vectors.vector import (
    AdapterVector,
    CheckpointVector,
    DeltaVector,
    DistributionVector,
    Tensors,
)


def own_vocabulary(
    vector: DistributionVector, base: Path, union: UnionRecord | None = None
) -> dict[str, int]:
    """Return the ids of a vector's tokens: those of its tokenizer or, if it has none or is a delta,
    those of the base as it was.
    """
    if vector.kind != "delta" and has_tokenizer(vector.path):
        return dict(read_tokenizer(vector.path).get_vocab())
    added = () if union is None else union.added
    ids = read_tokenizer(base).get_vocab()
    return {token: number for token, number in ids.items() if token not in added}


def rows_of_tokens(vector: DistributionVector, name: str, base: Checkpoint) -> Tensors:
    """Return the tensors in which row i of the tensor `name` is that of a vector's token i: its own
    ones, or those of the base where the vector does not store rows.
    """
    if isinstance(vector, CheckpointVector):
        return vector.tuned
    part = vector.parts.get(name) if isinstance(vector, AdapterVector) else None
    return LoadedTensors(vector.path, {name: part.tensor}) if isinstance(part, Trained) else base


def align_vector(
    vector: DistributionVector, ids: Mapping[str, int], base: Checkpoint
) -> DistributionVector:
    """Return a vector with its rows in the places of the base; `ids` are those of its own tokens.

    Raises VocabularyError for a token that the base has no row for.
    """
    names = vocabulary_names(base) & vector.names
    if not names:
        return vector
    places = _places(vector, ids, names, base)
    if isinstance(vector, CheckpointVector):
        assert not isinstance(vector.tuned, AlignedTensors)
        return replace(vector, tuned=AlignedTensors(vector.tuned, names, places, base))
    if isinstance(vector, DeltaVector):
        assert not isinstance(vector.stored, AlignedTensors)
        scales = {f"{name}{SCALES}" for name in names} & {*vector.stored.names}
        return replace(vector, stored=AlignedTensors(vector.stored, names | scales, places))
    assert isinstance(vector, AdapterVector)
    parts = {name: _align_part(vector.parts[name], name, places, base) for name in names}
    return replace(vector, parts=vector.parts | parts)


def _places(
    vector: DistributionVector, ids: Mapping[str, int], names: frozenset[str], base: Checkpoint
) -> torch.Tensor:
    """Return the row of a vector for each row of the base, -1 where it has none."""
    n_rows = base.shape(min(names))[0]
    n_own = min(_n_rows(vector, name) for name in names)
    places = torch.full((n_rows,), -1, dtype=torch.int64)
    known = read_tokenizer(base.path).get_vocab()
    for token, number in ids.items():
        if number < n_own and known.get(token, n_rows) < n_rows:
            places[known[token]] = number
        elif number < n_own and token not in known:
            raise VocabularyError(
                f"vector {vector.name!r} ({vector.path}): has a row for the token {token!r}, which "
                "no vector of the study has. Add this one to the study, or leave it out."
            )
    return places


def _n_rows(vector: DistributionVector, name: str) -> int:
    if isinstance(vector, AdapterVector):
        return vector.parts[name].shape[0]
    assert isinstance(vector, CheckpointVector | DeltaVector)
    return (vector.tuned if isinstance(vector, CheckpointVector) else vector.stored).shape(name)[0]


def _align_part(
    part: LowRank | Trained, name: str, places: torch.Tensor, base: Checkpoint
) -> LowRank | Trained:
    known = places >= 0
    if isinstance(part, LowRank):
        b = torch.zeros(len(places), part.b.shape[1])
        b[known] = part.b[places[known]]
        return LowRank(b, part.a, part.scale)
    aligned = AlignedTensors(
        LoadedTensors(base.path, {name: part.tensor}), frozenset({name}), places, base
    )
    return Trained(aligned.read(name))
