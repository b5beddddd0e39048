"""Groups of the tensors of a vector, each with a weight of its own: by their names, as with the
filters of mergekit, or by layers.

A vector, its groups and weights by group come in; weights by name go out, `math.mlp` for the group
`mlp` of the vector `math`. Everything that merges sees each group as a vector of its own.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

ELSE, LAYERS = "else", "layers"
LAYER_KEY = re.compile(rf"{LAYERS}\.\d+")
OF_LAYER = re.compile(r"(?P<stack>(.*?\.)?)(?P<layer>\d+)\.")  # the first number counts layers


@dataclass(frozen=True)
class Groups:
    """How a vector is split. With `filters`, a tensor belongs to the first that is a part of its
    name; `else` takes the rest. With `n_layer_groups`, a group is a run of neighbouring layers, all
    of as equal a length as possible, and the first one takes what is in no layer (embedding, head,
    norms), as with mergekit's gradients.
    """

    filters: tuple[str, ...] = ()
    n_layer_groups: int = 0

    @classmethod
    def of_keys(cls, keys: Collection[str]) -> "Groups":
        """Return the groups with these `keys`."""
        is_by_layers = all(LAYER_KEY.fullmatch(key) for key in keys)
        return cls(n_layer_groups=len(keys)) if is_by_layers else cls(tuple(keys))

    @property
    def keys(self) -> list[str]:
        """The names of the groups, in order."""
        layers = [f"{LAYERS}.{number + 1}" for number in range(self.n_layer_groups)]
        return [*self.filters] or layers

    def names_of(self, vector: str) -> dict[str, str]:
        """Return the name of the weight of each group of a vector."""
        return {key: f"{vector}.{key}" for key in self.keys}

    def group_of_layer(self, layer: int, n_layers: int) -> str:
        """Return the group of a layer of `n_layers`; layers beyond (for multi-token prediction)
        belong to the last group.
        """
        number = min(layer * self.n_layer_groups // n_layers, self.n_layer_groups - 1)
        return self.keys[number]

    def split(self, names: Iterable[str], n_layers: int) -> dict[str, list[str]]:
        """Return the names of tensors by group, every group in order; `n_layers` is that of the
        base. Names that belong to no group have the key "".

        Raises ValueError for layers in two stacks.
        """
        groups: dict[str, list[str]] = {key: [] for key in self.keys}
        names = sorted(names)
        if self.n_layer_groups:
            _refuse_two_stacks(names)
        for name in names:
            groups.setdefault(self._group_of(name, n_layers), []).append(name)
        return groups

    def _group_of(self, name: str, n_layers: int) -> str:
        if self.filters:
            return next((key for key in self.filters if key == ELSE or key in name), "")
        found = OF_LAYER.match(name)
        return self.group_of_layer(int(found["layer"]) if found else 0, n_layers)


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
