"""TrainConfig -> checkpoint: continual pre-training of one base model on one corpus with the HF
Trainer.

A LoRA run leaves a PEFT adapter in `out`, a full-parameter run a float32 model (small deltas do not
survive bfloat16); `training.json` is written last and makes the directory complete. A killed run
goes on from its last complete checkpoint. What a reader would not guess: the model computes its
loss through `head.fuse_loss`, without logits, and documents packed into one block do not see each
other (their positions restart, there is no cache).
"""

import contextlib
import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Mapping
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optimer_hf.errors import OutputError
from optimer_hf.files.digest import differences
from optimer_hf.files.disk import naming_disk_errors
from optimer_hf.files.locks import exclusive, remove_dead_locks
from optimer_hf.files.model import refuse_absent
from optimer_hf.files.paths import ATOMIC_PREFIX
from optimer_hf.files.reading import read_yaml
from optimer_hf.files.reference import is_there
from optimer_hf.files.staging import make_directory, sync_all, write_text
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.models.live import default_device, empty_model, loaded_tokenizer
from optimer_hf.models.resolve import resolve_base
from optimer_hf.models.ties import ties_of
from optimer_hf.progress import Cost
from optimer_hf.training.checkpoints import BLOCKS, CHECKPOINTS, STARTED, drop_damaged, newest_whole
from optimer_hf.training.checks import _check_targets, check_config, check_fields
from optimer_hf.training.config import TrainConfig
from optimer_hf.training.packing import PackedCorpus, Part, load_packed, pack, pack_mixture
from optimer_hf.training.trainer import (
    _adapted,
    _refuse_saved_apart,
    _refuse_unweighted,
    _spent_before,
    _tokens_per_step,
    build_trainer,
)
from optimer_hf.vectors.delta import describe
from optimer_hf.vectors.record import VectorFile

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)


LEFTOVERS = (ATOMIC_PREFIX, "blocks.")  # of a run killed while it packed
LONGEST_WAIT = 6 * 3600  # seconds; the first process packs a billion tokens in half an hour
VERSIONED_PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors")


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


def train_vector(path: Path, out: Path) -> VectorFile | None:
    """Train what the train file at `path` says, describe it as a vector and return its record; of
    several processes only the first one does so, and None comes back in the others.
    """
    config = TrainConfig.read(path)
    if not (out / "training.json").exists():  # a trained vector no longer needs its corpus
        refuse_absent({path: config.model_dump()})
    train(config, out)
    if int(os.environ.get("RANK", "0")) != 0:
        return None
    base = resolve_base(config.base_model)
    return describe(out, base, name=config.name, kind=config.kind)


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
