"""Groups of the tensors of a vector, each with a weight of its own: by their names, as with the
filters of mergekit, by layers, or along the layers, as with its gradients.

A vector, its groups and weights by group come in; weights by name go out, `math.mlp` for the group
`mlp` of the vector `math`. Everything that merges sees each part as a vector of its own. A part is
a group or, of a gradient, a layer, whose weight lies between those of two groups.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

ELSE, LAYERS, GRADIENT = "else", "layers", "gradient"
LAYER_KEY = re.compile(rf"{LAYERS}\.\d+")
RUN_KEY = re.compile(rf"{LAYERS}\.(\d+):(\d+)")
GRADIENT_KEY = re.compile(rf"{GRADIENT}\.\d+")
OF_LAYER = re.compile(r"(?P<stack>(.*?\.)?)(?P<layer>\d+)\.")  # the first number counts layers


@dataclass(frozen=True)
class Groups:
    """How a vector is split, in one of four ways.

    With `filters`, a tensor belongs to the first that is a part of its name; `else` takes the rest.
    With `n_layer_groups`, a group is a run of neighbouring layers, all of as equal a length as
    possible; `ends` gives the end of each run instead. With `n_anchors`, the weight of a layer is
    interpolated between weights at equal distances along the layers. In the last three, what is in
    no layer (embedding, head, norms) goes with the first layer, as with mergekit's gradients.
    """

    filters: tuple[str, ...] = ()
    n_layer_groups: int = 0
    ends: tuple[int, ...] = ()
    n_anchors: int = 0

    @classmethod
    def of_keys(cls, keys: Collection[str]) -> "Groups":
        """Return the groups with these `keys`, if they have them (see `keys`)."""
        if all(LAYER_KEY.fullmatch(key) for key in keys):
            return cls(n_layer_groups=len(keys))
        if all(GRADIENT_KEY.fullmatch(key) for key in keys):
            return cls(n_anchors=len(keys))
        runs = [RUN_KEY.fullmatch(key) for key in keys]
        if all(runs):
            return cls(ends=tuple(int(run[2]) for run in runs if run))
        return cls(tuple(keys))

    @property
    def keys(self) -> list[str]:
        """The names of the groups, in order."""
        if self.ends:
            starts = (0, *self.ends[:-1])
            return [f"{LAYERS}.{s}:{e}" for s, e in zip(starts, self.ends, strict=True)]
        layers = [f"{LAYERS}.{number + 1}" for number in range(self.n_layer_groups)]
        return [*self.filters] or layers or self._anchors

    @property
    def _anchors(self) -> list[str]:
        return [f"{GRADIENT}.{number + 1}" for number in range(self.n_anchors)]

    @property
    def is_in_order(self) -> bool:
        """Whether each run of layers has layers."""
        return all(start < end for start, end in pairwise((0, *self.ends)))

    @property
    def needs_layers(self) -> bool:
        """Whether the number of layers decides where a tensor belongs."""
        return not self.filters

    @property
    def least_layers(self) -> int:
        """The smallest number of layers that can be split like this."""
        return max(self.n_layer_groups, self.n_anchors, *self.ends, 0)

    def names_of(self, vector: str) -> dict[str, str]:
        """Return the name of the weight of each group of a vector."""
        return {key: f"{vector}.{key}" for key in self.keys}

    def parts(self, n_layers: int) -> list[str]:
        """Return the keys of the parts: those of the groups or, of a gradient, one per layer."""
        if not self.n_anchors:
            return self.keys
        return [f"{LAYERS}.{number + 1}" for number in range(n_layers)]

    def shares(self, layer: int, n_layers: int) -> dict[str, float]:
        """Return the groups whose weights make that of a layer of `n_layers`, each with its share;
        layers beyond (for multi-token prediction) go with the last one.
        """
        layer = min(layer, n_layers - 1)
        if self.n_layer_groups:
            return {self.keys[layer * self.n_layer_groups // n_layers]: 1.0}
        if self.ends:
            return {self.keys[sum(end <= layer for end in self.ends[:-1])]: 1.0}
        place = layer / (n_layers - 1) * (self.n_anchors - 1) if n_layers > 1 else 0.0
        before = int(place)  # mergekit's formula, so that the bits are its own
        after = {} if place == before else {self._anchors[before + 1]: place - before}
        return {self._anchors[before]: 1 - (place - before)} | after

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
            parts.setdefault(self._part_of(name, n_layers), []).append(name)
        return parts

    def _part_of(self, name: str, n_layers: int) -> str:
        if self.filters:
            return next((key for key in self.filters if key == ELSE or key in name), "")
        numbered = OF_LAYER.match(name)
        layer = int(numbered["layer"]) if numbered else 0
        if self.n_anchors:
            return f"{LAYERS}.{min(layer, n_layers - 1) + 1}"
        return next(iter(self.shares(layer, n_layers)))


def is_filter(key: str) -> bool:
    """Whether a key of a group can be a part of a tensor's name, or `else`."""
    is_name = bool(key.isprintable() and key.strip() and "/" not in key and key != "*")
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
    """Return the weights of the vectors of a split pool. They are `weights`, but those of the
    groups of a gradient become one for each layer.
    """
    spread = dict(weights)
    for vector, own in groups.items():
        if not own.n_anchors:
            continue
        values = {key: spread.pop(name, 0.0) for key, name in own.names_of(vector).items()}
        for layer, part in enumerate(own.parts(n_layers)):
            shares = own.shares(layer, n_layers)
            spread[f"{vector}.{part}"] = sum(share * values[key] for key, share in shares.items())
    return spread


def slopes_of_groups(
    slopes: Mapping[str, float], groups: Mapping[str, Groups], n_layers: int
) -> dict[str, float]:
    """Return derivatives in the weights of groups from those in `weights_of_parts`."""
    gathered = dict(slopes)
    for vector, own in groups.items():
        if not own.n_anchors:
            continue
        names = own.names_of(vector)
        gathered |= dict.fromkeys(names.values(), 0.0)
        for layer, part in enumerate(own.parts(n_layers)):
            slope = gathered.pop(f"{vector}.{part}")
            for key, share in own.shares(layer, n_layers).items():
                gathered[names[key]] += share * slope
    return gathered
