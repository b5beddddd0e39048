"""Continual pre-training of one base model on one corpus, with the HF Trainer.

A LoRA run writes a PEFT adapter to `out`. A full-parameter run writes a float32 model, because
small deltas do not survive bfloat16. `training.json` is written last and marks the directory as
complete. An interrupted run resumes from its last complete checkpoint.

The loss is computed by `fused_loss.fuse_loss`, without logits. Documents packed into one block do
not attend to each other: their positions restart, and there is no cache.
"""

import contextlib
import functools
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimer_hf.errors import OutputError
from optimer_hf.files.digest import differences
from optimer_hf.files.disk import naming_disk_errors
from optimer_hf.files.locks import hold_place, remove_dead_locks
from optimer_hf.files.model import refuse_absent_files
from optimer_hf.files.paths import ATOMIC_PREFIX
from optimer_hf.files.reference import is_there
from optimer_hf.files.staging import make_directory, sync_all
from optimer_hf.files.versions import versions
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.layout import ResolvedModel, tokenizer_digests
from optimer_hf.models.live import default_device, empty_model
from optimer_hf.models.loader import read_tokenizer
from optimer_hf.models.memory import collect_memory, lacks_memory
from optimer_hf.models.resolve import resolve_base
from optimer_hf.models.sharded import gather_adapter, is_sharded, write_gathered
from optimer_hf.models.ties import ties_of
from optimer_hf.progress import Cost
from optimer_hf.training.arguments import finds_batch_size
from optimer_hf.training.checkpoints import (
    BLOCKS,
    CHECKPOINTS,
    STARTED,
    StartedRecord,
    drop_damaged,
    newest_checkpoint,
    read_spent,
    read_started,
    refuse_other_processes,
)
from optimer_hf.training.checks import check_config, check_fields, check_targets
from optimer_hf.training.config import TrainConfig
from optimer_hf.training.packing import PackedCorpus, load_packed, pack, pack_mixture
from optimer_hf.training.sharding import (
    check_sharding,
    forget_deepspeed,
    refuse_unpassable,
    requested_sharding,
)
from optimer_hf.training.trainer import (
    add_lora,
    build_trainer,
    refuse_unmergeable_adapter,
    refuse_untied_copies,
)
from optimer_hf.vectors.delta import write_record
from optimer_hf.vectors.record import VectorFile
from optimer_hf.vectors.training_record import (
    TRAINING_FILE,
    CorpusRecord,
    RunRecord,
    Speed,
    TrainingRecord,
    read_training,
)

if TYPE_CHECKING:
    from optimer_hf.training.captured import CapturedTrainer

logger = logging.getLogger(__name__)


PACKED = "blocks."  # what packing writes begins so
LEFTOVERS = (ATOMIC_PREFIX, PACKED)  # of a run that was killed while packing
POSITIONS = re.compile(  # tables with a row for each position, which have no row beyond the last
    r"(^|\.)(wpe|positions_embed|(embed_)?positions?(_embeddings?)?)(\.weight)?$"
)
LONGEST_WAIT = 6 * 3600  # seconds; packing a billion tokens takes half an hour


def is_trained(config: TrainConfig, out: Path) -> bool:
    """Whether `out` holds the finished result of this config. Changes nothing.

    Raises OutputError when `out` belongs to another config, to another base or text of the same
    name, or holds files that are not ours.
    """
    trained, started = read_training(out), read_started(out)
    if (record := trained or started) is not None:
        if other := _difference(config, record):
            was = "was trained" if trained is not None else "holds a run that was started"
            raise OutputError(
                f"{out}: {was} with a different {other}. Give another output directory."
            )
        return trained is not None
    present = out.iterdir() if out.is_dir() else [out] if is_there(out) else []
    if any(not path.name.startswith(LEFTOVERS) for path in present):
        raise OutputError(
            f"{out}: already exists and is not a training directory. Give another output directory."
        )
    return False


def _difference(config: TrainConfig, record: TrainingRecord | StartedRecord) -> str:
    """Return which config, base or text of a run differs from the recorded one, or an empty string.
    Local files that no longer exist are not compared.
    """
    if record.config_sha256 != config.digest():
        known, settings = record.settings, config.settings
        fields = [*settings, *(known.keys() & {"replay"} - settings.keys())]
        recorded, now = ({field: each.get(field) for field in fields} for each in (known, settings))
        differing = differences(recorded, now) if known else []
        names = "; ".join(differing) or "base_model or corpus"
        return f"config ({names})"
    known = record.inputs
    changed = [
        field for field, now in config.digest_inputs().items() if known.get(field, now) != now
    ]
    return f"content of {', '.join(changed)} under the same name" if changed else ""


