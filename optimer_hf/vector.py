"""Checkpoint, adapter or delta -> DistributionVector: what one dataset did to the base model.

A vector is read lazily, a few rows of one tensor at a time, whatever its kind: a whole checkpoint
(its delta is taken on the fly), a LoRA adapter (kept as factors; a row block of B times A is made
when it is asked for), or a delta directory, in floating point or block-quantised. A directory of
ours is complete when `vector.json`, written last, is there.
"""

import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import Field, ValidationError

from optimer_hf.adapter import merged_by_peft, read_adapter
from optimer_hf.checkpoint import (
    DTYPES,
    Checkpoint,
    Loaded,
    copy_beside_weights,
    matrix_rows,
    matrix_shape,
    row_blocks,
    weight_files,
    write_sharded,
)
from optimer_hf.convert import TOKENIZER_FILES, ResolvedModel, loaded_tokenizer, resolve_model
from optimer_hf.errors import ConfigError, ModelError, VocabularyError
from optimer_hf.files import FileModel, VersionedFile, staged_directory
from optimer_hf.kernel import Delta, LowRank, Trained, dense
from optimer_hf.names import Match, match, names_in, summary, vocabulary_names
from optimer_hf.printable import warn_once
from optimer_hf.quantize import BLOCK_SIZE, SCALES, dequantize, n_blocks, quantize
from optimer_hf.reading import read_json
from optimer_hf.settings import differing_settings, shown_settings
from optimer_hf.ties import ties_of
from optimer_hf.vocabulary import moved_tokens

logger = logging.getLogger(__name__)

QUANTISED = "int8"
STORE_ALIKE = (
    "Load base and fine-tune with transformers and save both with `save_pretrained(DIRECTORY, "
    "save_original_format=False)`, which stores them alike."
)
OTHER_TOKENS = (
    "The vocabularies differ: the fine-tune added, removed or moved tokens. Align them with "
    "mergekit's `tokenizer:` through `optimer merge` first."
)


# -- vector.json -----------------------------------------------------------------------------------


class BaseRecord(FileModel):
    """The base model a vector was trained from."""

    reference: str
    commit: str | None = None
    files: dict[str, str]


class VectorFile(VersionedFile):
    """vector.json: what the vector is, where it comes from, how large it is.

    `dtype`, `block_size`, `relative_error` (of the stored delta, in total and by tensor) and
    `source_files` (sha256 of the weights it was taken from) belong to deltas.
    """

    name: str
    kind: Literal["adapter", "delta", "checkpoint"]
    base: BaseRecord
    source_files: dict[str, str] | None = None
    dtype: str | None = None
    block_size: int | None = Field(default=None, gt=0, le=2**20)
    norm: float
    relative_norm: float
    relative_error: float | None = None
    relative_errors: dict[str, float] | None = None
    corpus: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    versions: dict[str, str] = {}


# -- the three kinds -------------------------------------------------------------------------------


class DistributionVector(Protocol):
    """What merging needs of a vector: its name, the tensors it moves, and rows of its delta."""

    @property
    def name(self) -> str:
        """Its name in the pool."""
        ...

    @property
    def kind(self) -> str:
        """checkpoint, delta or adapter."""
        ...

    @property
    def path(self) -> Path:
        """The directory that holds its weights."""
        ...

    @property
    def names(self) -> frozenset[str]:
        """Tensors with a delta; all others are zero."""
        ...

    @property
    def n_bytes(self) -> int:
        """Memory it takes when it is loaded."""
        ...

    def delta(self, name: str, rows: slice, device: torch.device | str) -> Delta:
        """Return rows of the delta of a tensor on a device, in the form it is stored in; see
        `kernel.dense`. Not to be changed by the caller.
        """
        ...

    def loaded(self, device: str) -> "DistributionVector":
        """Return the vector with its weights in the memory of a device."""
        ...


