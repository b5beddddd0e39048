"""A model that is spread over devices, host memory and disk: where it takes its inputs, and where
its weights really are.

accelerate places a model by its device map. A parameter that lies in host memory or on disk is a
tensor without values (on the device `meta`); a hook on its module brings the values to the device
that computes with them, and forgets them afterwards.
"""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from optimer_hf.errors import ConfigError
from optimer_hf.files.text import did_you_mean

Device = int | str  # number of a GPU, or cpu or disk
DeviceMap = str | dict[str, Device]


@dataclass(frozen=True)
class Placement:
    """Where the parts of a model go: accelerate's `device_map` (a strategy, or a device for each
    module) and its `max_memory` by device.
    """

    device_map: DeviceMap
    max_memory: Mapping[Device, str] | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError for a GPU that this machine does not have."""
        named = self.device_map.values() if isinstance(self.device_map, dict) else ()
        for device in (*named, *(self.max_memory or ())):
            number = _as_number(device)
            if isinstance(number, int) and number >= torch.cuda.device_count():
                raise ConfigError(
                    f"device_map: found device {device!r}, but this machine has "
                    f"{torch.cuda.device_count()} GPUs. Give one of them, 'cpu' or 'disk'."
                )

    def check(self, model: Any) -> None:
        """Raise ConfigError if a device map names a part that a model, which needs no weights, does
        not have: accelerate would put the part that was meant on the CPU.
        """
        if not isinstance(self.device_map, dict):
            return
        known = {name for name, _ in model.named_modules()} | set(model.state_dict())
        for name in self.device_map:
            if name not in known:
                parts = [n for n in known if n.count(".") <= name.count(".") and n]
                raise ConfigError(
                    f"device_map: {type(model).__name__} has no part "
                    f"{name!r}.{did_you_mean(name, sorted(parts))}"
                )

    def options(self, folder: str) -> dict[str, Any]:
        """Return options for `from_pretrained`; what goes to disk may be written to a folder."""
        devices, most = self.device_map, self.max_memory
        if isinstance(devices, dict):
            devices = {name: _as_number(device) for name, device in devices.items()}
        if most is not None:
            most = {_as_number(device): amount for device, amount in most.items()}
        return {"device_map": devices, "max_memory": most, "offload_folder": folder}


def input_device(model: Any) -> torch.device:
    """Return the device on which a model takes token ids."""
    embedding = model.get_input_embeddings()
    for hook in _hooks_of(embedding):
        if hook.execution_device is not None:
            return _as_device(hook.execution_device)
    device: torch.device = embedding.weight.device
    return device


def devices_of(model: Any) -> list[torch.device]:
    """Return the devices that compute."""
    modules = model.modules()
    named = {_as_device(h.execution_device) for m in modules for h in _hooks_of(m) if h.offload}
    held = {each.device for each in model.parameters() if each.device.type != "meta"}
    return sorted(named | held, key=str)


def live_state(model: Any) -> dict[str, torch.Tensor]:
    """Return the state dict of a model with the tensors that it computes with: writing to one
    changes the model. What lies on disk becomes a part of a file that is mapped into memory.
    """
    state: dict[str, torch.Tensor] = dict(model.state_dict())
    held = {name: tensor for name, tensor in state.items() if tensor.device.type != "meta"}
    if len(held) == len(state):
        return state
    aliases = dict(model.all_tied_weights_keys)
    with tempfile.TemporaryDirectory() as folder:  # a mapped file lives on without its name
        for name, key, weights in _offloaded(model):
            source = aliases.get(name, name)
            if source not in held:
                held[source] = _pin(weights, key, Path(folder) / str(len(held)))
            _store_of(weights)[f"{weights.prefix}{key}"] = held[source]
            held[name] = held[source]
    return {name: held[name] for name in state}


def resident_weight(layer: torch.nn.Module) -> torch.Tensor:
    """Return the weight of a layer, on the device that computes with it."""
    for hook in _hooks_of(layer):
        if hook.offload:
            weight: torch.Tensor = hook.weights_map["weight"]
            return weight.to(hook.execution_device)
    return layer.weight  # type: ignore[return-value]


def is_only_placed(layer: torch.nn.Module) -> bool:
    """Whether all that `forward` does beyond that of its class is to move tensors between devices,
    as accelerate does.
    """
    inner = vars(layer).get("_old_forward")
    own = getattr(inner, "__func__", None) is type(layer).forward
    return own and len(_hooks_of(layer)) == len(_all_hooks_of(layer))


def _as_number(device: Device) -> Device:
    """Return the number of a GPU, which JSON turns into text where it is a key."""
    number = str(device).removeprefix("cuda:")
    return int(number) if number.isdecimal() else device


def _as_device(device: int | str | torch.device) -> torch.device:
    return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)


def _all_hooks_of(module: torch.nn.Module) -> list[Any]:
    hook = vars(module).get("_hf_hook")
    if hook is None:
        return []
    from accelerate.hooks import SequentialHook

    return list(hook.hooks) if isinstance(hook, SequentialHook) else [hook]


def _hooks_of(module: torch.nn.Module) -> list[Any]:
    """Return the hooks of a module that move tensors between devices."""
    if not (hooks := _all_hooks_of(module)):
        return []
    from accelerate.hooks import AlignDevicesHook

    return [hook for hook in hooks if isinstance(hook, AlignDevicesHook)]


def _offloaded(model: Any) -> Iterator[tuple[str, str, Any]]:
    """Yield the name of each tensor that lies in host memory or on disk, and its key in the
    mapping from which a hook takes it.
    """
    for prefix, module in model.named_modules():
        for hook in _hooks_of(module):
            if hook.offload:
                for key, tensor in module.state_dict(keep_vars=True).items():
                    if tensor.device.type == "meta" and "." not in key:
                        yield f"{prefix}.{key}" if prefix else key, key, hook.weights_map


def _store_of(weights: Any) -> Any:
    """Return the dictionary that accelerate reads before any file."""
    from accelerate.utils import OffloadedWeightsLoader

    inner = weights.dataset
    return inner.state_dict if isinstance(inner, OffloadedWeightsLoader) else inner


def _pin(weights: Mapping[str, torch.Tensor], key: str, file: Path) -> torch.Tensor:
    """Return the tensor that hooks read; from a file of accelerate's, copy it to one of ours."""
    stored, full = _store_of(weights), f"{weights.prefix}{key}"  # type: ignore[attr-defined]
    if full in stored:
        tensor: torch.Tensor = stored[full]
        return tensor
    value = weights[key]
    mapped = torch.from_file(str(file), shared=True, size=max(1, value.numel()), dtype=value.dtype)
    return mapped[: value.numel()].view(value.shape).copy_(value)
