"""What a forward pass keeps for the backward pass: how much that is, and how to keep less."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from optimer_hf.models.placement import input_device

PROBE_LENGTH = 128


def activation_bytes(
    model: torch.nn.Module, run: Callable[[torch.Tensor], torch.Tensor], max_length: int
) -> float:
    """Return how many bytes a model keeps for each token, beside its parameters, when `run` gives
    it token ids [n, length].
    """
    held = {each.untyped_storage().data_ptr() for each in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in held:
            kept[memory.data_ptr()] = memory.nbytes()
        return tensor

    length = min(PROBE_LENGTH, max_length)
    ids = torch.zeros((1, length), dtype=torch.long, device=input_device(model))
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda each: each):
        result = run(ids)
    del result
    return max(1.0, sum(kept.values()) / ids.numel())


@contextmanager
def recompute_layers(model: Any) -> Iterator[None]:
    """Keep only what goes into the layers of a model, and run them again in the backward pass."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [each for each in model.modules() if isinstance(each, GradientCheckpointingLayer)]
    layers = [each for each in layers if "forward" not in vars(each)]
    for layer in layers:  # `gradient_checkpointing_enable` works in training mode only
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
