"""Groups of the tensors of a vector, each with a weight of its own: by layers, by their names, as
with the filters of mergekit, or along the layers, as with its gradients.

A vector, its groups and weights by group come in; weights by name go out, `math.mlp` for the group
`mlp` of the vector `math`. Everything that merges sees each part as a vector of its own. A part is
a group or, of a gradient, a layer, whose weight lies between two of its values.

A key names a weight. It has up to three steps: layers, a part of a tensor's name within them, and a
value of a gradient along them, such as `layers.0:8/self_attn/gradient.2`.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

ELSE, LAYERS, GRADIENT, INSIDE = "else", "layers", "gradient", "/"
LAYER_KEY = re.compile(rf"{LAYERS}\.\d+")
RUN_KEY = re.compile(rf"{LAYERS}\.(\d+):(\d+)")
GRADIENT_KEY = re.compile(rf"{GRADIENT}\.\d+")
OF_LAYER = re.compile(r"(?P<stack>(.*?\.)?)(?P<layer>\d+)\.")  # the first number counts layers


def join_key(*steps: str) -> str:
    """Return the key with these steps, without those that are empty."""
    return INSIDE.join(step for step in steps if step)


@dataclass(frozen=True)
class Group:
    """Tensors with one weight or, along the layers, with `n_values` of which those of the layers
    are interpolated: those of a `run` of layers (`layers.2` or `layers.0:8`; "": all) whose names
    have `name` as a part ("" or `else`: the rest).
    """

    run: str = ""
    name: str = ""
    n_values: int = 0

    @property
    def key(self) -> str:
        """What the keys of the group begin with."""
        return join_key(self.run, self.name)

    @property
    def keys(self) -> list[str]:
        """The keys of its weights."""
        values = [f"{GRADIENT}.{number + 1}" for number in range(self.n_values)]
        return [join_key(self.key, value) for value in values or [""]]

    @property
    def takes_rest(self) -> bool:
        """Whether it takes all tensors of its layers that no group before it has."""
        return self.name in ("", ELSE)

    def parts(self, layers: range) -> list[str]:
        """Return the keys of its parts, where its run is these layers."""
        if not self.n_values:
            return self.keys
        return [self.part_of(layer) for layer in layers]

    def part_of(self, layer: int) -> str:
        return join_key(self.key, f"{LAYERS}.{layer + 1}") if self.n_values else self.key

    def shares(self, layer: int, layers: range) -> dict[str, float]:
        """Return the keys of the weights that make that of a layer, each with its share."""
        if not self.n_values:
            return {self.key: 1.0}
        t = (layer - layers.start) / (len(layers) - 1) if len(layers) > 1 else 1.0
        place = t * (self.n_values - 1)
        before = int(place)  # mergekit's formula, so that the bits are its own
        after = {} if place == before else {self.keys[before + 1]: place - before}
        return {self.keys[before]: 1 - (place - before)} | after


@dataclass(frozen=True)
class Groups:
    """How a vector is split.

    A tensor belongs to the run of its layer; what is in no layer (embedding, head, norms) goes with
    the first layer, as with mergekit's gradients. Of the names of all groups, the first that is a
    part of its own counts. A run without a group of that name has it in `else`.

    A run is given by its ends (`layers.0:8`) or by its number among all (`layers.1`), as equal in
    length as possible.
    """

    members: tuple[Group, ...]

    @classmethod
    def of_keys(cls, keys: Iterable[str]) -> "Groups":
        """Return the groups with these `keys`, if they have them (see `keys`)."""
        n_values: dict[tuple[str, str], int] = {}
        for key in keys:
            run, name, value = _steps_of(key)
            n_values[run, name] = n_values.get((run, name), 0) + bool(value)
        return cls(tuple(Group(*at, n) for at, n in n_values.items()))

    @property
    def keys(self) -> list[str]:
        """The keys of the weights, in order."""
        return [key for group in self.members for key in group.keys]

    @property
    def runs(self) -> list[str]:
        """The runs of layers; one that is empty, if there are none."""
        return list(dict.fromkeys(group.run for group in self.members))

    @property
    def names(self) -> list[str]:
        """The parts of names that tell tensors apart, in order, without `else`."""
        return list(dict.fromkeys(g.name for g in self.members if not g.takes_rest))

    @property
    def ends(self) -> list[int]:
        """The end of each run, where they are given."""
        return [int(found[2]) for run in self.runs if (found := RUN_KEY.fullmatch(run))]

    @property
    def needs_layers(self) -> bool:
        """Whether the number of layers decides where a tensor belongs."""
        return any(group.run or group.n_values for group in self.members)

    @property
    def n_values(self) -> int:
        """The largest number of values of a gradient."""
        return max((group.n_values for group in self.members), default=0)

    def names_of(self, vector: str) -> dict[str, str]:
        """Return the name of the weight of each key of a vector."""
        return {key: f"{vector}.{key}" for key in self.keys}

    def layers_of(self, run: str, n_layers: int) -> range:
        """Return the layers of a run, of a model that has `n_layers`."""
        if (ends := RUN_KEY.fullmatch(run)) is not None:
            return range(int(ends[1]), int(ends[2]))
        runs = self.runs
        at, n = runs.index(run), len(runs)
        starts = [-(-index * n_layers // n) for index in (at, at + 1)]
        return range(*starts)

    def run_of(self, layer: int, n_layers: int) -> str:
        """Return the run that a layer belongs to; layers beyond the last one, for multi-token
        prediction, go with that.
        """
        layer, runs = min(layer, n_layers - 1), self.runs
        if len(runs) == 1:
            return runs[0]
        return next((run for run in runs if layer in self.layers_of(run, n_layers)), runs[-1])

    def group_of(self, run: str, name: str) -> Group | None:
        """Return the group of a run that has a part of names ("" or `else`: the rest)."""
        own = [group for group in self.members if group.run == run]
        exact = (group for group in own if group.name == name and not group.takes_rest)
        rest = (group for group in own if group.takes_rest)
        return next(exact, None) or next(rest, None)

    def has(self, run: str, name: str) -> bool:
        """Whether a run has a group of its own with this part of names."""
        return any((group.run, group.name) == (run, name) for group in self.members)

    def parts(self, n_layers: int) -> list[str]:
        """Return the keys of the parts: those of the groups or, of a gradient, one per layer."""
        spans = ((group, self.layers_of(group.run, n_layers)) for group in self.members)
        return [part for group, layers in spans for part in group.parts(layers)]

    def shares(self, group: Group, layer: int, n_layers: int) -> dict[str, float]:
        """Return the keys of the weights that make that of a layer in a group of its run, each with
        its share.
        """
        layer = min(layer, n_layers - 1)
        return group.shares(layer, self.layers_of(group.run, n_layers))

    def split(self, names: Iterable[str], n_layers: int) -> dict[str, list[str]]:
        """Return the names of tensors by part, every part in order; `n_layers` is that of the base.
        Names that belong to no part have the key "".

        Raises ValueError for layers in two stacks.
        """
        parts: dict[str, list[str]] = {key: [] for key in self.parts(n_layers)}
        names = sorted(names)
        if self.needs_layers:
            _refuse_two_stacks(names)
        for name in names:
            layer = min(layer_of(name), n_layers - 1)
            found = next((each for each in self.names if each in name), ELSE)
            group = self.group_of(self.run_of(layer, n_layers), found)
            parts.setdefault("" if group is None else group.part_of(layer), []).append(name)
        return parts

    def mistakes(self, keys: Collection[str]) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the `keys` that the groups were made of, with the key at fault
        ("": all).
        """
        for group in self.members:
            mates = [each for each in self.members if each.run == group.run]
            is_alone = len(mates) == 1 and not group.name
            if not is_alone and not is_filter(group.name):
                expected = f"expected part of a tensor's name, or '{ELSE}' for the rest"
                yield group.keys[0], f"found the group {group.keys[0][:80]!r}; {expected}"
            if group.name == ELSE and group != mates[-1]:
                yield group.key, "it takes every tensor, so it has to be the last group"
        if self.keys != list(keys) or not self._are_runs_in_order or self._has_lone_value:
            yield "", f"found {', '.join(keys)}; expected each layer in one group, in order"

    @property
    def _has_lone_value(self) -> bool:
        """Whether a gradient has one value alone, which is no gradient."""
        return any(group.n_values == 1 for group in self.members)

    @property
    def _are_runs_in_order(self) -> bool:
        """Whether every layer is in one run, and each run has layers."""
        runs = [run for run, _ in groupby(group.run for group in self.members)]
        if not any(runs) or runs == [f"{LAYERS}.{number + 1}" for number in range(len(runs))]:
            return True
        end = 0
        for run in runs:
            ends = RUN_KEY.fullmatch(run)
            if ends is None or not end == int(ends[1]) < int(ends[2]):
                return False
            end = int(ends[2])
        return True


