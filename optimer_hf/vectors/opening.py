"""Open a directory as a distribution vector, and check that it fits its base."""

import functools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch

from optimer_hf.errors import ModelError, OptimerError, VocabularyError
from optimer_hf.files.reference import expand_home
from optimer_hf.models.aligned import AlignedTensors
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.layout import (
    ResolvedModel,
    has_tokenizer,
    weight_digests,
    weight_states,
    weights_fingerprint,
)
from optimer_hf.models.live import load_tokenizer
from optimer_hf.models.loader import read_settings
from optimer_hf.models.names import Match, match, names_in, summarize_names, vocabulary_names
from optimer_hf.models.resolve import resolve_model
from optimer_hf.models.settings import compare_settings, describe_settings
from optimer_hf.models.ties import ties_of
from optimer_hf.models.union import UnionRecord
from optimer_hf.models.vocabulary import find_moved_tokens
from optimer_hf.printable import warn_once
from optimer_hf.vectors.alignment import align_vector, own_vocabulary
from optimer_hf.vectors.forms import OnCopy
from optimer_hf.vectors.int8 import SCALES, n_blocks
from optimer_hf.vectors.lora import changed_copy_error, empty_tensor_error, read_adapter
from optimer_hf.vectors.record import QUANTISED, VectorFile, read_record
from optimer_hf.vectors.shapes import quantization_in
from optimer_hf.vectors.vector import (
    AdapterVector,
    CheckpointVector,
    DeltaVector,
    DistributionVector,
    Tensors,
)

logger = logging.getLogger(__name__)


STORE_ALIKE = (
    "Load base and fine-tune with transformers and save both with `save_pretrained(DIRECTORY, "
    "save_original_format=False)`, which stores them alike."
)
PLAIN = frozenset({torch.bfloat16, torch.float16, torch.float32})
OTHER_TOKENS = (
    "The vocabularies differ: the fine-tune added, removed or moved tokens. In a study or recipe, "
    "`vocabulary: union` matches rows by token; in a mergekit config, `tokenizer:` does."
)

States = tuple[tuple[str, tuple[int, int]], ...]  # `weight_states`, hashable


# -- opening ---------------------------------------------------------------------------------------


def open_vector(name: str, source: str, base: ResolvedModel) -> DistributionVector:
    """Open the vector in `source` (directory or Hub id); its files show which kind it is.

    If the base was given tokens that it lacks (`vocabulary: union`), rows of embedding and head are
    matched by token. Raises ModelError if the vector's record names a base with other weights, or
    if its tensors do not fit the base. An adapter that fits but names another base only causes a
    warning.
    """
    resolved = _resolve(name, source)
    if resolved.path.is_dir() and not any(resolved.path.iterdir()):
        raise ModelError(
            f"vector {name!r}: {resolved.path}: is an empty directory. Expected a fine-tune, an "
            "adapter or a delta."
        )
    with _naming_quantised(name, resolved.path, base):
        return _open_resolved(name, source, resolved, base)


def _open_resolved(
    name: str, source: str, resolved: ResolvedModel, base: ResolvedModel
) -> DistributionVector:
    checkpoint = Checkpoint(base.path)
    _refuse_leftover_quantization(base, checkpoint)
    record = read_record_for_base(name, source, resolved.path, base)
    vector = _read_vector(name, resolved.path, record, checkpoint)
    union = _union_of(base, record)
    if union is not None:
        ids = own_vocabulary(vector, base.path, union)
        vector = align_vector(vector, ids, checkpoint, union.added)
    elif isinstance(vector, CheckpointVector):
        vector = replace(vector, padding=_padding(name, vector.tuned, checkpoint))
        vector = _without_spare_rows(vector, checkpoint)
    check_shapes(vector, checkpoint)
    if union is None:
        _refuse_other_rows(vector)
    if vector.kind == "checkpoint":
        _check_settings(name, resolved.path, base.path)
        _warn_of_leftover_quantization(name, resolved.path, base.path)
    if vector.kind != "delta" and union is None:  # a delta has the tokenizer of its base
        _check_tokens(name, resolved.path, base.path)
    if vector.kind == "adapter" and record is None:
        warn_of_another_base(name, resolved.path, base)
    return vector


@contextmanager
def _naming_quantised(name: str, path: Path, base: ResolvedModel) -> Iterator[None]:
    """Say of a vector that does not fit that it or its base is quantised, which may be why."""
    try:
        yield
    except ModelError as error:
        pair = {f"base_model {base.reference}": base.path, f"vector {name!r}": path}
        found = {what: method for what, each in pair.items() if (method := _quantised_as(each))}
        if not found:
            raise
        what, method = next(iter(found.items()))
        raise type(error)(
            f"{error} Besides, {what} is quantised ({method}), so its weights are codes, of "
            "which no sum can be made. Give the model in 16 bits that it was made from."
        ) from error


