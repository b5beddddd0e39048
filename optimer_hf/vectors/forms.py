"""The three forms of a delta during a merge: low-rank product, trained tensor, dense tensor."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LowRank:
    """Rows of a delta as a product scale * (b @ a): b [rows, r] and a [r, columns], in float32."""

    b: torch.Tensor
    a: torch.Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the product."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def n_bytes(self) -> int:
        """Size of the factors in bytes."""
        return self.b.nbytes + self.a.nbytes

    def to_dense(self) -> torch.Tensor:
        """Return the rows as one float32 tensor."""
        return (self.b @ self.a) * self.scale

    def to(self, device: torch.device | str) -> "LowRank":
        """Return the factors on a device."""
        return LowRank(self.b.to(device), self.a.to(device), self.scale)


@dataclass(frozen=True)
class OnCopy(LowRank):
    """A product that belongs on top of `start`, a copy of the tensor whose rows differ from those
    of the base: an adapter has one if its embedding was resized before training.
    """

    start: torch.Tensor

    def to_dense(self) -> torch.Tensor:
        """Return the rows after training as one float32 tensor."""
        return self.start.float() + super().to_dense()


@dataclass(frozen=True)
class Trained:
    """Rows of a tensor after training, in the dtype of the file; their delta subtracts the base."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return tuple(self.tensor.shape)

    @property
    def n_bytes(self) -> int:
        """Size of the tensor in bytes."""
        return self.tensor.nbytes

    def to(self, device: torch.device | str) -> "Trained":
        """Return the tensor on a device."""
        return Trained(self.tensor.to(device))


Delta = torch.Tensor | Trained | LowRank


def to_dense(delta: Delta, base: torch.Tensor) -> torch.Tensor:
    """Return a delta of any form as a float32 tensor; `base` has the same rows of the base."""
    if isinstance(delta, LowRank):
        return delta.to_dense()
    if isinstance(delta, Trained):
        return delta.tensor.float() - base.float()
    return delta.float()
