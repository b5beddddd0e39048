"""The HF Trainer of a run: its model, adapter and callback."""

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from optimer_hf.errors import ConfigError, ModelError
from optimer_hf.files.patterns import ends_with, is_literal, matches
from optimer_hf.files.staging import write_text
from optimer_hf.files.text import did_you_mean, first_line
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.head import fuse_loss, keeps_documents_apart
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.models.live import loaded_model
from optimer_hf.models.ties import Ties
from optimer_hf.progress import Cost, Meter
from optimer_hf.training.arguments import _arguments, _lora_config
from optimer_hf.training.checkpoints import CHECKPOINTS, SPENT_FILE, newest_whole, seal
from optimer_hf.training.checks import MEND_LORA
from optimer_hf.training.config import TrainConfig
from optimer_hf.training.growth import full_norm, is_due, lora_norm
from optimer_hf.training.packing import PackedCorpus
from optimer_hf.vectors.lora import Lora, parts_of, refuse_unfit
from optimer_hf.vectors.lora_config import FIELD_OF, patterns_of

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback, TrainingArguments

logger = logging.getLogger(__name__)


SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")


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