def open_unaligned(name: str, source: str, base: ResolvedModel) -> DistributionVector:
    """Open a vector whose embedding and head may have rows for other tokens than its base has, in
    its own order. Raises ModelError if its other tensors do not fit the base.
    """
    resolved, checkpoint = _resolve(name, source), Checkpoint(base.path)
    _refuse_leftover_quantization(base, checkpoint)
    record = read_record_for_base(name, source, resolved.path, base)
    vector = _read_vector(name, resolved.path, record, checkpoint)
    check_shapes(vector, checkpoint, apart_from=vocabulary_names(checkpoint))
    if vector.kind == "checkpoint":
        _check_settings(name, resolved.path, base.path)
    return vector


def _refuse_other_rows(vector: DistributionVector) -> None:
    """Refuse a vector that has its rows in another order than its base, or on top of others."""
    where = f"vector {vector.name!r} ({vector.path})"
    if isinstance(vector, DeltaVector) and vector.added_tokens is not None:
        raise VocabularyError(f"{where}: is a delta with tokens of its own. {OTHER_TOKENS}")
    if isinstance(vector, AdapterVector):
        for name, part in vector.parts.items():
            if isinstance(part, OnCopy):
                raise changed_copy_error(where, name)


def _resolve(name: str, source: str) -> ResolvedModel:
    try:
        return resolve_model(source)
    except ModelError as error:
        raise ModelError(f"vector {name!r}: {error}") from error


def _read_vector(
    name: str, path: Path, record: VectorFile | None, base: Checkpoint
) -> DistributionVector:
    """Return the vector in a directory as it is stored."""
    if (path / "adapter_config.json").exists():
        parts = read_adapter(path, base, name)
        stored = names_in(base, parts)  # a tensor that the base has twice has two names
        return AdapterVector(
            name, path, {known: parts[key] for key in parts for known in stored.get(key, [key])}
        )
    if record is not None and record.kind == "delta":
        tokens = record.added_tokens
        return replace(
            _open_delta(name, path, record), unread=ties_of(base).copies, added_tokens=tokens
        )
    tuned = _rename_to_base(name, _without_front(name, Checkpoint(path), base), base)
    _check_dtypes(name, tuned, base)
    return CheckpointVector(name, tuned, _floating_names(tuned, base))


def _union_of(base: ResolvedModel, record: VectorFile | None) -> UnionRecord | None:
    """Return the record of a base with added tokens; None for a vector that was made from that very
    base, whose rows are in their places.
    """
    union = UnionRecord.of(base.path)
    if union is None or record is None or record.base.files == union.base:
        return union
    return None


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
        shape = stored.shape(scales) if scales in stored.names else None
        if shape is None or shape != expected:
            raise ModelError(
                f"vector {name!r} ({path}): tensor {tensor!r} has scales of shape {shape}; with "
                f"block_size {record.block_size} of vector.json it would be {expected}. Fetch it "
                "again."
            )
    return DeltaVector(name, stored, block_size)


def read_record_for_base(
    name: str, source: str, path: Path, base: ResolvedModel
) -> VectorFile | None:
    """Return the vector.json in a directory; refuse a vector that was trained from another base."""
    record, union = read_record(path), UnionRecord.of(base.path)
    if record is None or (union is not None and record.base.files == union.base):
        return record
    if record.base.files != weight_digests(base.path):
        raise ModelError(
            f"vector {name!r} ({source}) was trained from {record.base.reference}, whose weights "
            f"differ from those of base_model {base.reference}. Retrain it from this base, or drop "
            "it."
        )
    return record


def warn_of_another_base(name: str, path: Path, base: ResolvedModel) -> None:
    """Warn if an adapter names another model as its base: another Hub id, or a local model that is
    there and has other weights.

    A name proves nothing: QLoRA names the quantised copy, others name a mirror.
    """
    config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    declared = str(config.get("base_model_name_or_path") or "")
    is_hub_id = declared.count("/") == 1 and not declared.startswith((".", "/", "~"))
    if is_hub_id and base.commit is not None:
        is_another = declared != base.reference
    else:
        is_another = bool(declared) and _is_another_model(expand_home(Path(declared)), base)
    if is_another:
        warn_once(
            logger,
            f"vector {name!r} ({path}): its adapter_config.json names {declared} as its base, and "
            f"base_model is {base.reference}. Its shapes fit. That is fine if one is a mirror or "
            "a quantised copy (QLoRA) of the other; otherwise train the adapter again.",
        )


