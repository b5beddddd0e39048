"""Run a merge config with mergekit, and check what it wrote."""

import contextlib
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from optimer_hf.errors import ConfigError, ModelError, OptimerError
from optimer_hf.files.digest import digest, sha256_file
from optimer_hf.files.disk import DISK_ERRORS
from optimer_hf.files.reference import is_there
from optimer_hf.files.staging import finish_move, staged_directory, write_text
from optimer_hf.files.text import first_line
from optimer_hf.merging.check import Promise, check_merged
from optimer_hf.merging.mergekit_checks import (
    refuse_changed_depth,
    refuse_mixed_heads,
    refuse_no_tokenizer,
    refuse_other_names,
    refuse_unknown_head,
    refuse_unreadable,
    refuse_unreadable_tokenizers,
    warn_of_idle_filters,
    warn_of_left_out,
    warn_of_other_functions,
)
from optimer_hf.merging.mergekit_keys import METHOD
from optimer_hf.merging.mergekit_method import register_method
from optimer_hf.merging.mergekit_models import ModelName, models_of, with_models
from optimer_hf.merging.mergekit_pool import (
    makes_tokenizer,
    model_name_in,
    tokenizer_of,
)
from optimer_hf.merging.mergekit_yaml import (
    chat_templates,
    parse_with_mergekit,
)
from optimer_hf.merging.tokenizer import complete_generation_config
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.layout import (
    ANY_WEIGHTS,
    GENERATION_CONFIG,
    weights_fingerprint,
)
from optimer_hf.models.loader import refuse_lack_of_memory
from optimer_hf.models.resolve import (
    resolve_model,
    resolve_tokenizer,
)
from optimer_hf.vectors.peft import check_merge_with_peft

logger = logging.getLogger(__name__)


def write_card(parsed: Any, path: Path, name: str, out: Path) -> None:
    """Write mergekit's model card and a copy of the config."""
    from mergekit.card import generate_card

    register_method()  # else the card names `optimer` without its paper
    source = path.read_text(encoding="utf-8")
    write_text(out / "README.md", generate_card(parsed, source, name))
    write_text(out / "mergekit_config.yml", source)


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
        with_models(config, lambda value: opened[model_name_in(value, path)].long_form), path
    )
    promise = _promise_of(config, parsed, path, options)
    models = _checkpoints_of(parsed)
    refuse_other_names(models, path)
    refuse_mixed_heads(models, parsed.merge_method, path)
    if models:
        refuse_unknown_head(models[0], parsed, options, path)
    refuse_changed_depth(parsed, promise.config_of, path)
    warn_of_other_functions(models, promise, makes_tokenizer(config), path)
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
        warn_of_idle_filters(config, staging, path)
        if models and not config.get("slices") and not config.get("modules"):
            warn_of_left_out(models[0], Checkpoint(staging), path)
        _copy_generation_config(config, path, staging)
        if options.write_model_card:
            write_card(named, path, out.name, staging)


def _run(parsed: Any, staging: Path, options: Any, path: Path) -> list[str]:
    """Run mergekit and return its warnings."""
    from mergekit.architecture.auto import infer_architecture_info
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge

    # mergekit never clears these caches, so it would read a replaced model from the old file
    LoaderCache().loaders = {}
    infer_architecture_info.cache_clear()
    try:
        with _name_failures(path), _collect_warnings() as warnings:
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
def _collect_warnings() -> Iterator[list[str]]:
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
        name, is_tokenizer = model_name_in(value, path), at[0] in ("tokenizer", "tokenizer_source")
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
        refuse_unreadable(Path(parts[0]), path)
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
        refuse_unreadable_tokenizers(parsed, path, every=builds or template == "auto")
    if needs_tokenizer and donor is not None:
        refuse_no_tokenizer(donor, path)
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
    """Copy generation_config.json from the model that a config takes its tokenizer from, which
    mergekit does not; without one, add its end of a text to that of the merge.
    """
    if (reference := tokenizer_of(config, path)) is None:
        return
    source = resolve_tokenizer(reference).path
    if (source / GENERATION_CONFIG).exists():
        shutil.copyfile(source / GENERATION_CONFIG, out / GENERATION_CONFIG)
    complete_generation_config(out, source)
