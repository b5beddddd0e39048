"""Build the HF Trainer of a run, with its model, adapter and callback."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from optimer_hf.errors import ConfigError, ModelError
from optimer_hf.files.patterns import ends_with, is_literal, matches
from optimer_hf.files.text import did_you_mean, first_line
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.flops import training_flops
from optimer_hf.models.fused_loss import fuse_loss
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.models.live import load_model
from optimer_hf.models.probes import (
    keeps_documents_apart,
    refuse_reading_ahead,
    sharded_keeps_documents_apart,
)
from optimer_hf.models.sharded import is_sharded, layer_class
from optimer_hf.models.sizes import measure_sizes
from optimer_hf.models.ties import Ties
from optimer_hf.training.arguments import (
    compiles_layers,
    finds_batch_size,
    lora_config,
    training_arguments,
)
from optimer_hf.training.batch_size import find_batch_size
from optimer_hf.training.checkpoints import SpentRecord
from optimer_hf.training.checks import LORA_FIX
from optimer_hf.training.config import TrainConfig
from optimer_hf.training.head_choice import install_head, install_sharded_head
from optimer_hf.training.packing import PackedCorpus
from optimer_hf.training.sharding import reduce_in_float32, refuse_unsharded, requested_sharding
from optimer_hf.vectors.lora import Lora, parts_of, refuse_unmergeable
from optimer_hf.vectors.lora_config import FIELD_OF, patterns_of
from optimer_hf.vectors.training_record import Speed

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainingArguments

    from optimer_hf.training.captured import CapturedTrainer

logger = logging.getLogger(__name__)


def build_trainer(
    config: TrainConfig,
    base: ResolvedModel,
    packed: PackedCorpus,
    out: Path,
    spent: SpentRecord | None = None,
) -> "CapturedTrainer":
    """Return the Trainer of a run, with its model loaded. `spent` is of the checkpoint that the run
    goes on from, if there is one.

    Raises ConfigError for arguments that the Trainer refuses.
    """
    from transformers import PrinterCallback, default_data_collator, set_seed

    from optimer_hf.training.callback import RunCallback
    from optimer_hf.training.captured import CapturedTrainer  # takes seconds to import

    arguments = training_arguments(config, out)
    set_seed(config.seed)
    model = _load_base(config, base, arguments)
    spent = spent or SpentRecord()
    speed = _speed_of(config, spent.speed, arguments.device)
    callback = RunCallback(config, base.path, spent.cost, speed, n_blocks=len(packed))
    try:
        trainer = CapturedTrainer(
            model=model,
            args=arguments,
            train_dataset=packed,  # any object with __len__ and __getitem__ is a dataset
            data_collator=default_data_collator,
            callbacks=[callback],
        )
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"train config {config.name!r}: trainer: {error}") from error
    refuse_unsharded(trainer, config.name)
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, which is for results
    trainer.speed = speed
    _make_fast(trainer, config, packed)
    callback.flops_per_token = trainer.flops_per_token
    return trainer


def _speed_of(config: TrainConfig, recorded: Speed | None, device: torch.device) -> Speed:
    """Return the choices that a train file makes, and those of the run so far if it goes on on the
    same kind of device; the rest is None. The batch size stays on any device, since the steps and
    the schedule of a run count batches.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    requested = _requested_speed(config)
    if recorded is None or recorded.device != name:
        batch_size = None if recorded is None else recorded.batch_size
        return requested.model_copy(update={"device": name, "batch_size": batch_size})
    decided = {"cuda_graph": requested.cuda_graph, "compiled": requested.compiled}
    return recorded.model_copy(
        update={field: value for field, value in decided.items() if value is not None}
    )


def _requested_speed(config: TrainConfig) -> Speed:
    """Return the choices that a train file makes; the rest is None."""
    is_decided = "torch_compile" in config.trainer or requested_sharding() is not None
    return Speed(
        cuda_graph=None if config.cuda_graph else False,
        compiled=compiles_layers(config) if is_decided else None,
    )


