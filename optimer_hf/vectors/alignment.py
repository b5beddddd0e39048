"""Match the rows of a vector's embedding and head with those of its base by token.

The base has a row for every token of the pool (`vocabulary: union`); the vector has rows for its
own tokens, in its own order. Tokens that it lacks do not move.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from optimer_hf.errors import VocabularyError
from optimer_hf.models.aligned import AlignedTensors
from optimer_hf.models.checkpoint import Checkpoint, LoadedTensors
from optimer_hf.models.layout import has_tokenizer
from optimer_hf.models.loader import read_tokenizer
from optimer_hf.models.names import vocabulary_names
from optimer_hf.models.ties import ties_of
from optimer_hf.models.union import UnionRecord
from optimer_hf.vectors.forms import LowRank, OnCopy, Trained
from optimer_hf.vectors.int8 import SCALES
from optimer_hf.vectors.lora import changed_copy_error
from optimer_hf.vectors.vector import (
    AdapterVector,
    CheckpointVector,
    DeltaVector,
    DistributionVector,
    Tensors,
)


def has_own_tokens(vector: DistributionVector) -> bool:
    """Whether a vector has rows for the tokens of the tokenizer beside it; other deltas, and what
    has no tokenizer, have those of the base.
    """
    return not _is_delta_of_base_rows(vector) and has_tokenizer(vector.path)


def own_vocabulary(
    vector: DistributionVector, base: Path, union: UnionRecord | None = None
) -> dict[str, int]:
    """Return the ids of a vector's tokens: those of its tokenizer or, if it has none of its own,
    those of the base as it was.
    """
    if has_own_tokens(vector):
        return dict(read_tokenizer(vector.path).get_vocab())
    added = () if union is None else union.added
    ids = read_tokenizer(base).get_vocab()
    return {token: number for token, number in ids.items() if token not in added}


# -- the rows of a vector in its own order ---------------------------------------------------------


def token_tensors(base: Checkpoint) -> list[str]:
    """Return the tensors with a row for each token, without copies of a tied one."""
    return sorted(vocabulary_names(base) - ties_of(base).copies)


def n_token_rows(vector: DistributionVector, name: str, base: Checkpoint) -> int:
    """Return how many rows a vector has in a tensor with one for each token, in its own order;
    where it stores none, those of the base.
    """
    return _n_rows(vector, name) if _has_rows(vector, name) else base.shape(name)[0]


def token_row(
    vector: DistributionVector, name: str, number: int, base: Checkpoint
) -> torch.Tensor | None:
    """Return row `number` of a tensor after training, in float32, in the vector's own order; None
    if the vector leaves the tensor as it is in the base.
    """
    row = slice(number, number + 1)
    if not _has_rows(vector, name):
        return None
    if isinstance(vector, AdapterVector) and isinstance(part := vector.parts[name], OnCopy):
        return OnCopy(part.b[row], part.a, part.scale, part.start[row]).to_dense()[0]
    delta = vector.delta(name, row, "cpu")
    assert not isinstance(delta, LowRank)  # it has rows of its own
    return (delta.tensor if isinstance(delta, Trained) else delta)[0].float()


def _has_rows(vector: DistributionVector, name: str) -> bool:
    """Whether a vector stores the rows of a tensor as they are after training."""
    if isinstance(vector, AdapterVector):
        return isinstance(vector.parts.get(name), Trained | OnCopy)
    return not _is_delta_of_base_rows(vector)


def _is_delta_of_base_rows(vector: DistributionVector) -> bool:
    """Whether a vector is a delta whose rows are those of the base, with no tokens of its own."""
    return isinstance(vector, DeltaVector) and vector.added_tokens is None


def rows_of_base(
    vector: DistributionVector, ids: Mapping[str, int], base: Checkpoint
) -> AlignedTensors:
    """Return the tensors of a base with its rows in the order of a vector's tokens, and zeros for
    tokens that it has no row for. `ids` are those of the vector.
    """
    names = vocabulary_names(base)
    known = read_tokenizer(base.path).get_vocab()
    n_rows = max(n_token_rows(vector, name, base) for name in token_tensors(base))
    n_base = base.shape(min(names))[0]
    places = torch.full((n_rows,), -1, dtype=torch.int64)
    for token, number in ids.items():
        if number < n_rows and known.get(token, n_base) < n_base:
            places[number] = known[token]
    return AlignedTensors(base, names, places)


def refuse_changed_copies(
    vector: DistributionVector, ids: Mapping[str, int], base: Checkpoint
) -> None:
    """Raise ModelError for a copy of the embedding that differs from the base in a row that both
    have. `ids` are those of the vector's tokens.
    """
    parts = vector.parts if isinstance(vector, AdapterVector) else {}
    for name, part in parts.items():
        if isinstance(part, OnCopy):
            rows = rows_of_base(vector, ids, base)
            known = torch.nonzero(rows.places >= 0).flatten()
            _refuse_other_start(part.start[known], rows.read(name)[known], name, vector)


def _refuse_other_start(
    start: torch.Tensor, base_rows: torch.Tensor, name: str, vector: DistributionVector
) -> None:
    if not torch.equal(start.to(base_rows.dtype), base_rows):
        raise changed_copy_error(f"vector {vector.name!r} ({vector.path})", name)


def subtract_from(vector: DistributionVector, base: AlignedTensors) -> DistributionVector:
    """Return an unaligned vector whose delta is that to `rows_of_base`: products on a copy of the
    embedding become products on those rows.
    """
    if not isinstance(vector, AdapterVector):
        return vector
    new = torch.nonzero(base.places < 0).flatten()
    parts = dict(vector.parts)
    for name, part in vector.parts.items():
        if isinstance(part, OnCopy):
            parts[name] = _move_start(part, name, torch.arange(len(part.b)), new, base, vector)
    return replace(vector, parts=parts)


# -- in the order of the base ----------------------------------------------------------------------


def align_vector(
    vector: DistributionVector, ids: Mapping[str, int], base: Checkpoint, added: Collection[str]
) -> DistributionVector:
    """Return a vector with its rows in the places of the base; `ids` are those of its own tokens,
    `added` the tokens whose rows the base was given.

    Raises VocabularyError for a token that the base has no row for.
    """
    names = vocabulary_names(base) & vector.names
    if not names:
        return vector
    places = _places(vector, ids, names, base)
    if isinstance(vector, CheckpointVector):
        assert not isinstance(vector.tuned, AlignedTensors)
        return replace(vector, tuned=AlignedTensors(vector.tuned, names, places, base))
    known = read_tokenizer(base.path).get_vocab()
    if isinstance(vector, DeltaVector):
        assert not isinstance(vector.stored, AlignedTensors)
        scales = {f"{name}{SCALES}" for name in names} & {*vector.stored.names}
        stored = AlignedTensors(vector.stored, names | scales, places)
        whole = sorted(known[token] for token in vector.added_tokens or ())
        starts = {name: _read_rows(base, name, whole).float() for name in names if whole}
        return replace(vector, stored=stored, whole=torch.tensor(whole), starts=starts)
    assert isinstance(vector, AdapterVector)
    new = [known[token] for token in added if places[known[token]] >= 0]
    parts = {
        name: _align_part(vector, name, places, torch.tensor(new, dtype=torch.int64), base)
        for name in names
    }
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


def _read_rows(source: Tensors, name: str, numbers: Sequence[int]) -> torch.Tensor:
    """Return single rows of a tensor, one after the other."""
    none = source.read_rows(name, slice(0, 0))
    return torch.cat([none, *(source.read_rows(name, slice(i, i + 1)) for i in numbers)])


def _align_part(
    vector: AdapterVector, name: str, places: torch.Tensor, new: torch.Tensor, base: Checkpoint
) -> LowRank | Trained:
    part = vector.parts[name]
    if isinstance(part, OnCopy):
        return _move_start(part, name, places, new, base, vector)
    if isinstance(part, LowRank):
        return LowRank(_rows_at(part.b, places), part.a, part.scale)
    aligned = AlignedTensors(
        LoadedTensors(base.path, {name: part.tensor}), frozenset({name}), places, base
    )
    return Trained(aligned.read(name))


def _rows_at(rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return rows in float32 by their places, and zeros where the place is -1."""
    out = torch.zeros(len(places), rows.shape[1])
    out[places >= 0] = rows[places[places >= 0]].float()
    return out


def _move_start(
    part: OnCopy,
    name: str,
    places: torch.Tensor,
    new: torch.Tensor,
    base: Checkpoint | AlignedTensors,
    vector: AdapterVector,
) -> LowRank:
    """Return a product on a copy of the embedding as one on the rows of the base: for each row in
    `new`, which the copy has and the base had not, the rank grows by one.

    Raises ModelError if the copy differs from the base elsewhere.
    """
    kept = places.clone()
    kept[new] = -1
    old = torch.nonzero(kept >= 0).flatten()
    _refuse_other_start(part.start[kept[old]], base.read(name)[old], name, vector)
    own = places[new]
    trained = OnCopy(part.b[own], part.a, part.scale, part.start[own]).to_dense()
    columns = torch.zeros(len(places), len(new))
    columns[new, torch.arange(len(new))] = 1.0
    b = torch.cat([_rows_at(part.b, kept) * part.scale, columns], dim=1)
    a = torch.cat([part.a, trained - _read_rows(base, name, new.tolist()).float()])
    return LowRank(b, a, 1.0)
