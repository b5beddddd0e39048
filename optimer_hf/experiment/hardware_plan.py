"""What a run would take on accelerators that are not here: the record of such a plan, in words."""

from optimer_hf.experiment.plan_file import Download, describe_download, show_bytes
from optimer_hf.files.model import FileModel
from optimer_hf.files.text import markdown_table


class HardwareStage(FileModel):
    """One stage: its work, the hours that one device would take for it and that all take, what it
    takes of the memory of each, in bytes, and how the model is placed on them.
    """

    name: str
    work: str
    device_hours: float
    hours: float
    memory_bytes: int
    placement: str


class HardwarePlan(FileModel):
    """What a search or a run takes on `n_devices` devices of one kind.

    Bytes on disk are those of the base, of the vectors and other results, and of the checkpoints of
    the largest training while it runs. `host_bytes` is what a trial keeps in the memory of its
    machine.
    """

    device: str
    n_devices: int
    base_model: str
    n_parameters: int
    stages: tuple[HardwareStage, ...]
    base_bytes: int
    result_bytes: int
    checkpoint_bytes: int
    host_bytes: int
    downloads: tuple[Download, ...] = ()
    assumptions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def hardware_to_markdown(plan: HardwarePlan) -> str:
    """Return a plan as a table and a few lines."""
    header = [
        "stage",
        "work",
        "GPU-hours",
        f"hours on {plan.n_devices}",
        "memory per GPU",
        "placement",
    ]
    rows = [
        [
            stage.name,
            stage.work,
            _show_hours(stage.device_hours),
            _show_hours(stage.hours),
            show_bytes(stage.memory_bytes),
            stage.placement,
        ]
        for stage in plan.stages
    ]
    totals = sum(s.device_hours for s in plan.stages), sum(s.hours for s in plan.stages)
    rows.append(["together", "", *map(_show_hours, totals), "", ""])
    billions = f"{plan.n_parameters / 1e9:.3g} billion parameters"
    lines = [
        f"{plan.base_model} ({billions}) on {plan.n_devices} x {plan.device}\n",
        markdown_table(header, rows),
        f"disk: base {show_bytes(plan.base_bytes)}, results {show_bytes(plan.result_bytes)}, "
        f"checkpoints while a training runs {show_bytes(plan.checkpoint_bytes)}",
    ]
    if plan.host_bytes:
        lines.append(f"host memory: {show_bytes(plan.host_bytes)} for each trial that runs")
    lines += [describe_download(each) for each in plan.downloads]
    lines += [f"assumed: {each}" for each in plan.assumptions]
    lines += [f"warning: {each}" for each in plan.warnings]
    return "\n".join(lines)


def _show_hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 10 else f"{hours:.2g}"