def _is_another_model(path: Path, base: ResolvedModel) -> bool:
    """Whether there is a model at `path` whose weights are not those of the base, as far as a part
    of each file tells; unknown of one that is in files of other names, or cannot be read.
    """
    try:
        if not (path / "config.json").is_file() or path.resolve() == base.path.resolve():
            return False
        union, states = UnionRecord.of(base.path), weight_states(base.path)
        if (states if union is None else union.base).keys() != weight_states(path).keys():
            return False
        if union is not None:
            return weights_fingerprint(path) != union.fingerprint
        return weights_fingerprint(path) != _fingerprint_of_base(base.path, (*states.items(),))
    except (OSError, ValueError, OptimerError):  # ValueError: the path contains a null byte
        return False


@functools.lru_cache(maxsize=8)
def _fingerprint_of_base(path: Path, states: States) -> str:
    """Return a base's fingerprint; `states` is part of the cache key, to notice other weights."""
    return weights_fingerprint(path)


def _without_front(name: str, tuned: Checkpoint, base: Checkpoint) -> Checkpoint:
    """Return a tuned checkpoint without the prefix that a program put before every name of the
    base, such as `policy.`, and warn about it.
    """
    shortest = min(base.names, key=len)
    fronts = {each.removesuffix(shortest) for each in tuned.names if each.endswith(f".{shortest}")}
    for front in fronts:
        plain = {each.removeprefix(front): each for each in tuned.names if each.startswith(front)}
        if len(plain) == len(tuned.names) and plain.keys() == {*base.names}:
            warn_once(
                logger,
                f"vector {name!r} ({tuned.path}): ignoring the prefix {front!r} of all its tensor "
                "names, without which they are those of the base",
            )
            return tuned.rename(plain)
    return tuned


def _rename_to_base(name: str, tuned: Checkpoint, base: Checkpoint) -> Checkpoint:
    """Rename a tuned checkpoint's tensors to the names in the base, and drop what is not in it.

    Raises ModelError if it lacks part of the base or has additional parts. Tied tensors are
    represented by the one that is stored.
    """
    of_base = ties_of(base)
    try:
        of_tuned, matched = ties_of(tuned), match(tuned, base)
    except ModelError as error:
        raise ModelError(f"vector {name!r}: {error}") from error
    copies = {other for key, other in matched.tuned_names.items() if key in of_base.copies}
    stored = {key: matched.tuned_names[key] for key in matched.tuned_names.keys() - of_base.copies}
    lacking = set(matched.missing) - of_base.copies
    kept = {key: of_tuned.stored.get(of_base.class_names.get(key, key)) for key in lacking}
    tied = {key: other for key, other in kept.items() if other in tuned.names}
    missing = sorted(lacking - tied.keys())
    rest = {*matched.unknown, *copies} - {*stored.values(), *tied.values()} - of_tuned.copies
    groups = {key: of_base.group_of(of_tuned.class_names.get(key, key)) for key in sorted(rest)}
    separate = {key: of_base.source_of(group[0]) for key, group in groups.items() if group}
    extra = sorted(key for key in rest if separate.get(key) not in stored)
    if missing or extra:
        _refuse_other_form(
            name,
            tuned.path,
            {of_base.class_names.get(key, key): key for key in missing},
            {of_tuned.class_names.get(key, key): key for key in extra},
        )
        raise _other_model_error(name, tuned.path, missing, extra, matched.reason)
    for key, one in separate.items():
        if not tuned.are_equal(key, stored[one]):
            raise _separate_copy_error(name, tuned.path, key, base.path, one)
    for key, other in tied.items():
        if of_tuned.is_assumed:
            raise _assumed_tie_error(name, tuned.path, key, other)
    _warn_of_differences(name, tuned, matched)
    return tuned.rename(stored | tied)


def _other_model_error(
    name: str, path: Path, missing: Sequence[str], extra: Sequence[str], reason: str
) -> ModelError:
    return ModelError(
        f"vector {name!r} ({path}): is not a fine-tune of the base: {len(missing)} tensors are "
        f"missing (first: {missing[:1]}), {len(extra)} are unknown (first: {extra[:1]}). Use a "
        "model of the same architecture."
        + (f" Names were compared as they are: {reason}" if reason else "")
    )


def _separate_copy_error(name: str, tuned: Path, key: str, base: Path, tied_to: str) -> ModelError:
    return ModelError(
        f"vector {name!r} ({tuned}): has a separate tensor {key!r}, which the base {base} ties to "
        f"{tied_to!r}. A merge has the form of the base and would drop it. Untie the base first "
        "(save it with the head as a tensor and tie_word_embeddings: false), or use a fine-tune "
        "with a tied head."
    )


