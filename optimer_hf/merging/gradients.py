"""A resident model + one backward pass -> the derivative of what was computed in every weight.

With W = base + sum_i w_i v_i, the derivative in w_i is the sum over all tensors of <dL/dW, v_i>.
One backward pass therefore serves any number of vectors. There are two ways to that sum:

* A hook on each moved parameter multiplies its gradient with the vectors, in blocks of rows, and
  drops it, so that the gradient of one tensor exists at a time. This fits every kind of vector. Of
  an embedding and a head that is tied to it only the rows exist that have a gradient.
* Where all that moves the weight of a linear layer y = W x are LoRA products s B A, the gradient of
  W is not needed: <dL/dW, s B A> is s times the sum over tokens of <B^T dL/dy, A x>. That takes a
  fraction of the arithmetic, and the layer keeps A x for the backward pass instead of x.

The rounding of a merge to 16 bits counts as the identity: what comes out is the derivative of the
score at the rounded parameters along the vectors as they are stored. The score itself is a step
function of the weights, then.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from optimer_hf.merging.resident import ResidentModel
from optimer_hf.models.blocks import matrix_rows, row_blocks
from optimer_hf.models.placement import input_device
from optimer_hf.vectors.forms import LowRank, Trained

logger = logging.getLogger(__name__)

PROBE_TOKENS = 8
GAP = 16  # rows that are read rather than left out between others


class Derivatives:
    """Sums <dL/dW, v_i> over tensors and backward passes until they are taken.

    `names` are those of the vectors, in order; `pool_bytes` is what the vectors take in memory.
    """

    def __init__(self, resident: ResidentModel) -> None:
        self._resident = resident
        self.names = [vector.name for vector in resident.vectors]
        self.pool_bytes = resident.pool_bytes
        self._totals: dict[torch.device, torch.Tensor] = {}
        self._views = _views_by_leaf(resident)
        self._taps = list(_taps_of(resident, self._views, self))
        tapped = {id(tap.layer.weight) for tap in self._taps}
        self._hooked = [leaf for leaf in self._views if id(leaf) not in tapped]
        self._embeddings = [
            each
            for each in resident.model.modules()
            if isinstance(each, torch.nn.Embedding) and not each.sparse
        ]

    def take(self) -> torch.Tensor:
        """Return the sums [vectors] in float64 on the host, and start again from zero."""
        total = torch.zeros(len(self.names), dtype=torch.float64)
        for part in self._totals.values():
            total += part.cpu()
            part.zero_()
        return total

    @contextmanager
    def active(self) -> Iterator[None]:
        """Follow backward passes inside: moved parameters require gradients, no others do."""
        leaves = list(_leaves_of(self._resident.model))
        before = [leaf.requires_grad for leaf in leaves]
        handles = []
        try:
            for leaf in leaves:
                leaf.requires_grad_(False)
            for leaf in self._hooked:
                leaf.requires_grad_(True)
                handle = leaf.register_post_accumulate_grad_hook(self._collect)  # type: ignore[no-untyped-call]
                handles.append(handle)
            handles += [tap.layer.register_forward_hook(tap.follow) for tap in self._taps]
            for embedding in self._embeddings:
                embedding.sparse = True
            self.take()
            yield
        finally:
            for handle in handles:
                handle.remove()
            for embedding in self._embeddings:
                embedding.sparse = False
            for leaf, required in zip(leaves, before, strict=True):
                leaf.grad = None
                leaf.requires_grad_(required)

    def total_on(self, device: torch.device) -> torch.Tensor:
        """Return the sums of a device, to add to."""
        if device not in self._totals:
            n = len(self.names)
            self._totals[device] = torch.zeros(n, dtype=torch.float64, device=device)
        return self._totals[device]

    @torch.no_grad()
    def _collect(self, leaf: torch.Tensor) -> None:
        """Multiply the gradient of a parameter with the vectors, and drop it."""
        gradient, leaf.grad = leaf.grad, None
        assert gradient is not None  # autograd calls this after it has set one
        if gradient.is_sparse and self._add_sparse(leaf, gradient):
            return
        if gradient.is_sparse:
            gradient = gradient.to_dense()
        if gradient.stride() != leaf.stride():
            gradient = torch.empty_like(leaf).copy_(gradient)
        total = self.total_on(leaf.device)
        for name, view in self._views[leaf].items():
            start = gradient.storage_offset() + view.storage_offset() - leaf.storage_offset()
            self._add(total, name, gradient.as_strided(view.shape, view.stride(), start))

    def _add(self, total: torch.Tensor, name: str, gradient: torch.Tensor) -> None:
        for rows in row_blocks(tuple(gradient.shape), gradient.device.type):
            self._add_rows(total, name, rows, matrix_rows(gradient, rows))

    def _add_sparse(self, leaf: torch.Tensor, gradient: torch.Tensor) -> bool:
        """Add the rows of a sparse gradient, some of which may be there twice; returns whether the
        parameter is one whole tensor of the base.
        """
        (name, view), *others = self._views[leaf].items()
        if others or view.shape != leaf.shape or view.stride() != leaf.stride():
            return False
        total = self.total_on(leaf.device)
        places, order = gradient._indices()[0].sort()
        values = gradient._values()
        for rows in _spans(places, row_blocks(tuple(leaf.shape), leaf.device.type)[0].stop):
            first, end = torch.searchsorted(places, places.new_tensor([rows.start, rows.stop]))
            inside = slice(int(first), int(end))
            self._add_rows(total, name, rows, values[order[inside]], places[inside] - rows.start)
        return True

    def _add_rows(
        self,
        total: torch.Tensor,
        name: str,
        rows: slice,
        slope: torch.Tensor,
        places: torch.Tensor | None = None,
    ) -> None:
        """Add the products with the gradient of some rows, or of the `places` among them."""
        slope = slope.float()
        base: torch.Tensor | None = None  # is read once, and only if a vector needs it
        for index, vector in enumerate(self._resident.vectors):
            if name not in vector.names:
                continue
            delta = vector.delta(name, rows, slope.device)
            if isinstance(delta, LowRank):
                b = _at(delta.b, places)
                total[index] += delta.scale * ((b.T @ slope) * delta.a).sum(dtype=torch.float64)
            elif isinstance(delta, Trained):
                if base is None:
                    base = _at(self._resident.base_rows(name, rows), places).float()
                total[index] += _dot(slope, _at(delta.tensor, places).float() - base)
            else:
                total[index] += _dot(slope, _at(delta, places).float())


def _at(rows: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
    return rows if places is None else rows[places]


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.dot(a.flatten(), b.flatten())


def _spans(places: torch.Tensor, step: int) -> Iterator[slice]:
    """Yield ranges of at most `step` rows that cover places [n], which are in order, without the
    wider gaps between them.
    """
    if not len(places):
        return
    after = (places.diff() > GAP).nonzero()[:, 0] + 1
    for part in places.tensor_split(after.cpu()):
        first, end = int(part[0]), int(part[-1]) + 1
        for start in range(first, end, step):
            yield slice(start, min(start + step, end))


# -- where the parameters are ----------------------------------------------------------------------

Views = Mapping[torch.Tensor, Mapping[str, torch.Tensor]]  # tensors are keys by identity


def _leaves_of(model: Any) -> Iterator[torch.Tensor]:
    """Yield the parameters and the real buffers of a model; some classes scale by a buffer."""
    yield from model.parameters()
    yield from (each for each in model.buffers() if each.is_floating_point())


def _views_by_leaf(resident: ResidentModel) -> Views:
    """Return the parameters and buffers that the vectors move, each with the views of its parts by
    the name in the base's files. Two that share memory each have a gradient of their own.
    """
    by_memory: dict[int, dict[str, torch.Tensor]] = {}
    for name, view in resident.parameters.items():
        by_memory.setdefault(view.untyped_storage().data_ptr(), {})[name] = view
    views = {}
    for leaf in _leaves_of(resident.model):
        there = by_memory.get(leaf.untyped_storage().data_ptr(), {})
        if own := {name: view for name, view in there.items() if _is_within(view, leaf)}:
            views[leaf] = own
    return views


def _is_within(view: torch.Tensor, leaf: torch.Tensor) -> bool:
    """Whether a view of some memory begins in a parameter, which may be a part of that memory."""
    return 0 <= view.storage_offset() - leaf.storage_offset() < max(1, leaf.numel())


# -- linear layers that only LoRA moves ------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Tap:
    """The stacked factors of the vectors that move a linear layer: `a` [r, inputs] and
    `b` [outputs, r] in the dtype of the layer, `scales` [r], and the vector of each row, `owners`.
    """

    layer: torch.nn.Linear
    a: torch.Tensor
    b: torch.Tensor
    scales: torch.Tensor
    owners: torch.Tensor
    anchor: torch.Tensor  # requires a gradient, so that autograd visits the layer
    derivatives: Derivatives

    def follow(self, _: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> Any:
        """Let the backward pass come through here: a forward hook that changes no value."""
        if not torch.is_grad_enabled():
            return output
        reduced = inputs[0].detach() @ self.a.T
        return _Follow.apply(output, self.anchor, reduced, self)  # type: ignore[no-untyped-call]

    def add(self, reduced: torch.Tensor, gradient: torch.Tensor) -> None:
        """Add the sum over tokens of <b^T gradient, reduced> for each vector."""
        products = (gradient @ self.b).flatten(0, -2).float() * reduced.flatten(0, -2).float()
        sums = products.sum(0, dtype=torch.float64) * self.scales
        self.derivatives.total_on(gradient.device).index_add_(0, self.owners, sums)


class _Follow(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, output: torch.Tensor, _: torch.Tensor, reduced: torch.Tensor, tap: _Tap
    ) -> torch.Tensor:
        ctx.tap = tap
        ctx.save_for_backward(reduced)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[torch.Tensor | None, ...]:
        ctx.tap.add(*ctx.saved_tensors, grad_outputs[0])
        return grad_outputs[0], None, None, None


def _taps_of(resident: ResidentModel, views: Views, derivatives: Derivatives) -> Iterator[_Tap]:
    """Yield taps for the layers that only LoRA moves, if that takes less than their gradients."""
    layers = _called_layers(resident.model)
    for leaf, parts in views.items():
        layer = layers.get(id(leaf))
        if layer is None or len(parts) > 1:
            continue
        ((name, view),) = parts.items()
        rows = slice(0, leaf.shape[0])
        deltas = [
            (index, vector.delta(name, rows, leaf.device))
            for index, vector in enumerate(resident.vectors)
            if name in vector.names
        ]
        factors = [(index, delta) for index, delta in deltas if isinstance(delta, LowRank)]
        rank = sum(delta.a.shape[0] for _, delta in factors)
        is_worth_it = rank * sum(leaf.shape) < leaf.numel()
        is_whole = view.shape == leaf.shape and view.stride() == leaf.stride()
        if len(factors) < len(deltas) or not is_worth_it or not is_whole:
            continue
        owners = [index for index, delta in factors for _ in range(delta.a.shape[0])]
        scales = [delta.scale for _, delta in factors for _ in range(delta.a.shape[0])]
        yield _Tap(
            layer,
            torch.cat([delta.a for _, delta in factors]).to(leaf.dtype),
            torch.cat([delta.b for _, delta in factors], 1).to(leaf.dtype),
            torch.tensor(scales, dtype=torch.float64, device=leaf.device),
            torch.tensor(owners, device=leaf.device),
            torch.zeros((), requires_grad=True, device=leaf.device),
            derivatives,
        )


def _called_layers(model: Any) -> dict[int, torch.nn.Linear]:
    """Return the linear layers that a model calls, by the identity of a weight that no other module
    has. Some classes read the weight of a layer that they never call; the head is read like that
    here.
    """
    owners: dict[int, list[torch.nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(module)
    called: set[torch.nn.Module] = set()
    linear = [module for module in model.modules() if type(module) is torch.nn.Linear]
    handles = [each.register_forward_hook(lambda m, *_: called.add(m)) for each in linear]
    ids = torch.arange(PROBE_TOKENS, device=input_device(model)).unsqueeze(0)
    try:
        with torch.no_grad():
            model.base_model(
                input_ids=ids % model.config.get_text_config().vocab_size, use_cache=False
            )
    finally:
        for handle in handles:
            handle.remove()
    return {
        id(each.weight): each
        for each in linear
        if each in called and len(owners[id(each.weight)]) == 1
    }
