"""Distribution vectors: the effect of one dataset on a base, as checkpoint, delta or adapter."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch

from optimer_hf.models.aligned import AlignedTensors
from optimer_hf.models.blocks import matrix_rows, matrix_shape
from optimer_hf.models.checkpoint import Checkpoint, LoadedTensors
from optimer_hf.vectors.forms import Delta, LowRank, Trained, to_dense
from optimer_hf.vectors.int8 import SCALES, dequantize

Place = str | Mapping[str, str]  # a device, or the device of each tensor
Tensors = Checkpoint | LoadedTensors | AlignedTensors

# -- the three kinds -------------------------------------------------------------------------------


class DistributionVector(Protocol):
    """What merging needs from a vector: its name, the tensors it moves, and rows of its delta."""

    @property
    def name(self) -> str:
        """Its name in the pool."""
        ...

    @property
    def kind(self) -> str:
        """checkpoint, delta or adapter."""
        ...

    @property
    def path(self) -> Path:
        """The directory with its weights."""
        ...

    @property
    def names(self) -> frozenset[str]:
        """Tensors with a delta; all others are zero."""
        ...

    @property
    def n_bytes(self) -> int:
        """Memory in bytes that it takes when loaded."""
        ...

    def delta(self, name: str, rows: slice, device: torch.device | str) -> Delta:
        """Return rows of a tensor's delta on a device, in its stored form (see `forms.to_dense`).

        The caller must not change them.
        """
        ...

    def load_to(self, place: "Place") -> "DistributionVector":
        """Return the vector with its weights in the memory of a device, or each tensor in that of
        its own device; tensors that are not named go to host memory.
        """
        ...


class _Brief:
    """The repr of a vector: its kind, name and size instead of its tensors."""

    def __repr__(self: DistributionVector) -> str:
        size = f"{len(self.names)} tensors, {self.n_bytes / 1e6:,.1f} MB"
        return f"{type(self).__name__}({self.name!r}, {size})"


@dataclass(frozen=True, repr=False)
class CheckpointVector(_Brief):
    """A whole tuned model; merging computes its delta, tuned minus base, in float32.

    If the base has a padded vocabulary and the tuned model does not, the missing rows come from
    `padding`, the base, and do not move.
    """

    name: str
    tuned: Tensors
    names: frozenset[str]
    padding: Tensors | None = None
    kind: str = "checkpoint"

    @property
    def path(self) -> Path:
        return self.tuned.path

    @property
    def n_bytes(self) -> int:
        return self.tuned.n_bytes(self.names)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, including rows that only the base has."""
        is_padded = self.padding is not None and name in self.padding.names
        return (self.padding if is_padded and self.padding else self.tuned).shape(name)

    def delta(self, name: str, rows: slice, device: torch.device | str) -> Trained:
        n_rows = matrix_shape(self.tuned.shape(name))[0]
        if self.padding is None or rows.stop <= n_rows:
            return Trained(self.tuned.read_rows(name, rows).to(device))
        trained = self.tuned.read_rows(name, slice(min(rows.start, n_rows), n_rows))
        unmoved = self.padding.read_rows(name, slice(max(rows.start, n_rows), rows.stop))
        dtype = torch.promote_types(trained.dtype, unmoved.dtype)
        return Trained(torch.cat([part.to(device, dtype) for part in (trained, unmoved)]))

    def load_to(self, place: Place) -> "CheckpointVector":
        tuned = _load(self.tuned, self.names, place)
        padding = self.padding and _load(self.padding, self.padding.names, place)
        return replace(self, tuned=tuned, padding=padding)


@dataclass(frozen=True, repr=False)
class DeltaVector(_Brief):
    """Stored deltas: bf16, fp16, fp32, or int8 with one scale per block.

    Tensors in `unread`, such as copies of a tied embedding, are stored, too, but never read.
    `added_tokens` are those that its base lacks, and whose rows are stored whole, as trained; None
    if it has the tokens of its base. Once the rows are in the order of a base that has them all,
    `whole` has the ids of these tokens, int64 [n], and `starts` the rows of that base, which are
    subtracted, float32 [n, d].
    """

    name: str
    stored: Tensors
    block_size: int | None = None
    unread: frozenset[str] = frozenset()
    added_tokens: Sequence[str] | None = None
    whole: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    starts: Mapping[str, torch.Tensor] = field(default_factory=dict)
    kind: str = "delta"

    @property
    def path(self) -> Path:
        return self.stored.path

    @cached_property
    def names(self) -> frozenset[str]:
        names = frozenset(name for name in self.stored.names if not name.endswith(SCALES))
        return names - self.unread

    @property
    def _read(self) -> list[str]:
        """The stored tensors that are read, with their scales."""
        return [name for name in self.stored.names if name.removesuffix(SCALES) in self.names]

    @property
    def n_bytes(self) -> int:
        return self.stored.n_bytes(self._read)

    def delta(self, name: str, rows: slice, device: torch.device | str) -> torch.Tensor:
        delta = self._read_rows(name, rows, device)
        inside = (self.whole >= rows.start) & (self.whole < rows.stop)
        if name not in self.starts or not inside.any():
            return delta
        delta = delta.to(torch.float32, copy=True)
        delta[self.whole[inside] - rows.start] -= self.starts[name][inside].to(device)
        return delta

    def _read_rows(self, name: str, rows: slice, device: torch.device | str) -> torch.Tensor:
        stored = self.stored.read_rows(name, rows).to(device)
        if self.block_size is None or stored.is_floating_point():
            return stored
        scales = self.stored.read_rows(f"{name}{SCALES}", rows).to(device)
        return dequantize(stored, scales, self.block_size)

    def load_to(self, place: Place) -> "DeltaVector":
        starts = {name: rows.to(_device_at(place, name)) for name, rows in self.starts.items()}
        return replace(self, stored=_load(self.stored, self._read, place), starts=starts)


@dataclass(frozen=True, repr=False)
class AdapterVector(_Brief):
    """A LoRA adapter, with float32 factors in memory; biases and whole modules stay as trained."""

    name: str
    path: Path
    parts: dict[str, LowRank | Trained]
    kind: str = "adapter"

    @cached_property
    def names(self) -> frozenset[str]:
        return frozenset(self.parts)

    @property
    def n_bytes(self) -> int:
        return sum(part.n_bytes for part in self.parts.values())

    def delta(self, name: str, rows: slice, device: torch.device | str) -> LowRank | Trained:
        part = self.parts[name]
        if isinstance(part, LowRank):
            return LowRank(part.b[rows], part.a, part.scale).to(device)
        return Trained(matrix_rows(part.tensor, rows).to(device))

    def load_to(self, place: Place) -> "AdapterVector":
        parts = {name: part.to(_device_at(place, name)) for name, part in self.parts.items()}
        return replace(self, parts=parts)


def _load(source: Tensors, names: Iterable[str], place: Place) -> LoadedTensors:
    tensors = {name: source.read(name).to(_device_at(place, name)) for name in names}
    return LoadedTensors(source.path, tensors)


def _device_at(place: Place, name: str) -> str:
    """Return the device for a tensor; the scales of an int8 tensor go with it."""
    return place if isinstance(place, str) else place.get(name.removesuffix(SCALES), "cpu")


def dense_rows(
    vector: DistributionVector, name: str, rows: slice, base_rows: torch.Tensor
) -> torch.Tensor:
    """Return rows of a delta in float32; `base_rows` are the same rows of the base."""
    return to_dense(vector.delta(name, rows, base_rows.device), base_rows)
