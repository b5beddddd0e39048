"""TrainConfig -> checkpoint: continual pre-training of one base model on one corpus with the HF
Trainer.

A LoRA run leaves a PEFT adapter in `out`, a full-parameter run a float32 model (small deltas do not
survive bfloat16); `training.json` is written last and makes the directory complete. A killed run
goes on from its last complete checkpoint. What a reader would not guess: the model computes its
loss through `head.fuse_loss`, without logits, and documents packed into one block do not see each
other (their positions restart, there is no cache).
"""

import contextlib
import copy
import dataclasses
import json
import logging
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_type_hints

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from optimer_hf.adapter import Lora, parts_of, refuse_unfit
from optimer_hf.adapter_config import FIELD_OF, patterns_of, why_not_trained, why_not_weighted
from optimer_hf.checkpoint import Checkpoint, weights_fingerprint
from optimer_hf.convert import (
    ResolvedModel,
    default_device,
    empty_model,
    loaded_model,
    loaded_tokenizer,
    multiplied_in,
    resolve_base,
)
from optimer_hf.corpus import (
    CorpusConfig,
    MixturePart,
    PackedCorpus,
    Part,
    load_packed,
    pack,
    pack_mixture,
)
from optimer_hf.errors import ConfigError, ModelError, OutputError
from optimer_hf.files import (
    ATOMIC_PREFIX,
    Mistake,
    Place,
    Reference,
    ReferenceText,
    VersionedFile,
    did_you_mean,
    differences,
    digest,
    exclusive,
    fingerprint,
    first_line,
    is_there,
    listed,
    make_directory,
    naming_disk_errors,
    read_yaml,
    remove_dead_locks,
    shown,
    sync_all,
    without_folders,
    write_text,
)
from optimer_hf.growth import full_norm, is_due, lora_norm
from optimer_hf.head import fuse_loss, keeps_documents_apart
from optimer_hf.patterns import ends_with, is_literal, matches
from optimer_hf.progress import Cost, Meter
from optimer_hf.ties import Ties, ties_of
from optimer_hf.training_state import drop_damaged, newest_whole, seal

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback, TrainingArguments

logger = logging.getLogger(__name__)

