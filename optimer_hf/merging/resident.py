"""Keep a model and its pool in memory and set the weights of the merge in place.

Every trial of a search uses this. Each setting starts again from the base's values, which are kept
beside the model where there is room, so even a thousand settings cause no drift. The values equal
those of the streaming writer bit for bit, because both use `merge_rows`.
"""

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from optimer_hf.errors import ModelError
from optimer_hf.merging.writer import merge_rows, merged_dtypes
from optimer_hf.models.blocks import compute_ahead, matrix_rows, row_blocks
from optimer_hf.models.checkpoint import DTYPES, Checkpoint, LoadedTensors
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.models.live import compute_dtype, load_model
from optimer_hf.models.memory import free_memory
from optimer_hf.models.names import ClassNames, kept_wide, summarize_names, views_in
from optimer_hf.models.placement import Placement, live_state
from optimer_hf.models.resolve import AnyModel, base_from_here
from optimer_hf.printable import warn_once
from optimer_hf.vectors.vector import DistributionVector

logger = logging.getLogger(__name__)


LARGEST_SHARE_OF_BASE = 0.75  # of the free memory, for the values of the base
LARGEST_SHARE = 0.5  # of the free memory, for one vector; activations need some, too


class ResidentModel:
    """A loaded model whose parameters are base + sum_i w_i v_i for the weights last set.

    `parameters` are views of those that the vectors move, by the name in the base's files.
    `pool_bytes` is the size of the vectors that are kept in memory.
    """

    def __init__(
        self,
        base: AnyModel,
        vectors: Sequence[DistributionVector],
        *,
        dtype: str,
        device: str = "cpu",
        placement: Placement | None = None,
    ) -> None:
        """Load the base, a directory, a Hub id or a ResolvedModel, in `dtype`, to a device or, with
        a `placement`, to several; the weights start at zero.

        On a device that cannot multiply in `dtype`, the parameters are held in float32, but still
        rounded to `dtype`, apart from those that `merged_dtypes` excepts. Raises ModelError when a
        vector moves a tensor that the loaded model holds in another form.
        """
        base = base_from_here(base)
        self.dtype = DTYPES[dtype]
        self.model = _load_rounded(base, self.dtype, device, placement)
        views = views_in(Checkpoint(base.path), self.model)
        every = sorted(frozenset[str]().union(*(vector.names for vector in vectors)))
        moved = [name for name in every if name in views]
        if unknown := [name for name in every if name not in views]:
            self._check_unplaced(unknown, base)
        places = {name: place for place, name in enumerate(views)}
        by_place = {  # the first name, that of the embedding, wins over its alias
            views[name].data_ptr(): name for name in sorted(moved, key=places.__getitem__)[::-1]
        }
        self.parameters = {name: views[name] for name in by_place.values()}
        self._dtypes = merged_dtypes(Checkpoint(base.path), self.dtype)
        devices = {name: str(view.device) for name, view in self.parameters.items()}
        # as stored: a float32 base is rounded once, after the sum
        self._base = _place_base(Checkpoint(base.path), devices)
        self.vectors = [_place(vector, devices, self.parameters) for vector in vectors]
        pairs = zip(self.vectors, vectors, strict=True)
        self.pool_bytes = sum(own.n_bytes for own, other in pairs if own is not other)
        self.weights: dict[str, float] = {vector.name: 0.0 for vector in vectors}

    def _check_unplaced(self, unknown: Sequence[str], base: ResolvedModel) -> None:
        """Raise ModelError for tensors that the model holds in another form, and warn of those that
        it does not load (a vision tower), which cannot change the scores.
        """
        names = ClassNames.of(self.model)
        for name, key in names.keys(unknown).items():
            if key.parameter in names.parameters:
                raise ModelError(
                    f"{base.reference}: the vectors move tensor {name!r}, which "
                    f"{type(self.model).__name__} holds in another form than the base's file. "
                    "Build the merge and evaluate that instead."
                )
        warn_once(
            logger,
            f"{base.reference}: {type(self.model).__name__} does not load {len(unknown)} tensors "
            f"that the vectors move ({summarize_names(unknown)}); the merge on disk will include "
            "them",
        )

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Set the parameters to base + sum_i w_i v_i. Vectors that are not named get weight 0."""
        unknown = set(weights) - self.weights.keys()
        if unknown:
            raise ModelError(
                f"no vector named {sorted(unknown)[0]!r} in the pool; known: "
                f"{', '.join(sorted(self.weights))}."
            )
        self.weights = {name: float(weights.get(name, 0.0)) for name in self.weights}
        blocks = [
            (name, rows)
            for name, parameter in self.parameters.items()
            for rows in row_blocks(tuple(parameter.shape), parameter.device.type)
        ]
        on_host = [each for each in blocks if self.parameters[each[0]].device.type == "cpu"]
        for name, rows in blocks:  # these are only launched, so the host works meanwhile
            if self.parameters[name].device.type != "cpu":
                self._set_rows(name, rows)
        deque(compute_ahead(self._set_rows, on_host), maxlen=0)

    def base_rows(self, name: str, rows: slice) -> torch.Tensor:
        """Return rows of the base as it is stored, on the device of the parameter."""
        return self._base[name].read_rows(name, rows).to(self.parameters[name].device)

    def _set_rows(self, name: str, rows: slice) -> None:
        target = matrix_rows(self.parameters[name], rows)
        base_rows, dtype = self.base_rows(name, rows), self._dtypes[name]
        out = target if target.dtype == dtype else None
        merged = merge_rows(base_rows, name, rows, self.vectors, self.weights, dtype, out=out)
        if out is None:
            target.copy_(merged)


def _load_rounded(
    base: ResolvedModel, dtype: torch.dtype, device: str, placement: Placement | None
) -> Any:
    """Load a model, its weights rounded to `dtype`, in a dtype that the device can multiply."""
    held_in = compute_dtype(dtype, device)
    model = load_model(base, held_in, placement).eval()
    if placement is None:
        model = model.to(device)
    if held_in != dtype:
        kept = kept_wide(model, dtype)
        for name, tensor in live_state(model).items():
            if tensor.is_floating_point() and name not in kept:
                tensor.copy_(tensor.to(dtype))
    return model


def _place_base(
    checkpoint: Checkpoint, devices: Mapping[str, str]
) -> dict[str, Checkpoint | LoadedTensors]:
    """Load the tensors of the base, each to its device if all of that device fit there, else to
    host memory, else not at all; return where to read each.
    """
    sources: dict[str, Checkpoint | LoadedTensors] = {}
    for device in sorted(set(devices.values())):
        names = [name for name, own in devices.items() if own == device]
        sources |= dict.fromkeys(names, _load_base(checkpoint, names, device))
    return sources


def _load_base(
    checkpoint: Checkpoint, names: Sequence[str], device: str
) -> Checkpoint | LoadedTensors:
    n_bytes = checkpoint.n_bytes(names)
    for place in dict.fromkeys((device, "cpu")):
        if n_bytes <= LARGEST_SHARE_OF_BASE * free_memory(place):
            tensors = {name: checkpoint.read(name).to(place) for name in names}
            return LoadedTensors(checkpoint.path, tensors)
        logger.info("base: a second copy does not fit into the memory of %s", place)
    return checkpoint


def _place(
    vector: DistributionVector, devices: Mapping[str, str], parameters: Mapping[str, torch.Tensor]
) -> DistributionVector:
    """Load the tensors of a vector to the devices of its parameters if they fit, else to host
    memory, else not at all.
    """
    moved = [name for name in devices if name in vector.names]
    sizes = dict.fromkeys([devices[name] for name in moved], 0)
    for name in moved:
        sizes[devices[name]] += parameters[name].nbytes
    parts = {device: n / sum(sizes.values()) for device, n in sizes.items()} or {"cpu": 1.0}
    for places, wanted in ((devices, parts), ("cpu", {"cpu": 1.0})):
        if all(
            part * vector.n_bytes <= LARGEST_SHARE * free_memory(device)
            for device, part in wanted.items()
        ):
            return vector.load_to(places)
        logger.info("vector %s: does not fit into the memory of %s", vector.name, [*wanted])
    return vector
