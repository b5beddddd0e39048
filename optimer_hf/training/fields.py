"""Check the fields of `lora` and `trainer` without importing the packages that read them.

Importing peft and transformers takes seconds, and a typo should be named at once. So the names,
types and choices of the fields are read from the source of the packages. `checks` finds the
mistakes that only the packages themselves can find.
"""

import ast
import builtins
import dataclasses
import functools
import importlib
import importlib.util
import multiprocessing
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from optimer_hf.files.model import Mistake
from optimer_hf.files.paths import Place
from optimer_hf.files.text import did_you_mean, quote
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

Source = tuple[str, str, str]  # package, file and class

SOURCES: dict[str, list[Source]] = {  # section of a train file -> its class, after the inherited
    "lora": [
        ("peft", "config.py", "PeftConfigMixin"),
        ("peft", "config.py", "PeftConfig"),
        ("peft", "tuners/lora/config.py", "LoraConfig"),
    ],
    "trainer": [("transformers", "training_args.py", "TrainingArguments")],
}
ENUMS: dict[str, Source] = {  # field of `trainer` -> the enum of its values
    "optim": ("transformers", "training_args.py", "OptimizerNames"),
    "lr_scheduler_type": ("transformers", "trainer_utils.py", "SchedulerType"),
    "logging_strategy": ("transformers", "trainer_utils.py", "IntervalStrategy"),
}
CHOICES: dict[str, list[Any]] = {  # values that transformers or torch check late
    "dataloader_multiprocessing_context": multiprocessing.get_all_start_methods(),
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
RENAMED = {  # fields of TrainingArguments with one name in old releases, and another in new ones
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
LORA_UNUSABLE = {
    **dict.fromkeys(
        ("eva_config", "corda_config", "lora_ga_config", "loftq_config"),
        "It belongs to an init_lora_weights whose adapters cannot be merged",
    ),
    "runtime_config": "It is for using an adapter, not for training one",
    "auto_mapping": "It names classes of another model",
}
LayerIndex = Annotated[int, Field(ge=0, le=10**5)]
Rank = Annotated[int, Field(ge=1, le=2**16)]
Share = Annotated[float, Field(ge=0, lt=1)]
Tracker = Literal["none", "all", "tensorboard", "wandb", "mlflow", "trackio", "comet_ml"]
# Values that no package refuses, if they have no mistakes. (Without bf16, a GPU refuses that.) Any
# stands for whatever passes `list_field_mistakes`.
SETTLED: dict[str, dict[str, Any]] = {
    "lora": {
        **dict.fromkeys(("r", "lora_alpha", "lora_dropout", "use_rslora"), Any),
        "target_modules": Literal["all-linear"] | list[str],
        **dict.fromkeys(("exclude_modules", "modules_to_save"), list[str]),
        "init_lora_weights": Literal[True, "gaussian"],
        **dict.fromkeys(("rank_pattern", "alpha_pattern"), dict[str, Rank]),
        "bias": Literal["none"],
        "task_type": Literal["CAUSAL_LM"],
    },
    "trainer": {
        # the batch and the length of a run
        **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps"), Any),
        **dict.fromkeys(("num_train_epochs", "max_steps", "average_tokens_across_devices"), Any),
        # the optimizer
        "optim": Literal[
            "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop", "adagrad"
        ],
        **dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon"), Any),
        **dict.fromkeys(("adam_beta1", "adam_beta2"), Share),
        "lr_scheduler_type": Literal[
            *("linear", "cosine", "constant", "constant_with_warmup"),
            *("cosine_with_restarts", "inverse_sqrt"),
        ],
        **dict.fromkeys(("logging_steps", "save_steps", "warmup_steps"), int | Share),
        "neftune_noise_alpha": Any,
        # numbers and memory
        **dict.fromkeys(("bf16", "fp16", "full_determinism", "use_cache"), bool),
        "tf32": Literal[False] | None,
        "use_cpu": Literal[True],
        **dict.fromkeys(("activation_checkpointing", "gradient_checkpointing"), Any),
        **dict.fromkeys(
            ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"),
            dict[Literal["use_reentrant"], bool] | None,
        ),
        "torch_empty_cache_steps": Any,
        # the log and the checkpoints
        **dict.fromkeys(("logging_first_step", "logging_nan_inf_filter", "disable_tqdm"), Any),
        **dict.fromkeys(("log_level", "log_level_replica", "log_on_each_node"), Any),
        **dict.fromkeys(("logging_strategy", "save_strategy"), Literal["no", "steps", "epoch"]),
        **dict.fromkeys(("save_total_limit", "save_on_each_node", "skip_memory_metrics"), Any),
        **dict.fromkeys(("include_num_input_tokens_seen", "run_name", "project"), Any),
        "report_to": Tracker | list[Tracker],
        # the data and the processes
        "train_sampling_strategy": Literal["random", "sequential"],
        **dict.fromkeys(("dataloader_num_workers", "dataloader_prefetch_factor"), Any),
        **dict.fromkeys(("dataloader_drop_last", "dataloader_pin_memory"), Any),
        **dict.fromkeys(("dataloader_persistent_workers", "dataloader_in_order"), Any),
        **dict.fromkeys(("remove_unused_columns", "ddp_timeout", "ddp_bucket_cap_mb"), Any),
        **dict.fromkeys(("ddp_find_unused_parameters", "ddp_broadcast_buffers"), Any),
    },
}

TEXTS = {str, list[str], type(None)}
TYPED = {  # stricter types than the hints of some fields
    **dict.fromkeys(
        ("target_modules", "exclude_modules", "layers_pattern"), str | list[str] | None
    ),
    **dict.fromkeys(("peft_version", "megatron_core", "revision"), str | None),
    "base_model_name_or_path": str | None,
    "per_device_train_batch_size": int | Literal["auto"],
    "bias": Literal["none", "all", "lora_only"],
    "layers_to_transform": LayerIndex | list[LayerIndex] | None,
    "modules_to_save": list[str] | None,
    "peft_type": Literal["LORA"] | None,
    "accelerator_config": dict[str, Any] | None,
    "lr_scheduler_kwargs": dict[str, Any] | str | None,
    "optim_target_modules": str | list[str] | None,
    "trackio_static_space_id": str | Literal[False] | None,
}


# -- mistakes --------------------------------------------------------------------------------------


def list_field_mistakes(config: TrainConfig) -> list[Mistake]:
    """Return every field under `lora` and `trainer` that is unknown, or wrong on its own."""
    lora, trainer = config.lora or {}, config.trainer
    mistakes: list[Mistake] = []
    for section, given in (("lora", lora), ("trainer", trainer)):
        cls = SOURCES[section][-1][2]
        known = with_both_names(field_types(section)) if given else {}
        mistakes += list_type_mistakes((section,), given, known, cls)
    for field, value in trainer.items():
        mistakes += _mistakes_of_trainer(field, value)
    mistakes += _mistakes_together(trainer)
    for field, value in lora.items():
        mistakes += _mistakes_of_bounds("lora", field, value, LORA_BOUNDS)
        if field in LORA_UNUSABLE and value not in (None, {}):
            message = f"found {quote(value)}. {LORA_UNUSABLE[field]}; leave it out."
            mistakes.append((("lora", field), message))
    return name_fields(mistakes)


def with_both_names(types: Mapping[str, Any]) -> dict[str, Any]:
    """Return the types of fields, and of those in RENAMED by their other name, too."""
    other = {old: types[new] for old, new in RENAMED.items() if new in types}
    other |= {new: types[old] for old, new in RENAMED.items() if old in types}
    return {**other, **types}


def with_installed_names(given: Mapping[str, Any], installed: Collection[str]) -> dict[str, Any]:
    """Return fields by the names that the installed release has for them, see RENAMED."""
    names = {old: new for old, new in RENAMED.items() if new in installed}
    names |= {new: old for old, new in RENAMED.items() if new not in installed}
    names = {name: other for name, other in names.items() if other not in given}
    return {names.get(name, name): value for name, value in given.items()}


def name_fields(mistakes: Iterable[Mistake]) -> list[Mistake]:
    """Return mistakes whose messages begin with the dotted name of the field."""
    return [(at, f"{'.'.join(map(str, at))}: {message}") for at, message in mistakes]


def list_type_mistakes(
    at: Place, given: Mapping[str, Any], known: Mapping[str, Any], cls: str
) -> list[Mistake]:
    """Return the fields that a class does not know, and those with a value of the wrong type.

    `known` maps the fields of the class to their types. A dataclass does not check the types.
    """
    mistakes: list[Mistake] = []
    for field, value in given.items():
        if field not in known:
            hint = did_you_mean(field, list(known))
            mistakes.append(((*at, field), f"unknown field of {cls}.{hint}"))
            continue
        kind = TYPED.get(field, known[field])
        kinds = set(get_args(kind) or [kind])
        is_checked = kinds <= PLAIN or (kinds <= TEXTS and field not in UNUSABLE)
        if (field in TYPED or is_checked) and (reason := _why_not(kind, value)):
            mistakes.append(((*at, field), f"found {quote(value)}. {reason}."))
    return mistakes


def _why_not(kind: Any, value: Any) -> str | None:
    """Return why a value is not of a type, None where it is."""
    try:
        config = ConfigDict(strict=True, allow_inf_nan=False)
        TypeAdapter(kind, config=config).validate_python(value)
    except ValidationError as error:
        return str(error.errors()[0]["msg"])
    return None


def _mistakes_of_trainer(field: str, value: Any) -> Iterator[Mistake]:
    at = ("trainer", field)
    if field in RESERVED_TRAINER_FIELDS:
        yield at, f"set it through {RESERVED_TRAINER_FIELDS[field]}."
    if field in SECRET and value is not None:
        yield at, "found a token, which would be saved with the run. Leave it out."
    if field in UNUSABLE and value not in (None, False, 0, "no", "", []):
        yield at, f"found {quote(value)}. {UNUSABLE[field]}; leave it out."
    choices = CHOICES.get(field) or (_values_of(*ENUMS[field]) if field in ENUMS else [])
    yield from choice_mistakes(at, value, choices)
    if field in ABOVE_ZERO and isinstance(value, int | float) and not value > 0:
        yield at, f"found {value!r}. Expected a number above 0."
    else:
        yield from _mistakes_of_bounds("trainer", field, value, BOUNDS)


def _mistakes_together(trainer: Mapping[str, Any]) -> Iterator[Mistake]:
    """Yield values of `trainer` that contradict each other."""
    if trainer.get("bf16") is True and trainer.get("fp16") is True:
        yield ("trainer", "fp16"), "found true, and bf16 is true as well. Choose one of them."
    has_workers = trainer.get("dataloader_num_workers") not in (None, 0)
    if trainer.get("dataloader_prefetch_factor") is not None and not has_workers:
        message = "only workers load data ahead. Set dataloader_num_workers, or leave it out."
        yield ("trainer", "dataloader_prefetch_factor"), message


def choice_mistakes(at: Place, value: Any, choices: Sequence[Any]) -> Iterator[Mistake]:
    """Yield a value that is not one of the choices, where there are any."""
    if choices and value is not None and value not in choices:
        hint = did_you_mean(str(value), list(map(str, choices)))
        yield at, f"found {quote(value)}.{hint}"


def _mistakes_of_bounds(
    section: str, field: str, value: Any, bounds: Mapping[str, tuple[int, int]]
) -> Iterator[Mistake]:
    if field in bounds and isinstance(value, int | float):
        least, most = bounds[field]
        if not least <= value <= most:
            yield (section, field), f"found {value!r}. Expected {least:,} to {most:,}."


def is_settled(config: TrainConfig) -> bool:
    """Whether a config without field mistakes has nothing in `lora` and `trainer` that a package
    could refuse.
    """
    return all(
        field in SETTLED[section] and _why_not(SETTLED[section][field], value) is None
        for section, given in (("lora", config.lora or {}), ("trainer", config.trainer))
        for field, value in given.items()
    )


# -- the source of the packages --------------------------------------------------------------------


@functools.cache
def field_types(section: str) -> dict[str, Any]:
    """Return the fields that the class of a section, `lora` or `trainer`, takes, with their types.

    The type is Any where reading it needs the package. A class whose source does not look as
    expected is imported, which takes seconds.
    """
    types: dict[str, Any] = {}
    for source in SOURCES[section]:
        own = _fields_in(_body_of(*source))
        if not own:
            return types_by_import(section)
        types |= own
    return types


def types_by_import(section: str) -> dict[str, Any]:
    """Return `field_types` of the class itself; importing it takes seconds."""
    return types_of(_import_class(*SOURCES[section][-1]))


def types_of(cls: Any) -> dict[str, Any]:
    """Return the fields that the constructor of a dataclass takes, with their types."""
    hints = get_type_hints(cls)
    return {item.name: hints[item.name] for item in dataclasses.fields(cls) if item.init}


@functools.cache
def _values_of(package: str, file: str, cls: str) -> list[Any]:
    """Return the values of an enum."""
    values = [
        item.value.value
        for item in _body_of(package, file, cls)
        if isinstance(item, ast.Assign) and isinstance(item.value, ast.Constant)
    ]
    return values or [each.value for each in _import_class(package, file, cls)]


def _import_class(package: str, file: str, cls: str) -> Any:
    module = file.removesuffix(".py").replace("/", ".")
    return getattr(importlib.import_module(f"{package}.{module}"), cls)


def _body_of(package: str, file: str, cls: str) -> list[ast.stmt]:
    """Return the statements of a class in a file of an installed package; none where there is no
    such class.
    """
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations if spec is not None else None) or []
    for path in (Path(folder) / file for folder in folders):
        for node in _statements_of(path) if path.is_file() else []:
            if isinstance(node, ast.ClassDef) and node.name == cls:
                return node.body
    return []


@functools.cache
def _statements_of(path: Path) -> list[ast.stmt]:
    return ast.parse(path.read_text(encoding="utf-8")).body


def _fields_in(body: list[ast.stmt]) -> dict[str, Any]:
    """Return the fields that a dataclass declares and its constructor takes, with their types."""
    return {
        item.target.id: _type_of(item.annotation)
        for item in body
        if isinstance(item, ast.AnnAssign)
        and isinstance(item.target, ast.Name)
        and "init=False" not in ast.unparse(item.value or ast.Constant(None))
    }


def _type_of(annotation: ast.expr) -> Any:
    """Return a type made of builtin types and those of `typing`; Any for one of other classes."""
    named = {**vars(builtins), **{name: getattr(typing, name) for name in typing.__all__}}
    used = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}
    if not used <= named.keys() or any(isinstance(n, ast.Call) for n in ast.walk(annotation)):
        return Any
    kind = eval(ast.unparse(annotation), named)
    return Any if isinstance(kind, str) else kind