TRAINER_DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "num_train_epochs": 1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "logging_steps": 1,
    "save_steps": 0.1,
    "save_total_limit": 2,  # a kill while the newest one is written leaves the one before
    "report_to": "none",
}
RESERVED_TRAINER_FIELDS = {
    "output_dir": "the command line",
    "seed": "`seed`",
    "data_seed": "`seed`",
}
UNUSABLE = {  # fields of TrainingArguments for what a run of ours does not have
    "eval_strategy": "There is nothing to evaluate on; `optimer evaluate` scores a model",
    "do_eval": "There is nothing to evaluate on; `optimer evaluate` scores a model",
    "do_predict": "There is nothing to predict; `optimer evaluate` scores a model",
    "push_to_hub": "`optimer push` publishes a vector",
    "hub_model_id": "`optimer push` publishes a vector",
    "resume_from_checkpoint": "A killed run goes on by itself",
    "save_only_model": "A killed run goes on with its optimizer, which a checkpoint has to hold",
    "ignore_data_skip": "A killed run goes on with the next block, not with the first",
    "use_liger_kernel": "The loss of a run is computed without logits already",
    "label_smoothing_factor": "The loss is computed without logits, which smoothing needs",
    "liger_kernel_config": "The loss of a run is computed without logits already",
    "label_names": "The labels of a run are the tokens of its texts",
    "load_best_model_at_end": "There is nothing to evaluate on, so no checkpoint is the best",
    "metric_for_best_model": "There is nothing to evaluate on, so no checkpoint is the best",
    "include_for_metrics": "There is nothing to evaluate on",
    **dict.fromkeys(
        ("fsdp", "fsdp_config", "deepspeed", "parallelism_config"),
        "No process would hold the whole model, which one has to write",
    ),
}
LORA_UNUSABLE = {
    **dict.fromkeys(
        ("eva_config", "corda_config", "lora_ga_config", "loftq_config"),
        "It goes with an init_lora_weights that no merge takes",
    ),
    "runtime_config": "It is for the use of an adapter, not for its training",
    "auto_mapping": "It names classes of other models",
}
CHOICES: dict[str, list[Any]] = {  # of texts that transformers or torch read late
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
OF_LAYERS = ("galore_adamw", "galore_adamw_8bit", "galore_adafactor", "apollo_adamw", "layerwise")
CHECKPOINTING = ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")
SECRET = {"hub_token", "push_to_hub_token"}  # fields that are neither shown nor written
LayerIndex = Annotated[int, Field(ge=0, le=10**5)]
ABOVE_ZERO = {
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs"),
    *("logging_steps", "save_steps"),
}
BOUNDS = {  # of the numbers of TrainingArguments, which few libraries check before they start
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "ddp_bucket_cap_mb"),
        (1, 2**20),
    ),
    **dict.fromkeys(
        ("gradient_accumulation_steps", "eval_accumulation_steps", "save_total_limit"), (1, 2**20)
    ),
    **dict.fromkeys(("warmup_steps", "logging_steps", "save_steps"), (0, 10**9)),
    **dict.fromkeys(("eval_steps", "eval_delay"), (0, 10**9)),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon", "label_smoothing_factor"), (0, 1)),
    **dict.fromkeys(("learning_rate", "weight_decay", "neftune_noise_alpha"), (0, 1000)),
    "dataloader_num_workers": (0, 256),
    "dataloader_prefetch_factor": (1, 1024),
    "ddp_timeout": (1, 10**7),
    "local_rank": (-1, 2**20),
    "max_grad_norm": (0, 10**9),
    "max_steps": (-1, 10**9),
    "num_train_epochs": (0, 10**6),
    "torch_empty_cache_steps": (1, 10**9),
}
LORA_BOUNDS = {
    "r": (1, 2**16),
    "lora_alpha": (-(10**6), 10**6),
    "lora_dropout": (0, 1),
    "qalora_group_size": (1, 2**20),
}
PLAIN = {int, float, bool, type(None)}  # types that are checked before the run
TEXTS = {str, list[str], type(None)}
TYPED = {  # types of fields that are checked, too, where their hints say more
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
MEND_LORA = "What is trained so fits no merge. Change or drop the field."
STARTED, BLOCKS, CHECKPOINTS = "started.json", "blocks.npy", "checkpoints"  # of a run that goes on
LEFTOVERS = (ATOMIC_PREFIX, "blocks.")  # of a run killed while it packed
SPENT_FILE = "spent.json"
LONGEST_WAIT = 6 * 3600  # seconds; the first process packs a billion tokens in half an hour
SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
VERSIONED_PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors")


class TrainConfig(VersionedFile):
    """One continual pre-training run on a corpus, or on a mixture of corpora by ratio; `lora` and
    `trainer` go to LoraConfig and TrainingArguments as they are.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    base_model: ReferenceText
    corpus: CorpusConfig | None = None
    mixture: list[MixturePart] | None = Field(default=None, min_length=1)
    block_size: int = Field(default=1024, ge=8, le=2**20)
    max_tokens: int | None = Field(default=None, gt=0, le=10**13)
    lora: dict[str, Any] | None = None
    trainer: dict[str, Any] = {}
    seed: int = Field(default=0, ge=0, lt=2**32)

    def mistakes(self) -> Iterator[Mistake]:
        if (self.corpus is None) == (self.mixture is None):
            yield (), "give exactly one of 'corpus' and 'mixture'"
        if self.mixture is not None:
            if self.max_tokens is None:
                yield ("mixture",), "a mixture needs max_tokens: shares are shares of it"
            total = sum(part.share for part in self.mixture)
            if abs(total - 1) > 1e-6:
                yield ("mixture",), f"the shares of the mixture sum to {total:g}, not to 1"

    @property
    def corpora(self) -> Sequence[CorpusConfig]:
        """The corpus, or those of the mixture."""
        return self.mixture or ([self.corpus] if self.corpus is not None else [])

    @property
    def kind(self) -> Literal["adapter", "checkpoint"]:
        """The kind of vector the run leaves behind."""
        return "checkpoint" if self.lora is None else "adapter"

    @property
    def settings(self) -> dict[str, Any]:
        """The fields that a run's record repeats: those that name no file of this machine."""
        fields = {"block_size", "max_tokens", "lora", "trainer", "seed"}
        return self.model_dump(mode="json", include=fields)

    @property
    def digest(self) -> str:
        """Digest of everything that decides the result; of local files the names, see `inputs`."""
        absent = {"mixture"} if self.mixture is None else {"corpus"}
        data = self.model_dump(mode="json", exclude=absent)
        for part in (data, data.get("corpus") or {}, *data.get("mixture", ())):
            named = ("base_model", "path", "dataset", "data_files")
            part |= without_folders({key: part[key] for key in named if key in part})
            if part.get("data_files", "") is None:  # a field that runs before it did not have
                del part["data_files"]
        return digest(data)

    @property
    def inputs(self) -> dict[str, str]:
        """Digests of the local base and of the local texts that are there now, by field."""
        found = {}
        base = Reference(self.base_model).path
        if base is not None and is_there(base):
            found["base_model"] = fingerprint(base) if base.is_file() else weights_fingerprint(base)
        for number, corpus in enumerate(self.corpora):
            if (text := corpus.fingerprint) is not None:
                found["corpus" if self.mixture is None else f"mixture.{number}"] = text
        return found


# -- the run ---------------------------------------------------------------------------------------


def check_config(config: TrainConfig, path: Path | None = None) -> None:
    """Raise ConfigError for what LoraConfig, TrainingArguments, the optimizer, the scheduler and
    gradient checkpointing refuse, with the lines of the file at `path`; loads no model.
    """
    origin = path or f"train config {config.name!r}"
    check_fields(config, origin)
    arguments = _arguments(config, Path("unused"))
    _check_optimizer(config, arguments, origin)
    _check_sampling(config, origin)
    if config.lora is not None:
        options = _lora_config(config).to_dict()
        if reason := why_not_weighted(options) or why_not_trained(options):
            raise ConfigError(f"train config {config.name!r}: lora: {reason}. {MEND_LORA}")


def check_fields(config: TrainConfig, origin: Path | str) -> None:
    """Raise ConfigError for fields and values that can be told to be wrong one by one."""
    from peft import LoraConfig
    from transformers import TrainingArguments

    found = [
        *_mistakes_of_fields(("lora",), config.lora or {}, LoraConfig),
        *_mistakes_of_fields(("trainer",), config.trainer, TrainingArguments),
        *_mistakes_of_trainer(config.trainer),
        *_mistakes_of_checkpointing(config.trainer),
        *_mistakes_of_accelerator(config.trainer.get("accelerator_config")),
    ]
    for field, value in (config.lora or {}).items():
        found += _out_of_bounds("lora", field, value, LORA_BOUNDS)
        if field in LORA_UNUSABLE and value not in (None, {}):
            told = f"found {shown(value)}. {LORA_UNUSABLE[field]}; leave it out."
            found.append((("lora", field), told))
    if found:
        raise ConfigError(
            listed(origin, [(at, f"{'.'.join(map(str, at))}: {told}") for at, told in found])
        )


def _mistakes_of_fields(at: Place, given: Mapping[str, Any], cls: Any) -> Iterator[Mistake]:
    """Yield fields that a dataclass does not have, and numbers, switches and texts that are none:
    its authors check them late, or not at all.
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
            yield from _of_another_type((*at, field), value, hint)


def _of_another_type(at: Place, value: Any, hint: Any) -> Iterator[Mistake]:
    try:
        config = ConfigDict(strict=True, allow_inf_nan=False)
        TypeAdapter(hint, config=config).validate_python(value)
    except ValidationError as error:
        yield at, f"found {shown(value)}. {error.errors()[0]['msg']}."


def _mistakes_of_trainer(given: Mapping[str, Any]) -> Iterator[Mistake]:
    for field, value in given.items():
        if field in RESERVED_TRAINER_FIELDS:
            yield ("trainer", field), f"set it through {RESERVED_TRAINER_FIELDS[field]}."
        if field in SECRET and value is not None:
            yield ("trainer", field), "found a token, which would be written down. Leave it out."
        if field in UNUSABLE and value not in (None, False, 0, "no", "", []):
            yield ("trainer", field), f"found {shown(value)}. {UNUSABLE[field]}; leave it out."
        choices = _choices(field)
        if choices and value is not None and value not in choices:
            hint = did_you_mean(str(value), list(map(str, choices)))
            yield ("trainer", field), f"found {shown(value)}.{hint}"
        if field in ABOVE_ZERO and isinstance(value, int | float) and not value > 0:
            yield ("trainer", field), f"found {value!r}. Expected a number above 0."
        else:
            yield from _out_of_bounds("trainer", field, value, BOUNDS)


def _choices(field: str) -> list[Any]:
    """Return what a field of TrainingArguments may be, where it is one of a few words."""
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


def _out_of_bounds(
    part: str, field: str, value: Any, bounds: Mapping[str, tuple[int, int]]
) -> Iterator[Mistake]:
    if field in bounds and isinstance(value, int | float):
        least, most = bounds[field]
        if not least <= value <= most:
            yield (part, field), f"found {value!r}. Expected {least:,} to {most:,}."


def _mistakes_of_checkpointing(given: Mapping[str, Any]) -> Iterator[Mistake]:
    """Yield options of gradient checkpointing that torch refuses, which it would do in the first
    step: they are tried on one number.
    """
    from torch.utils.checkpoint import checkpoint

    for field in CHECKPOINTING:
        options = given.get(field)
        if isinstance(options, str):  # JSON, as on a command line
            with contextlib.suppress(ValueError):
                options = json.loads(options)
        if options is None:
            continue
        if not isinstance(options, dict):
            yield ("trainer", field), f"found {shown(options)}. Expected a mapping of options."
            continue
        for option, value in options.items():
            if not isinstance(value, bool) and option != "determinism_check":
                yield ("trainer", field, option), f"found {shown(value)}. Expected true or false."
        try:
            number = torch.zeros(1, requires_grad=True)
            tried: dict[str, Any] = {"use_reentrant": False, **options}
            loss = checkpoint(torch.sin, number, **tried)
            loss.backward()
        except Exception as error:
            yield ("trainer", field), f"found {shown(options)}. {first_line(error)}."


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
                f"found {shown(inner)}. Expected a mapping.",
            )


def _check_sampling(config: TrainConfig, origin: Path | str) -> None:
    """Raise ConfigError for a sampling of texts by their length: packed blocks have one."""
    if config.trainer.get("train_sampling_strategy") in ("group_by_length", "batch_rebalance"):
        at = ("trainer", "train_sampling_strategy")
        told = "packed blocks are all of one length. Leave it out."
        raise ConfigError(listed(origin, [(at, f"{'.'.join(at)}: {told}")]))


def _check_optimizer(
    config: TrainConfig, arguments: "TrainingArguments", origin: Path | str
) -> None:
    """Make the optimizer and the scheduler of a run for one number: what they refuse, Trainer would
    say only once the model is loaded and the corpus packed.
    """
    from transformers import Trainer, get_scheduler
    from transformers.integrations import get_reporting_integration_callbacks

    field = "report_to"
    try:
        get_reporting_integration_callbacks(arguments.report_to)
        model = torch.nn.Linear(1, 1)
        if config.trainer.get("optim_target_modules"):
            field = "optim_target_modules"
            if not str(arguments.optim).lower().endswith(OF_LAYERS):
                raise ValueError(f"{arguments.optim} takes all layers. Leave it out")
            return  # `_checked` looks them up in the model
        field = "optim_args" if arguments.optim_args else "optim"
        optimizer_class, options = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        if unread := _unread_options(arguments, model):
            raise ValueError(f"{arguments.optim} reads no {unread!r}. Leave it out")
        if str(arguments.optim).lower().endswith("lomo"):
            return  # it goes over the gradients of a whole model
        optimizer = optimizer_class([torch.nn.Parameter(torch.zeros(1))], **options)
        field = "lr_scheduler_kwargs"
        get_scheduler(
            arguments.lr_scheduler_type,
            optimizer,
            num_warmup_steps=0,
            num_training_steps=1,
            scheduler_specific_kwargs=dict(arguments.lr_scheduler_kwargs or {}),
        )
    except Exception as error:  # libraries of many authors
        place = ("trainer", field)
        told = f"{'.'.join(place)}: {first_line(error).rstrip('.')}."
        raise ConfigError(listed(origin, [(place, told)])) from error


def _unread_options(arguments: "TrainingArguments", model: torch.nn.Module) -> str | None:
    """Return an option of `optim_args` that changes nothing about the optimizer."""
    from transformers import Trainer

    given: dict[str, str] = dict(
        part.strip().partition("=")[::2] for part in (arguments.optim_args or "").split(",") if part
    )

    def made(options: Mapping[str, str]) -> Any:
        changed = copy.copy(arguments)
        changed.optim_args = ",".join(f"{key}={value}" for key, value in options.items()) or None
        try:
            return Trainer.get_optimizer_cls_and_kwargs(changed, model)
        except Exception as error:  # so that it was read
            return repr(error)

    for name in given:
        others = {key: value for key, value in given.items() if key != name}
        if made(given) == made(others) == made(given | {name: "0.123"}):
            return name
    return None


def is_trained(config: TrainConfig, out: Path) -> bool:
    """Whether `out` holds the finished result of this config; changes nothing.

    Raises OutputError when it belongs to another config, or to another base or text of the same
    name, or holds files that are not ours.
    """
    for name in ("training.json", STARTED):
        if (out / name).exists():
            if other := _what_differs(config, read_yaml(out / name)):
                was = "was trained" if name == "training.json" else "holds a run that began"
                raise OutputError(
                    f"{out}: {was} with another {other}. Remove it, or give another output "
                    "directory."
                )
            return name == "training.json"
    found = out.iterdir() if out.is_dir() else [out] if is_there(out) else []
    if any(not path.name.startswith(LEFTOVERS) for path in found):
        raise OutputError(
            f"{out}: already exists and is not a training directory. Give another output directory."
        )
    return False


def _what_differs(config: TrainConfig, record: Mapping[str, Any]) -> str:
    """Return in which config, base or text a run differs from the one recorded, or nothing. Files
    that are gone from the disk may be.
    """
    if record.get("config_sha256") != config.digest:
        known, settings = record.get("training", {}), config.settings
        recorded = {field: known.get(field) for field in settings}
        differing = differences(recorded, settings) if known else []
        names = "; ".join(differing) or "base_model or corpus"
        return f"config; what differs: {names}"
    known = record.get("inputs", {})
    changed = [field for field, found in config.inputs.items() if known.get(field, found) != found]
    return f"content of {', '.join(changed)}, under the same name" if changed else ""


def train(config: TrainConfig, out: Path) -> Path:
    """Train and return `out`; go on where an interrupted run stopped, do nothing when it is
    finished.

    Under `accelerate launch` every process calls this, and the first one writes. Raises OutputError
    when another run writes `out`.
    """
    check_fields(config, f"train config {config.name!r}")  # before the processes meet
    state = _processes(config)
    with contextlib.ExitStack() as stack:
        with state.main_process_first():
            check_config(config)
            if is_trained(config, out):
                _tidy(out)
                logger.info("train %s: %s is trained, nothing to do", config.name, out)
                return out
            if state.is_main_process:
                stack.enter_context(_held(out))
            packed = _prepared(config, out)
        if packed is not None:  # by the run that held `out` until now
            _run(config, out, packed, state)
    return out


def _held(out: Path) -> contextlib.AbstractContextManager[bool]:
    """Hold an output directory for this run; its lock stands beside it, or in it where nothing may
    be written beside it.
    """
    place = Path(os.path.realpath(out))
    make_directory(place.parent)
    is_inside = place.is_dir() and not os.access(place.parent, os.W_OK)
    return exclusive(place, beside=place if is_inside else None)


def _run(config: TrainConfig, out: Path, packed: PackedCorpus, state: Any) -> None:
    if state.is_main_process:
        drop_damaged(out / CHECKPOINTS)
    state.wait_for_everyone()
    base = resolve_base(config.base_model)
    trainer = build_trainer(config, base, packed, out)
    logger.info("train %s: %s tokens", config.name, f"{packed.n_tokens:,}")
    before, started = _spent_before(out), Cost.now()
    checkpoint = newest_whole(out / CHECKPOINTS)
    if checkpoint is not None:
        logger.info("train %s: going on from %s", config.name, checkpoint.name)
    with naming_disk_errors(out, "The last complete checkpoint is kept"):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        if state.is_main_process:
            _save(config, base, packed, trainer, out, before + started.since())
    state.wait_for_everyone()


def _processes(config: TrainConfig) -> Any:
    """Join the processes of `accelerate launch`, if there are more, that wait as long for each
    other as packing a corpus and writing a model take.
    """
    from accelerate import PartialState

    wait = timedelta(seconds=int(config.trainer.get("ddp_timeout", LONGEST_WAIT)))
    # without cpu=True, processes on a machine without a GPU do not find each other
    return PartialState(cpu=default_device() == "cpu", timeout=wait)


def prepare(config: TrainConfig, out: Path) -> PackedCorpus | None:
    """Check a run and pack its corpus into `out`, once; return None when the run is finished.

    Cheap beside the training: a corpus that is too small, a bad field and a foreign directory are
    found here.
    """
    check_config(config)
    if is_trained(config, out):
        _tidy(out)  # a kill may have left it
        return None
    with _held(out):
        return _prepared(config, out)


def _prepared(config: TrainConfig, out: Path) -> PackedCorpus | None:
    """Do what `prepare` does where this process holds `out`."""
    if is_trained(config, out):
        return None
    started = out / STARTED
    if not started.exists():
        return _begun(config, out)
    record = json.loads(started.read_text(encoding="utf-8"))
    found = _blocks_of(record, out)
    if found is None or _is_other(record, found):  # lost or damaged
        found = _packed(config, _checked(config), out / BLOCKS)
    if _is_other(record, found):
        (out / BLOCKS).unlink()
        raise OutputError(
            f"{out}: the run began on another text than its corpus holds now. Restore the corpus, "
            "or remove the directory to begin again."
        )
    return found


def _begun(config: TrainConfig, out: Path) -> PackedCorpus:
    """Pack the corpus of a new run; what fails leaves nothing behind."""
    tokenizer = _checked(config)
    is_new = not out.exists()
    make_directory(out)
    try:
        with naming_disk_errors(out, "Nothing was left behind"):
            packed = _packed(config, tokenizer, out / BLOCKS)
    except BaseException:
        for path in out.glob(f"{LEFTOVERS[1]}*"):
            path.unlink(missing_ok=True)
        if is_new:
            with contextlib.suppress(OSError):
                out.rmdir()
        raise
    record = {
        "config_sha256": config.digest,
        "training": config.settings,
        "inputs": config.inputs,
        "parts": [dataclasses.asdict(part) for part in packed.parts],
        "blocks_sha256": packed.sha256,
    }
    write_text(out / STARTED, json.dumps(record))
    return load_packed(out / BLOCKS, packed.parts)


def _checked(config: TrainConfig) -> Any:
    """Return the tokenizer of a run whose base and LoRA pass every check that its vector will have
    to pass, without the weights.
    """
    base = resolve_base(config.base_model)
    tokenizer = loaded_tokenizer(base)
    adapted = _adapted(empty_model(base), config, base)
    _check_targets(config, adapted)
    _refuse_saved_apart(config, ties_of(Checkpoint(base.path)))
    if config.lora is not None:
        _refuse_unweighted(adapted, config, base)
    return tokenizer


def _check_targets(config: TrainConfig, model: Any) -> None:
    """Raise ConfigError for layers that an optimizer of some layers does not find in a model."""
    from transformers import Trainer

    if config.trainer.get("optim_target_modules"):
        try:
            Trainer.get_optimizer_cls_and_kwargs(_arguments(config, Path("unused")), model)
        except Exception as error:
            told = first_line(error)
            raise ConfigError(f"train config {config.name!r}: trainer: {told}") from error


def _blocks_of(record: Mapping[str, Any], out: Path) -> PackedCorpus | None:
    """Return the packed corpus of a run that began, None where it cannot be read."""
    try:
        parts = [Part(**part) for part in record.get("parts", [])]
        return load_packed(out / BLOCKS, parts)
    except (OSError, ValueError, EOFError):
        return None


def _is_other(record: Mapping[str, Any], found: PackedCorpus) -> bool:
    return bool(record.get("blocks_sha256", found.sha256) != found.sha256)


def _packed(config: TrainConfig, tokenizer: Any, out: Path) -> PackedCorpus:
    """Pack the corpus or the mixture of a run, and tell of documents that are read again."""
    if config.corpus is not None:
        return pack(
            config.corpus,
            tokenizer,
            block_size=config.block_size,
            max_tokens=config.max_tokens,
            seed=config.seed,
            out=out,
        )
    packed = pack_mixture(
        config.mixture or [],
        tokenizer,
        block_size=config.block_size,
        max_tokens=config.max_tokens or 0,
        seed=config.seed,
        out=out,
    )
    for part in packed.parts:
        if part.n_repeats:
            logger.warning(
                "%s: up-sampled: %s documents are read again (%.2f passes)",
                part.name,
                f"{part.n_repeats:,}",
                1 + part.n_repeats / part.n_documents,
            )
    return packed


def build_trainer(
    config: TrainConfig, base: ResolvedModel, packed: PackedCorpus, out: Path
) -> "Trainer":
    """Return the Trainer of a run, its model loaded and its arguments set."""
    from transformers import PrinterCallback, Trainer, default_data_collator, set_seed

    arguments = _arguments(config, out)
    set_seed(config.seed)
    model = _model(config, base, arguments)
    try:
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=packed,  # any object with __len__ and __getitem__ is a data set
            data_collator=default_data_collator,
            callbacks=[_callback(config, base.path, _spent_before(out))],
        )
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"train config {config.name!r}: trainer: {error}") from error
    _refuse_sharded(trainer.accelerator.distributed_type.value, config.name)
    trainer.remove_callback(PrinterCallback)  # it prints on stdout, where results go
    return trainer


def _refuse_sharded(kind: str, name: str) -> None:
    """Raise ConfigError where no process holds the whole model, which one has to write."""
    if kind in SHARDED:
        raise ConfigError(
            f"train config {name!r}: accelerate launch: found {kind}, expected whole models (one "
            "GPU each, or --multi_gpu). Train a LoRA (`lora:`) where the model does not fit, or "
            "train it with another tool and take the vector with `optimer extract`."
        )


def _arguments(config: TrainConfig, out: Path) -> "TrainingArguments":
    from transformers import TrainingArguments

    device = default_device()
    has_kernels = multiplied_in(torch.bfloat16, device) == torch.bfloat16
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
    try:
        arguments = TrainingArguments(**fields)
    except Exception as error:  # its authors check few fields, and late
        told = first_line(error)
        raise ConfigError(f"train config {config.name!r}: trainer: {told}") from error
    if arguments.n_gpu > 1:  # DataParallel, which the Trainer would take, copies no fused loss
        logger.info("train: one GPU of %d; `accelerate launch` takes them all", arguments.n_gpu)
        arguments._n_gpu = 1
    return arguments


def _model(config: TrainConfig, base: ResolvedModel, arguments: "TrainingArguments") -> Any:
    """Load the base: as stored where a LoRA is trained in mixed precision (the base stays frozen),
    else in float32, which full-parameter runs keep beside the 16 bits they multiply.
    """
    mixed = config.lora is not None and (arguments.bf16 or arguments.fp16)
    model = loaded_model(base, "auto" if mixed else torch.float32)
    fuse_loss(model)
    if not keeps_documents_apart(model):
        logger.warning(
            "train %s: layers of %s carry their state from one document of a block into the next, "
            "so documents packed together are not trained as if they stood alone",
            config.name,
            type(model).__name__,
        )
    return _adapted(model, config, base)


def _adapted(model: Any, config: TrainConfig, base: ResolvedModel) -> Any:
    """Return a model with the LoRA layers of a run, if it has any."""
    if config.lora is None:
        return model
    from peft import get_peft_model

    lora = _lora_config(config)
    _refuse_unmatched(model, config.lora.get("target_modules"), config.name)
    _resolve_patterns(lora, model, f"train config {config.name!r}: lora")
    if model.device.type == "meta" and str(lora.init_lora_weights).lower() == "mica":
        lora.init_lora_weights = True  # it takes the weights apart, and there are none
    try:
        return get_peft_model(model, lora)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # PEFT looks at few of its fields before it uses them
        raise ConfigError(f"train config {config.name!r}: lora: {first_line(error)}") from error


def _resolve_patterns(lora: Any, model: Any, where: str) -> None:
    """Have PEFT match none of the patterns that could keep it busy, and write down by layer what
    rank_pattern and alpha_pattern say where that depends on patterns or on their order.

    A saved adapter_config.json has its keys sorted, and a reader compiles no pattern of others.
    """
    layers = [
        name
        for name, module in model.named_modules()
        if any(own == "weight" for own, _ in module.named_parameters(recurse=False))
    ]
    if others := patterns_of(lora.to_dict()):
        matches(others, [name for name, _ in model.named_modules()], where)
    for field in FIELD_OF:
        given: dict[str, Any] = getattr(lora, field) or {}
        fitting = {key: _fitting(key, layers, f"{where}.{field}") for key in given}
        for key, found in fitting.items():
            if not found:
                raise ConfigError(f"{where}.{field}: found {key!r}, which fits no layer.")
        n_fits = sum(len(found) for found in fitting.values())
        by_layer = {name: given[key] for key in reversed(given) for name in fitting[key]}
        if n_fits > len(by_layer) or not all(is_literal(key) for key in given):
            setattr(lora, field, {_only(name, layers): by_layer[name] for name in sorted(by_layer)})


def _fitting(key: str, layers: Sequence[str], where: str) -> list[str]:
    """Return the layers that a key of rank_pattern or alpha_pattern fits."""
    if is_literal(key):
        return [name for name in layers if ends_with(name, key)]
    (found,) = matches([rf"(.*\.)?({key})$"], layers, where)
    return [name for name, fits in zip(layers, found, strict=True) if fits]


def _only(name: str, layers: Sequence[str]) -> str:
    """Return the key that fits a layer and no other."""
    return f"^{name}" if any(layer.endswith(f".{name}") for layer in layers) else name


def _lora_config(config: TrainConfig) -> Any:
    from peft import LoraConfig

    try:
        return LoraConfig(**{"task_type": "CAUSAL_LM", **(config.lora or {})})
    except Exception as error:  # its authors check few fields, and late
        raise ConfigError(f"train config {config.name!r}: lora: {first_line(error)}") from error


def _refuse_unmatched(model: Any, target_modules: Any, name: str) -> None:
    """Raise ConfigError for a name among target_modules that no layer has: PEFT says nothing where
    another one matches.
    """
    if not isinstance(target_modules, list):
        return  # none, a word of PEFT or a pattern, or what PEFT refuses
    layers = [layer for layer, _ in model.named_modules()]
    for wanted in target_modules:
        if not any(layer == wanted or layer.endswith(f".{wanted}") for layer in layers):
            hint = did_you_mean(wanted, sorted({layer.rpartition(".")[2] for layer in layers}))
            raise ConfigError(
                f"train config {name!r}: lora: target_modules: found {wanted!r}, which no layer of "
                f"{type(model).__name__} is called.{hint}"
            )


def _refuse_unweighted(adapted: Any, config: TrainConfig, base: ResolvedModel) -> None:
    """Raise ConfigError for a LoRA whose adapter `open_vector` would refuse once it is trained."""
    from peft import get_peft_model_state_dict

    where, checkpoint = f"train config {config.name!r}: lora", Checkpoint(base.path)
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    options = adapted.peft_config["default"].to_dict()
    refuse_unfit([*state], checkpoint, where)
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    try:
        parts_of(Lora(options, shapes, checkpoint, where, MEND_LORA))
    except ModelError as error:
        raise ConfigError(str(error)) from None


def _refuse_saved_apart(config: TrainConfig, ties: Ties) -> None:
    """Raise ConfigError where modules_to_save would train two copies of one tensor of the base."""
    lora = config.lora or {}
    modules = lora.get("modules_to_save") or []
    for group in ties.groups:
        layers = [f".{name.removesuffix('.weight')}" for name in group]
        saved = [module for module in modules if any(at.endswith(f".{module}") for at in layers)]
        if saved and not lora.get("ensure_weight_tying"):
            raise ConfigError(
                f"train config {config.name!r}: lora: modules_to_save: {saved[0]!r} would get a "
                f"copy of its own, but the base ties {' and '.join(map(repr, group))} to one "
                "tensor, and a merge has one. Add ensure_weight_tying: true, train full "
                "parameters (leave `lora` out), or drop it."
            )


def _callback(config: TrainConfig, base: Path, earlier: Cost) -> "TrainerCallback":
    """Return what shows progress, keeps the time spent beside every checkpoint, and notes how the
    vector grows.
    """
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        meter: Meter
        loss = ""
        started = Cost.now()
        is_measured = True

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            args.distributed_state.wait_for_everyone()  # each process writes a file of its own
            if state.is_world_process_zero:
                folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                spent = dataclasses.asdict(earlier + self.started.since())
                write_text(folder / SPENT_FILE, json.dumps(spent))
                seal(folder)

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.n_tokens = _tokens_per_step(config, args)
            self.meter = Meter(
                f"train {config.name}",
                state.max_steps * self.n_tokens,
                "tokens",
                done=state.global_step * self.n_tokens,
            )
            if state.is_world_process_zero:
                self.meter.__enter__()

        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **_: Any
        ) -> None:
            if "loss" not in (logs or {}):
                return
            self.loss = f"loss {logs['loss']:.3f}"
            if state.is_world_process_zero and self.is_measured:
                self.is_measured = _note_norm(config, base, model, state)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                self.meter.advance(self.n_tokens, self.loss)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                self.meter.__exit__(None, None, None)

    return Callback()


def _note_norm(config: TrainConfig, base: Path, model: Any, state: Any) -> bool:
    """Write the norm of the vector so far into the last entry of a run's log; return whether it can
    be told, and say why not.
    """
    try:
        if is_due(state.log_history, state.max_steps):
            norm = full_norm(model, base) if config.lora is None else lora_norm(model)
            state.log_history[-1]["norm"] = norm
    except ModelError as error:
        logger.info("train %s: no norms along the run: %s", config.name, error)
        return False
    return True


def _tokens_per_step(config: TrainConfig, args: "TrainingArguments") -> int:
    n_blocks = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return int(n_blocks * config.block_size)


def _spent_before(out: Path) -> Cost:
    """Return the time of training that the checkpoint to go on from stands for."""
    checkpoint = newest_whole(out / CHECKPOINTS)
    if checkpoint is None:
        return Cost()
    return Cost(**json.loads((checkpoint / SPENT_FILE).read_text(encoding="utf-8")))


def _save(
    config: TrainConfig,
    base: ResolvedModel,
    packed: PackedCorpus,
    trainer: "Trainer",
    out: Path,
    spent: Cost,
) -> None:
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if config.lora is not None:
        for lora in model.peft_config.values():
            lora.base_model_name_or_path = base.reference
        model.save_pretrained(
            out, save_embedding_layers=False
        )  # "auto" would look the base up on the Hub
    else:
        model.save_pretrained(out)
    (out / "README.md").unlink(
        missing_ok=True
    )  # PEFT's card template; ours is written when the vector is pushed
    inputs = read_yaml(out / STARTED).get("inputs", {})
    record = _record(config, base, packed, trainer, spent) | {"inputs": inputs}
    sync_all(out)
    write_text(out / "training.json", json.dumps(record, indent=2))
    _tidy(out)


def _tidy(out: Path) -> None:
    """Remove from a finished vector what only its training needed, and locks of killed ones."""
    (out / STARTED).unlink(missing_ok=True)
    (out / BLOCKS).unlink(missing_ok=True)
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    for folder in (out, Path(os.path.realpath(out)).parent):
        remove_dead_locks(folder)


def _record(
    config: TrainConfig,
    base: ResolvedModel,
    packed: PackedCorpus,
    trainer: "Trainer",
    spent: Cost,
) -> dict[str, Any]:
    """Return what a reader of the vector needs to know; no path of this machine."""
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    norms = {entry["step"]: entry["norm"] for entry in history if "norm" in entry}
    return {
        "config_sha256": config.digest,
        "name": config.name,
        "base_model": base.reference,
        "corpus": {
            "name": " + ".join(part.name for part in packed.parts),
            "n_tokens": packed.n_tokens,
            "n_documents": packed.n_documents,
            "sha256": packed.sha256,
            **({"parts": [dataclasses.asdict(p) for p in packed.parts]} if config.mixture else {}),
        },
        "training": {
            **config.settings,
            "mixed_precision": trainer.accelerator.mixed_precision,
            "n_steps": trainer.state.global_step,
            "n_tokens": trainer.state.global_step * _tokens_per_step(config, trainer.args),
            "losses": losses,
            **({"norms": [*norms.values()], "norm_steps": [*norms]} if norms else {}),
            "seconds": round(spent.seconds, 2),
            "cpu_seconds": round(spent.cpu_seconds, 2),
        },
        "versions": {name: version(name) for name in VERSIONED_PACKAGES},
    }