def _assumed_tie_error(name: str, tuned: Path, key: str, other: str) -> ModelError:
    return ModelError(
        f"vector {name!r} ({tuned}): lacks tensor {key!r}, and neither its config nor its model "
        f"class says that it is {other!r}. Write tie_word_embeddings into its config.json."
    )


def _refuse_other_form(
    name: str, path: Path, missing: Mapping[str, str], extra: Mapping[str, str]
) -> None:
    """Raise ModelError if base and tuned model store a parameter in different forms.

    For example, one may stack the experts that the other stores one by one. Both mappings go from
    parameter to tensor name.
    """
    for parameter in sorted(missing.keys() & extra.keys()):
        raise ModelError(
            f"vector {name!r} ({path}): tensor {extra[parameter]!r} stores in another form what "
            f"the base has as {missing[parameter]!r}. {STORE_ALIKE}"
        )


def _warn_of_differences(name: str, tuned: Checkpoint, matched: Match) -> None:
    if matched.unmoved:
        warn_once(
            logger,
            f"vector {name!r} ({tuned.path}): does without {len(matched.unmoved)} tensors of the "
            f"base ({summarize_names(matched.unmoved)}), which a merge leaves as they are",
        )
    if matched.left_out:
        warn_once(
            logger,
            f"vector {name!r} ({tuned.path}): leaves out {len(matched.left_out)} tensors that the "
            "base does not have and its class does not load "
            f"({summarize_names(matched.left_out)})",
        )


def _check_dtypes(name: str, tuned: Checkpoint, base: Checkpoint) -> None:
    """Refuse quantised tensors, and integer tensors that differ from the base."""
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


def _floating_names(tuned: Checkpoint, base: Checkpoint) -> frozenset[str]:
    return frozenset(name for name in tuned.names if base.dtype(name).is_floating_point)


def check_shapes(
    vector: DistributionVector, base: Checkpoint, *, apart_from: frozenset[str] = frozenset()
) -> None:
    """Raise ModelError if a tensor of a vector is not in the base, or has another shape there."""
    known = set(base.names)
    for name in sorted(vector.names - apart_from):
        if name not in known:
            raise ModelError(
                f"vector {vector.name!r}: tensor {name!r} is not in the base {base.path}. Give a "
                "vector trained from this base; for an adapter whose module names differ, see "
                "`optimer extract --from-adapter`."
            )
        shape = _shape_of(vector, name)
        if shape == base.shape(name):
            continue
        if 0 in shape:
            raise empty_tensor_error(f"vector {vector.name!r} ({vector.path})", name)
        if 0 in base.shape(name):
            raise empty_tensor_error(f"base_model {base.path}", name)
        differs = (
            f"vector {vector.name!r}: tensor {name!r} has shape {list(shape)}, the base has "
            f"{list(base.shape(name))}."
        )
        if shape[1:] == base.shape(name)[1:] and name in vocabulary_names(base):
            raise VocabularyError(f"{differs} {OTHER_TOKENS}")
        if sorted(shape) == sorted(base.shape(name)):
            raise ModelError(f"{differs} One is stored the other way round. {STORE_ALIKE}")
        raise ModelError(f"{differs} Give a vector trained from this base.")


def _check_settings(name: str, tuned: Path, base: Path) -> None:
    """Refuse a fine-tune whose config makes the same tensors compute something else."""
    differing = compare_settings(tuned, base)
    if not differing:
        return
    raise ModelError(
        f"vector {name!r} ({tuned}): its config.json changes how the model computes "
        f"({describe_settings(differing)}). A merge uses the config of the base, so at weight 1 it "
        "would not be this model. Use a fine-tune that keeps these settings. If its tensors also "
        "work with the settings of the base, write those into a copy of its config.json."
    )


def _refuse_leftover_quantization(base: ResolvedModel, checkpoint: Checkpoint) -> None:
    """Refuse a base of plain floats whose config tells transformers to load it quantised: every
    merge would inherit that config.
    """
    method = _quantization_of(base.path)
    if method and _is_plain(checkpoint):
        raise ModelError(
            f"base_model {base.reference}: its config.json has a quantization_config ({method}), "
            "but its tensors are plain floats. transformers would quantise every merge when it "
            "loads it, or fail. Give a copy of the base whose config.json does not have it."
        )


