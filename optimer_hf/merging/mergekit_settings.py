"""The parameter `weight` of a mergekit config as rules, and as weights of the groups of a vector.

The settings of a model come in, those of its own entry first; rules go out. A rule has part of a
tensor's name and a number, or values along the layers; the first rule that fits a name counts.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optimer_hf.vectors.groups import ELSE, GRADIENT, Group, Groups, is_filter, join_key

WHOLE = ""  # key of the one weight of a vector that is not split

Setting = float | list[Any]  # one number, a number for each layer, or filters with either of these
Table = dict[str, float]  # weights of a vector, by the key of their group


@dataclass(frozen=True)
class Rule:
    """What a setting says of the tensors whose names have `name` as a part ("": of the rest)."""

    name: str
    values: tuple[float, ...]

    def key(self, run: str, *, is_alone: bool) -> str:
        """Return what the keys of its group begin with."""
        return join_key(run, self.name or (WHOLE if is_alone else ELSE))


def rules_of(*blocks: Mapping[str, Any], parameter: str = "weight") -> list[Rule]:
    """Return the rules for a parameter in some blocks of a config, which count in this order: a
    tensor that no rule of one fits has the value of the next.
    """
    rules: dict[str, Rule] = {}
    for block in blocks:
        for name, value in conditions_of((block.get("parameters") or {}).get(parameter)):
            values = value if isinstance(value, list) else [value]
            rules.setdefault(name, Rule(name, tuple(map(float, values))))
            if not name:
                return list(rules.values())  # nothing is left for later ones
    return list(rules.values())


def conditions_of(setting: Any) -> Iterator[tuple[str, Any]]:
    """Yield the filters of a setting with their values; "" is the filter for all tensors."""
    items = setting if isinstance(setting, list) else [setting]
    if not any(isinstance(item, Mapping) for item in items):
        if setting is not None:
            yield "", setting
        return
    for item in items:
        given = item.get("filter")
        yield "" if given in (None, "*") else given, item["value"]


def can_split(rules: Iterable[Rule]) -> bool:
    """Whether the rules can be told apart as groups."""
    return all(not rule.name or (is_filter(rule.name) and rule.name != ELSE) for rule in rules)


def table_of(rules: Sequence[Rule], run: str = "") -> Table:
    """Return the weights that rules give the groups of a vector."""
    table: Table = {}
    for rule in rules:
        key = rule.key(run, is_alone=len(rules) == 1)
        if len(rule.values) == 1:
            table[key] = rule.values[0]
        else:
            for number, value in enumerate(rule.values):
                table[join_key(key, f"{GRADIENT}.{number + 1}")] = value
    return table


def setting_of(groups: Groups, own: Table, n_layers: int | None) -> Setting:
    """Return the setting that gives a vector the weights `own` of its groups. Where there are runs
    of layers, it has a value for each of `n_layers`, which mergekit takes as they are. Tensors
    outside of all groups have weight 0.
    """
    values = {name: _values_of(name, groups, own, n_layers) for name in (*groups.names, ELSE)}
    return _as_setting(values)


def setting_in_run(groups: Groups, run: str, own: Table) -> Setting:
    """Return the setting of a vector in a slice with the layers of a run."""
    names = [name for name in groups.names if groups.has(run, name)]
    return _as_setting({n: _values_in(groups.group_of(run, n), own) for n in (*names, ELSE)})


def _as_setting(values: Mapping[str, Setting]) -> Setting:
    rest = values[ELSE]
    named = [{"filter": key, "value": value} for key, value in values.items() if key != ELSE]
    return [*named, {"value": rest}] if named else rest


def _values_in(group: Group | None, own: Table) -> Setting:
    if group is None:
        return 0.0
    values: list[Any] = [own[key] for key in group.keys]
    return values if group.n_values else values[0]


def _values_of(name: str, groups: Groups, own: Table, n_layers: int | None) -> Setting:
    """Return the number for a part of names, or its values along the layers."""
    if not any(groups.runs):
        return _values_in(groups.group_of("", name), own)
    assert n_layers is not None  # whoever has weights by layers knows their number
    values = []
    for layer in range(n_layers):
        group = groups.group_of(groups.run_of(layer, n_layers), name)
        shares = {} if group is None else groups.shares(group, layer, n_layers)
        values.append(sum((share * own[key] for key, share in shares.items()), 0.0))
    return values


def with_outside(
    last: Setting, first: Setting, outside: Iterable[str], stack: str | None
) -> Setting:
    """Return the setting of the last slice that gives tensors in no layer (the names `outside`) the
    weights that the setting of the `first` one gives them; names in layers begin with `stack`.
    """
    expected = {name: value_at_start(first, name) for name in outside}
    if stack is None or all(value_at_start(last, n) == value for n, value in expected.items()):
        return last
    rules = list(conditions_of(last))
    named = [{"filter": name, "value": value} for name, value in rules if name]
    rest = next((value for name, value in rules if not name), 0.0)
    others = {n: v for n, v in expected.items() if any(rule["filter"] in n for rule in named)}
    alike = Counter(value for name, value in expected.items() if name not in others)
    for_rest = alike.most_common(1)[0][0] if alike else 0.0
    others |= {n: v for n, v in expected.items() if n not in others and v != for_rest}
    exact = [{"filter": name, "value": value} for name, value in others.items()]
    return [*exact, *named, {"filter": stack, "value": rest}, {"value": for_rest}]


def value_at_start(setting: Setting, name: str) -> float:
    """Return the number that a setting gives a tensor where no layer counts."""
    rules = rules_of({"parameters": {"weight": setting}})
    return next((rule.values[0] for rule in rules if rule.name in name), 0.0)
