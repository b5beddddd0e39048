"""Convert between mergekit's YAML and a pool of vectors with weights."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from optimer_hf.errors import ConfigError
from optimer_hf.files.model import list_mistakes
from optimer_hf.files.paths import Place
from optimer_hf.files.reference import Reference
from optimer_hf.files.text import field_path
from optimer_hf.merging.mergekit_keys import METHOD
from optimer_hf.merging.mergekit_models import ModelName, model_name, with_models
from optimer_hf.merging.mergekit_settings import (
    WHOLE,
    Setting,
    can_split,
    rules_of,
    setting_of,
    table_of,
)
from optimer_hf.vectors.groups import Groups, weights_of_groups

INT8 = "int8"  # kind of the deltas that mergekit cannot read
BASE_FIELD, VECTORS = "base_model", "vectors"  # fields that name the models of a recipe
UNREAD = "unread"  # kind of the vectors whose tensors mergekit does not find
ON_UNREAD = "on unread"  # kind of all vectors if it does not find those of the base
WRITTEN_DTYPES = {"bfloat16", "float16", "float32"}  # by the streaming writer


# -- what a config names ---------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearMerge:
    """A merge that the streaming writer can run: one number per vector or per group of its tensors,
    and the tokenizer of a model (None: of the base) or, with `is_union`, the tokens of all.
    """

    base_model: str
    sources: dict[str, str]
    weights: dict[str, float]
    out_dtype: str | None
    tokenizer_source: str | None = None
    is_union: bool = False
    groups: dict[str, Groups] = field(default_factory=dict)


def pool_of(config: Mapping[str, Any], path: Path) -> tuple[str, dict[str, str]]:
    """Return the base model and the vectors (name -> reference) of a mergekit config.

    Names are the last parts of the paths; BASE+ADAPTER gives the adapter. Raises ConfigError for a
    config that is no pool.
    """
    if written_base(config) is None:
        raise ConfigError(
            f"{path}: field 'base_model' is missing. Name the model that all others were trained "
            "from."
        )
    if config.get("modules"):
        raise _mistake(
            path,
            ("modules",),
            "has the models of each part of a model. List them once under `models:`, with a filter "
            "for each part in `weight` (such as `{filter: vision_tower, value: 0.5}`), and each is "
            "searched.",
        )
    for where, name in _entries_for_mergekit(config, path):
        found = f"found {str(name)!r}"
        if name.architecture is not None:
            raise _mistake(
                path,
                where,
                f"{found} with override_architecture, which only mergekit reads. Leave it out; a "
                "vector has the architecture of its base.",
            )
        raise _mistake(
            path,
            where,
            f"{found}, an adapter of another model than base_model ({base_of(config, path)}), "
            "expected BASE or BASE+ADAPTER. Merge the adapter into its model and give the result.",
        )
    base, sources = base_of(config, path).model, vector_names(config, path)
    if not sources:
        at = "slices" if config.get("slices") else "models"
        raise _mistake(path, (at,), "found only the base. Give at least one model to merge into it")
    return base, {name: model.parts[-1] for name, model in sources.items()}


def _mistake(path: Path, where: Place, message: str) -> ConfigError:
    return ConfigError(list_mistakes(path, [(where, f"{field_path(where)}: {message}")]))


def model_name_in(value: Any, path: Path) -> ModelName:
    """Return a model reference of the config at `path`, with absolute local paths."""
    return model_name(value, path.resolve().parent)


def base_of(config: Mapping[str, Any], path: Path) -> ModelName:
    """Return the base of a config."""
    return model_name_in(written_base(config), path)


def written_base(config: Mapping[str, Any]) -> Any:
    """Return the base as a config names it: its `base_model`, or that of the first slice with one;
    None if there is none. A search refuses slices with other bases.
    """
    parts = [config, *(config.get("slices") or [])]
    return next((part["base_model"] for part in parts if part.get("base_model")), None)


def entries_of(config: Mapping[str, Any]) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    """Yield the entries of `models`, or the sources of all slices, each with its place."""
    for index, entry in enumerate(config.get("models") or []):
        yield ("models", index), entry
    for number, piece in enumerate(config.get("slices") or []):
        for index, source in enumerate(piece["sources"]):
            yield ("slices", number, "sources", index), source


def vector_names(config: Mapping[str, Any], path: Path) -> dict[str, ModelName]:
    """Return the models of a config that are not its base, by name; one that stands in several
    slices once.
    """
    base = base_of(config, path)
    names = [model_name_in(entry["model"], path) for _, entry in entries_of(config)]
    names = [name for name in names if name != base]
    names = list(dict.fromkeys(names)) if config.get("slices") else names
    return dict(zip(name_sources([name.parts[-1] for name in names]), names, strict=True))


def _entries_for_mergekit(
    config: Mapping[str, Any], path: Path
) -> Iterator[tuple[Place, ModelName]]:
    """Yield place and name of every model that only mergekit can read: an adapter of another model
    than the base, or a model with an overridden architecture.
    """
    base = base_of(config, path)
    if base != ModelName(base.model):
        yield ("base_model",), base
        return
    for place, entry in entries_of(config):
        name = model_name_in(entry["model"], path)
        if name.architecture or (name.adapter and name.model != base.model):
            yield (*place, "model"), name


def name_sources(sources: Iterable[str]) -> dict[str, str]:
    """Name references by the last part of their paths; a repeated name gets -2, -3, ..."""
    named: dict[str, str] = {}
    for source in sources:
        stem = name = source.rstrip("/").split("/")[-1].split("@")[0]
        number = 2
        while name in named:
            name, number = f"{stem}-{number}", number + 1
        named[name] = source
    return named


def tokenizer_of(config: Mapping[str, Any], path: Path) -> str | None:
    """Return the model that a mergekit config takes its tokenizer from; None for the base, or when
    the config `makes_tokenizer`.
    """
    source = _tokenizer_source(config)
    if source == "base" or makes_tokenizer(config):
        return None
    reference = model_name_in(source, path).model
    base = written_base(config)
    return None if base and reference == base_of(config, path).model else reference


def makes_tokenizer(config: Mapping[str, Any]) -> bool:
    """Whether a config asks mergekit to build a new tokenizer: a union, added or replaced tokens,
    or a model with an adapter.
    """
    block, source = config.get("tokenizer"), _tokenizer_source(config)
    is_simple = not block or not set(block) - {"source"}
    has_adapter = isinstance(source, Mapping) and source.get("lora") is not None
    is_named = source != "union" and not has_adapter and "+" not in str(source)
    return not (is_simple and is_named)


def is_union(config: Mapping[str, Any]) -> bool:
    """Whether a config asks for the tokens of all models, and for nothing else of a tokenizer."""
    return _tokenizer_source(config) == "union" and not set(config.get("tokenizer") or ()) - {
        "source"
    }


def _tokenizer_source(config: Mapping[str, Any]) -> Any:
    block = config.get("tokenizer")
    if block is not None:
        return block.get("source") or "union"  # mergekit's default where the block is given
    return config.get("tokenizer_source") or "base"


def why_not_plain(
    references: Iterable[str], kinds: Mapping[str, str], *, joins_tokens: bool
) -> str | None:
    """Return why mergekit alone cannot read the models of a merge, or join their tokens where they
    are to be joined; None if it can. `kinds` has the kind of each vector.

    It reads nothing from PyPI, and of a model with an adapter it takes the tokens of the model for
    those of the adapter.
    """
    packages = [text for text in references if Reference(text).package is not None]
    if packages:
        return f"it does not read {packages[0]} from PyPI"
    by_kind = {kind: name for name, kind in reversed([*kinds.items()])}  # the first of each
    if ON_UNREAD in by_kind:
        return "it would not find, or would leave out, tensors of the base, whose names it lacks"
    if UNREAD in by_kind:
        return (
            f"it looks tensors up by the names in the base, and those of {by_kind[UNREAD]!r} have "
            "others"
        )
    if INT8 in by_kind:
        return f"{by_kind[INT8]!r} is an int8 delta, which it does not read"
    if joins_tokens and set(by_kind) - {"checkpoint"}:
        return "it joins the tokens of checkpoints only"
    return None


def _shortest_form(name: ModelName) -> Any:
    """Return a reference as text, or in the long form where text would be misread."""
    plain = name.architecture is None and not any("+" in part for part in name.parts)
    return str(name) if plain else name.long_form


def with_absolute_references(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return a config read from `path` with absolute local models; MODEL+ADAPTER becomes a list.

    Opens no model.
    """

    def absolute(value: Any) -> Any:
        parts = model_name_in(value, path).parts
        return parts if parts[1:] else parts[0]

    return with_models(config, absolute)


