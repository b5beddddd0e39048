"""A live model plus its pool in memory: `set_weights(w)` in place, no disk, no reload.

Every trial of a search goes through here. The base values of the tensors that a vector moves are
kept beside the model, so a thousand settings leave no drift, and the values equal what the
streaming writer writes, bit for bit: both compute row block by row block through
`merge.merged_rows`.
"""

from collections.abc import Mapping, Sequence

import torch

from optimer_hf.convert import ResolvedModel
from optimer_hf.errors import ModelError
from optimer_hf.merge import merged_rows
from optimer_hf.vector import DTYPES, Checkpoint, DistributionVector, row_blocks


def default_device() -> str:
    """Return where models are evaluated: the first GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


class ResidentModel:
    """A model whose parameters are base + sum_i w_i v_i for the weights last set."""

    def __init__(
        self,
        base: ResolvedModel,
        vectors: Sequence[DistributionVector],
        *,
        dtype: str,
        device: str = "cpu",
    ) -> None:
        """Load the base in `dtype`; the weights start at zero.

        Raises ModelError when a vector moves a tensor that the loaded model does not have under
        that name.
        """
        from transformers import AutoModelForCausalLM

        self.vectors = list(vectors)
        self.model = (
            AutoModelForCausalLM.from_pretrained(base.path, dtype=DTYPES[dtype]).to(device).eval()
        )
        parameters = dict(self.model.named_parameters())  # a tied parameter appears once
        moved = sorted(frozenset[str]().union(*(vector.names for vector in vectors)))
        tied = {
            name for name, _ in self.model.named_parameters(remove_duplicate=False)
        } - parameters.keys()
        unknown = [name for name in moved if name not in parameters and name not in tied]
        if unknown:
            raise ModelError(
                f"{base.reference}: {type(self.model).__name__} has no parameter {unknown[0]!r} "
                "that the vectors move. "
                "Evaluate a built merge instead."
            )
        self._parameters = {name: parameters[name] for name in moved if name in parameters}
        checkpoint = Checkpoint(
            base.path
        )  # as stored: a float32 base is rounded once, after the sum
        self._base = {name: checkpoint.read(name).to(device) for name in self._parameters}
        self.weights: dict[str, float] = {vector.name: 0.0 for vector in vectors}

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Make the parameters base + sum_i w_i v_i; vectors that are not named get weight 0."""
        unknown = set(weights) - self.weights.keys()
        if unknown:
            raise ModelError(
                f"no vector named {sorted(unknown)[0]!r} in the pool; known: "
                f"{sorted(self.weights)}."
            )
        self.weights = {name: float(weights.get(name, 0.0)) for name in self.weights}
        for name, parameter in self._parameters.items():
            base = self._base[name]
            for rows in row_blocks(tuple(base.shape)):
                target = parameter[rows] if base.dim() else parameter
                source = base[rows] if base.dim() else base
                target.copy_(
                    merged_rows(source, name, rows, self.vectors, self.weights, parameter.dtype)
                )