def _make_fast(trainer: "CapturedTrainer", config: TrainConfig, packed: PackedCorpus) -> None:
    """Choose the batch size, if that is wanted, and how the loss is computed; count the FLOPs of a
    token.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    plain = model if config.lora is None else model.get_base_model()
    args, speed = trainer.args, trainer.speed
    if finds_batch_size(config):
        if config.head != "stock":
            fuse_loss(plain)
        speed.batch_size = speed.batch_size or find_batch_size(trainer, packed)
        args.per_device_train_batch_size = trainer._train_batch_size = speed.batch_size
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else model.dtype
    if requested_sharding() is None:
        n_batches = len(packed) * args.num_train_epochs / args.train_batch_size / args.world_size
        if args.max_steps > 0:
            n_batches = args.max_steps * args.gradient_accumulation_steps
        n_tokens = args.train_batch_size * config.block_size
        install_head(plain, config.head, n_tokens, dtype, speed, n_batches=int(n_batches))
    else:
        trainer.add_callback(_sharded_start(config, trainer))
    if trainer.is_fsdp_enabled:
        reduce_in_float32(trainer)
    if not is_sharded(model):  # DeepSpeed has by now taken the weights apart, FSDP has not
        trainer.flops_per_token = training_flops(measure_sizes(model), config.block_size)


def _sharded_start(config: TrainConfig, trainer: "CapturedTrainer") -> "TrainerCallback":
    """Return a callback that probes a model and chooses its loss once it is sharded. Before, only
    one process may have its weights.
    """
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            root = trainer.model_wrapped
            model: Any = trainer.accelerator.unwrap_model(root)
            plain = model if config.lora is None else model.get_base_model()
            if not sharded_keeps_documents_apart(plain, root):
                _warn_of_carried_state(config.name, plain)
            install_sharded_head(plain, root, config.head, args.device.type, trainer.speed)

    return Callback()


def _load_base(config: TrainConfig, base: ResolvedModel, arguments: "TrainingArguments") -> Any:
    """Load the base: in its own dtype for a LoRA in mixed precision, where it stays frozen, and in
    float32 otherwise. Full-parameter runs in mixed precision multiply 16-bit copies of it.
    """
    mixed = config.lora is not None and (arguments.bf16 or arguments.fp16)
    model = load_model(base, "auto" if mixed else torch.float32)
    if requested_sharding() is None:
        refuse_reading_ahead(model)
        if not keeps_documents_apart(model):
            _warn_of_carried_state(config.name, model)
    return add_lora(model, config, base)


def _warn_of_carried_state(name: str, model: Any) -> None:
    logger.warning(
        "train %s: %s has layers that carry their state across documents, so documents in one "
        "block influence each other",
        name,
        layer_class(model).__name__,
    )


def add_lora(model: Any, config: TrainConfig, base: ResolvedModel) -> Any:
    """Return a model with the LoRA layers of a run added, if it has any.

    Raises ConfigError for options that PEFT refuses and for layers that the model does not have.
    """
    if config.lora is None:
        return model
    from peft import get_peft_model

    lora = lora_config(config)
    _refuse_unmatched(model, config.lora.get("target_modules"), config.name)
    _expand_patterns(lora, model, f"train config {config.name!r}: lora")
    if model.device.type == "meta" and str(lora.init_lora_weights).lower() == "mica":
        lora.init_lora_weights = True  # MiCA decomposes the weights, and there are none
    try:
        return get_peft_model(model, lora)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # PEFT checks few of its fields before it uses them
        raise ConfigError(f"train config {config.name!r}: lora: {first_line(error)}") from error


def _expand_patterns(lora: Any, model: Any, where: str) -> None:
    """Check all patterns in bounded time, and replace those of rank_pattern and alpha_pattern by
    the layers that they match.

    PEFT sorts the keys when it saves adapter_config.json, so their order would be lost, and we
    never compile a pattern from somebody else's file.
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
        fitting = {key: _matching_layers(key, layers, f"{where}.{field}") for key in given}
        for key, names in fitting.items():
            if not names:
                raise ConfigError(f"{where}.{field}: found {key!r}, which matches no layer.")
        n_fits = sum(len(names) for names in fitting.values())
        by_layer = {name: given[key] for key in reversed(given) for name in fitting[key]}
        if n_fits > len(by_layer) or not all(is_literal(key) for key in given):
            setattr(
                lora, field, {_exact_key(name, layers): by_layer[name] for name in sorted(by_layer)}
            )


def _matching_layers(key: str, layers: Sequence[str], where: str) -> list[str]:
    """Return the layers that a key of rank_pattern or alpha_pattern matches."""
    if is_literal(key):
        return [name for name in layers if ends_with(name, key)]
    (fitting,) = matches([rf"(.*\.)?({key})$"], layers, where)
    return [name for name, fits in zip(layers, fitting, strict=True) if fits]


def _exact_key(name: str, layers: Sequence[str]) -> str:
    """Return a key that matches this layer and no other."""
    return f"^{name}" if any(layer.endswith(f".{name}") for layer in layers) else name


def _refuse_unmatched(model: Any, target_modules: Any, name: str) -> None:
    """Raise ConfigError for a name in target_modules that no layer has. PEFT ignores it if another
    name matches.
    """
    if not isinstance(target_modules, list):
        return  # none, a keyword of PEFT, a pattern, or a value that PEFT refuses
    layers = [layer for layer, _ in model.named_modules()]
    for wanted in target_modules:
        if not any(layer == wanted or layer.endswith(f".{wanted}") for layer in layers):
            hint = did_you_mean(wanted, sorted({layer.rpartition(".")[2] for layer in layers}))
            raise ConfigError(
                f"train config {name!r}: lora: target_modules: found {wanted!r}, but no layer of "
                f"{type(model).__name__} has that name.{hint}"
            )


def refuse_unmergeable_adapter(adapted: Any, config: TrainConfig, base: ResolvedModel) -> None:
    """Raise ConfigError for a LoRA whose trained adapter `open_vector` would refuse."""
    from peft import get_peft_model_state_dict

    where, checkpoint = f"train config {config.name!r}: lora", Checkpoint(base.path)
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    options = adapted.peft_config["default"].to_dict()
    refuse_unmergeable([*state], checkpoint, where)
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    try:
        parts_of(Lora(options, shapes, checkpoint, where, LORA_FIX))
    except ModelError as error:
        raise ConfigError(str(error)) from None


def refuse_untied_copies(config: TrainConfig, ties: Ties) -> None:
    """Raise ConfigError when modules_to_save would train two copies of a tensor that the base ties
    to another.
    """
    lora = config.lora or {}
    modules = lora.get("modules_to_save") or []
    for group in ties.groups:
        layers = [f".{name.removesuffix('.weight')}" for name in group]
        saved = [module for module in modules if any(at.endswith(f".{module}") for at in layers)]
        if saved and not lora.get("ensure_weight_tying"):
            raise ConfigError(
                f"train config {config.name!r}: lora: modules_to_save: {saved[0]!r} would be "
                f"trained as a separate copy, but the base ties {' and '.join(map(repr, group))} "
                "to one tensor, and so does a merge. Add ensure_weight_tying: true, train full "
                "parameters (leave `lora` out), or drop it."
            )
