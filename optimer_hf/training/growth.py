"""Measure the norm of a vector while it is trained: how fast one dataset moves the model.

LoRA products are never materialised. Full-parameter norms re-read the base from disk, a few rows at
a time, so no second copy of the model is in memory. Each norm costs one pass over the weights while
the GPU waits, so a run measures only N_NORMS of them.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from optimer_hf.errors import ModelError
from optimer_hf.models.blocks import matrix_rows, row_blocks
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.names import names_in
from optimer_hf.models.sharded import gather, is_sharded, name_parameters, whole_shape
from optimer_hf.models.stored import to_stored

N_NORMS = 16  # per run


def lora_norm(model: Any) -> float:
    """Return the Frobenius norm of what the LoRA layers add to a model.

    |BA|^2 = <B^T B, A A^T>; where the smaller side of BA is below the rank, BA itself is smaller.
    """
    squares = []
    for module in model.modules():
        for name, a in getattr(module, "lora_A", {}).items():
            left, right = gather(a.weight).float(), gather(module.lora_B[name].weight).float()
            if left.ndim == right.ndim == 2:
                if min(len(right), left.shape[1]) < len(left):
                    product = (right @ left).square().sum()
                else:
                    product = ((right.T @ right) * (left @ left.T)).sum()
                squares.append(product * float(module.scaling[name]) ** 2)
    if not squares:
        return 0.0
    device = squares[0].device  # a model may be on several
    total = torch.stack([each.to(device) for each in squares]).sum()
    return float(total.clamp(min=0).sqrt())


def full_norm(model: Any, base: Path) -> float:
    """Return the Frobenius norm of a model minus the base in a directory. A tied head counts once.

    Raises ModelError when the base has no such parameter. Needs memory for a few row blocks, or for
    one whole parameter where transformers stores it in another form (fused experts) or where
    processes share it; they then take turns, each with every n-th parameter.
    """
    checkpoint, squares = Checkpoint(base), 0.0
    here = _places_in(checkpoint, model)
    turn, n_turns = _own_turn(model)
    for number, (name, parameter) in enumerate(name_parameters(model)):
        whole = gather(parameter)
        if number % n_turns == turn:
            for key, tensor in to_stored(model, name, whole).items():
                squares += _squared_distance(tensor.contiguous(), checkpoint, here[key])
    return math.sqrt(squares if n_turns == 1 else _sum_over_processes(squares, model))


def _places_in(checkpoint: Checkpoint, model: Any) -> dict[str, str]:
    """Return the tensor in a checkpoint, by the name of each tensor that a model would store."""
    stored = {
        key: tuple(tensor.shape)
        for name, parameter in name_parameters(model)
        for key, tensor in to_stored(
            model, name, torch.empty(whole_shape(parameter), dtype=parameter.dtype, device="meta")
        ).items()
    }
    known = names_in(checkpoint, [*stored])
    places = {key: known.get(key, [""])[0] for key in stored}
    for key, shape in stored.items():
        if not places[key] or checkpoint.shape(places[key]) != shape:
            raise ModelError(f"{checkpoint.path}: holds no tensor {key!r} of shape {list(shape)}.")
    return places


def _own_turn(model: Any) -> tuple[int, int]:
    """Return the number of this process and of all that share a model's parameters."""
    if not is_sharded(model):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _sum_over_processes(number: float, model: Any) -> float:
    total = torch.tensor(number, dtype=torch.float64, device=model.device)
    torch.distributed.all_reduce(total)
    return float(total)


def _squared_distance(tensor: torch.Tensor, base: Checkpoint, name: str) -> float:
    """Return |tensor - base|^2 in float32, row block by row block."""
    squares = 0.0
    for rows in row_blocks(tuple(tensor.shape), tensor.device.type):
        before = base.read_rows(name, rows).to(tensor.device).float()
        after = matrix_rows(tensor, rows).float()
        squares += torch.linalg.vector_norm(after - before).item() ** 2
    return squares


def is_due(history: Sequence[Mapping[str, Any]], n_steps: int) -> bool:
    """Whether to measure a norm for the last entry of a run's log: N_NORMS are spread evenly over
    `n_steps`, however often the run is interrupted.
    """
    noted = max((entry["step"] for entry in history if "norm" in entry), default=0)
    return bool(history[-1]["step"] * N_NORMS // n_steps > noted * N_NORMS // n_steps)