def _warn_of_leftover_quantization(name: str, tuned: Path, base: Path) -> None:
    """Warn of a fine-tune that asks to be loaded quantised: its floats are merged, unquantised."""
    method = _quantization_of(tuned)
    if method and method != _quantization_of(base):
        warn_once(
            logger,
            f"vector {name!r} ({tuned}): its config.json has a quantization_config ({method}), but "
            "its tensors have the dtypes of the base. They are merged as they are; the merge is "
            "not quantised",
        )


def _quantization_of(path: Path) -> str:
    """Return the method in the quantization_config of a model or of its language part, or an empty
    text.
    """
    file = path / "config.json"
    settings = read_settings(file) if file.exists() else {}
    config = quantization_in(settings)
    if config is None and isinstance(settings.get("quantization"), dict):
        return "MLX"
    return str(config.get("quant_method") if isinstance(config, dict) else config or "")[:80]


def _quantised_as(path: Path) -> str:
    """Return the method by which a model is quantised; empty if its tensors are plain floats or it
    cannot be read.
    """
    try:
        method = _quantization_of(path)
    except OptimerError:
        return ""
    with suppress(OptimerError):  # of eight bits, which have no dtype here
        if _is_plain(Checkpoint(path)):
            return ""
    return method


def _is_plain(checkpoint: Checkpoint) -> bool:
    """Whether all tensors are plain floats."""
    return all(checkpoint.dtype(name) in PLAIN for name in checkpoint.names)


def _check_tokens(name: str, tuned: Path, base: Path) -> None:
    """Refuse a vector that was trained with different ids for the base's tokens."""
    moved = find_moved_tokens(tuned, base)
    if moved:
        token, number, expected = moved[0]
        raise VocabularyError(
            f"vector {name!r} ({tuned}): its tokenizer gives the token {token!r} the id {number}, "
            f"that of the base {expected} ({len(moved):,} tokens in all): it was trained with "
            f"other rows for them. {OTHER_TOKENS}"
        )


def _padding(name: str, tuned: Tensors, base: Checkpoint) -> Checkpoint | None:
    """Return the vocabulary tensors that have more rows in the base than in a tuned model, or None.

    Raises VocabularyError if those rows belong to tokens.
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
        tokens = load_tokenizer(ResolvedModel(base.path, base.path.name)).get_vocab()
    except ModelError as error:
        raise VocabularyError(
            f"{differs}, and whether those are tokens cannot be told: {error}"
        ) from error
    at_end = sorted(tokens, key=tokens.__getitem__)
    if lost := [t for t in at_end if n_rows <= tokens[t] < base.shape(padded[0])[0]]:
        raise VocabularyError(f"{differs}, of which {lost[0]!r} is a token. {OTHER_TOKENS}")
    if has_tokenizer(tuned.path):
        own = load_tokenizer(ResolvedModel(tuned.path, tuned.path.name)).get_vocab()
        if other := [token for token in at_end if own.get(token) != tokens[token]]:
            raise VocabularyError(
                f"{differs}, and its token {other[0]!r} has the id {own.get(other[0])}, that of "
                f"the base {tokens[other[0]]}. {OTHER_TOKENS}"
            )
    return base.rename({key: key for key in padded})


def _without_spare_rows(vector: CheckpointVector, base: Checkpoint) -> CheckpointVector:
    """Return a fine-tune without the rows of its embedding and head that the base lacks, if none of
    them belongs to a token: programs round the size of a vocabulary up.
    """
    tuned = vector.tuned
    longer = [
        key
        for key in tuned.names
        if tuned.shape(key)[1:] == base.shape(key)[1:]
        and tuned.shape(key)[:1] > base.shape(key)[:1]
    ]
    names = vocabulary_names(base).intersection(longer) if longer else frozenset[str]()
    if not names or not has_tokenizer(vector.path) or isinstance(tuned, AlignedTensors):
        return vector
    n_rows = base.shape(min(names))[0]
    tokens = load_tokenizer(ResolvedModel(vector.path, vector.path.name)).get_vocab()
    if max(tokens.values(), default=0) >= n_rows:
        return vector  # `check_shapes` refuses it
    warn_once(
        logger,
        f"vector {vector.name!r} ({vector.path}): leaves out {tuned.shape(min(names))[0] - n_rows} "
        f"rows of {', '.join(sorted(names))} that the base does not have, since none belongs to a "
        "token",
    )
    return replace(vector, tuned=AlignedTensors(tuned, names, torch.arange(n_rows)))


def _shape_of(vector: DistributionVector, name: str) -> tuple[int, ...]:
    if isinstance(vector, CheckpointVector):
        return vector.shape(name)
    if isinstance(vector, DeltaVector):
        return vector.stored.shape(name)
    assert isinstance(vector, AdapterVector)
    return vector.parts[name].shape
