"""Probe this machine to plan what a study or a recipe folder will take: time, memory, disk.

Configs come in, an estimate for each stage goes out. It rests on a few real training steps and a
few real items, scored on the real base. The memory is that of the probe itself, which loads what
the run loads, and what is still to be fetched on top.
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from optimer_hf.comparison.rows import list_rows
from optimer_hf.errors import ModelError
from optimer_hf.experiment.plan_file import Download, Plan, Stage, StageKind, show_bytes
from optimer_hf.files.digest import digest
from optimer_hf.files.reference import Reference
from optimer_hf.files.text import first_line
from optimer_hf.hub.pulling import inputs_of
from optimer_hf.merging.resident import ResidentModel
from optimer_hf.merging.tokenizer import open_tokenizer, scoring_tokenizer
from optimer_hf.models.layout import ResolvedModel, weight_states
from optimer_hf.models.live import default_device
from optimer_hf.models.memory import peak_memory, total_memory
from optimer_hf.models.resolve import fetch_snapshot, resolve_base
from optimer_hf.progress import Cost, Meter
from optimer_hf.scoring.evaluator import Evaluator
from optimer_hf.scoring.objective import Asked, Term
from optimer_hf.study.config import StudyConfig
from optimer_hf.training.arguments import TRAINER_DEFAULTS
from optimer_hf.training.config import TrainConfig
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


@dataclass(frozen=True)
class Probe:
    """What was measured: the time and number of items by term, the time of a token by kind of
    training, and the bytes that such a training leaves behind.
    """

    item_costs: Mapping[str, Cost]
    n_items: Mapping[str, int]
    token_costs: Mapping[str, Cost]
    vector_bytes: Mapping[str, int]


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
    stages = [
        stage for stage in _make_stages(config, trainings, probe, is_run) if stage.cost.seconds > 0
    ]
    model_bytes = sum(n_bytes for n_bytes, _ in weight_states(base.path).values())
    disk = sum(probe.vector_bytes[_training_key(training)] for training in trainings.values())
    disk += max(probe.vector_bytes.values(), default=0) * len(config.baselines.mixtures)
    disk += model_bytes if is_run else 0
    fetched = list_downloads(config)
    memory = peak_memory() + sum(each.n_bytes or 0 for each in fetched)
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return Plan(
        stages=tuple(stages),
        memory_bytes=memory,
        device_bytes=int(device),
        disk_bytes=disk,
        downloads=fetched,
        warnings=_warn_of_room(memory, disk, out),
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
    kinds = {_training_key(training): training for training in trainings.values()}
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
            n: str(Path(scratch) / _training_key(training)) for n, training in trainings.items()
        }
        with _refusing_misfits(f"{config.base_model}: a trial", TRIAL_REMEDY):
            evaluator = _open_evaluator(config, base, trained)
            for term in terms[:1]:  # the first call is slower
                evaluator.evaluate([Asked(term, 1)])
            for term in terms:
                began = Cost.now()
                scored = evaluator.evaluate([Asked(term, PROBE_ITEMS)])[term.label]
                item_costs[_term_key(term)] = began.since() * (1 / len(scored.items))
                counts[_term_key(term)] = evaluator.count_items(term)
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
    sources = {name: str(vector.source) for name, vector in config.vectors.items()} | dict(trained)
    pool = [
        open_vector(name, source, base)
        for name, source in sources.items()
        if not _is_to_fetch(Reference(source))
    ]
    objectives = [config.objective] + ([config.test] if config.test is not None else [])
    resident = ResidentModel(base, pool, dtype=config.dtype, device=default_device())
    resident.set_weights({vector.name: 0.5 for vector in pool})
    tokenizer = scoring_tokenizer(  # a few MB where it has to be fetched
        base,
        open_tokenizer(base, config.tokenizer_reference),
        apply_chat_template=config.objective.apply_chat_template,
    )
    return Evaluator(resident.model, tokenizer, objectives)


def _measure_training(config: TrainConfig, out: Path) -> tuple[Cost, int]:
    """Train a few real steps into `out`; return the time of a token and the bytes left behind."""
    settings = {**TRAINER_DEFAULTS, **config.trainer}
    blocks = int(settings["per_device_train_batch_size"])
    blocks *= int(settings.get("gradient_accumulation_steps", 1))
    n_tokens = PROBE_STEPS * blocks * config.block_size
    n_tokens = min(n_tokens, config.max_tokens or n_tokens)
    lora = ", or train a LoRA (`lora:`)" if config.lora is None else ""
    remedy = f"Lower trainer.per_device_train_batch_size or block_size{lora}."
    with _refusing_misfits(f"{config.base_model}: a training step of {config.name!r}", remedy):
        train(config.model_copy(update={"max_tokens": n_tokens}), out)
    took = TrainingRecord.read(out / TRAINING_FILE).training
    n_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return Cost(took.seconds, took.cpu_seconds) * (1 / took.n_tokens), n_bytes


def _training_key(training: TrainConfig) -> str:
    """Return the key of a kind of training; trainings of one kind cost the same per token."""
    text = {"name", "corpus", "mixture", "max_tokens", "seed"}
    return digest(training.model_dump(mode="json", exclude=text))


def _term_key(term: Term) -> str:
    return digest([term.task_key, term.metric, list(term.hash_range)])


# -- from the probe to the stages ------------------------------------------------------------------


def _make_stages(
    config: StudyConfig, trainings: Mapping[str, TrainConfig], probe: Probe, is_run: bool
) -> list[Stage]:
    tokens = {name: training.max_tokens or 0 for name, training in trainings.items()}
    stages = [
        Stage(
            kind="train",
            name=f"train {name}",
            work=f"{tokens[name]:,} tokens",
            cost=probe.token_costs[_training_key(training)] * tokens[name],
        )
        for name, training in trainings.items()
    ]
    stages += _search_stages(config, probe)
    if not is_run or config.test is None:
        return stages
    each = config.baselines
    mixed = sum(
        sum(tokens.values()) // (1 if mixture.budget == "all" else max(len(tokens), 1))
        for mixture in each.mixtures.values()
    )
    slowest = max(probe.token_costs.values(), key=lambda cost: cost.seconds, default=Cost())
    work, cost = f"{mixed:,} tokens", slowest * mixed
    stages.append(Stage(kind="mixtures", name="mixtures", work=work, cost=cost))
    for name, settings in each.searches.items():
        stages += _search_stages(config.with_other_search(settings), probe, name)
    n_rows = len(list_rows(config))  # at most, since rows with equal weights are scored once
    items, cost = _scoring_cost(config.test.asked_terms("rescore"), probe)
    work = f"{n_rows} rows of {items:,} items"
    stages.append(Stage(kind="sealed", name="sealed test", work=work, cost=cost * n_rows))
    return stages


def _search_stages(config: StudyConfig, probe: Probe, other: str | None = None) -> list[Stage]:
    """Return the trials and the re-scoring of a search: that of a study, or another one that is a
    baseline, by its name.
    """
    prefix = "" if other is None else f"{other}: "
    search, objective = config.search, config.objective
    items, cost = _scoring_cost(objective.asked_terms("search"), probe)
    work = f"{search.n_trials} trials of {items:,} items"
    kind: StageKind = "search" if other is None else "other_searches"
    total = cost * search.n_trials
    stages = [Stage(kind=kind, name=f"{prefix}search", work=work, cost=total)]
    if search.rescore_top:
        again = [
            Asked(term, config.rescore_limit_of(term))
            for term in objective.terms_at("rescore")
            if not config.keeps_search_scores(term, probe.n_items.get(_term_key(term)))
        ]
        items, cost = _scoring_cost(again, probe)
        n = search.rescore_top + 1
        work = f"{n} trials of {items:,} items"
        kind = "rescore" if other is None else "other_searches"
        stages.append(Stage(kind=kind, name=f"{prefix}re-score", work=work, cost=cost * n))
    return stages


def _scoring_cost(asked: Sequence[Asked], probe: Probe) -> tuple[int, Cost]:
    """Return how many items it takes to score some terms once, and how long that takes."""
    n_items, cost = 0, Cost()
    for each in asked:
        if each.term.function is None:
            n = probe.n_items[_term_key(each.term)]
            n = n if each.limit is None else min(n, each.limit)
            n_items += n
            cost += probe.item_costs[_term_key(each.term)] * n
    return n_items, cost
