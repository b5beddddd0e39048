"""Run a mergekit YAML with the streaming writer where it can, and with mergekit otherwise."""

import contextlib
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from optimer_hf.errors import ConfigError, ModelError, OptimerError, VocabularyError
from optimer_hf.files.digest import digest, sha256_file
from optimer_hf.files.disk import DISK_ERRORS
from optimer_hf.files.model import refuse_absent_files
from optimer_hf.files.reference import is_there
from optimer_hf.files.staging import finish_move, require_empty, staged_directory, write_text
from optimer_hf.files.text import first_line
from optimer_hf.merging.check import Promise, check_merged
from optimer_hf.merging.mergekit_keys import METHOD
from optimer_hf.merging.mergekit_method import register_method
from optimer_hf.merging.mergekit_models import ModelName, models_of, with_models
from optimer_hf.merging.mergekit_pool import (
    LinearMerge,
    linear_merge_of,
    makes_tokenizer,
    name_in_file,
    tokenizer_of,
    with_absolute_references,
)
from optimer_hf.merging.mergekit_yaml import (
    chat_templates,
    parse_with_mergekit,
    read_merge_config,
)
from optimer_hf.merging.tokenizer import open_tokenizer
from optimer_hf.merging.writer import write_merged
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.layout import (
    ANY_WEIGHTS,
    GENERATION_CONFIG,
    ResolvedModel,
    has_tokenizer,
    tokenizer_digests,
    weights_fingerprint,
)
from optimer_hf.models.loader import CONFIG, read_settings, read_tokenizer, refuse_lack_of_memory
from optimer_hf.models.names import match, summarize_names
from optimer_hf.models.resolve import (
    refuse_other_than_models,
    resolve_model,
    resolve_tokenizer,
)
from optimer_hf.models.settings import compare_settings, describe_settings
from optimer_hf.models.ties import ties_of
from optimer_hf.models.vocabulary import find_moved_tokens
from optimer_hf.printable import warn_once
from optimer_hf.vectors.opening import open_vector
from optimer_hf.vectors.peft import check_merge_with_peft
from optimer_hf.vectors.record import QUANTISED, read_record

logger = logging.getLogger(__name__)


RANDOM_METHODS = ("dare", "della")