# -- merging ---------------------------------------------------------------------------------------


def linear_merge_of(config: Mapping[str, Any], path: Path) -> LinearMerge | None:
    """Return a config as one number per vector, or None when only mergekit can run it."""
    simple = {"merge_method", "base_model", "models", "dtype", "out_dtype"}
    if not makes_tokenizer(config) or is_union(config):
        simple |= {"tokenizer", "tokenizer_source"}
    used = {key for key, value in config.items() if key != "parameters" or value}
    if config["merge_method"] != METHOD or not used <= simple:
        return None
    given = {key: config.get(key) for key in ("dtype", "out_dtype")}
    if given["out_dtype"] and given["dtype"] not in (None, "float32", given["out_dtype"]):
        return None
    if not set(given.values()) - {None} <= WRITTEN_DTYPES:
        return None
    if config.get("base_model") and any(_entries_for_mergekit(config, path)):
        return None
    base, sources = pool_of(config, path)
    if (settings := _weights_and_groups(config, path, sources)) is None:
        return None
    weights, groups = settings
    out_dtype = given["out_dtype"] or given["dtype"]
    source = tokenizer_of(config, path)
    return LinearMerge(base, sources, weights, out_dtype, source, is_union(config), groups)


def _weights_and_groups(
    config: Mapping[str, Any], path: Path, names: Iterable[str]
) -> tuple[dict[str, float], dict[str, Groups]] | None:
    """Return the weights by name and the groups by vector; None when only mergekit reads them."""
    weights: dict[str, float] = {}
    groups: dict[str, Groups] = {}
    base = base_of(config, path)
    entries = [pair for pair in entries_of(config) if model_name_in(pair[1]["model"], path) != base]
    for name, (place, entry) in zip(names, entries, strict=True):
        parameters = entry.get("parameters") or {}
        if parameters.get("delta"):
            return None  # somebody else's delta directory, without our vector.json
        if "weight" not in parameters:
            message = f"models: {name}: parameters.weight is missing. Give this vector a weight."
            raise ConfigError(list_mistakes(path, [(place, message)]))
        rules = rules_of(entry)
        if not can_split(rules):
            return None
        values = table_of(rules)
        weights |= {f"{name}.{key}" if key else name: value for key, value in values.items()}
        if set(values) != {WHOLE}:
            groups[name] = Groups.of_keys(values)
    return weights, groups


