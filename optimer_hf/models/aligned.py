"""Read the rows of an embedding by token: the tensors of a model come in, with the rows of those
that have one per token in the order of another vocabulary.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from optimer_hf.models.blocks import matrix_shape
from optimer_hf.models.checkpoint import Checkpoint, LoadedTensors


@dataclass(frozen=True)
class AlignedTensors:
    """Tensors with the interface of a checkpoint. Row i of a tensor in `aligned` is row places[i]
    of the one in `own`; where places[i] is -1, it is row i of the one in `rest`, or zero if that is
    None. `places` is int64 [rows]. Other tensors are those of `own`.
    """

    own: Checkpoint | LoadedTensors
    aligned: frozenset[str]
    places: torch.Tensor
    rest: Checkpoint | LoadedTensors | None = None

    @property
    def path(self) -> Path:
        """Where the tensors came from."""
        return self.own.path

    @property
    def names(self) -> list[str]:
        """Tensor names, sorted."""
        return self.own.names

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        shape = self.own.shape(name)
        return (len(self.places), *shape[1:]) if name in self.aligned else shape

    def dtype(self, name: str) -> torch.dtype:
        """dtype of a tensor; one that holds the rows of both, if there are two."""
        dtype = self.own.dtype(name)
        if self.rest is None or name not in self.aligned:
            return dtype
        return torch.promote_types(dtype, self.rest.dtype(name))

    def n_bytes(self, names: Iterable[str]) -> int:
        """Total size in bytes of some tensors."""
        return sum(
            torch.Size(self.shape(name)).numel() * self.dtype(name).itemsize for name in names
        )

    def read(self, name: str) -> torch.Tensor:
        """Return a whole tensor."""
        if name not in self.aligned:
            return self.own.read(name)
        return self.read_rows(name, slice(0, len(self.places))).view(self.shape(name))

    def read_rows(self, name: str, rows: slice) -> torch.Tensor:
        """Return rows of a tensor's matrix form, in new memory if it is aligned."""
        if name not in self.aligned:
            return self.own.read_rows(name, rows)
        _, *columns = matrix_shape(self.shape(name))
        out = torch.zeros(rows.stop - rows.start, *columns, dtype=self.dtype(name))
        for part, first in _runs(self.places[rows]):
            source, start = (self.rest, rows.start + part.start) if first < 0 else (self.own, first)
            if source is not None:
                out[part] = source.read_rows(name, slice(start, start + part.stop - part.start))
        return out


def _runs(places: torch.Tensor) -> Iterator[tuple[slice, int]]:
    """Yield the stretches of places that count up by one, or are all -1, each with its first."""
    steps = torch.diff(places)
    goes_on = torch.where((places[:-1] < 0) | (places[1:] < 0), steps == 0, steps == 1)
    cuts = (torch.nonzero(~goes_on).flatten() + 1).tolist()
    for start, stop in pairwise([0, *cuts, len(places)]):
        yield slice(start, stop), int(places[start])
