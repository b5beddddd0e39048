"""Run a mergekit YAML with the streaming writer where it can, and with mergekit otherwise."""

import contextlib
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from optimer_hf.errors import ConfigError, ModelError, VocabularyError
from optimer_hf.files.model import refuse_absent_files
from optimer_hf.files.staging import require_empty
from optimer_hf.merging.check import Promise, check_merged
from optimer_hf.merging.mergekit import run_mergekit, write_card
from optimer_hf.merging.mergekit_checks import refuse_no_tokenizer
from optimer_hf.merging.mergekit_names import list_unreadable
from optimer_hf.merging.mergekit_pool import (
    LinearMerge,
    linear_merge_of,
    with_absolute_references,
)
from optimer_hf.merging.mergekit_yaml import (
    parse_with_mergekit,
    read_merge_config,
)
from optimer_hf.merging.union import open_base
from optimer_hf.merging.writer import write_merged
from optimer_hf.models.layout import (
    MORE_TEMPLATES,
    ResolvedModel,
    tokenizer_digests,
)
from optimer_hf.models.loader import count_layers, read_tokenizer
from optimer_hf.models.resolve import (
    refuse_other_than_models,
    resolve_model,
)
from optimer_hf.models.union import Vocabulary
from optimer_hf.vectors.groups import weights_of_parts
from optimer_hf.vectors.layers import layers_for
from optimer_hf.vectors.opening import open_vector
from optimer_hf.vectors.record import QUANTISED, read_record
from optimer_hf.vectors.splitting import split_pool

logger = logging.getLogger(__name__)


def merge(path: Path, out: Path, *, options: Any = None, engine: str | None = None) -> str:
    """Run any mergekit YAML and return the engine used, 'native' or 'mergekit'.

    `options` are mergekit's MergeOptions (None: its defaults). The streaming writer runs configs
    with one number per vector, unless `engine` or an option asks for mergekit. `out` appears whole,
    with everything that the config promises, or not at all.
    """
    from mergekit.options import MergeOptions

    config, options = read_merge_config(path), options or MergeOptions(quiet=True)
    linear, flags = linear_merge_of(config, path), _mergekit_only_flags(options)
    if engine == "native":
        _refuse_mergekit_only(linear, flags, path)
    refuse_absent_files({path: with_absolute_references(config, path)})
    if linear is not None and engine != "mergekit" and not flags and _fits(linear, path, engine):
        base = resolve_model(linear.base_model)
        refuse_other_than_models(base)
        vocabulary: Vocabulary = "union" if linear.is_union else "base"
        try:
            base, tokenizer = open_base(base, linear.sources, linear.tokenizer_source, vocabulary)
        except ConfigError:
            if engine == "native":
                raise
        else:
            with contextlib.suppress(*_errors_for_mergekit(config, engine)):
                _write(linear, base, tokenizer, config, path, out, options)
                return "native"
    run_mergekit(config, path, out, options)  # which can reorder tokens
    return "mergekit"


def _refuse_mergekit_only(linear: LinearMerge | None, flags: Sequence[str], path: Path) -> None:
    """Raise ConfigError for what only mergekit reads in a config, and for flags of its own."""
    if linear is None:
        raise ConfigError(
            f"{path}: only mergekit can run this config (method, slices, parameters of all). Leave "
            "out --engine native."
        )
    if flags:
        raise ConfigError(
            f"--engine native: only mergekit reads {flags[0]}. Leave out one of them."
        )


def _fits(linear: LinearMerge, path: Path, engine: str | None) -> bool:
    """Whether the writer is the one to run a merge. Raises ConfigError if it is told to and cannot
    tell the weights of the layers.
    """
    if not _skips_values(linear):  # mergekit drops rows without a token, and warns of idle filters
        return engine == "native" or _needs_writer(linear)
    if engine == "native":
        raise ConfigError(
            f"{path}: a gradient has more values than the base has layers, and only mergekit skips "
            "some. Give fewer, or leave out --engine native."
        )
    return False


