"""What a search reads of a mergekit YAML, and the YAML with the weights that it found.

Each number of a `weight` is one weight to search: that of a model, of a filter, of a slice or of a
value along the layers. Along the layers there are at most MOST_SEARCHED: more gradient values than
that become so many, and more slices share weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optimer_hf.errors import ConfigError
from optimer_hf.files.editing import edit_yaml
from optimer_hf.files.model import list_mistakes
from optimer_hf.files.paths import Place
from optimer_hf.files.reading import read_yaml
from optimer_hf.files.text import quote
from optimer_hf.merging.mergekit_keys import METHOD
from optimer_hf.merging.mergekit_models import ModelName
from optimer_hf.merging.mergekit_pool import (
    Setting,
    base_of,
    entries_of,
    is_union,
    makes_tokenizer,
    mergekit_can_merge,
    model_name_in,
    pool_of,
    settings_of,
    vector_names,
)
from optimer_hf.merging.mergekit_table import FIELDS, OF_TASK_ARITHMETIC
from optimer_hf.vectors.groups import ELSE, GRADIENT, LAYERS, Groups, is_filter
from optimer_hf.vectors.record import read_record

MOST_SEARCHED = 4  # weights of a vector along the layers
METHODS = ("optimer", "task_arithmetic", "linear")  # whose result a sum of weighted vectors is
KEPT = ("tokenizer", "tokenizer_source", "chat_template", "name")
FIELDS_OF_MERGEKIT = {*FIELDS["config"], *OF_TASK_ARITHMETIC}
SPLIT = (
    "one weight is searched for each model, or for each filter, slice or value of a gradient of "
)
SPLIT += f"its `weight`, at most {MOST_SEARCHED} along the layers"

By = dict[str, dict[str, Any]]  # the groups of a vector, as in a study.yaml


# -- what is searched ------------------------------------------------------------------------------


def pool_to_search(config: Mapping[str, Any], path: Path) -> tuple[str, dict[str, str]]:
    """Return the base model and the vectors of a config whose weights are to be searched.

    Raises ConfigError for a delta directory without our vector.json, which would be mistaken for a
    model, and for slices that are no layers of one model in order.
    """
    base, sources = pool_of(config, path)
    _refuse_other_slices(config, path)
    for place, entry in entries_of(config):
        name = model_name_in(entry["model"], path)
        source = Path(name.parts[-1])
        if not (entry.get("parameters") or {}).get("delta"):
            continue
        record = read_record(source) if source.is_dir() else None
        if record is None or record.kind != "delta":
            message = (
                f"{place[0]}: {_text(entry['model'])}: parameters.delta: this directory has no "
                "vector.json, by which a search recognises a delta. Write the delta with `optimer "
                "extract`."
            )
            raise ConfigError(list_mistakes(path, [((*place, "parameters", "delta"), message)]))
    return base, sources


def _refuse_other_slices(config: Mapping[str, Any], path: Path) -> None:
    """Raise ConfigError for slices that are not the layers of one model in order."""
    end = 0
    for number, piece in enumerate(config.get("slices") or []):
        at: Place = ("slices", number)
        for key in ("base_model", "residual_weight"):
            value = piece.get(key)
            is_same = key == "base_model" and value == config["base_model"]
            if value is not None and not is_same:
                raise _mistake(path, (*at, key), f"{key}: only mergekit reads it. Leave it out.")
        seen: set[ModelName] = set()
        for index, source in enumerate(piece["sources"]):
            layers, name = source["layer_range"], model_name_in(source["model"], path)
            if layers != piece["sources"][0]["layer_range"] or layers[0] != end:
                expected = f"the layers from {end} on, of every model of the slice"
                message = (
                    f"layer_range: found {layers}, expected {expected}. One weight for each slice "
                    "can be searched only where the merge has the layers of its base in order."
                )
                raise _mistake(path, (*at, "sources", index, "layer_range"), message)
            if name in seen:
                raise _mistake(path, (*at, "sources", index), f"{name} is there twice.")
            seen.add(name)
        end = piece["sources"][0]["layer_range"][1]


def refuse_other_depth(config: Mapping[str, Any], path: Path, n_layers: int) -> None:
    """Raise ConfigError for slices that are not all `n_layers` of the base."""
    end = _ends_of(config)[-1]
    if end != n_layers:
        place = ("slices", len(config["slices"]) - 1)
        raise _mistake(path, place, f"ends at layer {end}, but the base has {n_layers} layers.")


def _mistake(path: Path, place: Place, message: str) -> ConfigError:
    return ConfigError(list_mistakes(path, [(place, f"slices: {message}")]))


def splits_to_search(config: Mapping[str, Any], path: Path) -> dict[str, By]:
    """Return how vectors are split, by name, that have more than one weight to search."""
    if len(config.get("slices") or []) > 1:
        models = vector_names(config, path)
        return {name: _by_slices(config, path, model) for name, model in models.items()}
    settings = _settings_of_models(config, path)
    splits = {name: _by_setting(setting) for name, setting in settings.items()}
    return {name: by for name, by in splits.items() if by is not None}


def place_of_vector(config: Mapping[str, Any], path: Path, vector: str) -> Place | None:
    """Return where a config names a vector."""
    model = vector_names(config, path).get(vector)
    places = (
        at for at, entry in entries_of(config) if model_name_in(entry["model"], path) == model
    )
    return next(places, None)


def _entries_by_vector(config: Mapping[str, Any], path: Path) -> dict[str, Mapping[str, Any]]:
    """Return the entry of each vector, by name, of a config with at most one slice."""
    base = base_of(config, path)
    entries = [each for _, each in entries_of(config) if model_name_in(each["model"], path) != base]
    return dict(zip(vector_names(config, path), entries, strict=True))


def _settings_of_models(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the `weight` of each vector of a config with at most one slice, by name: its own, that
    of the slice or that of all.
    """
    piece = (config.get("slices") or [{}])[0]
    settings = {}
    for name, entry in _entries_by_vector(config, path).items():
        blocks = [(each.get("parameters") or {}) for each in (entry, piece, config)]
        settings[name] = next((b["weight"] for b in blocks if "weight" in b), None)
    return settings


