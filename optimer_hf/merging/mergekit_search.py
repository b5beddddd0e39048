"""What a search reads of a mergekit YAML, and the YAML with the weights that it found.

Each number of a `weight` is one weight to search: that of a model, of a filter, of a slice or of a
value along the layers. Along the layers there are at most MOST_SEARCHED: more gradient values than
that become so many, and more slices share weights.
"""

from collections.abc import Collection, Mapping, Sequence
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
    base_of,
    entries_of,
    is_union,
    makes_tokenizer,
    model_name_in,
    pool_of,
    settings_of,
    vector_names,
    why_not_plain,
    written_base,
)
from optimer_hf.merging.mergekit_settings import (
    WHOLE,
    Rule,
    Setting,
    can_split,
    conditions_of,
    rules_of,
    setting_in_run,
    with_outside,
)
from optimer_hf.merging.mergekit_table import FIELDS, OF_TASK_ARITHMETIC
from optimer_hf.vectors.groups import (
    ELSE,
    GRADIENT,
    LAYERS,
    Groups,
    join_key,
    layer_of,
    weights_of_groups,
)
from optimer_hf.vectors.record import read_record

MOST_SEARCHED = 4  # weights of a vector along the layers
METHODS = ("optimer", "task_arithmetic", "linear")  # whose result a sum of weighted vectors is
KEPT = ("tokenizer", "tokenizer_source", "chat_template", "name")
FIELDS_OF_MERGEKIT = {*FIELDS["config"], *OF_TASK_ARITHMETIC}
SPLIT = (
    "one weight is searched for each model, or for each filter, slice or value of a gradient of "
)
SPLIT += f"its `weight`, at most {MOST_SEARCHED} along the layers"

OTHER_LAYERS = (
    "A search keeps the layers of the base in order. To repeat or reorder layers, merge these "
    "slices of the base alone and of each model alone (merge_method: passthrough), then search the "
    "results under `models:`."
)

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
        if piece.get("residual_weight") is not None:
            message = "residual_weight: only mergekit reads it. Leave it out."
            raise _mistake(path, (*at, "residual_weight"), message)
        _refuse_other_base(config, piece, path, at)
        seen: set[ModelName] = set()
        for index, source in enumerate(piece["sources"]):
            layers, name = source["layer_range"], model_name_in(source["model"], path)
            is_first = layers == piece["sources"][0]["layer_range"]
            if not is_first or layers[0] != end or layers[1] <= end:
                expected = f"the layers from {end} on, of every model of the slice"
                message = f"layer_range: found {layers}, expected {expected}. {OTHER_LAYERS}"
                raise _mistake(path, (*at, "sources", index, "layer_range"), message)
            if name in seen:
                raise _mistake(path, (*at, "sources", index), f"{name} is there twice.")
            seen.add(name)
        end = piece["sources"][0]["layer_range"][1]


def _refuse_other_base(
    config: Mapping[str, Any], piece: Mapping[str, Any], path: Path, at: Place
) -> None:
    """Raise ConfigError for a slice with another base than the config, or with none."""
    base, given = base_of(config, path), piece.get("base_model") or config.get("base_model")
    if given is None:
        message = f"base_model: other slices have the base {base}, this one has none. Give it "
        raise _mistake(path, at, f"{message}once, at the top of the file.")
    if (own := model_name_in(given, path)) != base:
        raise _mistake(
            path,
            (*at, "base_model"),
            f"base_model: found {own}, but the base of the config is {base}. A search adds all "
            "vectors to one base; give the same one everywhere, or merge with `optimer merge`.",
        )


def refuse_other_depth(config: Mapping[str, Any], path: Path, n_layers: int) -> None:
    """Raise ConfigError for slices that are not all `n_layers` of the base."""
    end = _ends_of(config)[-1]
    if end != n_layers:
        place = ("slices", len(config["slices"]) - 1)
        raise _mistake(path, place, f"ends at layer {end}, but the base has {n_layers} layers.")


def _mistake(path: Path, place: Place, message: str) -> ConfigError:
    return ConfigError(list_mistakes(path, [(place, f"slices: {message}")]))


