"""Write a config with which unmodified mergekit makes the merge of a study, and its deltas."""

from pathlib import Path

from optimer_hf.files.reading import yaml_text
from optimer_hf.files.staging import finish_move, write_text
from optimer_hf.merging.mergekit_pool import vanilla_config
from optimer_hf.merging.union import open_base
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.layout import ResolvedModel, weight_digests
from optimer_hf.models.resolve import resolve_model
from optimer_hf.recipes.record import tokenizer_note
from optimer_hf.study.directory import Study
from optimer_hf.study.trials import Trial
from optimer_hf.vectors.delta import extract, measure_norms
from optimer_hf.vectors.opening import open_vector
from optimer_hf.vectors.record import read_record
from optimer_hf.vectors.vector import DistributionVector

# relative norm of a delta; rounded by at most 2^-8, it moves 6 % of a bfloat16 output by one ulp
LARGEST_BFLOAT16_DELTA = 0.05


def write_vanilla(study: Study, path: Path, *, pick: Trial | None = None) -> None:
    """Write a config at `path` with which unmodified `mergekit-yaml` makes the merge of the best
    trial, or of the trial `pick`.

    A pool of checkpoints is merged with `linear`, in which the base has the weight 1 - sum w. If
    there are adapters or deltas, or if that sum would cancel digits, every vector is written as a
    delta directory under `deltas/` beside the config, and `linear` adds them to the base. So are
    vectors with other tokens than the base, to the copy of it in the cache that has them all. If
    the merge has another tokenizer than the base, a comment says which of its files to copy.
    """
    config, weights = study.config, (pick or study.best_trial).weights
    original = resolve_model(config.base_model)
    base, tokenizer = open_base(
        original, config.sources, config.tokenizer_reference, config.vocabulary
    )
    vectors = [
        open_vector(name, str(vector.source), base) for name, vector in config.vectors.items()
    ]
    merge_config = None
    is_grown = base.path != original.path  # mergekit would cut rows without a token from the base
    if not is_grown and all(vector.kind == "checkpoint" for vector in vectors):
        sources = {vector.name: str(vector.path) for vector in vectors}
        merge_config = vanilla_config(
            str(base.path), sources, weights, config.dtype, are_deltas=False
        )
    if merge_config is None:
        deltas = {
            vector.name: str(write_delta(vector, base, path.resolve().parent)) for vector in vectors
        }
        merge_config = vanilla_config(
            str(base.path), deltas, weights, config.dtype, are_deltas=True
        )
    assert merge_config is not None  # a sum of deltas cancels no digits
    header = f"# The paths are those of this machine. Run: mergekit-yaml {path.name} OUT\n"
    if tokenizer is not None:
        header += tokenizer_note(str(tokenizer.path))
    write_text(path, header + yaml_text(merge_config))


def write_delta(vector: DistributionVector, base: ResolvedModel, folder: Path) -> Path:
    """Write a vector as a complete delta directory, once for the same weights, and return it.

    It is in bfloat16 if that changes nothing visible, otherwise in float32.
    """
    out = folder / "deltas" / vector.name
    if out.resolve() == vector.path.resolve():
        return out
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