def vectors_once_whole(config: Mapping[str, Any], path: Path) -> set[str]:
    """Return the vectors that an older version gave one weight whatever the config gave them: it
    ignored gradients, also within filters, the filter `*`, and a weight for all models. It refused
    slices.
    """
    if config.get("slices"):
        return set()
    return {
        name
        for name, entry in _entries_by_vector(config, path).items()
        if not _has_plain_filters((entry.get("parameters") or {}).get("weight"))
    }


def _has_plain_filters(setting: Any) -> bool:
    """Whether a `weight` has filters, each with one number, and none for the rest by a name."""
    filters = [item for item in _items(setting) if isinstance(item, Mapping)]
    return bool(filters) and not any(
        isinstance(item.get("value"), list) or item.get("filter") == "*" for item in filters
    )


def _items(setting: Any) -> list[Any]:
    return setting if isinstance(setting, list) else [setting]


def _by_setting(setting: Any) -> By | None:
    """Return the groups for a `weight`; None for one number."""
    items = _items(setting)
    if not any(isinstance(item, Mapping) for item in items):
        n = min(len(items), MOST_SEARCHED)
        return {GRADIENT: {"groups": n}} if n > 1 else None
    keys: dict[str, dict[str, Any]] = {}
    for item in items:
        given = item.get("filter")
        key = ELSE if given in (None, "*") else given
        if given == ELSE or not is_filter(key):
            return None
        keys[key] = {}
        if key == ELSE:
            break  # nothing is left for later filters
    return keys if len(keys) > 1 else None


def _by_slices(config: Mapping[str, Any], path: Path, model: ModelName) -> By:
    """Return the groups of a vector in a config with several slices. Where a slice leaves it out,
    its weight is 0.
    """
    by: By = {}
    pieces, start = config["slices"], 0
    for end in _ends_to_search(config, path):
        inside = [piece for piece in pieces if start <= _range_of(piece)[0] < end]
        is_there = any(model in _models_in(piece, path) for piece in inside)
        by[f"{LAYERS}.{start}:{end}"] = {} if is_there else {"fixed": 0.0}
        start = end
    return by


