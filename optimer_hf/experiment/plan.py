"""A study or a recipe folder -> what it will take before it runs: time, memory, disk, downloads.

Configs come in, an estimate per stage goes out. It rests on a short probe on this machine, real
training steps and real items on the real base; nothing else is guessed. What a reader would not
guess: the memory is that of the probe itself, which loads what the run loads (and what is still to
be fetched on top).
"""

import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from optimer_hf.comparison.ledger import Ledger
from optimer_hf.comparison.rows import list_rows
from optimer_hf.errors import ModelError
from optimer_hf.files.digest import digest
from optimer_hf.files.reference import Reference
from optimer_hf.files.text import first_line, markdown_table
from optimer_hf.hub.pulling import Input, inputs_of
from optimer_hf.merging.resident import ResidentModel
from optimer_hf.merging.tokenizer import open_tokenizer, scoring_tokenizer
from optimer_hf.models.layout import ResolvedModel, weight_states
from optimer_hf.models.live import default_device
from optimer_hf.models.memory import total_memory
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

PROBE_STEPS = 4  # of training
PROBE_ITEMS = 4  # of every term
TRIAL_REMEDY = (  # a trial holds the model, and beside it base and vectors where there is room
    "Set `dtype: bfloat16`, write the vectors as int8 deltas (`optimer extract --dtype int8`), or "
    "take an accelerator with more memory; CUDA_VISIBLE_DEVICES= searches on the processor."
)
FREE_SHARE = 0.9  # of memory and disk that a run may fill


@dataclass(frozen=True)
class Stage:
    """One stage of a run: its work, and the time it is expected to take."""

    name: str
    work: str
    cost: Cost


@dataclass(frozen=True)
class Plan:
    """What a run will take; bytes of memory are those of one process, of disk those of its results.

    `device_bytes` is the memory of the accelerator, 0 without one.
    """

    stages: tuple[Stage, ...]
    memory_bytes: int
    device_bytes: int
    disk_bytes: int
    downloads: tuple[Input, ...]
    warnings: tuple[str, ...]

    @property
    def cost(self) -> Cost:
        """Of all stages."""
        return sum((stage.cost for stage in self.stages), Cost())


@dataclass(frozen=True)
class Probe:
    """What was measured: the time of an item by term and of a token of training by config, and
    bytes of what a training leaves behind.
    """

    item_costs: Mapping[str, Cost]
    n_items: Mapping[str, int]
    token_costs: Mapping[str, Cost]
    vector_bytes: Mapping[str, int]


def downloads(config: StudyConfig) -> tuple[Input, ...]:
    """Return what has to come from the Hub, with sizes and licences; what is in the cache already
    is left out.
    """
    references = [config.base_model, *(v.source for v in config.vectors.values() if v.source)]
    wanted = [text for text in dict.fromkeys(references) if _is_to_fetch(Reference(text))]
    if not wanted:
        return ()
    from huggingface_hub import HfApi

    return inputs_of(HfApi(), wanted)


def _is_to_fetch(ref: Reference) -> bool:
    if ref.path is not None or ref.package is not None:
        return False
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        fetch_snapshot(ref, local_files_only=True)
    except LocalEntryNotFoundError:
        return True
    return False


def plan(
    config: StudyConfig, trainings: Mapping[str, TrainConfig], out: Path, *, is_run: bool
) -> Plan:
    """Probe this machine and return the plan of a search, or of a whole run with `is_run`; the base
    has to be here.

    Raises ModelError when a training step or a trial does not fit into the accelerator's memory.
    """
    base = resolve_base(config.base_model)
    probe = _probed(config, trainings, base)
    stages = [
        stage for stage in _stages(config, trainings, probe, is_run) if stage.cost.seconds > 0
    ]
    model_bytes = sum(n_bytes for n_bytes, _ in weight_states(base.path).values())
    disk = sum(probe.vector_bytes[_key(training)] for training in trainings.values())
    disk += max(probe.vector_bytes.values(), default=0) * len(config.baselines.mixtures)
    disk += model_bytes if is_run else 0
    fetched = downloads(config)
    memory = peak_memory() + sum(each.n_bytes or 0 for each in fetched)
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return Plan(tuple(stages), memory, int(device), disk, fetched, _warnings(memory, disk, out))