def train(config: TrainConfig, out: Path) -> Path:
    """Train, or resume an interrupted run, and return `out`. Does nothing when the run is finished.

    Under `accelerate launch` every process calls this; only the first one writes. Raises
    OutputError when another run writes to `out`.
    """
    check_fields(
        config, f"train config {config.name!r}"
    )  # before the processes wait for each other
    check_sharding(config)
    state = _join_processes(config)
    with contextlib.ExitStack() as stack:
        with state.main_process_first():
            check_config(config)
            forget_deepspeed()
            if is_trained(config, out):
                _tidy(out)
                logger.info("train %s: %s is already trained, nothing to do", config.name, out)
                return out
            if state.is_main_process:
                stack.enter_context(_lock(out))
            packed = _prepare_under_lock(config, out)
        if packed is not None:  # None: another run has just finished it
            _run(config, out, packed, state)
            collect_memory()  # of captured steps, which nothing else can use until it is given back
    return out


def train_vector(path: Path, out: Path) -> VectorFile | None:
    """Train from the train file at `path`, describe the result as a vector and return its record.

    Under `accelerate launch` only the first process does so; the others return None.
    """
    config = TrainConfig.read(path)
    if not (out / TRAINING_FILE).exists():  # a trained vector no longer needs its corpus
        refuse_absent_files({path: config.model_dump()})
    return train_and_record(config, out)


def train_and_record(config: TrainConfig, out: Path) -> VectorFile | None:
    """Do as `train_vector` does, for a config."""
    train(config, out)
    if int(os.environ.get("RANK", "0")) != 0:
        return None
    base = resolve_base(config.base_model)
    return write_record(out, base, name=config.name, kind=config.kind)


def _lock(out: Path) -> contextlib.AbstractContextManager[bool]:
    """Lock an output directory for this run. The lock file stands beside the directory, or inside
    it where the parent is not writable.
    """
    place = Path(os.path.realpath(out))
    make_directory(place.parent)
    is_inside = place.is_dir() and not os.access(place.parent, os.W_OK)
    return hold_place(place, beside=place if is_inside else None)


def _run(config: TrainConfig, out: Path, packed: PackedCorpus, state: Any) -> None:
    if state.is_main_process:
        drop_damaged(out / CHECKPOINTS)
    state.wait_for_everyone()
    refuse_other_processes(out / CHECKPOINTS, requested_sharding(), state.num_processes)
    base = resolve_base(config.base_model)
    checkpoint = newest_checkpoint(out / CHECKPOINTS)  # reads all of it
    spent = read_spent(checkpoint)
    trainer = build_trainer(config, base, packed, out, spent)
    logger.info("train %s: %s", config.name, _describe_tokens(config, packed.n_tokens))
    started = Cost.now()
    if checkpoint is not None:
        logger.info("train %s: resuming from %s", config.name, checkpoint.name)
    with naming_disk_errors(out, "The last complete checkpoint is kept"):
        with _naming_found_batch_size(config, out, spent.speed):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        _save(config, base, packed, trainer, out, spent.cost + started.since())
    forget_deepspeed()
    state.wait_for_everyone()


@contextlib.contextmanager
def _naming_found_batch_size(config: TrainConfig, out: Path, found: Speed | None) -> Iterator[None]:
    """Turn a lack of memory into an OutputError where a resumed run keeps the batch size that it
    found before, perhaps on a larger device: its steps and its schedule count such batches.
    """
    try:
        yield
    except Exception as error:
        if found is None or not finds_batch_size(config) or not lacks_memory(error):
            raise
        raise OutputError(
            f"{out}: the batch size {found.batch_size}, which was found on "
            f"{found.device or 'the CPU'} (per_device_train_batch_size: auto) and which the run "
            "keeps, does not fit the memory here. Resume it on a device with as much memory, or "
            "remove the directory to start again."
        ) from error


def _describe_tokens(config: TrainConfig, n_tokens: int) -> str:
    """Return how many tokens a run trains on and, if fewer were asked for or there are no more,
    why.
    """
    text, asked = f"{n_tokens:,} tokens", config.max_tokens
    if asked is None or asked == n_tokens:
        return text
    if abs(asked - n_tokens) < config.block_size:
        return f"{text} (max_tokens {asked:,} in whole blocks of {config.block_size:,})"
    return f"{text} (max_tokens is {asked:,}, and the corpus has no more)"


def _join_processes(config: TrainConfig) -> Any:
    """Join the other processes of `accelerate launch`, if any. They wait for each other long enough
    to pack a corpus or to write a model.
    """
    from accelerate import PartialState

    wait = timedelta(seconds=int(config.trainer.get("ddp_timeout", LONGEST_WAIT)))
    # without cpu=True, processes on a machine without a GPU do not find each other
    return PartialState(cpu=default_device() == "cpu", timeout=wait)