# -- export ----------------------------------------------------------------------------------------


def with_tokenizer(config: Mapping[str, Any], source: str | Path | None) -> dict[str, Any]:
    """Return a merge config that takes the tokenizer of a model (None: unchanged)."""
    return {**config} if source is None else {**config, "tokenizer_source": str(source)}


class Merged(Protocol):
    """What a study and a recipe have in common: base, vectors, dtype and tokenizer of a merge."""

    @property
    def base_model(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def sources(self) -> Mapping[str, str]: ...
    @property
    def tokenizer_reference(self) -> str | None: ...
    @property
    def vocabulary(self) -> str: ...
    @property
    def groups(self) -> Mapping[str, Groups]: ...


def merge_config_of(
    record: Merged, weights: Mapping[str, float], n_layers: int | None
) -> dict[str, Any]:
    """Return the config that runs the merge of a study or a recipe with these weights. `n_layers`
    is the number of layers of the base, for weights of groups of layers.
    """
    settings = settings_of(record.sources, weights, record.groups, n_layers)
    config = optimer_config(record.base_model, record.sources, settings, record.dtype)
    is_union = record.vocabulary == "union"
    return with_tokenizer(config, "union" if is_union else record.tokenizer_reference)


def settings_of(
    names: Iterable[str],
    weights: Mapping[str, float],
    groups: Mapping[str, Groups],
    n_layers: int | None,
) -> dict[str, Setting]:
    """Return the parameter `weight` of each vector as mergekit knows it (see `setting_of`)."""
    tables = {name: weights_of_groups(name, groups.get(name), weights) for name in names}
    return {
        name: setting_of(groups[name], own, n_layers) if name in groups else own[WHOLE]
        for name, own in tables.items()
    }


def optimer_config(
    base_model: str, sources: Mapping[str, str], weights: Mapping[str, Setting], dtype: str
) -> dict[str, Any]:
    """Return a merge config for the `optimer` method. Its dtype is float32, so both engines round
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


def plain_config_of(
    record: Merged,
    weights: Mapping[str, float],
    kinds: Mapping[str, str],
    n_layers: int | None,
) -> dict[str, Any] | None:
    """Return the config with which mergekit alone makes the merge of a study or a recipe; None if
    `obstacle_to_plain` says why it cannot. `kinds` has the kind of each vector.
    """
    is_union, used = record.vocabulary == "union", used_names(record, weights)
    if obstacle_to_plain(record, weights, kinds) is not None:
        return None
    sources = {name: in_form_of_mergekit(record.sources[name]) for name in used}
    settings = settings_of(used, weights, record.groups, n_layers)
    base = in_form_of_mergekit(record.base_model)
    config = vanilla_config(base, sources, settings, record.dtype, kinds)
    return with_tokenizer(config, "union") if is_union and config is not None else config


def obstacle_to_plain(
    record: Merged, weights: Mapping[str, float], kinds: Mapping[str, str]
) -> str | None:
    """Return why mergekit alone cannot make the merge of a study or a recipe, as a clause; None if
    it can. `kinds` has the kind of each vector.

    It cannot for deltas beside other vectors, and for the tokenizer of another model, to which it
    would cut the embedding; nor for what `why_not_plain` names. Vectors of weight 0 do not count,
    unless their tokens are joined.
    """
    is_union = record.vocabulary == "union"
    if unknown := [name for name in record.sources if name not in kinds]:
        return f"the lock does not say what {unknown[0]!r} is"
    if record.tokenizer_reference and not is_union:
        return "it would cut the embedding to the tokens of tokenizer_source"
    used = used_names(record, weights)
    read = list(record.sources) if is_union else used
    references = [record.base_model, *(record.sources[name] for name in read)]
    relevant = {n: kind for n, kind in kinds.items() if n in read or kind == ON_UNREAD}
    if reason := why_not_plain(references, relevant, joins_tokens=is_union):
        return reason
    return "it does not add deltas beside other vectors" if _mixes_deltas(kinds, used) else None


def used_names(record: Merged, weights: Mapping[str, float]) -> list[str]:
    """Return the vectors with a weight that is not zero."""
    tables = {
        name: weights_of_groups(name, record.groups.get(name), weights) for name in record.sources
    }
    return [name for name, own in tables.items() if any(own.values())]


def _mixes_deltas(kinds: Mapping[str, str], used: Iterable[str]) -> bool:
    return len({kinds.get(name) == "delta" for name in used}) > 1


def in_form_of_mergekit(reference: str) -> str:
    """Return a reference to the Hub in mergekit's form."""
    return reference.removeprefix("hf://")


def vanilla_config(
    base_model: str,
    sources: Mapping[str, str],
    weights: Mapping[str, Setting],
    dtype: str,
    kinds: Mapping[str, str],
) -> dict[str, Any] | None:
    """Return a config that gives the same merge with stock `mergekit-yaml`, or None if there is
    none, because the pool has deltas beside other vectors.

    `sources` are those of the `used_names`, `kinds` has the kind of each vector. Checkpoints, and
    adapters as BASE+ADAPTER, are merged with `task_arithmetic`; delta directories are added to the
    base with `linear`. Its command is `mergekit_command`.
    """
    if _mixes_deltas(kinds, sources):
        return None
    entries = [
        {
            "model": _model_for_mergekit(base_model, source, kinds.get(name)),
            "parameters": {"weight": weights[name]},
        }
        for name, source in sources.items()
    ]
    are_deltas = any(kinds.get(name) == "delta" for name in sources)
    if are_deltas or not entries:
        entries = [{"model": base_model, "parameters": {"weight": 1.0}}, *entries]
    return {
        "merge_method": "linear" if are_deltas or not sources else "task_arithmetic",
        "base_model": base_model,
        "models": entries,
        "parameters": {"normalize": False},
        "dtype": "float32",
        "out_dtype": dtype,
    }


def _model_for_mergekit(base_model: str, source: str, kind: str | None) -> Any:
    """Return how a config for mergekit names a vector: an adapter together with its base."""
    return source if kind != "adapter" else _shortest_form(ModelName(base_model, source))


def mergekit_command(config: Mapping[str, Any], name: str, *, out: str = "OUT") -> str:
    """Return the command that writes the merge of a config in the file `name` to `out`: that of
    mergekit alone, unless its method is ours.

    mergekit merges adapters first, into models that it keeps in a cache; in float32, that rounds
    nothing that the merge does not round.
    """
    has_adapters = any(
        entry["model"].get("lora") if isinstance(entry["model"], Mapping) else "+" in entry["model"]
        for _, entry in entries_of(config)
    )
    if config["merge_method"] == METHOD:
        return f"optimer merge {name} {out}"
    cache = " --lora-merge-cache CACHE --lora-merge-dtype float32"
    return f"mergekit-yaml {name} {out}{cache * has_adapters}"
