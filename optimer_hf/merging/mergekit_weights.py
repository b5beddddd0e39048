"""The weights that a mergekit YAML gives its models, as weights of the pool that a search makes of
it.

A config and the groups that are searched come in; weights by name go out, which give the merge that
mergekit makes of the config, up to rounding.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from optimer_hf.merging.mergekit_keys import METHOD
from optimer_hf.merging.mergekit_models import ModelName
from optimer_hf.merging.mergekit_pool import base_of, model_name_in, vector_names
from optimer_hf.merging.mergekit_search import METHODS, By, groups_of
from optimer_hf.merging.mergekit_settings import WHOLE, Rule, Table, can_split, rules_of, table_of
from optimer_hf.merging.mergekit_table import PARAMETERS
from optimer_hf.vectors.groups import ELSE, GRADIENT, GRADIENT_KEY, INSIDE, Groups, join_key

NEAR_ZERO = 1e-8  # sums of weights that mergekit does not divide by


def lacks_weights(config: Mapping[str, Any], path: Path) -> bool:
    """Whether a config leaves the weight of a vector to the search, so that it is no merge yet."""
    if "weight" not in PARAMETERS.get(config["merge_method"], ()):
        return False
    base = base_of(config, path)
    return any(
        model != base and not rules_of(entry, piece, config)
        for piece in _pieces(config)
        for model, entry in _entries(piece, path)
    )


def weights_of_config(
    config: Mapping[str, Any],
    path: Path,
    splits: Mapping[str, By],
    outside: Collection[str] = (),
) -> dict[str, float] | None:
    """Return the weights of the pool that give the merge of a config; None if there are none: its
    method is not a weighted sum, or it has more numbers than are searched. `splits` has the groups
    of the vectors that have any, `outside` the names of the base's tensors that are in no layer.
    """
    if config["merge_method"] not in METHODS:
        return None
    pieces = [_weights_of_piece(piece, config, path) for piece in _pieces(config)]
    weights: dict[str, float] = {}
    for name in vector_names(config, path):
        groups = groups_of(splits[name]) if name in splits else None
        table = _joined(name, pieces, groups, config, outside)
        keys = [WHOLE] if groups is None else groups.keys
        if table is None or set(table) != set(keys):
            return None
        weights |= {f"{name}.{key}" if key else name: table[key] for key in keys}
    return weights


def _pieces(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the slices of a config, or all its models as one."""
    return config.get("slices") or [{"sources": config.get("models") or []}]


def _entries(piece: Mapping[str, Any], path: Path) -> Iterator[tuple[ModelName, Mapping[str, Any]]]:
    for entry in piece["sources"]:
        yield model_name_in(entry["model"], path), entry


def _setting(*blocks: Mapping[str, Any], name: str = "weight") -> Any:
    """Return a parameter from the first of these blocks that has it."""
    given = (block.get("parameters") or {} for block in blocks)
    return next((parameters[name] for parameters in given if name in parameters), None)


# -- one piece -------------------------------------------------------------------------------------


def _weights_of_piece(
    piece: Mapping[str, Any], config: Mapping[str, Any], path: Path
) -> dict[str, Table] | None:
    """Return the weights of the vectors in a piece, by name, as factors of trained minus base; None
    if no weights of groups can be.
    """
    base, names = base_of(config, path), vector_names(config, path)
    by_model = {model: name for name, model in names.items()}
    given = [
        (model, _table(rules_of(each, piece, config))) for model, each in _entries(piece, path)
    ]
    if not config.get("slices"):  # a pool may have a model twice, under two names
        own = iter(names)
        tables = {next(own): table for model, table in given if model != base}
    else:
        tables = {by_model[model]: table for model, table in given if model != base}
    of_base = next((table for model, table in given if model == base), None)
    if of_base is None and not config.get("slices"):
        of_base = _table(rules_of(config))  # mergekit adds the base to a list of models
    known = {name: table for name, table in tables.items() if table is not None}
    return _scaled(known, of_base, piece, config) if len(known) == len(tables) else None


def _table(rules: list[Rule]) -> Table | None:
    """Return the weights in a setting by group; None if it leaves tensors without one."""
    if not can_split(rules) or not rules or rules[-1].name:
        return None
    return table_of(rules)


