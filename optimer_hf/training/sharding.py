"""Training whose parameters are spread over processes: what `accelerate launch` was told.

accelerate passes its config to the processes in environment variables, which its own plug-ins read.
FSDP2 and DeepSpeed ZeRO-3 are supported. In both, no process ever holds the whole model on a GPU.
"""

import importlib.util
import os
from typing import TYPE_CHECKING, Any

import torch

from optimer_hf.errors import ConfigError
from optimer_hf.files.text import first_line
from optimer_hf.training.arguments import finds_batch_size
from optimer_hf.training.config import TrainConfig

if TYPE_CHECKING:
    from transformers import Trainer

FLAGS = {
    "FSDP": "ACCELERATE_USE_FSDP",
    "DeepSpeed": "ACCELERATE_USE_DEEPSPEED",
    "Megatron-LM": "ACCELERATE_USE_MEGATRON_LM",
}


def requested_sharding() -> str | None:
    """Return what `accelerate launch` was told to shard with: "FSDP", "DeepSpeed" or None."""
    return next((kind for kind, flag in FLAGS.items() if _is_on(flag)), None)


def _is_on(flag: str) -> bool:
    return os.environ.get(flag, "").lower() in ("1", "true", "t", "yes", "y", "on")


def check_sharding(config: TrainConfig) -> None:
    """Raise ConfigError when `accelerate launch` was told to shard in a way that cannot work."""
    where = f"train config {config.name!r}: accelerate launch"
    kind = requested_sharding()
    if kind == "FSDP":
        _check_fsdp(where)
    elif kind == "DeepSpeed":
        _check_deepspeed(where)
    elif kind is not None:
        raise ConfigError(
            f"{where}: found {kind}, expected FSDP with fsdp_version: 2 or DeepSpeed ZeRO-3."
        )
    if kind is not None and finds_batch_size(config):
        raise ConfigError(
            f"{where}: found {kind} and per_device_train_batch_size: auto, which is found with the "
            "whole model on each GPU. Give a number."
        )


def _check_fsdp(where: str) -> None:
    from accelerate.utils import FullyShardedDataParallelPlugin, ParallelismConfig

    try:
        plugin = FullyShardedDataParallelPlugin()
        shape = ParallelismConfig() if _is_on("ACCELERATE_USE_PARALLELISM_CONFIG") else None
    except (ValueError, TypeError, ImportError, KeyError) as error:
        raise ConfigError(f"{where}: FSDP: {first_line(error)}") from error
    if plugin.fsdp_version != 2:
        raise ConfigError(
            f"{where}: found FSDP version {plugin.fsdp_version}, expected fsdp_version: 2 "
            "(`accelerate to-fsdp2 --config_file FILE` converts a config)."
        )
    if plugin.state_dict_type.name != "SHARDED_STATE_DICT":
        raise ConfigError(
            f"{where}: found fsdp_state_dict_type: {plugin.state_dict_type.name}, expected "
            "SHARDED_STATE_DICT. Otherwise one process would hold the whole model to save it."
        )
    if shape is not None and shape.non_data_parallel_size > 1:
        raise ConfigError(
            f"{where}: found a parallelism_config that divides layers or blocks of text (tp_size, "
            "cp_size or sp_size above 1). Use only dp_shard_size and dp_replicate_size."
        )


def _check_deepspeed(where: str) -> None:
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(f"{where}: DeepSpeed is not installed. `pip install deepspeed`.")
    from accelerate.utils import DeepSpeedPlugin

    try:
        stage = DeepSpeedPlugin().zero_stage
    except Exception as error:  # accelerate and DeepSpeed raise errors of many kinds
        raise ConfigError(f"{where}: DeepSpeed: {first_line(error)}") from error
    if stage != 3:
        raise ConfigError(
            f"{where}: found DeepSpeed zero_stage: {stage}, expected 3. Below it, each "
            "process holds the whole model; --multi_gpu does that without DeepSpeed."
        )


def refuse_unpassable(config: TrainConfig, model: torch.nn.Module) -> None:
    """Raise ConfigError for a model that fsdp_cpu_ram_efficient_loading cannot load: accelerate
    passes only parameters from the process that reads them to the others, and ties them by itself.
    """
    if requested_sharding() != "FSDP" or not _is_on("FSDP_CPU_RAM_EFFICIENT_LOADING"):
        return
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = [name for name in model.state_dict() if name not in parameters]
    lora = config.lora or {}
    if buffers:
        reason = f"the saved buffer {buffers[0]!r}"
    elif lora.get("modules_to_save") and lora.get("ensure_weight_tying"):
        reason = "modules_to_save that are tied"
    else:
        return
    raise ConfigError(
        f"train config {config.name!r}: accelerate launch: accelerate cannot pass on {reason}. "
        "Set fsdp_cpu_ram_efficient_loading: false; every process then reads the base."
    )


def refuse_unsharded(trainer: "Trainer", name: str) -> None:
    """Raise ConfigError when accelerate has ignored the request to shard, as it does on CPUs."""
    kind, actual = requested_sharding(), trainer.accelerator.distributed_type.value
    if kind is not None and kind.upper() != actual:
        raise ConfigError(
            f"train config {name!r}: accelerate launch: {kind} needs GPUs, and accelerate found "
            f"none ({actual}). Leave it out."
        )


def forget_deepspeed() -> None:
    """Let transformers build models as usual again. While it knows a config of ZeRO-3, every model
    that it makes is spread over the processes, also one that is only looked at.
    """
    if requested_sharding() == "DeepSpeed":
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def reduce_in_float32(trainer: "Trainer") -> None:
    """Let FSDP2 add up gradients in float32, and leave the loss in float32, in mixed precision.

    accelerate's own policy rounds both to 16 bits.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin: Any = trainer.accelerator.state.fsdp_plugin
    policy = plugin.mixed_precision_policy
    if policy is not None and policy.param_dtype is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=policy.param_dtype, reduce_dtype=torch.float32
        )