def splits_to_search(
    config: Mapping[str, Any], path: Path, names: Collection[str] = ()
) -> dict[str, By]:
    """Return how vectors are split, by name, that have more than one weight to search. In several
    slices, groups without any of the tensors that the base `names` are left out.

    Raises ConfigError for filters that are in another order in another slice, where that matters.
    """
    pieces, runs = rules_of_pieces(config, path), _runs_to_search(config, path)
    splits: dict[str, By] = {}
    for vector in vector_names(config, path):
        by: By = {}
        for run in runs:
            rules = [own for at in run.pieces if (own := pieces[at].get(vector)) is not None]
            by |= _by_rules(rules, run)
        if list(by) != [WHOLE]:
            splits[vector] = _kept_groups(by, names) if len(runs) > 1 else by
            _refuse_other_order(splits[vector], vector, names, path)
    return splits


def rules_of_pieces(config: Mapping[str, Any], path: Path) -> list[dict[str, list[Rule]]]:
    """Return the rules for the weight of each vector in each slice that has it, by name; all models
    together are one slice.
    """
    if not config.get("slices"):
        entries = _entries_by_vector(config, path).items()
        return [{name: rules_of(entry, config) for name, entry in entries}]
    names = {model: name for name, model in vector_names(config, path).items()}
    return [
        {
            names[model]: rules_of(source, piece, config)
            for source in piece["sources"]
            if (model := model_name_in(source["model"], path)) in names
        }
        for piece in config["slices"]
    ]


@dataclass(frozen=True)
class _Run:
    """Slices that share the weights of a vector: their layers as a key, how many values along them
    are searched at most, and their numbers.
    """

    key: str
    most: int
    pieces: range