def _scaled(
    tables: dict[str, Table],
    of_base: Table | None,
    piece: Mapping[str, Any],
    config: Mapping[str, Any],
) -> dict[str, Table] | None:
    """Return weights after what the method makes of their sum."""
    method = config["merge_method"]
    is_linear, factor = method == "linear", 1.0
    normalize = _setting(piece, config, name="normalize") if method != METHOD else False
    normalize = is_linear if normalize is None else normalize
    if method == "task_arithmetic":
        given = _setting(piece, config, name="lambda")
        factor = 1.0 if given is None else given
    if not isinstance(normalize, bool) or not isinstance(factor, int | float):
        return None
    if not is_linear and not normalize:
        return {name: _times(table, factor) for name, table in tables.items()}
    if is_linear and of_base is None and not config.get("slices"):
        return None  # mergekit asks for its weight
    summed = [*tables.values(), *([of_base] if is_linear and of_base is not None else [])]
    if (totals := _totals(summed)) is None:
        return None
    if not normalize:  # the base is there as often as the weights sum to
        return tables if all(abs(total - 1) < NEAR_ZERO for total in totals.values()) else None
    return _divided(tables, totals, factor, is_linear=is_linear)


def _times(table: Table, factor: float) -> Table:
    return {key: value * factor for key, value in table.items()}


def _totals(tables: list[Table]) -> Table | None:
    """Return the sum of weights by group; None if models are split in different ways."""
    split = [table for table in tables if list(table) != [WHOLE]]
    if any(set(table) != set(split[0]) for table in split):
        return None
    keys = list(split[0]) if split else [WHOLE]
    return {key: sum(table.get(key, table.get(WHOLE, 0.0)) for table in tables) for key in keys}


def _divided(
    tables: dict[str, Table], totals: Table, factor: float, *, is_linear: bool
) -> dict[str, Table] | None:
    """Return weights divided by their sums. Where the sums differ, no whole vector and no gradient
    can have them.
    """
    if any(abs(total) < NEAR_ZERO for total in totals.values()):
        if is_linear:
            return None
        totals = {key: 1.0 if abs(total) < NEAR_ZERO else total for key, total in totals.items()}
    first = next(iter(totals.values()))
    if all(abs(total - first) < NEAR_ZERO for total in totals.values()):
        return {name: _times(table, factor / first) for name, table in tables.items()}
    if any(GRADIENT in key for key in totals) or any(WHOLE in table for table in tables.values()):
        return None
    return {
        name: {key: value * factor / totals[key] for key, value in table.items()}
        for name, table in tables.items()
    }


# -- several pieces --------------------------------------------------------------------------------


def _joined(
    name: str,
    pieces: list[dict[str, Table] | None],
    groups: Groups | None,
    config: Mapping[str, Any],
    outside: Collection[str],
) -> Table | None:
    """Return the weights of a vector from those in each slice; None if one number of the search is
    for several. A slice without the vector has 0.
    """
    if len(pieces) == 1:
        return None if pieces[0] is None else pieces[0].get(name)
    assert groups is not None  # several slices split every vector
    tables = [None if piece is None else piece.get(name, {WHOLE: 0.0}) for piece in pieces]
    first, last = tables[0], tables[-1]
    if any(table is None for table in tables) or first is None or last is None:
        return None
    if any(_at_start(first, tensor) != _at_start(last, tensor) for tensor in outside):
        return None  # mergekit takes norm and head from the last slice, we from the first
    joined: dict[str, set[float]] = {}
    for piece, table in zip(config["slices"], tables, strict=True):
        run = groups.run_of(piece["sources"][0]["layer_range"][0], groups.ends[-1])
        for key, value in (table or {}).items():
            if (own := _key_in_run(key, run, groups)) is not None:
                joined.setdefault(own, set()).add(value)
    if any(len(own) != 1 for own in joined.values()):
        return None
    return {key: own.pop() for key, own in joined.items()}


def _at_start(table: Table, tensor: str) -> float:
    """Return the weight that a table gives a tensor in no layer."""
    return next(
        (
            value
            for key, value in table.items()
            if (name := key.split(INSIDE)[0]) in (WHOLE, ELSE)
            or GRADIENT_KEY.fullmatch(name)
            or name in tensor
        ),
        0.0,
    )


def _key_in_run(key: str, run: str, groups: Groups) -> str | None:
    """Return the key of a weight in a run of layers; None for a filter that fits no tensor there,
    which has no weight in a search.
    """
    name = key.split(INSIDE)[0]
    is_filter = name != WHOLE and GRADIENT_KEY.fullmatch(name) is None
    return None if is_filter and not groups.has(run, name) else join_key(run, key)
