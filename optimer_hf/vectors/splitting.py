"""Split an opened vector into its groups: each comes out as a vector of the same kind, with the
tensors of its group alone.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from optimer_hf.errors import ModelError
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.vectors.groups import ELSE, GRADIENT, LAYERS, OF_LAYER, Group, Groups, join_key
from optimer_hf.vectors.layers import layers_for
from optimer_hf.vectors.vector import (
    AdapterVector,
    CheckpointVector,
    DeltaVector,
    DistributionVector,
)


def split_pool(
    vectors: Sequence[DistributionVector],
    groups: Mapping[str, Groups],
    base: ResolvedModel,
    *,
    idle: Collection[str] = (),
) -> list[DistributionVector]:
    """Return a pool with each vector that has `groups` (by its name) as one vector per part, which
    moves the tensors of the part and has the name of its weight (see `weights_of_parts`).

    Raises ModelError for a group without tensors, unless its weight is among the `idle` ones, which
    nothing has to depend on, and for tensors without a group.
    """
    pool: list[DistributionVector] = []
    for vector in vectors:
        own = groups.get(vector.name)
        if own is None:
            pool.append(vector)
            continue
        split = _split_names(vector.name, own, vector.names, base, idle)
        pool.extend(restrict(vector, f"{vector.name}.{key}", part) for key, part in split.items())
    return pool


def restrict(vector: DistributionVector, name: str, tensors: Iterable[str]) -> DistributionVector:
    """Return a vector under another name that moves some of the tensors of `vector` alone."""
    kept = frozenset(tensors)
    if isinstance(vector, CheckpointVector):
        padding = vector.padding
        if isinstance(padding, Checkpoint):
            padding = padding.rename({each: each for each in padding.names if each in kept})
        return replace(vector, name=name, names=kept, padding=padding)
    if isinstance(vector, DeltaVector):
        return replace(vector, name=name, unread=vector.unread | (vector.names - kept))
    assert isinstance(vector, AdapterVector)
    parts = {each: part for each, part in vector.parts.items() if each in kept}
    return replace(vector, name=name, parts=parts)


def _split_names(
    vector: str, groups: Groups, names: Iterable[str], base: ResolvedModel, idle: Collection[str]
) -> dict[str, list[str]]:
    """Return the tensors in each part of a vector that moves `names` of a base."""
    where = f"vectors.{vector}.by"
    n_layers = _count_layers(where, groups, base)
    try:
        split = groups.split(names, n_layers)
    except ValueError as error:
        raise ModelError(f"{where}: {error}.") from None
    for group in groups.members:
        parts = group.parts(groups.layers_of(group.run, n_layers))
        is_idle = all(f"{vector}.{key}" in idle for key in group.keys)
        if not is_idle and not any(split[part] for part in parts):
            raise ModelError(f"{where}: {_why_empty(group, groups, names)}")
    if rest := split.pop("", []):
        raise ModelError(
            f"{where}: no group takes {rest[0]!r} ({len(rest)} tensors in all). Add a group "
            f"'{ELSE}' at the end, which takes the rest (in a mergekit YAML, `- value: 0`)."
        )
    return split


def refuse_unknown_groups(vector: str, groups: Groups, base: ResolvedModel) -> None:
    """Raise ModelError for a group that can have no tensors, whatever a vector of the base moves,
    which is not trained yet.
    """
    where, names = f"vectors.{vector}.by", Checkpoint(base.path).names
    _count_layers(where, groups, base)
    for group in groups.members:
        if not group.takes_rest and not any(group.name in name for name in names):
            raise ModelError(f"{where}: {_why_empty(group, groups, names)}")


def idle_weights(weights: Mapping[str, float]) -> set[str]:
    """Return the names of weights that are 0: what they scale may be nothing."""
    return {name for name, weight in weights.items() if weight == 0}


def stack_of(base: Path) -> str | None:
    """Return what the names of a model's tensors in layers begin with, such as `model.layers.`;
    None for a model without layers.
    """
    numbered = (OF_LAYER.match(name) for name in Checkpoint(base).names)
    return next((match["stack"] for match in numbered if match and match["stack"]), None)


def names_outside(base: Path) -> list[str]:
    """Return the names of a model's tensors that are in no layer."""
    return [name for name in Checkpoint(base).names if not OF_LAYER.match(name)]


def _count_layers(where: str, groups: Groups, base: ResolvedModel) -> int:
    """Return the number of layers of a base, if groups need it. Raises ModelError for fewer layers
    than groups or values along them, and for runs of layers that end elsewhere.
    """
    n_layers = layers_for({where: groups}, base)
    n_runs = len(groups.runs) if any(groups.runs) and not groups.ends else 0
    if n_runs > n_layers or max(groups.ends, default=0) > n_layers:
        raise ModelError(
            f"{where}: found {LAYERS}: {n_runs or groups.runs[-1]}, but the base has {n_layers} "
            "layers. Give a smaller number."
        )
    if groups.ends and groups.ends[-1] < n_layers:
        raise ModelError(
            f"{where}: the groups end at layer {groups.ends[-1]}, but the base has {n_layers} "
            "layers. Make the last one end there."
        )
    for group in groups.members:
        n_own = len(groups.layers_of(group.run, n_layers))
        if group.n_values > n_own:
            found = f"{join_key(group.key, GRADIENT)}: {group.n_values}"
            has = f"{group.run} is {n_own}" if group.run else f"the base has {n_layers}"
            raise ModelError(f"{where}: found {found}, but {has} layers. Give a smaller number.")
    return n_layers


def _why_empty(group: Group, groups: Groups, names: Iterable[str]) -> str:
    if group.run or (group.n_values and group.takes_rest):
        return (
            f"the vector moves nothing in the layers of group '{group.key or GRADIENT}'. Give "
            "fewer groups."
        )
    if group.takes_rest:
        return f"'{ELSE}' has no tensors, as the other groups take all. Leave it out."
    example = next((name for name in sorted(names) if group.name in name), None)
    if example is None:
        some = ", ".join(sorted(_parts_of(names))[:20])
        return f"no tensor has {group.name!r} in its name. Parts of names: {some}."
    earlier = next(each for each in groups.names if each in example)
    return f"'{group.name}' has no tensors, as '{earlier}' before it takes them all. Put it first."


def _parts_of(names: Iterable[str]) -> set[str]:
    parts = {part for name in names for part in name.split(".") if not part.isdigit()}
    return parts - {"model", "weight", "bias", LAYERS}