def prepare(config: TrainConfig, out: Path) -> PackedCorpus | None:
    """Check a run and pack its corpus into `out`, once. Returns None when the run is finished.

    This is cheap compared with the training, and finds corpora that are too small, wrong fields and
    directories that are not ours.
    """
    check_config(config)
    if is_trained(config, out):
        _tidy(out)  # a killed run may have left files
        return None
    with _lock(out):
        return _prepare_under_lock(config, out)


def _prepare_under_lock(config: TrainConfig, out: Path) -> PackedCorpus | None:
    """Do the work of `prepare` while this process holds the lock of `out`."""
    if is_trained(config, out):
        return None
    record = read_started(out)
    if record is None:
        return _begin(config, out)
    packed = _read_blocks(record, out)
    if packed is None or _has_other_text(record, packed):  # lost or damaged
        tokenizer, context = _check_base(config)
        packed = _pack_text(config, tokenizer, record.context or context, out / BLOCKS)
    if _has_other_text(record, packed):
        (out / BLOCKS).unlink()
        raise OutputError(
            f"{out}: the corpus has changed since the run was started, or another version of "
            "optimer-hf has packed it. Restore the corpus, or remove the directory to start again."
        )
    return packed


def _begin(config: TrainConfig, out: Path) -> PackedCorpus:
    """Pack the corpus of a new run. Leaves no files behind if that fails."""
    tokenizer, context = _check_base(config)
    is_new = not out.exists()
    make_directory(out)
    try:
        with naming_disk_errors(out, "Nothing was left behind"):
            packed = _pack_text(config, tokenizer, context, out / BLOCKS)
        StartedRecord(
            config_sha256=config.digest(),
            training=config.settings,
            inputs=config.digest_inputs(),
            parts=list(packed.parts),
            blocks_sha256=packed.sha256,
            context=context,
        ).write(out / STARTED)
    except BaseException:
        _remove_packed(out)
        if is_new:
            with contextlib.suppress(OSError):
                out.rmdir()
        raise
    return load_packed(out / BLOCKS, packed.parts)


def _check_base(config: TrainConfig) -> tuple[Any, int | None]:
    """Check the base and the LoRA of a run as its vector will be checked. Return the tokenizer, and
    the longest text that the base can read, in tokens (None: any).

    Loads no weights.
    """
    base = resolve_base(config.base_model)
    tokenizer = _tokenizer(base.path, tuple(sorted(tokenizer_digests(base.path).items())))
    model = empty_model(base)
    context = _context_of(model, config.block_size)
    adapted = add_lora(model, config, base)
    check_targets(config, adapted)
    refuse_unpassable(config, adapted)
    refuse_untied_copies(config, ties_of(Checkpoint(base.path)))
    if config.lora is not None:
        refuse_unmergeable_adapter(adapted, config, base)
    return tokenizer, context


def _context_of(model: Any, block_size: int) -> int | None:
    """Return the longest text that a model can read, in tokens; None: any, as where positions are
    computed. Warn of a block that is longer than what the config says.
    """
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(longest, int) or longest <= 0:
        return None
    decoder = model.get_decoder()
    state = (*decoder.named_parameters(), *decoder.named_buffers())
    is_table = any(POSITIONS.search(name) and len(each) >= longest for name, each in state)
    if longest < block_size:
        logger.warning(
            "block_size is %s, the config of the base says max_position_embeddings %s: %s",
            f"{block_size:,}",
            f"{longest:,}",
            "documents are cut there" if is_table else "positions beyond have not been trained",
        )
    return longest if is_table else None


@functools.lru_cache(maxsize=1)  # the runs of a recipe have one base; a large vocabulary takes long
def _tokenizer(path: Path, state: tuple[tuple[str, str], ...]) -> Any:
    """Return the tokenizer in a directory, which nobody may change; `state` is part of the key, to
    notice changed files.
    """
    return read_tokenizer(path)


def _read_blocks(record: StartedRecord, out: Path) -> PackedCorpus | None:
    """Return the packed corpus of a run that was started, or None when it cannot be read."""
    try:
        return load_packed(out / BLOCKS, record.parts)
    except (OSError, ValueError, EOFError):
        return None


def _has_other_text(record: StartedRecord, packed: PackedCorpus) -> bool:
    return record.blocks_sha256 not in (None, packed.sha256)


