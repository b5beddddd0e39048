"""What LoraConfig, TrainingArguments or the optimizer refuse in a train file, refused first."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError

from optimer_hf.errors import ConfigError
from optimer_hf.files.model import listed
from optimer_hf.files.text import did_you_mean, shown
from optimer_hf.training.arguments import _arguments, _lora_config
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


MEND_LORA = "What is trained so fits no merge. Change or drop the field."


# -- the run ---------------------------------------------------------------------------------------


def check_config(config: TrainConfig, path: Path | None = None) -> None:
    """Raise ConfigError for what LoraConfig, TrainingArguments, the optimizer and the scheduler
    refuse, with the lines of the file at `path`; loads no model.
    """
    from peft import LoraConfig
    from transformers import TrainingArguments

    found = [
        *_mistakes_of_fields("lora", config.lora or {}, LoraConfig),
        *_mistakes_of_fields("trainer", config.trainer, TrainingArguments),
        *_mistakes_of_trainer(config.trainer),
    ]
    for field, value in (config.lora or {}).items():
        found += _out_of_bounds("lora", field, value, LORA_BOUNDS)
    if found:
        origin = path or f"train config {config.name!r}"
        raise ConfigError(listed(origin, [(at, f"{'.'.join(at)}: {told}") for at, told in found]))
    _check_optimizer(config, _arguments(config, Path("unused")))
    if config.lora is not None:
        options = _lora_config(config).to_dict()
        if reason := why_not_weighted(options) or why_not_trained(options):
            raise ConfigError(f"train config {config.name!r}: lora: {reason}. {MEND_LORA}")


def _mistakes_of_fields(
    name: str, given: Mapping[str, Any], cls: Any
) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield fields that a dataclass does not have, and numbers and switches that are none: its
    authors check them late, or not at all.
    """
    known, hints = [item.name for item in dataclasses.fields(cls) if item.init], None
    for field, value in given.items():
        if field not in known:
            hint = did_you_mean(field, known)
            yield (name, field), f"unknown field of {cls.__name__}.{hint}"
            continue
        hints = hints or get_type_hints(cls)
        if set(get_args(hints[field]) or [hints[field]]) <= PLAIN:
            try:
                config = ConfigDict(strict=True, allow_inf_nan=False)
                TypeAdapter(hints[field], config=config).validate_python(value)
            except ValidationError as error:
                yield (name, field), f"found {shown(value)}. {error.errors()[0]['msg']}."


def _mistakes_of_trainer(given: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], str]]:
    for field, value in given.items():
        if field in RESERVED_TRAINER_FIELDS:
            yield ("trainer", field), f"set it through {RESERVED_TRAINER_FIELDS[field]}."
        if field in SECRET and value is not None:
            yield ("trainer", field), "found a token, which would be written down. Leave it out."
        if field in UNUSABLE and value not in (None, False, 0, "no"):
            yield ("trainer", field), f"found {shown(value)}. {UNUSABLE[field]}; leave it out."
        if field in ABOVE_ZERO and isinstance(value, int | float) and not value > 0:
            yield ("trainer", field), f"found {value!r}. Expected a number above 0."
        else:
            yield from _out_of_bounds("trainer", field, value, BOUNDS)


def _out_of_bounds(
    part: str, field: str, value: Any, bounds: Mapping[str, tuple[int, int]]
) -> Iterator[tuple[tuple[str, str], str]]:
    if field in bounds and isinstance(value, int | float):
        least, most = bounds[field]
        if not least <= value <= most:
            yield (part, field), f"found {value!r}. Expected {least:,} to {most:,}."


def _check_optimizer(config: TrainConfig, arguments: "TrainingArguments") -> None:
    """Make the optimizer and the scheduler of a run for one number: what they refuse, Trainer would
    say only once the model is loaded and the corpus packed.
    """
    from transformers import Trainer, get_scheduler
    from transformers.integrations import get_reporting_integration_callbacks

    try:
        get_reporting_integration_callbacks(arguments.report_to)
        of_model = (
            arguments.deepspeed or arguments.fsdp or str(arguments.optim).lower().endswith("lomo")
        )
        if of_model or "optim_target_modules" in config.trainer:
            return  # those make the optimizer from the model itself
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer = optimizer_class([torch.nn.Parameter(torch.zeros(1))], **options)
        get_scheduler(
            arguments.lr_scheduler_type,
            optimizer,
            num_warmup_steps=0,
            num_training_steps=1,
            scheduler_specific_kwargs=dict(arguments.lr_scheduler_kwargs or {}),
        )
    except (ValueError, TypeError, ImportError, RuntimeError, KeyError) as error:
        raise ConfigError(f"train config {config.name!r}: trainer: {error}") from error
