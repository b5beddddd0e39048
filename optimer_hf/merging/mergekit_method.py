"""The merge method `optimer` for mergekit: base plus weighted vectors, with the streaming writer's
kernel.
"""

import functools
from pathlib import Path
from typing import Any

import torch

from optimer_hf.merging.kernel import add_weighted
from optimer_hf.merging.mergekit_keys import METHOD
from optimer_hf.models.layout import is_delta
from optimer_hf.vectors.forms import Delta, Trained


@functools.cache
def register_method() -> None:
    """Register `optimer` with mergekit, once per process and only when needed: importing mergekit
    takes seconds.
    """
    from mergekit.merge_methods.base import BasePolicy, InputContract, PerNonBase, TensorGroup
    from mergekit.merge_methods.easy_define import merge_method
    from mergekit.merge_methods.registry import register

    def kernel(
        group: TensorGroup, weight: PerNonBase[float], delta: PerNonBase[bool | None] = None
    ) -> torch.Tensor:
        declared = delta.values_for(group.non_base)
        deltas: list[Delta] = [
            entry.tensor
            if (is_delta(_path_of(entry)) if declared_delta is None else declared_delta)
            else Trained(entry.tensor)
            for entry, declared_delta in zip(group.non_base, declared, strict=True)
        ]
        weights = weight.values_for(group.non_base)
        return add_weighted(group.base.tensor, deltas, weights)  # the contract requires a base

    kernel.__annotations__ = {
        "group": TensorGroup,
        "weight": PerNonBase[float],
        "delta": PerNonBase[bool | None],
        "return": torch.Tensor,
    }
    contract = InputContract(base=BasePolicy.REQUIRED, min_non_base=1)
    register(
        merge_method(
            kernel,
            name=METHOD,
            pretty_name="OptiMer",
            reference_url="https://arxiv.org/abs/2603.28858",
            contract=contract,
        )
    )


def _path_of(entry: Any) -> Path:
    """Return the directory of a tensor's model, if it is on this disk; of models elsewhere, the
    config says which are deltas.
    """
    return Path(str(entry.id.model.path))