def _pack_text(config: TrainConfig, tokenizer: Any, context: int | None, out: Path) -> PackedCorpus:
    """Pack the corpus or the mixture of a run, with its replay. Warn of repeated documents."""
    if config.corpus is not None and config.replay is None:
        return pack(
            config.corpus,
            tokenizer,
            block_size=config.block_size,
            max_tokens=config.max_tokens,
            seed=config.seed,
            out=out,
            context=context,
        )
    packed = pack_mixture(
        config.parts or [],
        tokenizer,
        block_size=config.block_size,
        max_tokens=config.max_tokens or 0,
        seed=config.seed,
        out=out,
        context=context,
    )
    for part in packed.parts:
        if part.n_repeats:
            logger.warning(
                "%s: repeating %s documents to fill its share (%.2f passes)",
                part.name,
                f"{part.n_repeats:,}",
                1 + part.n_repeats / part.n_documents,
            )
    return packed


def _save(
    config: TrainConfig,
    base: ResolvedModel,
    packed: PackedCorpus,
    trainer: "CapturedTrainer",
    out: Path,
    spent: Cost,
) -> None:
    """Write what came of a run, and training.json last, which makes `out` complete."""
    _save_model(config, base, trainer, out)
    if not trainer.is_world_process_zero():
        return
    started = read_started(out)
    inputs = {} if started is None else started.inputs
    record = _training_record(config, base, packed, trainer, spent, inputs)
    sync_all(out)
    record.write(out / TRAINING_FILE)
    _tidy(out)


def _save_model(
    config: TrainConfig, base: ResolvedModel, trainer: "CapturedTrainer", out: Path
) -> None:
    """Write the adapter or the model of a run; collective, and the first process writes."""
    is_writer = trainer.is_world_process_zero()
    if is_writer and not (out / STARTED).exists():
        raise OutputError(f"{out}: was removed during the training. Run the command again.")
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    gathered = None
    if is_sharded(model):
        if config.lora is None:
            return write_gathered(model, out, is_writer=is_writer)
        gathered = gather_adapter(model)
    if not is_writer:
        return None
    if config.lora is None:
        model.save_pretrained(out)
        return None
    for lora in model.peft_config.values():
        lora.base_model_name_or_path = base.reference
    # "auto" would look the base up on the Hub
    model.save_pretrained(out, save_embedding_layers=False, state_dict=gathered)
    # PEFT's card template; ours is written when the vector is pushed
    (out / "README.md").unlink(missing_ok=True)
    return None


def _tidy(out: Path) -> None:
    """Remove the files that only the training needed, and the locks of killed runs."""
    (out / STARTED).unlink(missing_ok=True)
    _remove_packed(out)
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
    for folder in (out, Path(os.path.realpath(out)).parent):
        remove_dead_locks(folder)


def _remove_packed(out: Path) -> None:
    """Remove what packing wrote, also for another corpus by a run that was killed."""
    for path in out.glob(f"{PACKED}*"):
        path.unlink(missing_ok=True)


def _training_record(
    config: TrainConfig,
    base: ResolvedModel,
    packed: PackedCorpus,
    trainer: "CapturedTrainer",
    spent: Cost,
    inputs: Mapping[str, str],
) -> TrainingRecord:
    """Return the content of training.json. It names no path of this machine."""
    from optimer_hf.training.callback import count_blocks

    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    norms = {entry["step"]: entry["norm"] for entry in history if "norm" in entry}
    n_blocks = count_blocks(trainer.args, trainer.state.global_step, len(packed))
    n_tokens = n_blocks * config.block_size
    return TrainingRecord(
        config_sha256=config.digest(),
        name=config.name,
        base_model=base.reference,
        corpus=CorpusRecord(
            name=" + ".join(part.name for part in packed.parts),
            n_tokens=packed.n_tokens,
            n_documents=packed.n_documents,
            sha256=packed.sha256,
            parts=list(packed.parts) if config.parts is not None else None,
        ),
        training=RunRecord(
            **config.settings,
            mixed_precision=trainer.accelerator.mixed_precision,
            n_steps=trainer.state.global_step,
            n_tokens=n_tokens,
            losses=losses,
            norms=[*norms.values()] or None,
            norm_steps=[*norms] or None,
            seconds=round(spent.seconds, 2),
            cpu_seconds=round(spent.cpu_seconds, 2),
            speed=_measure_speed(trainer, n_tokens / max(spent.seconds, 1e-9)),
        ),
        versions=versions(),
        inputs=dict(inputs),
    )


def _measure_speed(trainer: "CapturedTrainer", rate: float) -> Speed:
    """Return the speed of a training that has read `rate` tokens per second."""
    from optimer_hf.training.callback import utilisation

    speed = trainer.speed
    mfu = utilisation(rate, trainer.flops_per_token, speed.device, trainer.args.world_size)
    rounded = None if mfu is None else round(mfu, 3)
    return speed.model_copy(update={"tokens_per_second": round(rate), "mfu": rounded})
