"""Read a live model whose parameters are spread over several processes (FSDP2, DeepSpeed ZeRO-3).

Each process holds a part of every parameter. What is read here is gathered one parameter at a time
and by all processes together, so that no process ever holds the model: every process has to make
the same calls in the same order.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from optimer_hf.models.shards import write_whole_tensors
from optimer_hf.models.stored import to_stored

LARGEST_FILE = 50 * 10**9  # bytes; as transformers' `save_pretrained`
INSERTED = ("_checkpoint_wrapped_module.", "_orig_mod.")  # by activation checkpointing and compile


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether the parameters of a model or a layer are spread over processes."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule) or any(map(_is_partitioned, model.parameters()))


def _is_partitioned(parameter: torch.Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 manages a parameter; it marks them so."""
    return hasattr(parameter, "ds_id")


def layer_class(layer: torch.nn.Module) -> type[torch.nn.Module]:
    """Return the class of a layer; FSDP2 replaces it by a subclass of its own."""
    from torch.distributed.fsdp import FSDPModule

    kind = type(layer)
    return kind.__mro__[2] if isinstance(layer, FSDPModule) else kind


def whole_shape(parameter: Any) -> tuple[int, ...]:
    """Return the shape of a parameter as a whole. Needs no other process."""
    return tuple(parameter.ds_shape if _is_partitioned(parameter) else parameter.shape)


def gather(parameter: torch.Tensor) -> torch.Tensor:
    """Return a whole parameter, detached; a collective call of all processes.

    A parameter that ZeRO-3 trains in 16 bits is returned in float32, which its optimizer holds.
    """
    from torch.distributed.tensor import DTensor

    detached = parameter.detach()
    if isinstance(detached, DTensor):  # which is in host memory when it is offloaded
        here: Any = detached.to(detached.device_mesh.device_type)
        return here.full_tensor()  # type: ignore[no-any-return]
    return _gather_partitioned(parameter) if _is_partitioned(parameter) else detached


def _gather_partitioned(parameter: Any) -> torch.Tensor:
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    exact: torch.Tensor | None = None
    if parameter.requires_grad:
        exact = safe_get_full_fp32_param(parameter)
    if exact is not None:
        return exact.detach().reshape(whole_shape(parameter))
    with GatheredParameters([parameter]):
        whole: torch.Tensor = parameter.detach().clone()
    return whole


def name_parameters(
    model: torch.nn.Module, *, with_copies: bool = False
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters of a model under the names that they had before it was wrapped.

    A tied parameter comes once, or under each of its names (`with_copies`).
    """
    for name, parameter in model.named_parameters(remove_duplicate=not with_copies):
        for part in INSERTED:
            name = name.replace(part, "")
        yield name, parameter


def gather_adapter(model: Any) -> dict[str, torch.Tensor]:
    """Return the parameters of a PEFT adapter, under their names in the model; collective.

    PEFT's `save_pretrained` takes them as `state_dict`. They are on the CPU.
    """
    from peft import get_peft_model_state_dict

    named = dict(name_parameters(model, with_copies=True))
    kept = get_peft_model_state_dict(model, state_dict=named, save_embedding_layers=False)
    kept_ids = {id(parameter) for parameter in kept.values()}
    return {
        name: gather(parameter).cpu()
        for name, parameter in named.items()
        if id(parameter) in kept_ids
    }


def write_gathered(model: Any, out: Path, *, is_writer: bool) -> None:
    """Write a model in float32 into a directory, as `save_pretrained` would; collective.

    One process writes; the others only help it to gather.
    """
    specs = {
        key: (tensor.dtype, tuple(tensor.shape))
        for name, tensor in _kept_tensors(model)
        for key, tensor in to_stored(model, name, _blank(tensor)).items()
    }
    tensors = _stored_tensors(model)
    if not is_writer:
        for _ in tensors:
            pass
        return
    write_whole_tensors(out, specs, tensors, LARGEST_FILE)
    model.config.dtype = "float32"
    model.config.architectures = [layer_class(model).__name__]
    model.config.save_pretrained(out)
    if model.can_generate():
        model.generation_config.save_pretrained(out)


def _stored_tensors(model: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of a model as its checkpoint stores them, whole and on the CPU."""
    for name, tensor in _kept_tensors(model):
        whole = gather(tensor)
        if whole.is_floating_point():
            whole = whole.float()
        for stored in to_stored(model, name, whole).values():
            yield stored.cpu()


def _kept_tensors(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters and the saved buffers of a model; a tied one once."""
    yield from name_parameters(model)
    parameters = {name for name, _ in name_parameters(model, with_copies=True)}
    for name, tensor in model.state_dict().items():
        if name not in parameters:
            yield name, tensor


def _blank(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor without values, in the form in which it is written."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return torch.empty(whole_shape(tensor), dtype=dtype, device="meta")
