"""Store rows of a delta as int8 numbers with one scale per block: half the bytes of bfloat16.

Each block is rounded symmetrically to 255 levels, scaled by its largest absolute value (absmax;
Dettmers et al., arXiv 2110.02861, in linear form). Deltas have a narrow range and quantise well
(arXiv 2503.06921). Blocks run along the last axis, so rows can be read without their neighbours.
"""

import torch
from torch.nn.functional import pad

BLOCK_SIZE = 64
LEVELS = 127
SCALES = ".scales"  # suffix for the tensor with the scales of another one


def quantize(rows: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise float32 rows [..., n].

    Returns int8 numbers [..., n] and bfloat16 scales [..., ceil(n / block_size)].
    """
    n = rows.shape[-1]
    blocks = _blocks(rows, block_size)
    scales = (blocks.abs().amax(-1) / LEVELS).bfloat16()
    steps = scales.float().unsqueeze(-1)
    steps = torch.where(steps == 0, 1.0, steps)
    numbers = (blocks / steps).round_().clamp_(-LEVELS, LEVELS).to(torch.int8)
    return numbers.flatten(-2)[..., :n].contiguous(), scales


def dequantize(numbers: torch.Tensor, scales: torch.Tensor, block_size: int) -> torch.Tensor:
    """Return float32 rows [..., n] from int8 numbers and their scales."""
    n = numbers.shape[-1]
    blocks = _blocks(numbers, block_size)
    rows: torch.Tensor = (blocks.float() * scales.float().unsqueeze(-1)).flatten(-2)[..., :n]
    return rows


def _blocks(rows: torch.Tensor, block_size: int) -> torch.Tensor:
    """Return rows [..., n] as [..., blocks, block_size], padding the last block with zeros."""
    padded = pad(rows, (0, -rows.shape[-1] % block_size))
    return padded.view(*padded.shape[:-1], -1, block_size)


def n_blocks(n: int, block_size: int) -> int:
    """Return how many scales a row of n numbers has."""
    return -(-n // block_size)