@dataclass(frozen=True)
class CheckpointVector:
    """A whole tuned model; its delta, tuned minus base, is taken in float32 when it is merged.

    Where the base is padded and the tuned model is not, its tensors of the vocabulary end early:
    the rows that it lacks are those of `padding`, the base, and do not move.
    """

    name: str
    tuned: Checkpoint | Loaded
    names: frozenset[str]
    padding: Checkpoint | Loaded | None = None
    kind: str = "checkpoint"

    @property
    def path(self) -> Path:
        return self.tuned.path

    @property
    def n_bytes(self) -> int:
        return self.tuned.n_bytes(self.names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, with the rows that only the base has."""
        is_padded = self.padding is not None and name in self.padding.names
        return (self.padding if is_padded and self.padding else self.tuned).shape(name)

    def delta(self, name: str, rows: slice, device: torch.device | str) -> Trained:
        n_rows = matrix_shape(self.tuned.shape(name))[0]
        if self.padding is None or rows.stop <= n_rows:
            return Trained(self.tuned.read_rows(name, rows).to(device))
        trained = self.tuned.read_rows(name, slice(min(rows.start, n_rows), n_rows))
        unmoved = self.padding.read_rows(name, slice(max(rows.start, n_rows), rows.stop))
        dtype = torch.promote_types(trained.dtype, unmoved.dtype)
        return Trained(torch.cat([part.to(device, dtype) for part in (trained, unmoved)]))

    def loaded(self, device: str) -> "CheckpointVector":
        tuned = _loaded(self.tuned, self.names, device)
        padding = self.padding and _loaded(self.padding, self.padding.names, device)
        return replace(self, tuned=tuned, padding=padding)


@dataclass(frozen=True)
class DeltaVector:
    """Stored deltas: bf16, fp16, fp32, or int8 with a scale per block; `copies`, of a tied head,
    are stored, too, and not read.
    """

    name: str
    stored: Checkpoint | Loaded
    block_size: int | None = None
    copies: frozenset[str] = frozenset()
    kind: str = "delta"

    @property
    def path(self) -> Path:
        return self.stored.path

    @cached_property
    def names(self) -> frozenset[str]:
        found = frozenset(name for name in self.stored.names if not name.endswith(SCALES))
        return found - self.copies

    @property
    def n_bytes(self) -> int:
        return self.stored.n_bytes(self.stored.names)

    def delta(self, name: str, rows: slice, device: torch.device | str) -> torch.Tensor:
        stored = self.stored.read_rows(name, rows).to(device)
        if self.block_size is None or stored.is_floating_point():
            return stored
        scales = self.stored.read_rows(f"{name}{SCALES}", rows).to(device)
        return dequantize(stored, scales, self.block_size)

    def loaded(self, device: str) -> "DeltaVector":
        return replace(self, stored=_loaded(self.stored, self.stored.names, device))


@dataclass(frozen=True)
class AdapterVector:
    """A LoRA adapter, kept as float32 factors in memory; biases and whole modules as trained."""

    name: str
    path: Path
    parts: dict[str, LowRank | Trained] = field(repr=False)
    kind: str = "adapter"

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(self.parts)

    @property
    def n_bytes(self) -> int:
        return sum(part.n_bytes for part in self.parts.values())

    def delta(self, name: str, rows: slice, device: torch.device | str) -> LowRank | Trained:
        part = self.parts[name]
        if isinstance(part, LowRank):
            return LowRank(part.b[rows], part.a, part.scale).to(device)
        return Trained(matrix_rows(part.tensor, rows).to(device))

    def loaded(self, device: str) -> "AdapterVector":
        return replace(self, parts={name: part.to(device) for name, part in self.parts.items()})


def _loaded(source: Checkpoint | Loaded, names: Iterable[str], device: str) -> Loaded:
    return Loaded(source.path, {name: source.read(name).to(device) for name in names})


def dense_rows(
    vector: DistributionVector, name: str, rows: slice, base_rows: torch.Tensor
) -> torch.Tensor:
    """Return rows of a delta in float32, given the same rows of the base."""
    return dense(vector.delta(name, rows, base_rows.device), base_rows)


# -- opening ---------------------------------------------------------------------------------------


def open_vector(name: str, source: str, base: ResolvedModel) -> DistributionVector:
    """Open the vector that `source` (directory or Hub id) holds; its kind is recognised from its
    files.

    Raises ModelError when it records other weights of its base, or when its tensors do not fit the
    base. An adapter that fits and only names another base gets a warning.
    """
    try:
        resolved = resolve_model(source)
    except ModelError as error:
        raise ModelError(f"vector {name!r}: {error}") from error
    checkpoint = Checkpoint(base.path)
    record = _record_of_this_base(name, source, resolved.path, base)
    vector: DistributionVector
    if (resolved.path / "adapter_config.json").exists():
        parts = read_adapter(resolved.path, checkpoint, name)
        stored = names_in(checkpoint, parts)  # two of a tensor that the base has twice
        parts = {known: parts[key] for key in parts for known in stored.get(key, [key])}
        vector = AdapterVector(name, resolved.path, parts)
    elif record is not None and record.kind == "delta":
        delta = _open_delta(name, resolved.path, record)
        vector = replace(delta, copies=ties_of(checkpoint).copies)
    else:
        tuned = _by_names_of(checkpoint, Checkpoint(resolved.path), name)
        _check_same_kinds(name, tuned, checkpoint)
        padding = _padding(name, tuned, checkpoint)
        vector = CheckpointVector(name, tuned, _merged_names(tuned, checkpoint), padding)
    _check_shapes(vector, checkpoint)
    if vector.kind == "checkpoint":
        _check_settings(name, resolved.path, base.path)
    if vector.kind != "delta":  # which has the tokenizer of its base
        _check_tokens(name, resolved.path, base.path)
    if vector.kind == "adapter" and record is None:
        _warn_of_another_base(name, resolved.path, base)
    return vector


def read_record(path: Path) -> VectorFile | None:
    """Return the vector.json of a directory, or None when there is none."""
    file = path / "vector.json"
    if not file.exists():
        return None
    try:
        return VectorFile.model_validate(read_json(file))
    except (ConfigError, ValidationError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise ModelError(f"{file}: not a vector.json of format version 1 ({reason}).") from None


def _open_delta(name: str, path: Path, record: VectorFile) -> DeltaVector:
    if record.dtype != QUANTISED:
        return DeltaVector(name, Checkpoint(path))
    stored, block_size = Checkpoint(path, "vector"), record.block_size or 0
    for tensor in stored.names:
        if tensor.endswith(SCALES) or stored.dtype(tensor) != torch.int8:
            continue
        *rows, n = stored.shape(tensor)
        expected = (*rows, n_blocks(n, block_size)) if block_size > 0 else None
        scales = f"{tensor}{SCALES}"
        found = stored.shape(scales) if scales in stored.names else None
        if found is None or found != expected:
            raise ModelError(
                f"vector {name!r} ({path}): tensor {tensor!r} has scales of shape {found}; "
                f"block_size {record.block_size} of vector.json makes it {expected}. Fetch it "
                "again."
            )
    return DeltaVector(name, stored, block_size)


def _record_of_this_base(
    name: str, source: str, path: Path, base: ResolvedModel
) -> VectorFile | None:
    """Return the vector.json of a directory; refuse a vector that records another base."""
    record = read_record(path)
    if record is not None and record.base.files != weight_files(base.path):
        raise ModelError(
            f"vector {name!r} ({source}) was trained from {record.base.reference}, whose weights "
            f"differ from those of base_model {base.reference}. Retrain it from this base, or drop "
            "it."
        )
    return record


def _warn_of_another_base(name: str, path: Path, base: ResolvedModel) -> None:
    """Warn of an adapter that names another Hub model as its base. A name proves nothing: QLoRA
    names the quantised copy, others a mirror. A local path tells nothing at all.
    """
    config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    declared = str(config.get("base_model_name_or_path") or "")
    is_hub_id = declared.count("/") == 1 and not declared.startswith((".", "/", "~"))
    if is_hub_id and base.commit is not None and declared != base.reference:
        warn_once(
            logger,
            f"vector {name!r} ({path}): its adapter_config.json names {declared} as its base, and "
            f"base_model is {base.reference}. Its shapes fit. That is right where the one is a "
            "mirror or a quantised copy (QLoRA) of the other; an adapter of other weights has to "
            "be trained again.",
        )


def _by_names_of(base: Checkpoint, tuned: Checkpoint, name: str) -> Checkpoint:
    """Return a tuned checkpoint by the names of the base, without what is no part of it; refuse one
    that lacks a part of the base, or has others. Of tensors that are one in either, the one that is
    stored stands for the others.
    """
    of_base = ties_of(base)
    try:
        of_tuned, found = ties_of(tuned), match(tuned, base)
    except ModelError as error:
        raise ModelError(f"vector {name!r}: {error}") from error
    copies = {other for key, other in found.tuned_names.items() if key in of_base.copies}
    stored = {key: found.tuned_names[key] for key in found.tuned_names.keys() - of_base.copies}
    lacking = set(found.missing) - of_base.copies
    kept = {key: of_tuned.stored.get(of_base.class_names.get(key, key)) for key in lacking}
    tied = {key: other for key, other in kept.items() if other in tuned.names}
    missing = sorted(lacking - tied.keys())
    rest = {*found.unknown, *copies} - {*stored.values(), *tied.values()} - of_tuned.copies
    groups = {key: of_base.group_of(of_tuned.class_names.get(key, key)) for key in sorted(rest)}
    parted = {key: of_base.kept(group[0]) for key, group in groups.items() if group}
    extra = sorted(key for key in rest if parted.get(key) not in stored)
    if missing or extra:
        _refuse_other_form(
            name,
            tuned.path,
            {of_base.class_names.get(key, key): key for key in missing},
            {of_tuned.class_names.get(key, key): key for key in extra},
        )
        raise ModelError(
            f"vector {name!r} ({tuned.path}): is not a fine-tune of the base: {len(missing)} "
            f"tensors are missing (first: {missing[:1]}), {len(extra)} are unknown (first: "
            f"{extra[:1]}). Use a model of the same architecture."
            + (f" Names were compared as they are: {found.reason}" if found.reason else "")
        )
    for key, one in parted.items():
        if not tuned.are_equal(key, stored[one]):
            raise ModelError(
                f"vector {name!r} ({tuned.path}): has a tensor {key!r} of its own, which the base "
                f"{base.path} ties to {one!r}. A merge has the form of the base and would drop "
                "it. Untie the base first (save it with the head as a tensor and "
                "tie_word_embeddings: false), or use a fine-tune with a tied head."
            )
    for key, other in tied.items():
        if of_tuned.is_assumed:
            raise ModelError(
                f"vector {name!r} ({tuned.path}): lacks tensor {key!r}, and neither its config "
                f"nor its model class says that it is {other!r}. Write tie_word_embeddings into "
                "its config.json."
            )
    _tell_differences(name, tuned, found)
    return tuned.renamed(stored | tied)


def _refuse_other_form(
    name: str, path: Path, missing: Mapping[str, str], extra: Mapping[str, str]
) -> None:
    """Raise ModelError where tensors of base and tuned model, by parameter of their classes, are
    the same in two forms: experts together in one and one by one in the other.
    """
    for parameter in sorted(missing.keys() & extra.keys()):
        raise ModelError(
            f"vector {name!r} ({path}): tensor {extra[parameter]!r} stores in another form what "
            f"the base has as {missing[parameter]!r}. {STORE_ALIKE}"
        )


def _tell_differences(name: str, tuned: Checkpoint, found: Match) -> None:
    if found.unmoved:
        warn_once(
            logger,
            f"vector {name!r} ({tuned.path}): does without {len(found.unmoved)} tensors of the "
            f"base ({summary(found.unmoved)}), which a merge leaves as they are",
        )
    if found.left_out:
        warn_once(
            logger,
            f"vector {name!r} ({tuned.path}): {len(found.left_out)} tensors that the base does not "
            f"have and its class does not load ({summary(found.left_out)}) are left out",
        )


def _check_same_kinds(name: str, tuned: Checkpoint, base: Checkpoint) -> None:
    """Refuse quantised tensors, and whole numbers other than those of the base."""
    for tensor in tuned.names:
        kinds = tuned.dtype(tensor), base.dtype(tensor)
        if kinds[0].is_floating_point != kinds[1].is_floating_point:
            raise ModelError(
                f"vector {name!r} ({tuned.path}): tensor {tensor!r} is {kinds[0]}, in the base it "
                f"is {kinds[1]}. Quantised models cannot be merged; use the full weights."
            )
        if not kinds[1].is_floating_point and not torch.equal(
            tuned.read(tensor), base.read(tensor)
        ):
            raise ModelError(
                f"vector {name!r} ({tuned.path}): tensor {tensor!r} of {kinds[1]} differs from the "
                "base, and whole numbers cannot be merged. Use a fine-tune that left it alone."
            )


def _merged_names(tuned: Checkpoint, base: Checkpoint) -> frozenset[str]:
    return frozenset(name for name in tuned.names if base.dtype(name).is_floating_point)


def _check_shapes(vector: DistributionVector, base: Checkpoint) -> None:
    known = set(base.names)
    for name in sorted(vector.names):
        if name not in known:
            raise ModelError(
                f"vector {vector.name!r}: tensor {name!r} is not in the base {base.path}. Give a "
                "vector trained from this base; for an adapter whose module names differ, see "
                "`optimer extract --from-adapter`."
            )
        found = _shape_of(vector, name)
        if found == base.shape(name):
            continue
        differs = (
            f"vector {vector.name!r}: tensor {name!r} has shape {list(found)}, the base has "
            f"{list(base.shape(name))}."
        )
        if found[1:] == base.shape(name)[1:] and name in vocabulary_names(base):
            raise VocabularyError(f"{differs} {OTHER_TOKENS}")
        if sorted(found) == sorted(base.shape(name)):
            raise ModelError(f"{differs} One is stored the other way round. {STORE_ALIKE}")
        raise ModelError(f"{differs} Give a vector trained from this base.")


def _check_settings(name: str, tuned: Path, base: Path) -> None:
    """Refuse a fine-tune whose config makes another function of the same tensors."""
    differing = differing_settings(tuned, base)
    if not differing:
        return
    raise ModelError(
        f"vector {name!r} ({tuned}): its config.json changes how the model computes "
        f"({shown_settings(differing)}). A merge has the config of the base, so that at weight 1 "
        "it would not be this model. Use a fine-tune that left these settings alone; if its "
        "tensors are meant to work with the settings of the base, write those into a copy of its "
        "config.json."
    )


def _check_tokens(name: str, tuned: Path, base: Path) -> None:
    """Refuse a vector that was trained with other ids for the tokens of the base."""
    moved = moved_tokens(tuned, base)
    if moved:
        token, found, expected = moved[0]
        raise VocabularyError(
            f"vector {name!r} ({tuned}): its tokenizer gives the token {token!r} the id {found}, "
            f"that of the base {expected} ({len(moved):,} tokens in all): it was trained with "
            f"other rows for them. {OTHER_TOKENS}"
        )


def _padding(name: str, tuned: Checkpoint, base: Checkpoint) -> Checkpoint | None:
    """Return the tensors of the vocabulary of which the base has more rows than a tuned model; None
    where there is none.

    Raises VocabularyError where those rows belong to tokens.
    """
    short = [
        key
        for key in tuned.names
        if tuned.shape(key)[1:] == base.shape(key)[1:]
        and tuned.shape(key)[:1] < base.shape(key)[:1]
    ]
    padded = sorted(vocabulary_names(base).intersection(short)) if short else []
    if not padded:
        return None
    n_rows = min(tuned.shape(key)[0] for key in padded)
    differs = (
        f"vector {name!r} ({tuned.path}): tensor {padded[0]!r} has {n_rows} rows, the base has "
        f"{base.shape(padded[0])[0]}"
    )
    try:
        tokens = loaded_tokenizer(ResolvedModel(base.path, base.path.name)).get_vocab()
    except ModelError as error:
        raise VocabularyError(
            f"{differs}, and whether those are tokens cannot be told: {error}"
        ) from error
    at_end = sorted(tokens, key=tokens.__getitem__)
    if lost := [t for t in at_end if n_rows <= tokens[t] < base.shape(padded[0])[0]]:
        raise VocabularyError(f"{differs}, of which {lost[0]!r} is a token. {OTHER_TOKENS}")
    if any((tuned.path / file).exists() for file in TOKENIZER_FILES):
        own = loaded_tokenizer(ResolvedModel(tuned.path, tuned.path.name)).get_vocab()
        if other := [token for token in at_end if own.get(token) != tokens[token]]:
            raise VocabularyError(
                f"{differs}, and its token {other[0]!r} has the id {own.get(other[0])}, that of "
                f"the base {tokens[other[0]]}. {OTHER_TOKENS}"
            )
    return base.renamed({key: key for key in padded})


def _shape_of(vector: DistributionVector, name: str) -> tuple[int, ...]:
    if isinstance(vector, CheckpointVector):
        return vector.shape(name)
    if isinstance(vector, DeltaVector):
        return vector.stored.shape(name)
    assert isinstance(vector, AdapterVector)
    return vector.parts[name].shape


# -- size and storage ------------------------------------------------------------------------------


def blocks_of(
    vector: DistributionVector, base: Checkpoint, name: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield delta and base of one tensor in float32, row block by row block."""
    for rows in row_blocks(base.shape(name)):
        base_rows = base.read_rows(name, rows).float()
        yield dense_rows(vector, name, rows, base_rows), base_rows


def norms(vector: DistributionVector, base: Checkpoint) -> tuple[float, float]:
    """Return the Frobenius norm of the delta, and that norm over the norm of the base tensors it
    moves (an adapter moves few of them).

    Raises ModelError, naming the tensor, when the delta is not finite.
    """
    squares = base_squares = 0.0
    for name in sorted(vector.names):
        here = 0.0
        for delta, base_rows in blocks_of(vector, base, name):
            here += _squares(delta)
            base_squares += _squares(base_rows)
        if not math.isfinite(base_squares):
            raise ModelError(f"base model: tensor {name!r} holds NaN or infinite values.")
        if not math.isfinite(here):
            raise not_finite(vector, name)
        squares += here
    relative = math.sqrt(squares / max(base_squares, 1e-30))
    if relative > 1:
        logger.warning(
            "vector %s: its delta is larger than the base tensors it moves (%.0f %%). Is that its "
            "base, and was the learning rate not too high?",
            vector.name,
            100 * relative,
        )
    return math.sqrt(squares), relative


def _squares(tensor: torch.Tensor) -> float:
    return tensor.double().square().sum().item()


def not_finite(vector: DistributionVector, name: str) -> ModelError:
    """Return the error of a vector with NaN or infinite values in a tensor."""
    return ModelError(
        f"vector {vector.name!r}: its delta holds NaN or infinite values (tensor {name!r}). "
        "Retrain it, or drop it."
    )


def describe(
    path: Path, base: ResolvedModel, *, name: str, kind: Literal["adapter", "checkpoint"]
) -> VectorFile:
    """Write vector.json beside a trained adapter or checkpoint, with what training.json says, and
    return it.
    """
    training_file = path / "training.json"
    training = (
        json.loads(training_file.read_text(encoding="utf-8")) if training_file.exists() else {}
    )
    (path / "vector.json").unlink(missing_ok=True)
    vector = open_vector(name, str(path.resolve()), base)
    norm, relative_norm = norms(vector, Checkpoint(base.path))
    record = VectorFile(
        name=name,
        kind=kind,
        base=_base_record(base),
        norm=norm,
        relative_norm=relative_norm,
        corpus=training.get("corpus"),
        training=training.get("training"),
        versions=training.get("versions", {}),
    )
    record.write(path / "vector.json")
    return record


def _base_record(base: ResolvedModel) -> BaseRecord:
    return BaseRecord(reference=base.reference, commit=base.commit, files=weight_files(base.path))


def extract(
    vector: DistributionVector,
    base: ResolvedModel,
    out: Path,
    *,
    dtype: str = "bfloat16",
    block_size: int = BLOCK_SIZE,
    max_shard_size: int = 5 * 10**9,
    source: Path | None = None,
    replace: bool = False,
) -> VectorFile:
    """Write a vector as a delta directory and return its record, with the relative error of what
    was stored.

    In a floating-point dtype it has a tensor for every one of the base (zeros where nothing moved),
    so that mergekit reads it as a model; in `int8`, with a scale for every `block_size` numbers, it
    has the moved ones only. A delta keeps its own exponent, so bfloat16 moves each number by at
    most 2^-8 of it. `source` holds the weights that the record names (None: those of the vector);
    with `replace` it takes the place of what is in `out`. Memory: a few row blocks.
    """
    checkpoint = Checkpoint(base.path)
    norm, relative_norm = norms(vector, checkpoint)
    with staged_directory(out, replace=replace) as staging:
        if dtype == QUANTISED:
            _write_quantised(vector, checkpoint, staging, block_size, max_shard_size)
            stored = DeltaVector(vector.name, Checkpoint(staging, "vector"), block_size)
        else:
            _write_dense(vector, checkpoint, staging, DTYPES[dtype], max_shard_size)
            stored = DeltaVector(vector.name, Checkpoint(staging))
            copy_beside_weights(base.path, staging)
        total, errors = relative_errors(vector, stored, checkpoint)
        record = VectorFile(
            name=vector.name,
            kind="delta",
            base=_base_record(base),
            source_files=weight_files(vector.path if source is None else source),
            dtype=dtype,
            block_size=block_size if dtype == QUANTISED else None,
            norm=norm,
            relative_norm=relative_norm,
            relative_error=total,
            relative_errors=errors,
            versions={package: version(package) for package in ("torch", "safetensors")},
        )
        record.write(staging / "vector.json")
    return record


def extract_any_adapter(
    name: str, adapter: ResolvedModel, base: ResolvedModel, out: Path, **options: Any
) -> VectorFile:
    """Write an adapter of any type that PEFT can merge (DoRA, IA3, ...) as a delta directory.

    Holds the whole model in memory, in float32. `options` are those of `extract`.
    """
    recorded = _record_of_this_base(name, str(adapter.path), adapter.path, base)
    with merged_by_peft(adapter.path, base.path) as merged:
        if recorded is None:
            _warn_of_another_base(name, adapter.path, base)
        vector = open_vector(name, str(merged), base)
        return extract(vector, base, out, source=adapter.path, **options)


def _write_dense(
    vector: DistributionVector,
    base: Checkpoint,
    out: Path,
    dtype: torch.dtype,
    max_shard_size: int,
) -> None:
    moved, ties = vector.names, ties_of(base)

    def rows_of(key: str, rows: slice) -> torch.Tensor:
        name = ties.kept(key)  # of a copy the same delta: mergekit keeps it equal then
        base_rows = base.read_rows(name, rows)
        if name not in moved:
            return torch.zeros(base_rows.shape, dtype=dtype)
        return dense_rows(vector, name, rows, base_rows).to(dtype)

    specs = {name: (dtype, base.shape(name)) for name in base.names}
    write_sharded(out, "model", specs, rows_of, max_shard_size)


def _write_quantised(
    vector: DistributionVector, base: Checkpoint, out: Path, block_size: int, max_shard_size: int
) -> None:
    """Write int8 numbers and scales; tensors of one dimension (norms, biases) stay in float32."""
    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name in sorted(vector.names):
        shape = base.shape(name)
        if len(shape) < 2:
            specs[name] = (torch.float32, shape)
            continue
        specs[name] = (torch.int8, shape)
        scales_shape = (*shape[:-1], n_blocks(shape[-1], block_size))
        specs[f"{name}{SCALES}"] = (torch.bfloat16, scales_shape)

    def delta_rows(name: str, rows: slice) -> torch.Tensor:
        return dense_rows(vector, name, rows, base.read_rows(name, rows))

    def rows_of(key: str, rows: slice) -> torch.Tensor:
        if not key.endswith(SCALES):
            delta = delta_rows(key, rows)
            return delta if delta.dim() < 2 else quantize(delta, block_size)[0]
        name = key.removesuffix(SCALES)
        _, columns = matrix_shape(base.shape(name))
        parts = [  # a block of scales stands for many blocks of the delta
            slice(rows.start + part.start, rows.start + part.stop)
            for part in row_blocks((rows.stop - rows.start, columns))
        ]
        return torch.cat([quantize(delta_rows(name, part), block_size)[1] for part in parts])

    write_sharded(out, "vector", specs, rows_of, max_shard_size)


def relative_errors(
    vector: DistributionVector, stored: DistributionVector, base: Checkpoint
) -> tuple[float, dict[str, float]]:
    """Return |stored - vector| / |vector| in total and by tensor (0 where nothing moved)."""
    squares = error_squares = 0.0
    by_tensor = {}
    for name in sorted(vector.names):
        here = error_here = 0.0
        for rows in row_blocks(base.shape(name)):
            base_rows = base.read_rows(name, rows).float()
            exact = dense_rows(vector, name, rows, base_rows)
            here += _squares(exact)
            error_here += _squares(dense_rows(stored, name, rows, base_rows) - exact)
        by_tensor[name] = math.sqrt(error_here / here) if here else 0.0
        squares += here
        error_squares += error_here
    return math.sqrt(error_squares / squares) if squares else 0.0, by_tensor
