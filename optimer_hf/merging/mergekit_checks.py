"""Refuse models that mergekit would merge wrongly, and warn of what it would not say.

mergekit merges tensors by name and does not compare configs, heads or tokenizers.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from optimer_hf.errors import ConfigError, ModelError
from optimer_hf.merging.check import Promise
from optimer_hf.merging.mergekit_keys import METHOD
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.layout import (
    has_tokenizer,
)
from optimer_hf.models.loader import CONFIG, read_settings, read_tokenizer
from optimer_hf.models.names import match, summarize_names
from optimer_hf.models.settings import compare_settings, describe_settings
from optimer_hf.models.ties import ties_of
from optimer_hf.models.vocabulary import find_moved_tokens
from optimer_hf.printable import warn_once
from optimer_hf.vectors.record import QUANTISED, read_record

logger = logging.getLogger(__name__)


RANDOM_METHODS = ("dare", "della")


def refuse_unreadable(source: Path, path: Path) -> None:
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


def refuse_no_tokenizer(model: Path, path: Path) -> None:
    """Raise ConfigError for a model without a tokenizer where the merge takes one from it."""
    if not has_tokenizer(model):
        raise ConfigError(
            f"{path}: {model}: has no tokenizer for the merge. Save one beside the model, or merge "
            "without one (--no-copy-tokenizer)."
        )


def refuse_unreadable_tokenizers(parsed: Any, path: Path, *, every: bool) -> None:
    """Raise for tokenizers that cannot be loaded: mergekit would use the base's ids instead."""
    models = parsed.referenced_models()
    for model in models if every else models[:1]:
        source = Path(model.model.path)
        if has_tokenizer(source):
            read_tokenizer(source)
        elif every and source.is_dir():
            logger.warning("%s: %s has no tokenizer; using that of the base", path, source)


def refuse_changed_depth(parsed: Any, donor: Path | None, path: Path) -> None:
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


def refuse_other_names(models: Sequence[Checkpoint], path: Path) -> None:
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


def refuse_mixed_heads(models: Sequence[Checkpoint], method: str, path: Path) -> None:
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


def refuse_unknown_head(base: Checkpoint, parsed: Any, options: Any, path: Path) -> None:
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


def warn_of_other_functions(
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


def warn_of_left_out(base: Checkpoint, merged: Checkpoint, path: Path) -> None:
    """Warn of tensors of the base that mergekit did not write."""
    if left := sorted(set(base.names) - set(merged.names) - ties_of(base).copies):
        logger.warning(
            "%s: mergekit left out %d tensors of the base (%s) that its model class does not "
            "load; the streaming writer keeps them",
            path,
            len(left),
            summarize_names(left),
        )


def warn_of_idle_filters(config: Any, merged: Path, path: Path) -> None:
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