def _runs_to_search(config: Mapping[str, Any], path: Path) -> list[_Run]:
    """Return the runs of layers that have weights of their own: the slices or, if there are more
    than a few and all have the same models, groups of slices.
    """
    ends = _ends_of(config)
    if len(ends) < 2:
        return [_Run("", min(MOST_SEARCHED, *ends or [MOST_SEARCHED]), range(1))]
    models = [_models_in(piece, path) for piece in config["slices"]]
    n = len(ends)
    is_shared = n > MOST_SEARCHED and all(each == models[0] for each in models)
    groups = [index * MOST_SEARCHED // n if is_shared else index for index in range(n)]
    most = 1 if is_shared else max(1, MOST_SEARCHED // n)
    runs, starts = [], [0, *ends]
    for group in dict.fromkeys(groups):
        at = [index for index in range(n) if groups[index] == group]
        start, end = starts[at[0]], ends[at[-1]]
        pieces = range(at[0], at[-1] + 1)
        runs.append(_Run(f"{LAYERS}.{start}:{end}", min(most, end - start), pieces))
    return runs


def _by_rules(given: list[list[Rule]], run: _Run) -> By:
    """Return the groups of a vector for its rules in the slices of a run. Where all leave it out,
    its weight is 0.
    """
    if not given:
        return {run.key: {"fixed": 0.0}}
    rules = [rule for own in given for rule in own]
    names = list(dict.fromkeys(rule.name for rule in rules if rule.name))
    has_rest = any(not rule.name for rule in rules)
    if not can_split(rules) or (len(names) == 1 and not has_rest and not run.key):
        return {run.key: {}}
    by: By = {}
    for name in [*names, WHOLE] if has_rest or not names else names:
        n = max((len(rule.values) for rule in rules if rule.name == name), default=1)
        n = min(n, run.most)
        key = Rule(name, ()).key(run.key, is_alone=not names)
        by |= {join_key(key, GRADIENT): {"groups": n}} if n > 1 else {key: {}}
    return by


def _kept_groups(by: By, names: Collection[str]) -> By:
    """Return the groups of runs that have any tensors among `names`, and those with a misspelt
    name, which have none in any run.
    """
    groups = groups_of(by)
    n_layers = groups.ends[-1]
    split = groups.split(names, n_layers)
    kept: By = {}
    for key, group in zip(by, groups.members, strict=True):
        parts = group.parts(groups.layers_of(group.run, n_layers))
        is_known = group.takes_rest or any(group.name in name for name in names)
        if not names or not is_known or any(split[part] for part in parts):
            kept[key] = by[key]
    return kept


def groups_of(by: By) -> Groups:
    """Return the groups that have these settings."""
    keys: list[str] = []
    for key, own in by.items():
        keys += [f"{key}.{number + 1}" for number in range(own.get("groups", 0))] or [key]
    return Groups.of_keys(keys)


def _refuse_other_order(by: By, vector: str, names: Collection[str], path: Path) -> None:
    """Raise ConfigError if a tensor has two filters of which one slice lacks the first, so that
    its group there would be another one than with mergekit.
    """
    groups = groups_of(by)
    n_layers = max(groups.ends, default=0)
    for name in names if n_layers else ():
        run = groups.run_of(layer_of(name), n_layers)
        fitting = [each for each in groups.names if each in name]
        own = next((each for each in fitting if groups.has(run, each)), ELSE)
        if groups.group_of(run, own) != groups.group_of(run, (*fitting, ELSE)[0]):
            message = (
                f"the weight of {vector} has the filters {fitting[0]!r} and {own!r}, both of which "
                f"fit {name!r}, and the slice {run} lacks the first one. Give it in all slices."
            )
            raise _mistake(path, (), message)


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
    items = setting if isinstance(setting, list) else [setting]
    filters = [item for item in items if isinstance(item, Mapping)]
    return bool(filters) and not any(
        isinstance(item.get("value"), list) or item.get("filter") == "*" for item in filters
    )


def former_split(by: By) -> By:
    """Return the groups that an older version made in place of `by`: one weight for each filter
    whatever its values along the layers, and for each slice whatever its filters.
    """
    groups = groups_of(by)
    keys = list(zip(by, groups.members, strict=True))
    if any(groups.runs):
        return {g.run: {k: v for k, v in by[key].items() if k == "fixed"} for key, g in keys}
    return {group.name: {} for _, group in keys} if groups.names else by


def _ends_of(config: Mapping[str, Any]) -> list[int]:
    return [_range_of(piece)[1] for piece in config.get("slices") or []]


def _range_of(piece: Mapping[str, Any]) -> list[int]:
    layers: list[int] = piece["sources"][0]["layer_range"]
    return layers


def _models_in(piece: Mapping[str, Any], path: Path) -> set[ModelName]:
    return {model_name_in(source["model"], path) for source in piece["sources"]}


# -- what is not -----------------------------------------------------------------------------------


def unsearched_settings(config: Mapping[str, Any], path: Path) -> list[str]:
    """Return the settings of a config that a search ignores, by field: everything beyond the
    numbers that it searches and the tokenizer of a model or of all.
    """
    ignored = []
    if config["merge_method"] not in METHODS:
        ignored.append(f"merge_method: {config['merge_method']}")
    most = [(run, at) for run in _runs_to_search(config, path) for at in run.pieces]
    most_in = {at: run.most for run, at in most}
    blocks: list[tuple[str, Sequence[Any], Mapping[str, Any], int]] = [("", [], config, most_in[0])]
    for number, piece in enumerate(config.get("slices") or []):
        blocks.append((f"slices.{number}", [], piece, most_in[number]))
    for at, entry in entries_of(config):
        piece = config["slices"][at[1]] if at[0] == "slices" else {}
        n = most_in[int(at[1])] if at[0] == "slices" else most_in[0]
        blocks.append((f"{at[0]}: {_text(entry['model'])}", [entry, piece, config], entry, n))
    for where, levels, block, n in blocks:
        for name, value in (block.get("parameters") or {}).items():
            if (note := _what_is_unsearched(name, value, rules_of(*levels or [block]), n)) is None:
                continue
            ignored.append(f"{where}: parameters.{name}{note}".removeprefix(": "))
    if makes_tokenizer(config) and not is_union(config):
        field = "tokenizer" if config.get("tokenizer") else "tokenizer_source"
        ignored.append(f"{field}: {quote(config.get(field))}")
    if config.get("chat_template"):
        ignored.append(f"chat_template: {quote(config['chat_template'])}")
    return list(dict.fromkeys(ignored))


def _what_is_unsearched(name: str, value: Any, rules: list[Rule], most: int) -> str | None:
    """Return what of a parameter a search ignores, to be read after its name; None: nothing. The
    `rules` are those of the weight with what other levels add, of which `most` values are searched.
    """
    if name == "int8_mask" or (name == "normalize" and value is False):
        return None  # a search does not normalise, either
    if name not in ("weight", "delta"):
        return ""
    if not isinstance(value, list | Mapping):
        return None
    if not can_split(rules) or [bool(rule.name) for rule in rules] == [True]:
        return " (filters that do not split the model)"
    given = (each for _, each in conditions_of(value) if isinstance(each, list))
    n = max(map(len, given), default=1)
    return f" ({n} values)" if n > most else None


def _text(value: Any) -> str:
    return value if isinstance(value, str) else quote(value)


# -- the weights that were found -------------------------------------------------------------------


@dataclass(frozen=True)
class Layers:
    """How vectors are split, by name, the number of layers of their base, what the names of tensors
    in its layers begin with, and the names of those outside of them.
    """

    groups: Mapping[str, Groups] = field(default_factory=dict)
    number: int | None = None
    stack: str | None = None
    outside: Collection[str] = ()


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
    `obstacle_in` names a reason; then it is `optimer`, and a list of models.
    Tokenizer and chat template are kept; parameters of other methods (density, ...) are not.
    """
    _, sources = pool_of(config, path)
    is_plain = obstacle_in(config, path, kinds) is None
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
        "base_model": written_base(config),
        **merged,
        **({"parameters": {"normalize": False}} if is_plain else {}),
        "dtype": "float32",
        "out_dtype": config.get("out_dtype") or config.get("dtype") or "bfloat16",
    }
    return ours | {key: config[key] for key in KEPT if config.get(key) is not None}


def obstacle_in(config: Mapping[str, Any], path: Path, kinds: Mapping[str, str]) -> str | None:
    """Return why mergekit alone cannot run a mergekit config with its models as they are written
    in it, as a clause; None if it can. `kinds` has the kind of each vector.
    """
    base, sources = pool_of(config, path)
    if "delta" in kinds.values():
        return "it reads a delta as a model"
    return why_not_plain([base, *sources.values()], kinds, joins_tokens=is_union(config))


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
    """Return the list of models with their weights; the base stays where it is written, by the one
    name that mergekit knows it by.
    """
    base, names = base_of(config, path), iter(settings)
    models: list[dict[str, Any]] = []
    for entry in config.get("models") or []:
        if model_name_in(entry["model"], path) == base:
            models.append({"model": written_base(config)})
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
                run = groups.run_of(_range_of(piece)[0], groups.ends[-1])
                own = weights_of_groups(name, groups, weights)
                table[name] = setting_in_run(groups, run, own)
    # What is in no layer has the weight of the first slice, as in a search. mergekit takes that of
    # the last one for the norm and the head of architectures that it knows.
    for name, first in tables[0].items():
        tables[-1][name] = with_outside(tables[-1][name], first, layers.outside, layers.stack)
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
    sources = []
    for model in [*models, *(each for each in (*names, base) if each not in models)]:
        name = names.get(model)
        source = {"model": written_base(config) if name is None else written[name]}
        source["layer_range"] = _range_of(piece)
        if name is not None:
            source["parameters"] = {"weight": table[name]}
        sources.append(source)
    own = {"base_model": written_base(config)} if piece.get("base_model") else {}
    return {"sources": sources} | own


def _as_written(config: Mapping[str, Any], model: Any, path: Path, kind: str) -> Any:
    """Return a model as a config names it; an adapter on its own together with the base, as
    mergekit needs it.
    """
    if kind != "adapter" or model_name_in(model, path).adapter is not None:
        return model
    base = written_base(config)
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