def _ends_to_search(config: Mapping[str, Any], path: Path) -> list[int]:
    """Return the ends of the groups of layers: those of the slices or, if there are more than a few
    and all have the same models, of runs of slices.
    """
    ends = _ends_of(config)
    models = [_models_in(piece, path) for piece in config["slices"]]
    if len(ends) <= MOST_SEARCHED or any(each != models[0] for each in models):
        return ends
    n = len(ends)
    groups = [index * MOST_SEARCHED // n for index in range(n)]
    return [
        end for end, own, after in zip(ends, groups, [*groups[1:], -1], strict=True) if own != after
    ]


def _ends_of(config: Mapping[str, Any]) -> list[int]:
    return [_range_of(piece)[1] for piece in config["slices"]]


def _range_of(piece: Mapping[str, Any]) -> list[int]:
    layers: list[int] = piece["sources"][0]["layer_range"]
    return layers


def _models_in(piece: Mapping[str, Any], path: Path) -> set[ModelName]:
    return {model_name_in(source["model"], path) for source in piece["sources"]}


# -- what is not -----------------------------------------------------------------------------------


def unsearched_settings(config: Mapping[str, Any]) -> list[str]:
    """Return the settings of a config that a search ignores, by field: everything beyond the
    numbers that it searches and the tokenizer of a model or of all.
    """
    ignored = []
    if config["merge_method"] not in METHODS:
        ignored.append(f"merge_method: {config['merge_method']}")
    n_slices = len(config.get("slices") or [])
    blocks = [("", config)]
    blocks += [(f"slices.{n}", piece) for n, piece in enumerate(config.get("slices") or [])]
    blocks += [(f"{at[0]}: {_text(each['model'])}", each) for at, each in entries_of(config)]
    for where, block in blocks:
        for name, value in (block.get("parameters") or {}).items():
            if (note := _what_is_unsearched(name, value, n_slices)) is not None:
                ignored.append(f"{where}: parameters.{name}{note}".removeprefix(": "))
    if makes_tokenizer(config) and not is_union(config):
        field = "tokenizer" if config.get("tokenizer") else "tokenizer_source"
        ignored.append(f"{field}: {quote(config.get(field))}")
    if config.get("chat_template"):
        ignored.append(f"chat_template: {quote(config['chat_template'])}")
    return list(dict.fromkeys(ignored))


def _what_is_unsearched(name: str, value: Any, n_slices: int) -> str | None:
    """Return what of a parameter a search ignores, to be read after its name; None: nothing."""
    if name == "int8_mask" or (name == "normalize" and value is False):
        return None  # a search does not normalise, either
    if name not in ("weight", "delta"):
        return ""
    if not isinstance(value, list | Mapping):
        return None
    items = _items(value)
    if n_slices > 1:
        return " (more than one number in a slice)"
    if not any(isinstance(item, Mapping) for item in items):
        return f" ({len(items)} values)" if len(items) > MOST_SEARCHED else None
    if _by_setting(value) is None:
        return " (filters that do not split the model)"
    has_gradients = any(isinstance(item.get("value"), list) for item in items)
    return " (gradients within filters)" if has_gradients else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else quote(value)


# -- the weights that were found -------------------------------------------------------------------


@dataclass(frozen=True)
class Layers:
    """How vectors are split, by name, the number of layers of their base, and what the names of
    tensors in its layers begin with.
    """

    groups: Mapping[str, Groups] = field(default_factory=dict)
    number: int | None = None
    stack: str | None = None


def with_weights(
    config: Mapping[str, Any],
    path: Path,
    weights: Mapping[str, float],
    kinds: Mapping[str, str],
    layers: Layers = Layers(),
) -> dict[str, Any]:
    """Return a mergekit config with these weights, with its models, filters and slices as they are
    written in it. `kinds` has the kind of each vector.

    The method is `task_arithmetic`, which stock mergekit has and which gives the same merge, unless
    there are deltas or `mergekit_can_merge` says no; then it is `optimer`, and a list of models.
    Tokenizer and chat template are kept; parameters of other methods (density, ...) are not.
    """
    base, sources = pool_of(config, path)
    is_plain = "delta" not in kinds.values() and mergekit_can_merge(
        [base, *sources.values()], kinds.values(), joins_tokens=is_union(config)
    )
    settings = settings_of(sources, weights, layers.groups, layers.number)
    written = {
        name: _as_written(config, model, path, kinds[name] if is_plain else "")
        for name, model in _first_models(config, path).items()
    }
    if config.get("slices") and is_plain:
        merged = {"slices": _slices_with(config, path, weights, settings, written, layers)}
    else:
        merged = {"models": _models_with(config, path, settings, written)}
    ours = {
        "merge_method": "task_arithmetic" if is_plain else METHOD,
        "base_model": config["base_model"],
        **merged,
        **({"parameters": {"normalize": False}} if is_plain else {}),
        "dtype": "float32",
        "out_dtype": config.get("out_dtype") or config.get("dtype") or "bfloat16",
    }
    return ours | {key: config[key] for key in KEPT if config.get(key) is not None}


def _first_models(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return each vector as it is written where it stands first, by name."""
    if not config.get("slices"):
        entries = _entries_by_vector(config, path)
        return {name: entry["model"] for name, entry in entries.items()}
    written = [
        (model_name_in(each["model"], path), each["model"]) for _, each in entries_of(config)
    ]
    first = dict(reversed(written))
    return {key: first[name] for key, name in vector_names(config, path).items()}


def _models_with(
    config: Mapping[str, Any],
    path: Path,
    settings: Mapping[str, Setting],
    written: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Return the list of models with their weights; the base stays where it is written."""
    base, names = base_of(config, path), iter(settings)
    models: list[dict[str, Any]] = []
    for entry in config.get("models") or []:
        if model_name_in(entry["model"], path) == base:
            models.append({"model": entry["model"]})
        else:
            name = next(names)
            models.append({"model": written[name], "parameters": {"weight": settings[name]}})
    rest = [{"model": written[name], "parameters": {"weight": settings[name]}} for name in names]
    return [*models, *rest]


def _slices_with(
    config: Mapping[str, Any],
    path: Path,
    weights: Mapping[str, float],
    settings: Mapping[str, Setting],
    written: Mapping[str, Any],
    layers: Layers,
) -> list[dict[str, Any]]:
    """Return the slices with their weights."""
    tables = [dict(settings) for _ in config["slices"]]
    for piece, table in zip(config["slices"], tables, strict=True):
        for name, groups in layers.groups.items():
            if groups.ends:
                (key,) = groups.shares(_range_of(piece)[0], groups.ends[-1])
                table[name] = weights[groups.names_of(name)[key]]
    # What is in no layer has the weight of the first slice, as in a search. mergekit takes that of
    # the last one for the norm and the head of architectures that it knows.
    for name, first in tables[0].items():
        if layers.stack is not None and tables[-1][name] != first:
            inside = {"filter": layers.stack, "value": tables[-1][name]}
            tables[-1][name] = [inside, {"value": first}]
    pieces = zip(config["slices"], tables, strict=True)
    return [_slice_with(piece, table, config, path, written) for piece, table in pieces]


def _slice_with(
    piece: Mapping[str, Any],
    table: Mapping[str, Setting],
    config: Mapping[str, Any],
    path: Path,
    written: Mapping[str, Any],
) -> dict[str, Any]:
    """Return a slice with its weights, and with every vector and the base, wherever it has them:
    the last slice of mergekit loses sources of the norm and the head that the first one lacks.
    """
    base, names = base_of(config, path), {m: n for n, m in vector_names(config, path).items()}
    models = [model_name_in(source["model"], path) for source in piece["sources"]]
    given = dict(zip(models, (source["model"] for source in piece["sources"]), strict=True))
    sources = []
    for model in [*models, *(each for each in (*names, base) if each not in given)]:
        name = names.get(model)
        as_given = given.get(model, config["base_model"])
        source = {"model": as_given if name is None else written[name]}
        source["layer_range"] = _range_of(piece)
        if name is not None:
            source["parameters"] = {"weight": table[name]}
        sources.append(source)
    return {"sources": sources} | {key: piece[key] for key in ("base_model",) if piece.get(key)}


def _as_written(config: Mapping[str, Any], model: Any, path: Path, kind: str) -> Any:
    """Return a model as a config names it; an adapter on its own together with the base, as
    mergekit needs it.
    """
    if kind != "adapter" or model_name_in(model, path).adapter is not None:
        return model
    base = config["base_model"]
    if isinstance(base, str) and isinstance(model, str) and "+" not in base + model:
        return f"{base}+{model}"
    return ModelName(base_of(config, path).model, model_name_in(model, path).model).long_form


def text_with(config: Mapping[str, Any], path: Path) -> str | None:
    """Return the text of a mergekit YAML with the values of `config`, which `with_weights` made of
    it, and with its comments, order and anchors; None if they cannot be kept.
    """
    given = read_yaml(path)
    if path.suffix == ".json":
        return None
    ours = {key: config.get(key, value) for key, value in given.items() if _stays(key, config)}
    return edit_yaml(path.read_text(encoding="utf-8-sig"), {**ours, **config})


def _stays(key: str, config: Mapping[str, Any]) -> bool:
    """Whether a field stays in a config: with a new value, or as an anchor or a note."""
    return key in config or key not in FIELDS_OF_MERGEKIT
