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
from optimer_hf.models.head_loss import fuse_loss, keeps_documents_apart
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.models.live import load_model
from optimer_hf.models.ties import Ties
from optimer_hf.progress import Cost, Meter
from optimer_hf.training.arguments import lora_config, training_arguments
from optimer_hf.training.checkpoints import SPENT_FILE, SpentRecord, cost_before, seal
from optimer_hf.training.checks import LORA_FIX
from optimer_hf.training.config import TrainConfig
from optimer_hf.training.growth import full_norm, is_due, lora_norm
from optimer_hf.training.packing import PackedCorpus
from optimer_hf.vectors.lora import Lora, parts_of, refuse_unmergeable
from optimer_hf.vectors.lora_config import FIELD_OF, patterns_of

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback, TrainingArguments

logger = logging.getLogger(__name__)


SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")


def build_trainer(
    config: TrainConfig, base: ResolvedModel, packed: PackedCorpus, out: Path
) -> "Trainer":
    """Return the Trainer of a run, with its model loaded.

    Raises ConfigError for arguments that the Trainer refuses, and for sharded training.
    """
    from transformers import PrinterCallback, Trainer, default_data_collator, set_seed

    arguments = training_arguments(config, out)
    set_seed(config.seed)
    model = _load_base(config, base, arguments)
    try:
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=packed,  # any object with __len__ and __getitem__ is a dataset
            data_collator=default_data_collator,
            callbacks=[_callback(config, base.path, cost_before(out))],
        )
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"train config {config.name!r}: trainer: {error}") from error
    _refuse_sharded(trainer.accelerator.distributed_type.value, config.name)
    trainer.remove_callback(PrinterCallback)  # it prints to stdout, which is for results
    return trainer


def _refuse_sharded(kind: str, name: str) -> None:
    """Raise ConfigError for sharded training: saving needs one process with the whole model."""
    if kind in SHARDED:
        raise ConfigError(
            f"train config {name!r}: accelerate launch: found {kind}, expected the whole model on "
            "each GPU (one GPU, or --multi_gpu). If it does not fit, train a LoRA (`lora:`), or "
            "train it with another tool and make the vector with `optimer extract`."
        )


def _load_base(config: TrainConfig, base: ResolvedModel, arguments: "TrainingArguments") -> Any:
    """Load the base: in its own dtype for a LoRA in mixed precision, where it stays frozen, and in
    float32 otherwise. Full-parameter runs in mixed precision multiply 16-bit copies of it.
    """
    mixed = config.lora is not None and (arguments.bf16 or arguments.fp16)
    model = load_model(base, "auto" if mixed else torch.float32)
    fuse_loss(model)
    if not keeps_documents_apart(model):
        logger.warning(
            "train %s: %s has layers that carry their state across documents, so documents in one "
            "block influence each other",
            config.name,
            type(model).__name__,
        )
    return add_lora(model, config, base)


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


def _callback(config: TrainConfig, base: Path, earlier: Cost) -> "TrainerCallback":
    """Return a callback that shows progress, saves the time spent with every checkpoint and
    records the norm of the vector.
    """
    from transformers import TrainerCallback

    class Callback(TrainerCallback):
        meter: Meter
        loss = ""
        started = Cost.now()
        is_measured = True

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            args.distributed_state.wait_for_everyone()  # each process writes its own file
            if state.is_world_process_zero:
                folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
                SpentRecord.of(earlier + self.started.since()).write(folder / SPENT_FILE)
                seal(folder)

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.n_tokens = tokens_per_step(config, args)
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
    """Add the norm of the vector so far to the last entry of a run's log, if one is due.

    Returns False, and logs why, when it cannot be measured.
    """
    try:
        if is_due(state.log_history, state.max_steps):
            norm = full_norm(model, base) if config.lora is None else lora_norm(model)
            state.log_history[-1]["norm"] = norm
    except ModelError as error:
        logger.info("train %s: the norm of the vector is not recorded: %s", config.name, error)
        return False
    return True


def tokens_per_step(config: TrainConfig, args: "TrainingArguments") -> int:
    """Return how many tokens one step of all processes together trains on."""
    n_blocks = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return int(n_blocks * config.block_size)
