"""Check a train file before anything is loaded or packed.

LoraConfig, TrainingArguments and optimizers check few of their fields, and some only after the
model is loaded. Everything that they would refuse is refused here, with file, line and field.
"""

import contextlib
import copy
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from optimer_hf.errors import ConfigError
from optimer_hf.files.layered import Origin
from optimer_hf.files.model import Mistake, list_mistakes
from optimer_hf.files.text import first_line, quote
from optimer_hf.models.live import default_device
from optimer_hf.training.arguments import lora_config, training_arguments
from optimer_hf.training.config import TrainConfig
from optimer_hf.training.fields import (
    choice_mistakes,
    list_field_mistakes,
    list_type_mistakes,
    name_fields,
    types_of,
)
from optimer_hf.vectors.lora_config import why_not_trained, why_not_weighted

if TYPE_CHECKING:
    from transformers import TrainingArguments


LAYERWISE_OPTIMIZERS = (
    "galore_adamw",
    "galore_adamw_8bit",
    "galore_adafactor",
    "apollo_adamw",
    "layerwise",
)
CHECKPOINTING = ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
LORA_FIX = "Such an adapter cannot be merged. Change the field or leave it out."


# -- the run ---------------------------------------------------------------------------------------


def check_config(config: TrainConfig, source: Origin | None = None) -> None:
    """Raise ConfigError for everything that LoraConfig, TrainingArguments, the optimizer, the
    scheduler or gradient checkpointing would refuse. Loads no model.

    `source` is the train file, for the line numbers in the error.
    """
    origin = source or f"train config {config.name!r}"
    check_fields(config, origin)
    arguments = training_arguments(config, Path("unused"))
    _check_optimizer(config, arguments, origin)
    _check_sampling(config, origin)
    if config.lora is not None:
        options = lora_config(config).to_dict()
        if reason := why_not_weighted(options) or why_not_trained(options):
            raise ConfigError(f"train config {config.name!r}: lora: {reason}. {LORA_FIX}")


def check_fields(config: TrainConfig, origin: Origin | str) -> None:
    """Raise ConfigError that lists every field or value that is wrong on its own."""
    mistakes = [
        *list_field_mistakes(config),
        *name_fields(
            [
                *_mistakes_of_compilation(config.trainer.get("torch_compile_backend")),
                *_mistakes_of_checkpointing(config.trainer),
                *_mistakes_of_accelerator(config.trainer.get("accelerator_config")),
                *_mistakes_of_head(config.head),
            ]
        ),
    ]
    if mistakes:
        raise ConfigError(list_mistakes(origin, mistakes))


def _mistakes_of_head(head: str) -> Iterator[Mistake]:
    if head == "liger" and importlib.util.find_spec("liger_kernel") is None:
        yield (
            ("head",),
            "found 'liger', but Liger is not installed. pip install 'optimer-hf[liger]'",
        )
    elif head == "liger" and default_device() == "cpu":
        yield ("head",), "found 'liger', whose kernels need a GPU. Leave it out."


def _mistakes_of_compilation(backend: Any) -> Iterator[Mistake]:
    if backend is not None:
        from torch._dynamo import list_backends

        at = ("trainer", "torch_compile_backend")
        yield from choice_mistakes(at, backend, list_backends(exclude_tags=()))


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
        yield from list_type_mistakes(
            at, given, types_of(AcceleratorConfig), AcceleratorConfig.__name__
        )
        inner = given.get("gradient_accumulation_kwargs")
        if isinstance(inner, dict):
            place = (*at, "gradient_accumulation_kwargs")
            known = types_of(GradientAccumulationPlugin)
            yield from list_type_mistakes(place, inner, known, GradientAccumulationPlugin.__name__)
        elif inner is not None:
            yield (
                (*at, "gradient_accumulation_kwargs"),
                f"found {quote(inner)}. Expected a mapping.",
            )


def _check_sampling(config: TrainConfig, origin: Origin | str) -> None:
    """Raise ConfigError for sampling by length: all packed blocks have the same length."""
    if config.trainer.get("train_sampling_strategy") in ("group_by_length", "batch_rebalance"):
        at = ("trainer", "train_sampling_strategy")
        message = "all packed blocks have the same length. Leave it out."
        raise ConfigError(list_mistakes(origin, [(at, f"{'.'.join(at)}: {message}")]))


def _check_optimizer(
    config: TrainConfig, arguments: "TrainingArguments", origin: Origin | str
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
