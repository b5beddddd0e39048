"""Estimate time and memory of trainings and trials on devices that are not here.

Sizes of models and numbers of tokens come in, seconds and bytes go out. A training is placed as one
copy on each device or sharded over all, a trial on as few devices as hold the model.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from optimer_hf.experiment.plan_file import show_bytes
from optimer_hf.models.devices import Accelerator
from optimer_hf.models.flops import (
    ModelSizes,
    activation_bytes,
    cache_bytes,
    forward_flops,
    generation_bytes,
    training_flops,
)
from optimer_hf.scoring.work import ItemWork
from optimer_hf.training.arguments import TRAINER_DEFAULTS
from optimer_hf.training.config import TrainConfig

RESERVED = 2 * 10**9  # bytes on each device for its context, kernels and blocks of logits
FULL = 0.95  # share of a device's memory that can be filled
HOST_BANDWIDTH = 25e9  # bytes/s from the memory of the machine to each device: PCIe 4.0 x16
MOST_TEXTS = 256  # that are generated at a time
OPTIMIZER = 12  # bytes for each trained weight: its gradient and Adam's two means
CHECKPOINT = 12  # bytes for each trained weight: the weight and Adam's two means
CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")


@dataclass(frozen=True)
class Hardware:
    """Devices of one kind, and the share of their peak that is reached, in FLOP/s and bytes/s."""

    n_devices: int
    device: Accelerator
    utilisation: float

    @property
    def room(self) -> int:
        """Bytes of one device that can be filled."""
        return int(FULL * self.device.memory_bytes)

    def seconds(self, flops: float, n_bytes: float = 0.0) -> float:
        """Return how long one device takes for products, and for the bytes that it reads and writes
        meanwhile.
        """
        needed = max(flops / self.device.flops, n_bytes / self.device.bandwidth)
        return needed / self.utilisation


@dataclass(frozen=True)
class Allocation:
    """Where the model of a stage is: on how many devices together, in words, and with how many
    bytes on each. `host_bytes` are in the memory of the machine. A warning says what does not fit.
    """

    n_together: int
    words: str
    memory_bytes: int
    host_bytes: int = 0
    warning: str | None = None


# -- training --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingSettings:
    """What decides the memory and the FLOPs of a training. `frozen_bytes` is the size of a number
    that is not trained.
    """

    n_tokens: int
    checkpointing: bool
    mixed: bool
    frozen_bytes: int


def read_settings(config: TrainConfig, stored_bytes: int) -> TrainingSettings:
    """Return the settings of a training of a base with `stored_bytes` bytes a number. The tokens
    are those of a step on one device.
    """
    settings = {**TRAINER_DEFAULTS, **config.trainer}
    blocks = settings["per_device_train_batch_size"]
    n_blocks = int(blocks) if isinstance(blocks, int) else 1  # auto: as many as fit
    mixed = bool(settings.get("bf16", True) or settings.get("fp16"))
    return TrainingSettings(
        n_tokens=n_blocks * config.block_size,
        checkpointing=any(settings.get(name) for name in CHECKPOINTING),
        mixed=mixed,
        frozen_bytes=stored_bytes if mixed and config.lora is not None else 4,
    )


def training_seconds(
    sizes: ModelSizes, n_context: int, hardware: Hardware, *, checkpointing: bool
) -> float:
    """Return how long one device trains on a token of a text of `n_context` tokens."""
    again = forward_flops(sizes, n_context) if checkpointing else 0
    return hardware.seconds(training_flops(sizes, n_context) + again)


def training_bytes(sizes: ModelSizes, settings: TrainingSettings, n_shards: int = 1) -> int:
    """Return the bytes that a training takes on each device: weights, gradients and Adam's means in
    float32, the frozen weights, and the activations of a step.

    Sharded, each device has its part of all but the activations, and holds two layers at a time.
    """
    state = (4 + OPTIMIZER) * sizes.trained + settings.frozen_bytes * (sizes.total - sizes.trained)
    copies = 2 * sizes.trained_multiplied * settings.mixed  # of weights, to multiply in 16 bits
    kept = activation_bytes(sizes, settings.n_tokens, checkpointing=settings.checkpointing)
    kept *= 1 if settings.mixed else 2
    if n_shards > 1:
        gathered = 2 * (2 if settings.mixed else 4) * sizes.largest_layer
        return math.ceil(state / n_shards) + gathered + kept + RESERVED
    return state + copies + kept + RESERVED


def place_training(
    name: str, sizes: ModelSizes, settings: TrainingSettings, hardware: Hardware
) -> Allocation:
    """Return where a training runs: a copy on each device if one fits, else sharded over all."""
    n = hardware.n_devices
    alone = Allocation(1, "one GPU" if n == 1 else "a copy on each", 0)
    ways = [(1, alone)] + ([(n, Allocation(n, f"sharded over {n}", 0))] if n > 1 else [])
    for n_shards, allocation in ways:
        n_bytes = training_bytes(sizes, settings, n_shards)
        if n_bytes <= hardware.room:
            return replace(allocation, memory_bytes=n_bytes)
    n_shards, allocation = ways[-1]
    n_bytes = training_bytes(sizes, settings, n_shards)
    reason = f"train {name}: {show_bytes(n_bytes)} a device do not fit. " + _find_remedy(
        sizes, settings, hardware
    )
    return replace(allocation, memory_bytes=n_bytes, words="does not fit", warning=reason)


def _find_remedy(sizes: ModelSizes, settings: TrainingSettings, hardware: Hardware) -> str:
    """Return what would make a training fit."""
    again, n = replace(settings, checkpointing=True), hardware.n_devices
    n_bytes = min(training_bytes(sizes, again, n_shards) for n_shards in (1, n))
    if not settings.checkpointing and n_bytes <= hardware.room:
        return f"With `trainer: {{{CHECKPOINTING[0]}: true}}` they are {show_bytes(n_bytes)}."
    wanted = (n_shards for n_shards in (2**k for k in range(1, 11)) if n_shards > n)
    for n_shards in wanted:
        if training_bytes(sizes, again, n_shards) <= hardware.room:
            return f"With `{CHECKPOINTING[0]}: true` {n_shards} devices would do."
    return "Lower per_device_train_batch_size or block_size, or train a LoRA (`lora:`)."


# -- trials ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrialModel:
    """The model of a trial: its sizes, the bytes of its weights, and those of what merges start
    from, the values of the base and the vectors.
    """

    sizes: ModelSizes
    weight_bytes: int
    source_bytes: int

    @property
    def bytes_per_number(self) -> int:
        """Bytes of one number of the model."""
        return self.weight_bytes // self.sizes.total


def place_trial(model: TrialModel, works: Sequence[ItemWork], hardware: Hardware) -> Allocation:
    """Return where a trial runs: on as few devices as hold the model. What merges start from is
    beside it if it fits, else in the memory of the machine.
    """
    n = 1
    while n < hardware.n_devices and model.weight_bytes / n + RESERVED > hardware.room:
        n = min(2 * n, hardware.n_devices)
    n_bytes, sources = (math.ceil(each / n) for each in (model.weight_bytes, model.source_bytes))
    n_bytes += RESERVED
    if n_bytes > hardware.room:
        warning = f"search: {show_bytes(n_bytes)} a device do not fit. Use more devices."
        return Allocation(n, "does not fit", n_bytes, warning=warning)
    words = (
        f"a model on {n} together"
        if n > 1
        else "one GPU"
        if hardware.n_devices == 1
        else "a model on each"
    )
    host = 0 if n_bytes + sources <= hardware.room else model.source_bytes
    n_bytes += 0 if host else sources
    free = n * (hardware.room - n_bytes)
    caches = [_count_texts(model, work, free) * _text_bytes(model, work) for work in works]
    return Allocation(n, words, n_bytes + math.ceil(max(caches, default=0) / n), host)


def _text_bytes(model: TrialModel, work: ItemWork) -> int:
    """Return the bytes of the keys and values of one text, at its longest; 0 without generation."""
    n_tokens = round(work.n_read + work.n_written) if work.n_written else 0
    return cache_bytes(model.sizes, n_tokens, model.bytes_per_number)


def _count_texts(model: TrialModel, work: ItemWork, free: float) -> int:
    """Return how many texts are generated at a time with so many bytes for keys and values."""
    fitting = int(free // max(_text_bytes(model, work), 1))
    return max(1, min(MOST_TEXTS, math.ceil(work.n_items * work.n_inputs), fitting))


def item_seconds(
    model: TrialModel, work: ItemWork, allocation: Allocation, hardware: Hardware
) -> float:
    """Return the time of one device for an item: to read its inputs and to generate the longest
    answers that are allowed, for many texts at a time, each token with one pass over the weights.
    """
    sizes = model.sizes
    seconds = hardware.seconds(work.n_read * forward_flops(sizes, round(work.n_read)))
    if work.n_written:
        free = allocation.n_together * (hardware.room - RESERVED) - model.weight_bytes
        free -= 0 if allocation.host_bytes else model.source_bytes
        n_texts, halfway = _count_texts(model, work, free), round(work.n_read + work.n_written / 2)
        n_bytes = generation_bytes(sizes, halfway, n_texts, model.bytes_per_number)
        step = hardware.seconds(n_texts * forward_flops(sizes, halfway), n_bytes)
        seconds += work.n_written * step / n_texts
    return work.n_inputs * seconds


def merge_seconds(model: TrialModel, allocation: Allocation, hardware: Hardware) -> float:
    """Return the time of one device to set the weights of a merge."""
    if allocation.host_bytes:
        return allocation.host_bytes / HOST_BANDWIDTH
    return hardware.seconds(0, model.source_bytes + model.weight_bytes)
