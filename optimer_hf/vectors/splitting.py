"""Split an opened vector into its groups: each comes out as a vector of the same kind, with the
tensors of its group alone.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from optimer_hf.errors import ModelError
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.vectors.groups import ELSE, GRADIENT, LAYERS, OF_LAYER, Groups
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
    """Return the tensors in each group of a vector that moves `names` of a base."""
    where = f"vectors.{vector}.by"
    try:
        split = groups.split(names, _count_layers(where, groups, base))
    except ValueError as error:
        raise ModelError(f"{where}: {error}.") from None
    for key, weight in groups.names_of(vector).items():
        if not groups.n_anchors and not split[key] and weight not in idle:
            raise ModelError(f"{where}: {_why_empty(key, groups, names)}")
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
    for key in groups.filters:
        if key != ELSE and not any(key in name for name in names):
            raise ModelError(f"{where}: {_why_empty(key, groups, names)}")


def idle_weights(weights: Mapping[str, float]) -> set[str]:
    """Return the names of weights that are 0: what they scale may be nothing."""
    return {name for name, weight in weights.items() if weight == 0}


def stack_of(base: Path) -> str | None:
    """Return what the names of a model's tensors in layers begin with, such as `model.layers.`;
    None for a model without layers.
    """
    numbered = (OF_LAYER.match(name) for name in Checkpoint(base).names)
    return next((match["stack"] for match in numbered if match and match["stack"]), None)


def _count_layers(where: str, groups: Groups, base: ResolvedModel) -> int:
    """Return the number of layers of a base, if groups need it. Raises ModelError for fewer layers
    than groups, and for runs of layers that end elsewhere.
    """
    n_layers = layers_for({where: groups}, base)
    if groups.least_layers > n_layers:
        kind = GRADIENT if groups.n_anchors else LAYERS
        number = groups.keys[-1] if groups.ends else groups.least_layers
        raise ModelError(
            f"{where}: found {kind}: {number}, but the base has {n_layers} layers. Give a smaller "
            "number."
        )
    if groups.ends and groups.ends[-1] < n_layers:
        raise ModelError(
            f"{where}: the groups end at layer {groups.ends[-1]}, but the base has {n_layers} "
            "layers. Make the last one end there."
        )
    return n_layers


def _why_empty(key: str, groups: Groups, names: Iterable[str]) -> str:
    if key == ELSE:
        return f"'{ELSE}' has no tensors, as the other groups take all. Leave it out."
    if groups.needs_layers:
        return f"the vector moves nothing in the layers of group '{key}'. Give fewer groups."
    example = next((name for name in sorted(names) if key in name), None)
    if example is None:
        some = ", ".join(sorted(_parts_of(names))[:20])
        return f"no tensor has {key!r} in its name. Parts of names: {some}."
    earlier = next(each for each in groups.filters if each in example)
    return f"'{key}' has no tensors, as '{earlier}' before it takes them all. Put it first."


def _parts_of(names: Iterable[str]) -> set[str]:
    parts = {part for name in names for part in name.split(".") if not part.isdigit()}
    return parts - {"model", "weight", "bias", LAYERS}
