"""Probe this machine to plan what a study or a recipe folder will take: time, memory, disk.

Configs come in, an estimate for each stage goes out. It rests on a few real training steps and a
few real items, scored on the real base. The memory is that of the probe itself, which loads what
the run loads, and what is still to be fetched on top.
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from optimer_hf.errors import ModelError
from optimer_hf.experiment.plan_file import Download, Plan, show_bytes
from optimer_hf.experiment.stages import (
    Probe,
    count_tokens,
    make_stages,
    term_key,
    training_key,
    warn_of_short_texts,
    warn_of_unknown_tokens,
)
from optimer_hf.files.reference import Reference
from optimer_hf.files.text import first_line
from optimer_hf.hub.pulling import inputs_of
from optimer_hf.merging.tokenizer import scoring_tokenizer
from optimer_hf.merging.union import open_base
from optimer_hf.models.layout import ResolvedModel, weight_states
from optimer_hf.models.memory import peak_memory, total_memory
from optimer_hf.models.resolve import fetch_snapshot, resolve_base
from optimer_hf.progress import Cost, Meter
from optimer_hf.scoring.evaluator import Evaluator
from optimer_hf.scoring.objective import Asked, Term
from optimer_hf.scoring.tasks import load_tasks
from optimer_hf.searching.engine import keep_engine, open_engine, refuse_unusable_engine
from optimer_hf.searching.trial import placement_of, source_of
from optimer_hf.study.config import StudyConfig
from optimer_hf.training.config import MOST_TOKENS, TrainConfig
from optimer_hf.training.run import train
from optimer_hf.vectors.opening import open_vector
from optimer_hf.vectors.training_record import TRAINING_FILE, TrainingRecord

PROBE_STEPS = 4  # steps of each kind of training
PROBE_ITEMS = 4  # items of every term
TRIAL_REMEDY = (  # a trial holds the model, and, if there is room, the base and the vectors
    "Set `dtype: bfloat16`, write the vectors as int8 deltas (`optimer extract --dtype int8`), or "
    "use an accelerator with more memory. With CUDA_VISIBLE_DEVICES= the search runs on the CPU."
)
FREE_SHARE = 0.9  # of memory and disk that a run may fill


def list_downloads(config: StudyConfig) -> tuple[Download, ...]:
    """Return the base and the vectors that have to be fetched from the Hub. Those in the cache are
    left out.
    """
    references = [config.base_model, *(v.source for v in config.vectors.values() if v.source)]
    wanted = [text for text in dict.fromkeys(references) if _is_to_fetch(Reference(text))]
    if not wanted:
        return ()
    from huggingface_hub import HfApi

    return tuple(Download(**asdict(each)) for each in inputs_of(HfApi(), wanted))


def _is_to_fetch(ref: Reference) -> bool:
    if ref.path is not None or ref.package is not None:
        return False
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        fetch_snapshot(ref, local_files_only=True)
    except LocalEntryNotFoundError:
        return True
    return False


def make_plan(
    config: StudyConfig, trainings: Mapping[str, TrainConfig], out: Path, *, is_run: bool
) -> Plan:
    """Probe this machine and return the plan of a search, or of a whole run with `is_run`. The base
    has to be on this disk.

    Raises ModelError if a training step or a trial does not fit into the accelerator's memory.
    """
    base = resolve_base(config.base_model)
    probe = _run_probe(config, trainings, base)
    model_bytes = sum(n_bytes for n_bytes, _ in weight_states(base.path).values())
    disk = sum(probe.vector_bytes[training_key(training)] for training in trainings.values())
    disk += max(probe.vector_bytes.values(), default=0) * config.baselines.n_trained_models
    disk += model_bytes if is_run else 0
    fetched = list_downloads(config)
    memory = peak_memory() + sum(each.n_bytes or 0 for each in fetched)
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return Plan(
        stages=tuple(make_stages(config, trainings, probe, is_run)),
        memory_bytes=memory,
        device_bytes=int(device),
        disk_bytes=disk,
        downloads=fetched,
        warnings=(
            *_warn_of_room(memory, disk, out),
            *warn_of_short_texts(trainings),
            *warn_of_unknown_tokens(trainings),
        ),
    )


def _warn_of_room(memory: int, disk: int, out: Path) -> tuple[str, ...]:
    """Return warnings if the memory or the disk has too little room."""
    warnings = []
    total = total_memory()
    if memory > FREE_SHARE * total:
        warnings.append(
            f"memory: {show_bytes(memory)} expected, {show_bytes(total)} here. Lower "
            "trainer.per_device_train_batch_size or block_size, or train LoRA vectors (`lora:`)."
        )
    there = next(folder for folder in (out, *out.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if disk > FREE_SHARE * free:
        warnings.append(
            f"disk: {show_bytes(disk)} expected, {show_bytes(free)} free. Give an OUT on another "
            "disk."
        )
    return tuple(warnings)


# -- the probe -------------------------------------------------------------------------------------


def _run_probe(
    config: StudyConfig, trainings: Mapping[str, TrainConfig], base: ResolvedModel
) -> Probe:
    kinds = {training_key(training): training for training in trainings.values()}
    terms = _terms_to_probe(config)
    token_costs, sizes, item_costs, counts = {}, {}, {}, {}
    with (
        tempfile.TemporaryDirectory() as scratch,
        Meter("probe", len(kinds) + len(terms), "parts") as meter,
    ):
        for key, training in kinds.items():
            token_costs[key], sizes[key] = _measure_training(training, Path(scratch) / key)
            meter.advance(1)
        trained = {
            n: str(Path(scratch) / training_key(training)) for n, training in trainings.items()
        }
        with keep_engine(), _refusing_misfits(f"{config.base_model}: a trial", TRIAL_REMEDY):
            evaluator = _open_evaluator(config, base, trained)
            for term in terms[:1]:  # the first call is slower
                evaluator.evaluate([Asked(term, 1)])
            for term in terms:
                began = Cost.now()
                scored = evaluator.evaluate([Asked(term, PROBE_ITEMS)])[term.label]
                item_costs[term_key(term)] = began.since() * (1 / len(scored.items))
                counts[term_key(term)] = evaluator.count_items(term)
                meter.advance(1)
    return Probe(item_costs, counts, token_costs, sizes)


@contextmanager
def _refusing_misfits(what: str, remedy: str) -> Iterator[None]:
    """Raise ModelError with a remedy if something does not fit into the accelerator's memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{what} does not fit into the accelerator's memory ({first_line(error)}) {remedy}"
        ) from None


