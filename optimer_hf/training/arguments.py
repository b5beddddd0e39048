"""A train file -> TrainingArguments and LoraConfig."""

import copy
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from optimer_hf.errors import ConfigError
from optimer_hf.files.text import first_line
from optimer_hf.models.live import compute_dtype, default_device
from optimer_hf.training.checkpoints import CHECKPOINTS
from optimer_hf.training.config import AUTO, TrainConfig
from optimer_hf.training.fields import with_installed_names

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)


BATCH_SIZE = "per_device_train_batch_size"

TRAINER_DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "num_train_epochs": 1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "logging_steps": 0.002,  # at most 500 losses a run: the host waits for the GPU to log one
    "logging_nan_inf_filter": False,  # it waits at every step, and hides that a run has diverged
    "save_steps": 0.1,
    "save_total_limit": 2,  # if the run is killed while it writes one, the other is whole
    "report_to": "none",
}


def training_arguments(config: TrainConfig, out: Path) -> "TrainingArguments":
    """Return the arguments of the Trainer: those of the train file over TRAINER_DEFAULTS.

    Raises ConfigError when TrainingArguments refuses a field.
    """
    from transformers import TrainingArguments

    device = default_device()
    has_kernels = compute_dtype(torch.bfloat16, device) == torch.bfloat16
    fields: dict[str, Any] = {
        "learning_rate": 2e-4 if config.lora is not None else 1e-5,
        "use_cpu": device == "cpu",
        "bf16": has_kernels and not config.trainer.get("fp16"),
        **TRAINER_DEFAULTS,
        **config.trainer,
        "output_dir": str(out / CHECKPOINTS),
        "seed": config.seed,
        "disable_tqdm": True,
    }
    if finds_batch_size(config):
        fields[BATCH_SIZE] = 1  # until it is found
    if compiles_layers(config):
        fields["torch_compile"] = False  # transformers would compile the model as a whole
    try:
        names = TrainingArguments.__dataclass_fields__
        arguments = TrainingArguments(**with_installed_names(fields, names))
    except Exception as error:  # TrainingArguments raises errors of many kinds
        reason = first_line(error)
        raise ConfigError(f"train config {config.name!r}: trainer: {reason}") from error
    if arguments.n_gpu > 1:  # the Trainer would use DataParallel, which drops the fused loss
        logger.info("train: using one GPU of %d; `accelerate launch` uses all", arguments.n_gpu)
        arguments._n_gpu = 1
    return arguments


def finds_batch_size(config: TrainConfig) -> bool:
    """Whether the batch size of a run is to be found (`per_device_train_batch_size: auto`)."""
    return bool(config.trainer.get(BATCH_SIZE) == AUTO)


def compiles_layers(config: TrainConfig) -> bool:
    """Whether a train file asks for compiled layers: `torch_compile: true`, without a backend or a
    mode. With one of these, transformers compiles the model as a whole, which takes much longer.
    """
    given = config.trainer
    others = ("torch_compile_backend", "torch_compile_mode")
    return bool(given.get("torch_compile")) and not any(given.get(field) for field in others)


def lora_config(config: TrainConfig) -> Any:
    """Return PEFT's LoraConfig of a run. Raises ConfigError when it refuses a field."""
    from peft import LoraConfig

    try:
        # PEFT writes into the lists that it is given
        return LoraConfig(**{"task_type": "CAUSAL_LM", **copy.deepcopy(config.lora or {})})
    except Exception as error:  # LoraConfig raises errors of many kinds
        raise ConfigError(f"train config {config.name!r}: lora: {first_line(error)}") from error
