"""How many layers a base has, where groups of a vector's tensors need it; no weights are read."""

from collections.abc import Mapping

from optimer_hf.models.layout import ResolvedModel
from optimer_hf.models.loader import count_layers
from optimer_hf.vectors.groups import Groups


def layers_for(groups: Mapping[str, Groups], base: ResolvedModel) -> int:
    """Return the number of layers of a base, or 0 if no groups need it."""
    return count_layers(base.path) if any(each.needs_layers for each in groups.values()) else 0