def _terms_to_probe(config: StudyConfig) -> list[Term]:
    """Return the terms of the search and the sealed test, without those that a Python function
    scores.
    """
    tested = config.test.scored_terms if config.test is not None else []
    return [term for term in (*config.objective.scored_terms, *tested) if term.function is None]


def _open_evaluator(
    config: StudyConfig, base: ResolvedModel, trained: Mapping[str, str]
) -> Evaluator:
    """Return what a trial runs, with a pool as large as that of the study: the vectors that are on
    this disk, and what the probe trained in place of those to be trained.
    """
    given = {name: each for name, each in config.vectors.items() if name not in trained}
    sources = {name: source_of(name, each) for name, each in given.items()} | dict(trained)
    here = {name: text for name, text in sources.items() if not _is_to_fetch(Reference(text))}
    is_whole = config.vocabulary == "base" or here == sources
    reference = config.tokenizer_reference if is_whole else None  # may have tokens of the others
    base, source = open_base(base, here, reference, config.vocabulary)
    pool = [open_vector(name, source, base) for name, source in here.items()]
    objectives = [config.objective] + ([config.test] if config.test is not None else [])
    refuse_unusable_engine(config.engine, base, source, config.dtype)
    tokenizer = scoring_tokenizer(
        base, source, apply_chat_template=config.objective.apply_chat_template
    )
    tasks = load_tasks(objectives)
    engine = open_engine(
        config.engine,
        base,
        pool,
        dtype=config.dtype,
        scoring_tokenizer=tokenizer,
        tokenizer=source,
        placement=placement_of(config),
    )
    engine.set_weights({vector.name: 0.5 for vector in pool})
    return Evaluator.of(engine.lm, tasks, objectives)


def _measure_training(config: TrainConfig, out: Path) -> tuple[Cost, int]:
    """Train a few real steps into `out`; return the time of a token and the bytes left behind."""
    few = config.model_copy(update={"trainer": {**config.trainer, "max_steps": PROBE_STEPS}})
    n_tokens = min(count_tokens(few), config.max_tokens or MOST_TOKENS)
    lora = ", or train a LoRA (`lora:`)" if config.lora is None else ""
    remedy = f"Lower trainer.per_device_train_batch_size or block_size{lora}."
    with _refusing_misfits(f"{config.base_model}: a training step of {config.name!r}", remedy):
        train(few.model_copy(update={"max_tokens": n_tokens}), out)
    took = TrainingRecord.read(out / TRAINING_FILE).training
    n_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return Cost(took.seconds, took.cpu_seconds) * (1 / took.n_tokens), n_bytes