def _warnings(memory: int, disk: int, out: Path) -> tuple[str, ...]:
    found = []
    total = total_memory()
    if memory > FREE_SHARE * total:
        found.append(
            f"memory: {_size(memory)} expected, {_size(total)} here. Lower "
            "trainer.per_device_train_batch_size or block_size, or train LoRA vectors (`lora:`)."
        )
    there = next(folder for folder in (out, *out.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if disk > FREE_SHARE * free:
        found.append(
            f"disk: {_size(disk)} expected, {_size(free)} free. Give an OUT on another disk."
        )
    return tuple(found)


# -- the probe -------------------------------------------------------------------------------------


def _probed(
    config: StudyConfig, trainings: Mapping[str, TrainConfig], base: ResolvedModel
) -> Probe:
    kinds = {_key(training): training for training in trainings.values()}
    terms = _terms(config)
    token_costs, sizes, item_costs, counts = {}, {}, {}, {}
    with (
        tempfile.TemporaryDirectory() as scratch,
        Meter("probe", len(kinds) + len(terms), "parts") as meter,
    ):
        for key, training in kinds.items():
            token_costs[key], sizes[key] = _training_cost(training, Path(scratch) / key)
            meter.advance(1)
        trained = {n: str(Path(scratch) / _key(training)) for n, training in trainings.items()}
        with _fitting(f"{config.base_model}: a trial", TRIAL_REMEDY):
            evaluator = _evaluator(config, base, trained)
            for term in terms[:1]:  # the first call is slower
                evaluator.evaluate([Asked(term, 1)])
            for term in terms:
                began = Cost.now()
                scored = evaluator.evaluate([Asked(term, PROBE_ITEMS)])[term.label]
                item_costs[_item_key(term)] = began.since() * (1 / len(scored.items))
                counts[_item_key(term)] = evaluator.count_items(term)
                meter.advance(1)
    return Probe(item_costs, counts, token_costs, sizes)


@contextmanager
def _fitting(what: str, remedy: str) -> Iterator[None]:
    """Raise ModelError, with what to do, for what does not fit into an accelerator."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{what} does not fit into the accelerator's memory ({first_line(error)}) {remedy}"
        ) from None


def _terms(config: StudyConfig) -> list[Term]:
    """Return the terms of search and sealed test that the harness can score without a person's
    Python.
    """
    tested = config.test.scored_terms if config.test is not None else []
    return [term for term in (*config.objective.scored_terms, *tested) if term.function is None]


def _evaluator(config: StudyConfig, base: ResolvedModel, trained: Mapping[str, str]) -> Evaluator:
    """Return what a trial runs, with a pool as large as that of the study: vectors that are here,
    and for those to be trained what the probe trained.
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


def _training_cost(config: TrainConfig, out: Path) -> tuple[Cost, int]:
    """Train a few real steps into `out`; return the time of a token, and the bytes left behind."""
    settings = {**TRAINER_DEFAULTS, **config.trainer}
    blocks = int(settings["per_device_train_batch_size"])
    blocks *= int(settings.get("gradient_accumulation_steps", 1))
    n_tokens = PROBE_STEPS * blocks * config.block_size
    n_tokens = min(n_tokens, config.max_tokens or n_tokens)
    lora = ", or train a LoRA (`lora:`)" if config.lora is None else ""
    remedy = f"Lower trainer.per_device_train_batch_size or block_size{lora}."
    with _fitting(f"{config.base_model}: a training step of {config.name!r}", remedy):
        train(config.model_copy(update={"max_tokens": n_tokens}), out)
    took = TrainingRecord.read(out / TRAINING_FILE).training
    n_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return Cost(took.seconds, took.cpu_seconds) * (1 / took.n_tokens), n_bytes


def _key(training: TrainConfig) -> str:
    """Return a key; trainings with the same key cost the same per token."""
    text = {"name", "corpus", "mixture", "max_tokens", "seed"}
    return digest(training.model_dump(mode="json", exclude=text))


def _item_key(term: Term) -> str:
    return digest([term.task_key, term.metric, list(term.hash_range)])


# -- from the probe to the stages ------------------------------------------------------------------


def _stages(
    config: StudyConfig, trainings: Mapping[str, TrainConfig], probe: Probe, is_run: bool
) -> list[Stage]:
    tokens = {name: training.max_tokens or 0 for name, training in trainings.items()}
    stages = [
        Stage(
            f"train {name}",
            f"{tokens[name]:,} tokens",
            probe.token_costs[_key(training)] * tokens[name],
        )
        for name, training in trainings.items()
    ]
    stages += _searching(config, probe, "")
    if not is_run or config.test is None:
        return stages
    each = config.baselines
    mixed = sum(
        sum(tokens.values()) // (1 if mixture.budget == "all" else max(len(tokens), 1))
        for mixture in each.mixtures.values()
    )
    slowest = max(probe.token_costs.values(), key=lambda cost: cost.seconds, default=Cost())
    stages.append(Stage("mixtures", f"{mixed:,} tokens", slowest * mixed))
    for name, settings in each.searches.items():
        stages += _searching(config.with_other_search(settings), probe, f"{name}: ")
    n_rows = len(list_rows(config))  # at most: rows with equal weights are scored once
    items, cost = _scoring(config.test.asked_terms("rescore"), probe)
    stages.append(Stage("sealed test", f"{n_rows} rows of {items:,} items", cost * n_rows))
    return stages


def _searching(config: StudyConfig, probe: Probe, prefix: str) -> list[Stage]:
    """Return the trials and re-scorings of the search of a study."""
    search, objective = config.search, config.objective
    items, cost = _scoring(objective.asked_terms("search"), probe)
    work = f"{search.n_trials} trials of {items:,} items"
    stages = [Stage(f"{prefix}search", work, cost * search.n_trials)]
    if search.rescore_top:
        again = [
            Asked(term, config.rescore_limit_of(term))
            for term in objective.terms_at("rescore")
            if not config.keeps_search_scores(term, probe.n_items.get(_item_key(term)))
        ]
        items, cost = _scoring(again, probe)
        n = search.rescore_top + 1
        work = f"{n} trials of {items:,} items"
        stages.append(Stage(f"{prefix}re-score", work, cost * n))
    return stages


def _scoring(asked: Sequence[Asked], probe: Probe) -> tuple[int, Cost]:
    """Return the items and time of scoring terms once."""
    n_items, cost = 0, Cost()
    for each in asked:
        if each.term.function is None:
            n = probe.n_items[_item_key(each.term)]
            n = n if each.limit is None else min(n, each.limit)
            n_items += n
            cost += probe.item_costs[_item_key(each.term)] * n
    return n_items, cost


# -- telling ---------------------------------------------------------------------------------------


def to_json(found: Plan) -> dict[str, Any]:
    """Return a plan as JSON values."""
    return asdict(found) | {"cost": asdict(found.cost)}


def to_markdown(found: Plan, n_runs: int = 1) -> str:
    """Return a plan as a table and a few lines; `n_runs` such runs are to follow each other."""
    rows = [[stage.name, stage.work, _clock(stage.cost.seconds)] for stage in found.stages]
    rows.append(["together", "", _clock(found.cost.seconds)])
    lines = [markdown_table(["stage", "work", "time"], rows)]
    device = f", {_size(found.device_bytes)} on the accelerator" if found.device_bytes else ""
    lines.append(f"memory: {_size(found.memory_bytes)}{device}")
    lines.append(f"disk: {_size(found.disk_bytes)}")
    if n_runs > 1:
        seconds, n_bytes = n_runs * found.cost.seconds, n_runs * found.disk_bytes
        lines.append(f"all {n_runs} seeds: {_clock(seconds)}, disk {_size(n_bytes)}")
    lines += [said(each) for each in found.downloads]
    lines += [f"warning: {warning}" for warning in found.warnings]
    return "\n".join(lines)


def said(each: Input) -> str:
    """Return a download in words."""
    size = f"{_size(each.n_bytes)}" if each.n_bytes is not None else "size unknown"
    return f"to fetch: {each.reference} ({size}, licence {each.licence or '?'})"


def against(planned: Mapping[str, Any], ledger: Ledger) -> str:
    """Return a plan, as JSON values, beside what the run took, by stage, as Markdown."""
    expected: dict[str, Cost] = {}
    for stage in planned["stages"]:
        key = _ledger_key(stage["name"])
        expected[key] = expected.get(key, Cost()) + Cost(**stage["cost"])
    spent = ledger.to_json()
    taken = {
        key: Cost(spent[key]["seconds"], spent[key]["cpu_seconds"])
        for key in expected
        if spent.get(key, {}).get("cpu_seconds")
    }
    peak_bytes = (ledger.this_invocation.peak_bytes or 0) if ledger.this_invocation else 0
    rows = [_side_by_side(key, expected[key], cost) for key, cost in taken.items()]
    together = [sum((costs[key] for key in taken), Cost()) for costs in (expected, taken)]
    rows.append(_side_by_side("together", *together))
    header = ["stage", "planned", "taken", "ratio", "CPU-seconds planned", "taken", "ratio"]
    planned_bytes = int(planned["memory_bytes"])
    ratio = f"{planned_bytes / max(peak_bytes, 1):.2f}"
    memory = f"Memory: planned {_size(planned_bytes)}, taken {_size(peak_bytes)}, ratio {ratio}"
    return f"{markdown_table(header, rows)}\n{memory}\n"


def _side_by_side(name: str, planned: Cost, taken: Cost) -> list[str]:
    pairs = [(planned.seconds, taken.seconds), (planned.cpu_seconds, taken.cpu_seconds)]
    return [name] + [
        text
        for left, right in pairs
        for text in (f"{left:,.0f} s", f"{right:,.0f} s", f"{left / max(right, 1e-9):.2f}")
    ]


def _ledger_key(name: str) -> str:
    if name.startswith("train "):
        return "train"
    if ": " in name:
        return "other_searches"
    return {"re-score": "rescore", "sealed test": "sealed"}.get(name, name)


def peak_memory() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak * (1 if sys.platform == "darwin" else 1024))


def _clock(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.1f} MB"