def _steps_of(key: str) -> tuple[str, str, str]:
    """Return the run, the part of a name and the value of a gradient in a key; "" for none."""
    steps = key.split(INSIDE)
    run = steps.pop(0) if LAYER_KEY.fullmatch(steps[0]) or RUN_KEY.fullmatch(steps[0]) else ""
    value = steps.pop() if steps and GRADIENT_KEY.fullmatch(steps[-1]) else ""
    return run, INSIDE.join(steps), value


def layer_of(name: str) -> int:
    """Return the layer of a tensor; 0 for one that is in none."""
    numbered = OF_LAYER.match(name)
    return int(numbered["layer"]) if numbered else 0


def is_filter(key: str) -> bool:
    """Whether a key of a group can be a part of a tensor's name, or `else`."""
    is_name = bool(key.isprintable() and key.strip() and INSIDE not in key and key != "*")
    return is_name and not any(form.fullmatch(key) for form in (LAYER_KEY, RUN_KEY, GRADIENT_KEY))


def _refuse_two_stacks(names: Iterable[str]) -> None:
    stacks: dict[str, str] = {}
    for name in names:
        if (found := OF_LAYER.match(name)) is not None:
            stacks.setdefault(found["stack"], name)
    if len(stacks) > 1:
        one, other, *_ = stacks.values()
        raise ValueError(
            f"{one!r} and {other!r} count layers apart from each other, so groups of layers cannot "
            "be told. Split the vector by names instead"
        )


