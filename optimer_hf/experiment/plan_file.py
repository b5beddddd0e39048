"""plan.json: what a run is expected to take, by stage, and how that compares with what it took."""

from typing import Any, Literal

from pydantic import Field, computed_field, model_validator

from optimer_hf.comparison.ledger import Ledger
from optimer_hf.files.model import FileModel, VersionedFile
from optimer_hf.files.text import markdown_table
from optimer_hf.progress import Cost

StageKind = Literal["train", "search", "rescore", "mixtures", "other_searches", "sealed"]


class Stage(FileModel):
    """One stage of a run: its work, and the time it is expected to take.

    `kind` is the field of the ledger that records what such stages took.
    """

    kind: StageKind
    name: str
    work: str
    cost: Cost

    @model_validator(mode="before")
    @classmethod
    def _add_kind(cls, data: Any) -> Any:
        """Derive the kind from the name, for plans that version 0.1.0 wrote without kinds."""
        if isinstance(data, dict) and "kind" not in data and isinstance(data.get("name"), str):
            return {"kind": _kind_of_name(data["name"]), **data}
        return data


def _kind_of_name(name: str) -> str:
    """Return the kind of a stage that version 0.1.0 called `name`."""
    if name.endswith((": search", ": re-score")):
        return "other_searches"
    if name.startswith("train "):
        return "train"
    return {"re-score": "rescore", "sealed test": "sealed"}.get(name, name)


class Download(FileModel):
    """A base model or vector that has to be fetched; its size in bytes is null if unknown."""

    reference: str
    n_bytes: int | None
    licence: str | None
    gated: bool


class Plan(VersionedFile):
    """plan.json: what a run will take.

    The memory is that of one process, in bytes: on the host, and on the accelerator (0 without
    one). The bytes on disk are those of the results. `inputs_sha256` is the digest of the inputs of
    the run (None: of a study, or of a version that did not record it).
    """

    stages: tuple[Stage, ...]
    memory_bytes: int
    device_bytes: int
    disk_bytes: int
    downloads: tuple[Download, ...] = ()
    warnings: tuple[str, ...] = ()
    inputs_sha256: str | None = Field(default=None, exclude_if=lambda digest: digest is None)

    @model_validator(mode="before")
    @classmethod
    def _drop_total(cls, data: Any) -> Any:
        """Drop the cost of all stages, which a file has and `cost` computes."""
        return {k: v for k, v in data.items() if k != "cost"} if isinstance(data, dict) else data

    @computed_field  # type: ignore[prop-decorator]
    @property
    def cost(self) -> Cost:
        """Time that all stages take together."""
        return sum((stage.cost for stage in self.stages), Cost())


# -- in words --------------------------------------------------------------------------------------


def to_markdown(plan: Plan, n_runs: int = 1) -> str:
    """Return a plan as a table and a few lines, for `n_runs` such runs one after the other."""
    rows = [[stage.name, stage.work, _show_time(stage.cost.seconds)] for stage in plan.stages]
    rows.append(["together", "", _show_time(plan.cost.seconds)])
    lines = [markdown_table(["stage", "work", "time"], rows)]
    device = f", {show_bytes(plan.device_bytes)} on the accelerator" if plan.device_bytes else ""
    lines.append(f"memory: {show_bytes(plan.memory_bytes)}{device}")
    lines.append(f"disk: {show_bytes(plan.disk_bytes)}")
    if n_runs > 1:
        seconds, n_bytes = n_runs * plan.cost.seconds, n_runs * plan.disk_bytes
        lines.append(f"all {n_runs} seeds: {_show_time(seconds)}, disk {show_bytes(n_bytes)}")
    lines += [describe_download(each) for each in plan.downloads]
    lines += [f"warning: {warning}" for warning in plan.warnings]
    return "\n".join(lines)


def describe_download(each: Download) -> str:
    """Return a download in words."""
    size = show_bytes(each.n_bytes) if each.n_bytes is not None else "size unknown"
    return f"to fetch: {each.reference} ({size}, licence {each.licence or '?'})"


def compare_with_ledger(plan: Plan, ledger: Ledger) -> str:
    """Return, as Markdown, the planned time of every stage beside the time it took."""
    planned: dict[str, Cost] = {}
    for stage in plan.stages:
        planned[stage.kind] = planned.get(stage.kind, Cost()) + stage.cost
    entries = dict(ledger)
    taken = {
        kind: Cost(entry.seconds, entry.cpu_seconds)
        for kind in planned
        if (entry := entries[kind]) is not None and entry.cpu_seconds
    }
    rows = [_compare_costs(kind, planned[kind], cost) for kind, cost in taken.items()]
    together = [sum((costs[kind] for kind in taken), Cost()) for costs in (planned, taken)]
    rows.append(_compare_costs("together", *together))
    header = ["stage", "planned", "taken", "ratio", "CPU-seconds planned", "taken", "ratio"]
    peak_bytes = (ledger.this_invocation.peak_bytes or 0) if ledger.this_invocation else 0
    memory = (
        f"Memory: planned {show_bytes(plan.memory_bytes)}, taken {show_bytes(peak_bytes)}, ratio "
        f"{plan.memory_bytes / max(peak_bytes, 1):.2f}"
    )
    return f"{markdown_table(header, rows)}\n{memory}\n"


def _compare_costs(name: str, planned: Cost, taken: Cost) -> list[str]:
    pairs = [(planned.seconds, taken.seconds), (planned.cpu_seconds, taken.cpu_seconds)]
    return [name] + [
        text
        for left, right in pairs
        for text in (f"{left:,.0f} s", f"{right:,.0f} s", f"{left / max(right, 1e-9):.2f}")
    ]


def _show_time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def show_bytes(n_bytes: int) -> str:
    """Return a number of bytes as text, in GB or MB."""
    if n_bytes >= 1e8:
        return f"{n_bytes / 1e9:.2f} GB"
    return f"{n_bytes / 1e6:.1f} MB" if n_bytes >= 1e5 else "under 0.1 MB"
