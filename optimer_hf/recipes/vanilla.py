"""Write a config with which unmodified mergekit makes the merge of a study, and its deltas."""

from pathlib import Path

from optimer_hf.files.staging import finish_move
from optimer_hf.merging.mergekit_names import list_unreadable
from optimer_hf.merging.mergekit_pool import (
    BASE_FIELD,
    settings_of,
    used_names,
    vanilla_config,
)
from optimer_hf.merging.tokenizer import completed_ends
from optimer_hf.merging.union import open_base
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.layout import ResolvedModel, weight_digests
from optimer_hf.models.resolve import resolve_model
from optimer_hf.models.union import UnionRecord
from optimer_hf.recipes.plain_config import write_for_mergekit
from optimer_hf.recipes.record import tokenizer_note
from optimer_hf.study.directory import Study
from optimer_hf.study.trials import Trial
from optimer_hf.vectors.delta import extract, measure_norms
from optimer_hf.vectors.layers import layers_for
from optimer_hf.vectors.opening import open_vector
from optimer_hf.vectors.record import read_record
from optimer_hf.vectors.vector import DeltaVector, DistributionVector

# relative norm of a delta; rounded by at most 2^-8, it moves 6 % of a bfloat16 output by one ulp
LARGEST_BFLOAT16_DELTA = 0.05


def write_vanilla(
    study: Study, path: Path, *, pick: Trial | None = None, deltas: Path | None = None
) -> bool:
    """Write a config at `path` with which unmodified `mergekit-yaml` makes the merge of the best
    trial, or of the trial `pick`. Return whether there is one.

    Checkpoints and adapters are named as they are. Other pools (deltas beside other vectors, int8
    deltas, vectors with other tokens than the base or with other names of tensors) only have a
    config with a folder for `deltas`: then every vector is written there as a delta directory, as
    large as the base, and `linear` adds them to the base or to the copy of it in the cache that has
    all tokens. If the merge has another tokenizer than the base, a comment says which of its files
    to copy. There is none if mergekit does not find the tensors of the base.
    """
    config, weights = study.config, (pick or study.best_trial).weights
    original = resolve_model(config.base_model)
    base, tokenizer = open_base(
        original, config.sources, config.tokenizer_reference, config.vocabulary
    )
    used = used_names(config, weights)
    vectors = [open_vector(name, str(config.vectors[name].source), base) for name in used]
    n_layers = layers_for(config.groups, base)
    settings = settings_of(used, weights, config.groups, n_layers)
    merge_config = None
    unread = list_unreadable(base.path, {v.name: v.path for v in vectors if v.kind == "checkpoint"})
    if BASE_FIELD in unread:
        path.unlink(missing_ok=True)
        return False
    is_grown = base.path != original.path  # mergekit would cut rows without a token from the base
    if not is_grown and not unread and not any(map(_is_quantised, vectors)):
        sources = {vector.name: str(vector.path) for vector in vectors}
        kinds = {vector.name: vector.kind for vector in vectors}
        merge_config = vanilla_config(str(base.path), sources, settings, config.dtype, kinds)
    if merge_config is None and deltas is None:
        path.unlink(missing_ok=True)  # that of an earlier pool
        return False
    if merge_config is None and deltas is not None:
        written = {vector.name: str(write_delta(vector, base, deltas)) for vector in vectors}
        kinds = dict.fromkeys(written, "delta")
        merge_config = vanilla_config(str(base.path), written, settings, config.dtype, kinds)
    assert merge_config is not None  # a pool of deltas alone has one
    note = "" if tokenizer is None else _note_of(base, tokenizer)
    write_for_mergekit(merge_config, path, note)
    return True


def _note_of(base: ResolvedModel, tokenizer: ResolvedModel) -> str:
    """Return the comment of a config whose merge has the tokenizer of another model."""
    return tokenizer_note(str(tokenizer.path), completed_ends(base.path, tokenizer.path))


def _is_quantised(vector: DistributionVector) -> bool:
    """Whether mergekit cannot read a vector, which has scales."""
    return isinstance(vector, DeltaVector) and vector.block_size is not None


def write_delta(vector: DistributionVector, base: ResolvedModel, folder: Path) -> Path:
    """Write a vector as a complete delta directory in a folder, once for the same weights, and
    return it.

    It is in bfloat16 if that changes nothing visible, otherwise in float32.
    """
    out = folder / vector.name
    is_own = out.resolve() == vector.path.resolve()
    if is_own and UnionRecord.of(base.path) is None:
        return out
    if is_own:  # its rows are in the order of its own tokens
        out = out.with_name(f"{vector.name}-by-token")
    finish_move(out)
    record = read_record(out)
    current = weight_digests(vector.path), weight_digests(base.path)
    if record is None or (record.source_files, record.base.files) != current:
        _, relative_norm = measure_norms(vector, Checkpoint(base.path))
        extract(
            vector,
            base,
            out,
            dtype="bfloat16" if relative_norm < LARGEST_BFLOAT16_DELTA else "float32",
            replace=record is not None and record.kind == "delta",  # a delta of an earlier training
        )
    return out