def _needs_writer(linear: LinearMerge) -> bool:
    """Whether the writer should run a merge that mergekit can run as well: one number per vector,
    or vectors that mergekit cannot read.
    """
    if not linear.is_union and not linear.groups:
        return True
    paths = [resolve_model(source).path for source in linear.sources.values()]
    if any((path / "adapter_config.json").exists() for path in paths):
        return True
    records = [read_record(path) for path in paths]
    if linear.groups and any(each and each.dtype == QUANTISED for each in records):
        return True
    pairs = zip(paths, records, strict=True)
    models = {str(path): path for path, each in pairs if not each or each.kind != "delta"}
    return bool(list_unreadable(resolve_model(linear.base_model).path, models))


def _skips_values(linear: LinearMerge) -> bool:
    """Whether a gradient has more values than the base has layers."""
    most = max((each.n_values for each in linear.groups.values()), default=0)
    return most > 0 and most > count_layers(resolve_model(linear.base_model).path)


def merge_with_flags(
    path: Path, out: Path, flags: Mapping[str, Any], *, engine: str | None = None
) -> str:
    """Run `merge` with the flags of `mergekit-yaml`, fields of its MergeOptions (None: not given).

    `out` has to be new or empty. Log level, threads and seed are set for the whole process.
    """
    from mergekit.options import MergeOptions

    require_empty(out)
    options = MergeOptions(**{name: value for name, value in flags.items() if value is not None})
    options.apply_global_options()
    if options.verbosity:  # mergekit sets it only if logging is not set up yet
        level = logging.INFO if options.verbosity == 1 else logging.DEBUG
        logging.getLogger().setLevel(level)
    return merge(path, out, options=options, engine=engine)


def _write(
    linear: LinearMerge,
    base: ResolvedModel,
    tokenizer: ResolvedModel | None,
    config: Mapping[str, Any],
    path: Path,
    out: Path,
    options: Any,
) -> None:
    """Write a merge with the streaming writer, and check it."""
    donor = (tokenizer or base).path
    if options.copy_tokenizer:
        refuse_no_tokenizer(donor, path)
        read_tokenizer(donor)  # raises if it cannot be loaded

    def complete(staging: Path) -> None:
        if not options.copy_tokenizer:
            for name in tokenizer_digests(staging):
                (staging / name).unlink()
            shutil.rmtree(staging / MORE_TEMPLATES, ignore_errors=True)
        dtype = linear.out_dtype
        check_merged(staging, Promise(base.path, dtype, dtype, options.copy_tokenizer))
        if options.write_model_card:
            write_card(parse_with_mergekit(config, path), path, out.name, staging)

    vectors = [open_vector(name, source, base) for name, source in linear.sources.items()]
    write_merged(
        base,
        split_pool(vectors, linear.groups, base, idle=linear.weights),
        weights_of_parts(linear.weights, linear.groups, layers_for(linear.groups, base)),
        out,
        out_dtype=linear.out_dtype,
        tokenizer=tokenizer,
        max_shard_size=options.out_shard_size,
        device=options.device,
        complete=complete,
    )


def _errors_for_mergekit(config: Mapping[str, Any], engine: str | None) -> list[type[ModelError]]:
    """Return the errors of the writer after which mergekit is tried: it can align tokens if the
    config asks for that.
    """
    is_asked = bool(config.get("tokenizer") or config.get("tokenizer_source"))
    return [VocabularyError] if is_asked and engine != "native" else []


def _mergekit_only_flags(options: Any) -> list[str]:
    """Return the flags that were given and that the streaming writer does not know."""
    from mergekit.options import MergeOptions

    known = {
        "out_shard_size",
        "quiet",
        "verbosity",
        "num_threads",
        "random_seed",
        "write_model_card",
        "copy_tokenizer",
        "lora_merge_cache",  # for adapters that mergekit merges first; the writer needs none
        "low_cpu_memory",
        "cuda",
        "device",
    }
    defaults = MergeOptions()
    return [
        f"--{name.replace('_', '-')}"
        for name in MergeOptions.model_fields
        if name not in known and getattr(options, name) != getattr(defaults, name)
    ]
