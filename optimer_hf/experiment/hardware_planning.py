"""Plan a study or a recipe folder for devices that are not here.

Configs and the config.json of the base come in, a plan goes out. The base is built without weights,
with the adapters of the trainings, and a few items of each task are counted. Nothing runs.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from optimer_hf.errors import ModelError
from optimer_hf.experiment.hardware import (
    CHECKPOINT,
    HOST_BANDWIDTH,
    MOST_TEXTS,
    RESERVED,
    Allocation,
    Hardware,
    TrialModel,
    item_seconds,
    merge_seconds,
    place_training,
    place_trial,
    read_settings,
    training_seconds,
)
from optimer_hf.experiment.hardware_plan import HardwarePlan, HardwareStage
from optimer_hf.experiment.plan_file import Download, Stage, show_bytes
from optimer_hf.experiment.planning import list_downloads
from optimer_hf.experiment.stages import (
    Probe,
    make_stages,
    term_key,
    training_key,
    warn_of_unknown_tokens,
)
from optimer_hf.files.reference import Reference, is_there
from optimer_hf.merging.tokenizer import open_tokenizer, scoring_tokenizer
from optimer_hf.models.layout import ResolvedModel, weight_states
from optimer_hf.models.loader import CONFIG, model_without_weights
from optimer_hf.models.resolve import resolve_tokenizer
from optimer_hf.models.sizes import measure_sizes
from optimer_hf.progress import Cost
from optimer_hf.scoring.objective import Term
from optimer_hf.scoring.work import ItemWork, count_work, key_of_items
from optimer_hf.study.config import StudyConfig
from optimer_hf.training.arguments import TRAINER_DEFAULTS
from optimer_hf.training.config import TrainConfig
from optimer_hf.training.trainer import add_lora

N_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}  # of a number


@dataclass(frozen=True)
class Training:
    """A kind of training on the hardware: where it runs, how long one device takes for a token, and
    the bytes of its vector and of its checkpoints.
    """

    allocation: Allocation
    seconds: float
    vector_bytes: int
    checkpoint_bytes: int


def plan_for_hardware(
    config: StudyConfig,
    trainings: Mapping[str, TrainConfig],
    hardware: Hardware,
    *,
    is_run: bool,
) -> HardwarePlan:
    """Return the plan of a search, or of a whole run with `is_run`.

    All files of a base on the Hub but its weights are fetched. Raises OptimerError for a base or a
    task that cannot be read.
    """
    base, empty = _open_base(config)
    sizes, stored = measure_sizes(empty), _bytes_per_number(empty)
    estimates = {
        name: _estimate_training(each, base, stored, hardware) for name, each in trainings.items()
    }
    downloads = list_downloads(config)
    base_bytes = _bytes_on_disk(base.path) or stored * sizes.total
    given = _list_source_bytes(config, trainings, downloads)
    trained = [each.vector_bytes for each in estimates.values()]
    known = [base_bytes if each is None else each for each in given.values()]
    vector_bytes = sum(trained) + sum(known)
    model_bytes = N_BYTES[config.dtype] * sizes.total
    model = TrialModel(sizes, model_bytes, stored * sizes.total + vector_bytes)
    works = _count_work(config, base, empty)
    trial = place_trial(model, list(works.values()), hardware)
    probe = _make_probe(config, model, works, trial, hardware)
    costs = {training_key(each): Cost(estimates[n].seconds) for n, each in trainings.items()}
    probe = replace(probe, token_costs=costs)
    stages = make_stages(config, trainings, probe, is_run)
    results = sum(trained)
    if is_run:
        results += model_bytes + max(trained, default=0) * config.baselines.n_trained_models
    return HardwarePlan(
        device=hardware.device.name,
        n_devices=hardware.n_devices,
        base_model=config.base_model,
        n_parameters=sizes.total,
        stages=tuple(_place_stage(stage, estimates, trial, hardware) for stage in stages),
        base_bytes=base_bytes,
        result_bytes=results,
        checkpoint_bytes=max((each.checkpoint_bytes for each in estimates.values()), default=0),
        host_bytes=trial.host_bytes,
        downloads=downloads,
        assumptions=tuple(_list_assumptions(hardware, trainings, works.values())),
        warnings=tuple(_list_warnings(trainings, estimates, trial, given)),
    )


# -- sizes -----------------------------------------------------------------------------------------


def _open_base(config: StudyConfig) -> tuple[ResolvedModel, Any]:
    """Return a base, whose weights need not be here, and its model without weights."""
    base = resolve_tokenizer(config.base_model)
    if not (base.path / CONFIG).exists():
        raise ModelError(f"{config.base_model}: not a model (it has no {CONFIG}).")
    return base, model_without_weights(base.path)


def _bytes_per_number(model: Any) -> int:
    """Return the bytes of a stored number, by the config of a model; two if it does not say."""
    dtype = model.config.get_text_config(decoder=True).dtype or model.config.dtype
    return 2 if dtype is None else int(dtype.itemsize)


def _bytes_on_disk(path: Path) -> int | None:
    """Return the bytes of the weights in a directory, or None if they are not here."""
    try:
        return sum(n_bytes for n_bytes, _ in weight_states(path).values())
    except (ModelError, OSError):
        return None


def _list_source_bytes(
    config: StudyConfig, trainings: Mapping[str, TrainConfig], downloads: Sequence[Download]
) -> dict[str, int | None]:
    """Return the bytes of each vector that is not trained here, None if they are not known."""
    on_hub = {each.reference: each.n_bytes for each in downloads}
    n_bytes = {}
    for name, vector in config.vectors.items():
        if name in trainings:
            continue
        source = str(vector.source)
        path = Reference(source).path
        is_here = path is not None and is_there(path)
        n_bytes[name] = _bytes_on_disk(path) if path and is_here else on_hub.get(source)
    return n_bytes


# -- time and place --------------------------------------------------------------------------------


def _estimate_training(
    config: TrainConfig, base: ResolvedModel, stored_bytes: int, hardware: Hardware
) -> Training:
    sizes = measure_sizes(add_lora(model_without_weights(base.path), config, base))
    settings = read_settings(config, stored_bytes)
    fields = {**TRAINER_DEFAULTS, **config.trainer}
    n_kept = int(fields.get("save_total_limit") or 1) + 1  # and the one that is being written
    return Training(
        allocation=place_training(config.name, sizes, settings, hardware),
        seconds=training_seconds(
            sizes, config.block_size, hardware, checkpointing=settings.checkpointing
        ),
        vector_bytes=4 * (sizes.total if config.lora is None else sizes.trained),
        checkpoint_bytes=n_kept * CHECKPOINT * sizes.trained,
    )


def _count_work(
    config: StudyConfig, base: ResolvedModel, model: Any
) -> dict[tuple[str, tuple[float, float]], ItemWork]:
    tokenizer = scoring_tokenizer(
        base,
        open_tokenizer(base, config.tokenizer_reference, config.vocabulary),
        apply_chat_template=config.objective.apply_chat_template,
    )
    return count_work(_objectives(config), model, tokenizer)


def _objectives(config: StudyConfig) -> list[Any]:
    return [config.objective] + ([config.test] if config.test is not None else [])


def _terms(config: StudyConfig) -> Iterator[Term]:
    for objective in _objectives(config):
        yield from (term for term in objective.scored_terms if term.function is None)


def _make_probe(
    config: StudyConfig,
    model: TrialModel,
    works: Mapping[tuple[str, tuple[float, float]], ItemWork],
    trial: Allocation,
    hardware: Hardware,
) -> Probe:
    """Return what the stages are made of, in seconds of one device."""
    by_term = {term_key(term): works[key_of_items(term)] for term in _terms(config)}
    return Probe(
        item_costs={
            key: Cost(item_seconds(model, work, trial, hardware)) for key, work in by_term.items()
        },
        n_items={key: work.n_items for key, work in by_term.items()},
        token_costs={},
        vector_bytes={},
        merge_cost=Cost(merge_seconds(model, trial, hardware)),
        n_devices=hardware.n_devices,
    )


def _place_stage(
    stage: Stage, estimates: Mapping[str, Training], trial: Allocation, hardware: Hardware
) -> HardwareStage:
    """Return a stage on the hardware; mixtures are trained like the slowest of the vectors."""
    hours, place = stage.cost.seconds / 3600, trial
    n_used = trial.n_together * (hardware.n_devices // trial.n_together)
    if stage.kind in ("train", "mixtures"):
        slowest = max(estimates.values(), key=lambda each: each.seconds)
        place = estimates.get(stage.name.removeprefix("train "), slowest).allocation
        n_used = hardware.n_devices
    return HardwareStage(
        name=stage.name,
        work=stage.work,
        device_hours=hours,
        hours=hours / n_used,
        memory_bytes=place.memory_bytes,
        placement=place.words,
    )


# -- in words --------------------------------------------------------------------------------------


def _list_assumptions(
    hardware: Hardware, trainings: Mapping[str, TrainConfig], works: Iterable[ItemWork]
) -> Iterator[str]:
    device, share = hardware.device, f"{100 * hardware.utilisation:g} %"
    yield (
        f"{share} of the peak of {device.flops / 1e12:,.0f} TFLOP/s (dense bfloat16) and of "
        f"{device.bandwidth / 1e12:.3g} TB/s (--mfu)"
    )
    yield f"{show_bytes(device.memory_bytes)} of memory, {show_bytes(RESERVED)} of it taken by CUDA"
    if trainings:
        yield "Adam in float32; activations are an estimate (within 25 %)"
    if any(read_settings(each, 2).checkpointing for each in trainings.values()):
        yield "layers that activation_checkpointing computes twice count twice"
    yield f"weights that do not fit beside the model come at {HOST_BANDWIDTH / 1e9:.0f} GB/s a GPU"
    if any(work.n_written for work in works):
        yield f"answers as long as their tasks allow, up to {MOST_TEXTS} at a time"
    yield "no time for loading, saving, choosing weights and waiting for other GPUs"


def _list_warnings(
    trainings: Mapping[str, TrainConfig],
    estimates: Mapping[str, Training],
    trial: Allocation,
    given: Mapping[str, int | None],
) -> Iterator[str]:
    yield from warn_of_unknown_tokens(trainings)
    placements = [*(each.allocation for each in estimates.values()), trial]
    yield from (each.warning for each in placements if each.warning is not None)
    for name, n_bytes in given.items():
        if n_bytes is None:
            yield f"vector {name!r}: its size is not known; as large as the base is assumed"