def merge(path: Path, out: Path, *, options: Any = None, engine: str | None = None) -> str:
    """Run any mergekit YAML and return the engine used, 'native' or 'mergekit'.

    `options` are mergekit's MergeOptions (None: its defaults). The streaming writer runs configs
    with one number per vector, unless `engine` or an option asks for mergekit. `out` appears whole,
    with everything that the config promises, or not at all.
    """
    from mergekit.options import MergeOptions

    config, options = read_merge_config(path), options or MergeOptions(quiet=True)
    linear = linear_merge_of(config, path)
    only_mergekit = _mergekit_only_flags(options)
    if engine == "native" and linear is None:
        raise ConfigError(
            f"{path}: only mergekit can run this config (method, slices, filters or gradients). "
            "Leave out --engine native."
        )
    if engine == "native" and only_mergekit:
        raise ConfigError(
            f"--engine native: only mergekit reads {only_mergekit[0]}. Leave out one of them."
        )
    refuse_absent_files({path: with_absolute_references(config, path)})
    if linear is not None and engine != "mergekit" and not only_mergekit:
        base = resolve_model(linear.base_model)
        refuse_other_than_models(base)
        try:
            tokenizer = open_tokenizer(base, linear.tokenizer_source)
        except ConfigError:
            if engine == "native":
                raise
        else:
            with contextlib.suppress(*_errors_for_mergekit(config, engine)):
                _write(linear, base, tokenizer, config, path, out, options)
                return "native"
    run_mergekit(config, path, out, options)  # which can reorder tokens
    return "mergekit"


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
        _refuse_no_tokenizer(donor, path)
        read_tokenizer(donor)  # raises if it cannot be loaded

    def complete(staging: Path) -> None:
        if not options.copy_tokenizer:
            for name in tokenizer_digests(staging):
                (staging / name).unlink()
        dtype = linear.out_dtype
        check_merged(staging, Promise(base.path, dtype, dtype, options.copy_tokenizer))
        if options.write_model_card:
            _write_card(parse_with_mergekit(config, path), path, out.name, staging)

    write_merged(
        base,
        [open_vector(name, source, base) for name, source in linear.sources.items()],
        linear.weights,
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


def _write_card(parsed: Any, path: Path, name: str, out: Path) -> None:
    """Write mergekit's model card and a copy of the config."""
    from mergekit.card import generate_card

    source = path.read_text(encoding="utf-8")
    write_text(out / "README.md", generate_card(parsed, source, name))
    write_text(out / "mergekit_config.yml", source)


# -- mergekit --------------------------------------------------------------------------------------


def run_mergekit(config: Mapping[str, Any], path: Path, out: Path, options: Any = None) -> None:
    """Run a config with mergekit, including the `optimer` method, and check what it wrote.

    mergekit gets absolute directories: with relative paths it would look for a model card on the
    Hub, and fail offline after writing the weights. `out` appears whole or not at all.
    """
    from mergekit.options import MergeOptions

    options = options or MergeOptions(quiet=True)
    register_method()
    named = parse_with_mergekit(config, path)
    opened = _resolve_models(config, path, options)
    parsed = parse_with_mergekit(
        with_models(config, lambda value: opened[name_in_file(value, path)].long_form), path
    )
    promise = _promise_of(config, parsed, path, options)
    models = _checkpoints_of(parsed)
    _refuse_other_names(models, path)
    _refuse_mixed_heads(models, parsed.merge_method, path)
    if models:
        _refuse_unknown_head(models[0], parsed, options, path)
    _refuse_changed_depth(parsed, promise.config_of, path)
    _warn_of_other_functions(models, promise, makes_tokenizer(config), path)
    with staged_directory(out) as staging, _merge_adapters(parsed, options, path) as options:
        warnings = _run(
            parsed, staging, options.model_copy(update={"write_model_card": False}), path
        )
        try:
            check_merged(staging, promise)
        except ModelError as error:
            reason = f" mergekit warned: {warnings[-1]}" if warnings else ""
            raise ModelError(f"{path}: {error}{reason}") from error
        for message in dict.fromkeys(warnings):
            logger.warning("mergekit: %s", message)
        _warn_of_idle_filters(config, staging, path)
        if models and not config.get("slices") and not config.get("modules"):
            _warn_of_left_out(models[0], Checkpoint(staging), path)
        _copy_generation_config(config, path, staging)
        if options.write_model_card:
            _write_card(named, path, out.name, staging)


def _run(parsed: Any, staging: Path, options: Any, path: Path) -> list[str]:
    """Run mergekit and return its warnings."""
    from mergekit.architecture.auto import infer_architecture_info
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge

    # mergekit never clears these caches, so it would read a replaced model from the old file
    LoaderCache().loaders = {}
    infer_architecture_info.cache_clear()
    try:
        with _name_failures(path), _warnings_of_mergekit() as warnings:
            run_merge(parsed, str(staging), options)
    finally:
        LoaderCache().loaders = {}
    return warnings


@contextlib.contextmanager
def _name_failures(path: Path) -> Iterator[None]:
    """Turn errors of mergekit and the libraries below it into a ModelError with the path."""
    try:
        yield
    except (OptimerError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise
        refuse_lack_of_memory(error, path)
        reason = first_line(error)
        if isinstance(error, KeyError):  # a token id when it aligns tokens, otherwise a name
            what = "token" if isinstance(error.args[0], int) else "entry"
            reason = f"one of the models has no {what} {reason}"
        raise ModelError(f"{path}: mergekit stopped: {reason}") from error


@contextlib.contextmanager
def _warnings_of_mergekit() -> Iterator[list[str]]:
    """Collect the warnings of mergekit's loggers instead of showing them with tracebacks."""
    warnings: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            error = record.exc_info[1] if record.exc_info else None
            reason = f" ({first_line(error)})" if isinstance(error, Exception) else ""
            warnings.append(f"{record.getMessage()}{reason}")

    theirs, collector = logging.getLogger("mergekit"), Collector(logging.WARNING)
    before = theirs.level, theirs.propagate
    theirs.setLevel(min(logging.WARNING, logging.getLogger().level))
    theirs.propagate = logging.getLogger().isEnabledFor(logging.INFO)  # -v shows everything
    theirs.addHandler(collector)
    try:
        yield warnings
    finally:
        theirs.removeHandler(collector)
        theirs.level, theirs.propagate = before
        theirs.setLevel(before[0])  # also clears the cache of levels in logging


def _resolve_models(
    config: Mapping[str, Any], path: Path, options: Any
) -> dict[ModelName, ModelName]:
    """Return the models of a config with their local directories, fetching or converting them.

    Raises ModelError or ConfigError for models that mergekit could not read, or would misread.
    """
    resolved: dict[ModelName, ModelName] = {}
    for at, value in models_of(config):
        name, is_tokenizer = name_in_file(value, path), at[0] in ("tokenizer", "tokenizer_source")
        if is_tokenizer:
            if name not in resolved:  # a model of the merge needs its weights, too
                parts = [str(resolve_tokenizer(part).path) for part in name.parts]
                resolved[name] = ModelName(*parts)
            continue
        if name.adapter is not None and options.lora_merge_cache is None:
            raise ConfigError(
                f"{path}: {name}: mergekit first merges the adapter into its model, and needs a "
                "directory for that. Give --lora-merge-cache DIR. An adapter of base_model needs "
                f"none under `merge_method: {METHOD}` if every weight is one number."
            )
        parts = [_directory_of(part, name, options) for part in name.parts]
        _refuse_unreadable(Path(parts[0]), path)
        resolved[name] = replace(ModelName(*parts), architecture=name.architecture)
    return resolved


def _directory_of(part: str, name: ModelName, options: Any) -> str:
    """Return the directory of a model or an adapter, or its Hub id if mergekit is to fetch it into
    a cache of its own.
    """
    is_on_hub = not part.startswith(("/", "pypi:"))
    if is_on_hub and options.transformers_cache and name.adapter is None:
        return part
    return str(resolve_model(part, may_run_code=options.trust_remote_code).path)


def _refuse_unreadable(source: Path, path: Path) -> None:
    """Raise ModelError for adapters and int8 deltas, which mergekit cannot read."""
    if not source.is_dir():
        return
    if (source / "adapter_config.json").exists():
        raise ModelError(
            f"{path}: {source}: is an adapter, which mergekit reads only as BASE+ADAPTER, merged "
            "into its base and rounded. Leave out what only mergekit can do (lists and filters "
            "of weights, tokenizers, slices), or turn the adapter into a delta with `optimer "
            "extract --dtype bfloat16`."
        )
    record = read_record(source)
    if record is not None and record.dtype == QUANTISED:
        raise ModelError(
            f"{path}: {source}: is an int8 delta, which mergekit cannot read. Leave out what only "
            "mergekit can do, or write the delta again with `optimer extract --dtype bfloat16`."
        )


def _promise_of(config: Mapping[str, Any], parsed: Any, path: Path, options: Any) -> Promise:
    """Return what a config and its flags promise about the output.

    Raises ConfigError for promises that cannot be kept, before any work.
    """
    if not options.safe_serialization:
        raise ConfigError(
            "--no-safe-serialization: models are only written as safetensors. Leave the flag out."
        )
    first = parsed.referenced_models()[0].model.path
    donor = Path(first) if is_there(Path(first)) else None
    builds = any(config.get(key) is not None for key in ("tokenizer", "tokenizer_source"))
    template = config.get("chat_template")
    if template and not builds and not options.copy_tokenizer:
        raise ConfigError(
            f"{path}: chat_template: --no-copy-tokenizer leaves no tokenizer for it. Leave one out."
        )
    needs_tokenizer = builds or options.copy_tokenizer
    if needs_tokenizer and not options.trust_remote_code:
        _refuse_unread_tokenizers(parsed, path, every=builds or template == "auto")
    if needs_tokenizer and donor is not None:
        _refuse_no_tokenizer(donor, path)
    expected = chat_templates().get(template or "", template)
    return Promise(
        donor,
        config.get("out_dtype", config.get("dtype")),
        config.get("out_dtype"),
        needs_tokenizer,
        builds or template is not None,
        None if template == "auto" else expected,
        options.trust_remote_code,
    )


def _warn_of_other_functions(
    models: Sequence[Checkpoint], promise: Promise, aligns_tokens: bool, path: Path
) -> None:
    """Warn of models that compute differently from the one whose config the merge has, or that give
    tokens other ids; mergekit adds their tensors all the same.
    """
    base = promise.config_of
    others = {model.path for model in models} - {base}
    for other in sorted(others) if base is not None else ():
        assert base is not None
        if differing := compare_settings(other, base):
            warn_once(
                logger,
                f"{path}: {other} computes differently from {base}, whose config the merge has: "
                f"{describe_settings(differing)}",
            )
        moved = [] if aligns_tokens else find_moved_tokens(other, base)
        if moved:
            token, number, expected = moved[0]
            warn_once(
                logger,
                f"{path}: {other} has the token {token!r} at id {number}, but {base} at {expected} "
                f"({len(moved):,} tokens in all), so rows of different tokens are merged. "
                "`tokenizer_source: base` aligns them.",
            )


def _refuse_no_tokenizer(model: Path, path: Path) -> None:
    if not has_tokenizer(model):
        raise ConfigError(
            f"{path}: {model}: has no tokenizer for the merge. Save one beside the model, or merge "
            "without one (--no-copy-tokenizer)."
        )


def _refuse_unread_tokenizers(parsed: Any, path: Path, *, every: bool) -> None:
    """Raise for tokenizers that cannot be loaded: mergekit would use the base's ids instead."""
    models = parsed.referenced_models()
    for model in models if every else models[:1]:
        source = Path(model.model.path)
        if has_tokenizer(source):
            read_tokenizer(source)
        elif every and source.is_dir():
            logger.warning("%s: %s has no tokenizer; using that of the base", path, source)


def _refuse_changed_depth(parsed: Any, donor: Path | None, path: Path) -> None:
    """Raise ConfigError for slices that change the number of layers if the config lists layer
    types: mergekit changes only the number, and transformers then refuses the config.
    """
    slices = parsed.slices or next(
        (module.slices for module in (parsed.modules or {}).values() if module.slices), None
    )
    if donor is None or not slices or not (donor / CONFIG).is_file():
        return
    settings = read_settings(donor / CONFIG)
    kinds = settings.get("layer_types", (settings.get("text_config") or {}).get("layer_types"))
    ranges = [piece.sources[0].layer_range for piece in slices if piece.sources]
    n_layers = sum(end - start for start, end in ranges)
    if isinstance(kinds, list) and len(kinds) != n_layers:
        raise ConfigError(
            f"{path}: slices: give {n_layers} layers, but {donor / CONFIG} lists {len(kinds)} "
            "layer_types, which mergekit does not change. Slices of this model must keep "
            f"{len(kinds)} layers."
        )


def _checkpoints_of(parsed: Any) -> list[Checkpoint]:
    """Return the models of a config, the base first.

    Raises ModelError for an adapter that PEFT, which merges it for mergekit, would merge wrongly.
    """
    checkpoints: dict[Path, Checkpoint] = {}
    for model in parsed.referenced_models():
        path = Path(model.model.path)
        if not any(path.glob(ANY_WEIGHTS)):
            continue  # pickled weights, which mergekit may read
        checkpoints.setdefault(path, Checkpoint(path))
        if model.lora is not None:
            check_merge_with_peft(Path(model.lora.path), path)
    return list(checkpoints.values())


def _refuse_other_names(models: Sequence[Checkpoint], path: Path) -> None:
    """Raise ModelError for models that name a tensor differently: mergekit merges by name."""
    advice = (
        f"and mergekit merges by name. Save both with the same names. An {METHOD} merge with one "
        "number per model does not need mergekit."
    )
    for model in models:
        if model.wrappers:
            raise ModelError(
                f"{path}: {model.path}: its tensor names have the prefix "
                f"{', '.join(model.wrappers)} of a wrapper (torch.compile, DDP, FSDP), {advice}"
            )
    for other in models[1:]:
        for name, called in match(other, models[0]).tuned_names.items():
            if name != called:
                raise ModelError(
                    f"{path}: {other.path}: calls {called!r} what {models[0].path} calls {name!r}, "
                    f"{advice}"
                )


def _warn_of_left_out(base: Checkpoint, merged: Checkpoint, path: Path) -> None:
    if left := sorted(set(base.names) - set(merged.names) - ties_of(base).copies):
        logger.warning(
            "%s: mergekit left out %d tensors of the base (%s) that its model class does not "
            "load; the streaming writer keeps them",
            path,
            len(left),
            summarize_names(left),
        )


def _warn_of_idle_filters(config: Any, merged: Path, path: Path) -> None:
    """Warn of filters that match no tensor name."""
    names = Checkpoint(merged).names
    for text in sorted(set(_filters_in(config))):
        if text != "*" and not any(text in name for name in names):
            logger.warning("%s: the filter %r matches no tensor name", path, text)


def _filters_in(value: Any) -> Iterator[str]:
    for item in value if isinstance(value, list) else ():
        yield from _filters_in(item)
    for key, item in value.items() if isinstance(value, Mapping) else ():
        if key == "filter" and isinstance(item, str):
            yield item
        else:
            yield from _filters_in(item)


def _refuse_mixed_heads(models: Sequence[Checkpoint], method: str, path: Path) -> None:
    """Raise ModelError for models whose heads mergekit would mix up. It merges by name, so it
    leaves out a head that the base does not store, and merges a copy only with models that store
    one.
    """
    for other in models[1:]:
        _refuse_other_head(other, models[0], path)
    if models and method.startswith(RANDOM_METHODS):
        ties = ties_of(models[0])
        for copy in sorted(ties.copies):
            raise ModelError(
                f"{path}: {models[0].path}: stores {copy!r}, a copy of {ties.source_of(copy)!r}, "
                f"and {method} drops numbers at random, so the two would no longer be equal. Save "
                "the models without the copy (`save_pretrained`)."
            )


def _refuse_unknown_head(base: Checkpoint, parsed: Any, options: Any, path: Path) -> None:
    """Raise ModelError for a head that mergekit would leave out because it does not know it."""
    from mergekit.architecture import get_architecture_info
    from transformers import PretrainedConfig

    head = ties_of(base).head
    if head is None:
        return
    try:
        config: PretrainedConfig = parsed.referenced_models()[0].config(trust_remote_code=False)
        weights = get_architecture_info(parsed, options).all_weights(config)
    except (ValueError, RuntimeError, KeyError, OSError, AttributeError):
        return  # mergekit raises its own error
    known = {name for weight in weights for name in (weight.name, *(weight.aliases or ()))}
    if not known & {head, ties_of(base).class_names[head]}:
        raise ModelError(
            f"{path}: mergekit does not know {head!r}, the head of {base.path}, and would leave it "
            f"out. Use `merge_method: {METHOD}` with one number per model (`--engine native`)."
        )


def _refuse_other_head(other: Checkpoint, base: Checkpoint, path: Path) -> None:
    of_other, of_base = ties_of(other), ties_of(base)
    for group in (*of_base.groups, *of_other.groups):
        here = [name for name in other.names if of_other.class_names[name] in group]
        there = [name for name in base.names if of_base.class_names[name] in group]
        if here != there:
            name = sorted({*here} ^ {*there})[0]
            stores, lacks = (other, base) if name in here else (base, other)
            raise ModelError(
                f"{path}: {stores.path}: stores tensor {name!r}, which {lacks.path} ties to "
                "another and does not store, and mergekit merges by name. Save both in the same "
                f"form. An {METHOD} merge with one number per model does not need mergekit."
            )
        if group in of_base.groups and not all(other.are_equal(here[0], name) for name in here):
            raise ModelError(
                f"{path}: {other.path}: has a separate tensor {here[-1]!r}, which {base.path} ties "
                f"to {here[0]!r}, and so would the merge. Give a base with a separate head, or a "
                "model with a tied one."
            )


@contextlib.contextmanager
def _merge_adapters(parsed: Any, options: Any, path: Path) -> Iterator[Any]:
    """Merge the adapters of a config into their models, and yield options that use the result.

    The cache directory is named by the content of the adapters. mergekit names it by their paths,
    so it would reuse the merge of an adapter that was retrained, or half a model after a failure.
    """
    adapted = [model for model in parsed.referenced_models() if model.lora is not None]
    if not adapted:
        yield options
        return
    content = [
        [_digests_of(Path(model.model.path)), _digests_of(Path(model.lora.path)), str(model)]
        for model in adapted
    ]
    folder = Path(options.lora_merge_cache) / digest([content, options.lora_merge_dtype])[:16]
    finish_move(folder)
    if not folder.exists():
        with staged_directory(folder) as staging, _name_failures(path):
            for model in adapted:
                model.merged(
                    cache_dir=str(staging),
                    trust_remote_code=False,
                    lora_merge_dtype=options.lora_merge_dtype,
                )
    yield options.model_copy(update={"lora_merge_cache": str(folder)})


def _digests_of(path: Path) -> list[str]:
    configs = sorted(path.glob("*config.json"))
    return [weights_fingerprint(path), *(sha256_file(file) for file in configs)]


def _copy_generation_config(config: Mapping[str, Any], path: Path, out: Path) -> None:
    """Copy generation_config.json from the model that a config takes its tokenizer from: mergekit
    does not.
    """
    reference = tokenizer_of(config, path)
    source = None if reference is None else resolve_tokenizer(reference).path / GENERATION_CONFIG
    if source is not None and source.exists():
        shutil.copyfile(source, out / GENERATION_CONFIG)
