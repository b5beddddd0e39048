"""Check a train file before anything is loaded or packed.

LoraConfig, TrainingArguments and optimizers check few of their fields, and some only after the
model is loaded. Everything that they would refuse is refused here, with file, line and field.
"""

import contextlib
import copy
import dataclasses
import json
import multiprocessing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_type_hints

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from optimer_hf.errors import ConfigError
from optimer_hf.files.model import Mistake, list_mistakes
from optimer_hf.files.paths import Place
from optimer_hf.files.text import did_you_mean, first_line, quote
from optimer_hf.training.arguments import lora_config, training_arguments
from optimer_hf.training.config import (
    ABOVE_ZERO,
    BOUNDS,
    LORA_BOUNDS,
    PLAIN,
    RESERVED_TRAINER_FIELDS,
    SECRET,
    UNUSABLE,
    TrainConfig,
)
from optimer_hf.vectors.lora_config import why_not_trained, why_not_weighted

if TYPE_CHECKING:
    from transformers import TrainingArguments


LORA_UNUSABLE = {
    **dict.fromkeys(
        ("eva_config", "corda_config", "lora_ga_config", "loftq_config"),
        "It belongs to an init_lora_weights whose adapters cannot be merged",
    ),
    "runtime_config": "It is for using an adapter, not for training one",
    "auto_mapping": "It names classes of another model",
}
CHOICES: dict[str, list[Any]] = {  # values that transformers or torch check late
    "debug": ["", "underflow_overflow"],
    "ddp_backend": ["nccl", "gloo", "mpi", "xccl", "hccl", "cncl", "mccl"],
    "include_num_input_tokens_seen": [True, False, "all", "non_padding", "no"],
    "log_level": ["passive", "detail", "debug", "info", "warning", "error", "critical"],
    "log_level_replica": ["passive", "detail", "debug", "info", "warning", "error", "critical"],
    "save_strategy": ["no", "steps", "epoch"],
    "torch_compile_mode": [
        *("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
    ],
    "train_sampling_strategy": ["random", "sequential", "group_by_length", "batch_rebalance"],
}
LAYERWISE_OPTIMIZERS = (
    "galore_adamw",
    "galore_adamw_8bit",
    "galore_adafactor",
    "apollo_adamw",
    "layerwise",
)
CHECKPOINTING = ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
LayerIndex = Annotated[int, Field(ge=0, le=10**5)]

TEXTS = {str, list[str], type(None)}
TYPED = {  # stricter types than the hints of some fields
    **dict.fromkeys(
        ("target_modules", "exclude_modules", "layers_pattern"), str | list[str] | None
    ),
    **dict.fromkeys(("peft_version", "megatron_core", "revision"), str | None),
    "base_model_name_or_path": str | None,
    "bias": Literal["none", "all", "lora_only"],
    "layers_to_transform": LayerIndex | list[LayerIndex] | None,
    "modules_to_save": list[str] | None,
    "peft_type": Literal["LORA"] | None,
    "accelerator_config": dict[str, Any] | None,
    "lr_scheduler_kwargs": dict[str, Any] | str | None,
    "optim_target_modules": str | list[str] | None,
    "trackio_static_space_id": str | Literal[False] | None,
}
LORA_FIX = "Such an adapter cannot be merged. Change the field or leave it out."


# -- the run ---------------------------------------------------------------------------------------


def check_config(config: TrainConfig, path: Path | None = None) -> None:
    """Raise ConfigError for everything that LoraConfig, TrainingArguments, the optimizer, the
    scheduler or gradient checkpointing would refuse. Loads no model.

    `path` is the train file, for the line numbers in the error.
    """
    origin = path or f"train config {config.name!r}"
    check_fields(config, origin)
    arguments = training_arguments(config, Path("unused"))
    _check_optimizer(config, arguments, origin)
    _check_sampling(config, origin)
    if config.lora is not None:
        options = lora_config(config).to_dict()
        if reason := why_not_weighted(options) or why_not_trained(options):
            raise ConfigError(f"train config {config.name!r}: lora: {reason}. {LORA_FIX}")


def check_fields(config: TrainConfig, origin: Path | str) -> None:
    """Raise ConfigError that lists every field or value that is wrong on its own."""
    from peft import LoraConfig
    from transformers import TrainingArguments

    mistakes = [
        *_mistakes_of_fields(("lora",), config.lora or {}, LoraConfig),
        *_mistakes_of_fields(("trainer",), config.trainer, TrainingArguments),
        *_mistakes_of_trainer(config.trainer),
        *_mistakes_of_checkpointing(config.trainer),
        *_mistakes_of_accelerator(config.trainer.get("accelerator_config")),
    ]
    for field, value in (config.lora or {}).items():
        mistakes += _mistakes_of_bounds("lora", field, value, LORA_BOUNDS)
        if field in LORA_UNUSABLE and value not in (None, {}):
            message = f"found {quote(value)}. {LORA_UNUSABLE[field]}; leave it out."
            mistakes.append((("lora", field), message))
    if mistakes:
        named = [(at, f"{'.'.join(map(str, at))}: {message}") for at, message in mistakes]
        raise ConfigError(list_mistakes(origin, named))


def _mistakes_of_fields(at: Place, given: Mapping[str, Any], cls: Any) -> Iterator[Mistake]:
    """Yield unknown fields of a dataclass, and values of the wrong type, which the dataclass itself
    does not check.
    """
    known, hints = [item.name for item in dataclasses.fields(cls) if item.init], None
    for field, value in given.items():
        if field not in known:
            hint = did_you_mean(field, known)
            yield (*at, field), f"unknown field of {cls.__name__}.{hint}"
            continue
        hints = hints or get_type_hints(cls)
        hint = TYPED.get(field, hints[field])
        kinds = set(get_args(hint) or [hint])
        if field in TYPED or kinds <= PLAIN or (kinds <= TEXTS and field not in UNUSABLE):
            yield from _mistakes_of_type((*at, field), value, hint)


def _mistakes_of_type(at: Place, value: Any, hint: Any) -> Iterator[Mistake]:
    try:
        config = ConfigDict(strict=True, allow_inf_nan=False)
        TypeAdapter(hint, config=config).validate_python(value)
    except ValidationError as error:
        yield at, f"found {quote(value)}. {error.errors()[0]['msg']}."


def _mistakes_of_trainer(given: Mapping[str, Any]) -> Iterator[Mistake]:
    for field, value in given.items():
        if field in RESERVED_TRAINER_FIELDS:
            yield ("trainer", field), f"set it through {RESERVED_TRAINER_FIELDS[field]}."
        if field in SECRET and value is not None:
            yield (
                ("trainer", field),
                "found a token, which would be saved with the run. Leave it out.",
            )
        if field in UNUSABLE and value not in (None, False, 0, "no", "", []):
            yield ("trainer", field), f"found {quote(value)}. {UNUSABLE[field]}; leave it out."
        choices = _choices_for(field)
        if choices and value is not None and value not in choices:
            hint = did_you_mean(str(value), list(map(str, choices)))
            yield ("trainer", field), f"found {quote(value)}.{hint}"
        if field in ABOVE_ZERO and isinstance(value, int | float) and not value > 0:
            yield ("trainer", field), f"found {value!r}. Expected a number above 0."
        else:
            yield from _mistakes_of_bounds("trainer", field, value, BOUNDS)


def _choices_for(field: str) -> list[Any]:
    """Return the allowed values of a field of TrainingArguments, empty if any value is allowed."""
    if field == "dataloader_multiprocessing_context":
        return list(multiprocessing.get_all_start_methods())
    if field in ("optim", "lr_scheduler_type", "logging_strategy"):
        from transformers.trainer_utils import IntervalStrategy, SchedulerType
        from transformers.training_args import OptimizerNames

        kinds: dict[str, Any] = {"optim": OptimizerNames, "lr_scheduler_type": SchedulerType}
        return [each.value for each in kinds.get(field, IntervalStrategy)]
    if field != "torch_compile_backend":
        return CHOICES.get(field, [])
    from torch._dynamo import list_backends

    return list(list_backends(exclude_tags=()))


def _mistakes_of_bounds(
    part: str, field: str, value: Any, bounds: Mapping[str, tuple[int, int]]
) -> Iterator[Mistake]:
    if field in bounds and isinstance(value, int | float):
        least, most = bounds[field]
        if not least <= value <= most:
            yield (part, field), f"found {value!r}. Expected {least:,} to {most:,}."


def _mistakes_of_checkpointing(given: Mapping[str, Any]) -> Iterator[Mistake]:
    """Yield options of gradient checkpointing that torch would refuse in the first step; each is
    tried on a single number.
    """
    from torch.utils.checkpoint import checkpoint

    for field in CHECKPOINTING:
        options = given.get(field)
        if isinstance(options, str):  # JSON, as TrainingArguments reads it from a command line
            with contextlib.suppress(ValueError):
                options = json.loads(options)
        if options is None:
            continue
        if not isinstance(options, dict):
            yield ("trainer", field), f"found {quote(options)}. Expected a mapping of options."
            continue
        for option, value in options.items():
            if not isinstance(value, bool) and option != "determinism_check":
                yield ("trainer", field, option), f"found {quote(value)}. Expected true or false."
        try:
            number = torch.zeros(1, requires_grad=True)
            checked: dict[str, Any] = {"use_reentrant": False, **options}
            loss = checkpoint(torch.sin, number, **checked)
            loss.backward()
        except Exception as error:
            yield ("trainer", field), f"found {quote(options)}. {first_line(error)}."


def _mistakes_of_accelerator(given: Any) -> Iterator[Mistake]:
    from accelerate.utils import GradientAccumulationPlugin
    from transformers.trainer_pt_utils import AcceleratorConfig

    at = ("trainer", "accelerator_config")
    if isinstance(given, dict):
        yield from _mistakes_of_fields(at, given, AcceleratorConfig)
        inner = given.get("gradient_accumulation_kwargs")
        if isinstance(inner, dict):
            place = (*at, "gradient_accumulation_kwargs")
            yield from _mistakes_of_fields(place, inner, GradientAccumulationPlugin)
        elif inner is not None:
            yield (
                (*at, "gradient_accumulation_kwargs"),
                f"found {quote(inner)}. Expected a mapping.",
            )


def _check_sampling(config: TrainConfig, origin: Path | str) -> None:
    """Raise ConfigError for sampling by length: all packed blocks have the same length."""
    if config.trainer.get("train_sampling_strategy") in ("group_by_length", "batch_rebalance"):
        at = ("trainer", "train_sampling_strategy")
        message = "all packed blocks have the same length. Leave it out."
        raise ConfigError(list_mistakes(origin, [(at, f"{'.'.join(at)}: {message}")]))


def _check_optimizer(
    config: TrainConfig, arguments: "TrainingArguments", origin: Path | str
) -> None:
    """Build the optimizer and the scheduler of a run for a single number, and raise ConfigError for
    what they refuse. The Trainer would raise it only after loading the model and packing the text.
    """
    from transformers import Trainer, get_scheduler
    from transformers.integrations import get_reporting_integration_callbacks

    field = "report_to"
    try:
        get_reporting_integration_callbacks(arguments.report_to)
        model = torch.nn.Linear(1, 1)
        if config.trainer.get("optim_target_modules"):
            field = "optim_target_modules"
            if not str(arguments.optim).lower().endswith(LAYERWISE_OPTIMIZERS):
                raise ValueError(f"{arguments.optim} always trains all layers. Leave it out")
            return  # `check_targets` looks them up in the model
        field = "optim_args" if arguments.optim_args else "optim"
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        if ignored := _ignored_option(arguments, model):
            raise ValueError(f"{arguments.optim} ignores {ignored!r}. Leave it out")
        if str(arguments.optim).lower().endswith("lomo"):
            return  # it needs a whole model
        optimizer = optimizer_class([torch.nn.Parameter(torch.zeros(1))], **options)
        field = "lr_scheduler_kwargs"
        get_scheduler(
            arguments.lr_scheduler_type,
            optimizer,
            num_warmup_steps=0,
            num_training_steps=1,
            scheduler_specific_kwargs=dict(arguments.lr_scheduler_kwargs or {}),
        )
    except Exception as error:  # each library raises its own kind
        place = ("trainer", field)
        message = f"{'.'.join(place)}: {first_line(error).rstrip('.')}."
        raise ConfigError(list_mistakes(origin, [(place, message)])) from error


def _ignored_option(arguments: "TrainingArguments", model: torch.nn.Module) -> str | None:
    """Return an option of `optim_args` that the optimizer does not read, or None."""
    from transformers import Trainer

    given: dict[str, str] = dict(
        part.strip().partition("=")[::2] for part in (arguments.optim_args or "").split(",") if part
    )

    def optimizer_with(options: Mapping[str, str]) -> Any:
        changed = copy.copy(arguments)
        changed.optim_args = ",".join(f"{key}={value}" for key, value in options.items()) or None
        try:
            return Trainer.get_optimizer_cls_and_kwargs(changed, model)
        except Exception as error:  # the optimizer read it
            return repr(error)

    for name in given:
        others = {key: value for key, value in given.items() if key != name}
        changed = given | {name: "0.123"}
        if optimizer_with(given) == optimizer_with(others) == optimizer_with(changed):
            return name
    return None


def check_targets(config: TrainConfig, model: Any) -> None:
    """Raise ConfigError when the model lacks layers that `optim_target_modules` names."""
    from transformers import Trainer

    if config.trainer.get("optim_target_modules"):
        try:
            Trainer.get_optimizer_cls_and_kwargs(training_arguments(config, Path("unused")), model)
        except Exception as error:
            reason = first_line(error)
            raise ConfigError(f"train config {config.name!r}: trainer: {reason}") from error