def confusable_names(split: Iterable[str], names: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield each of the `names` of vectors that could be that of a group of a `split` vector, with
    what is wrong.
    """
    names = list(names)
    for vector in split:
        for name in names:
            if name.startswith(f"{vector}."):
                yield name, f"could be a group of {vector!r}; choose a name without '{vector}.'"


def weights_of_groups(
    vector: str, groups: Groups | None, weights: Mapping[str, float]
) -> dict[str, float]:
    """Return the weights of the groups of a vector by group; of a whole vector by the key ""."""
    if groups is None:
        return {"": weights[vector]}
    return {key: weights[name] for key, name in groups.names_of(vector).items()}


def weights_of_parts(
    weights: Mapping[str, float], groups: Mapping[str, Groups], n_layers: int
) -> dict[str, float]:
    """Return the weights of the vectors of a split pool. They are `weights`, but the values of a
    gradient become one weight for each layer.
    """
    spread = dict(weights)
    for vector, own in groups.items():
        for group in own.members:
            if not group.n_values:
                continue
            values = {key: spread.pop(f"{vector}.{key}", 0.0) for key in group.keys}
            for part, shares in _shares_of_parts(own, group, n_layers):
                spread[f"{vector}.{part}"] = sum(share * values[key] for key, share in shares)
    return spread


def slopes_of_groups(
    slopes: Mapping[str, float], groups: Mapping[str, Groups], n_layers: int
) -> dict[str, float]:
    """Return derivatives in the weights of groups from those in `weights_of_parts`."""
    gathered = dict(slopes)
    for vector, own in groups.items():
        for group in own.members:
            if not group.n_values:
                continue
            names = {key: f"{vector}.{key}" for key in group.keys}
            gathered |= dict.fromkeys(names.values(), 0.0)
            for part, shares in _shares_of_parts(own, group, n_layers):
                slope = gathered.pop(f"{vector}.{part}")
                for key, share in shares:
                    gathered[names[key]] += share * slope
    return gathered


def _shares_of_parts(
    groups: Groups, group: Group, n_layers: int
) -> Iterator[tuple[str, Iterable[tuple[str, float]]]]:
    """Yield each part of a group that is a gradient, with the shares of its values."""
    for layer in groups.layers_of(group.run, n_layers):
        yield group.part_of(layer), groups.shares(group, layer, n_layers).items()
