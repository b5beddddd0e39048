"""The record of what a study or a run took, by stage, in recipe.yaml and ledger.json."""

from pathlib import Path
from typing import Any, Literal

from pydantic import AliasChoices, Field

from optimer_hf.files.model import FileModel, parse
from optimer_hf.files.reading import read_yaml
from optimer_hf.files.staging import write_text
from optimer_hf.files.text import count, show_seconds


class TrialCost(FileModel):
    """What some trials took."""

    n: int = Field(default=0, examples=[30], json_schema_extra={"unit": "trials"})
    """Number of trials."""
    items: int = Field(default=0, examples=[3840], json_schema_extra={"unit": "items"})
    """Items scored; scores that were taken over cost nothing and do not count."""
    tokens: int = Field(default=0, examples=[120_000], json_schema_extra={"unit": "tokens"})
    """Tokens that the model read and wrote."""
    seconds: float = Field(default=0.0, examples=[123.1], json_schema_extra={"unit": "seconds"})
    """Seconds of asking, merging and evaluating."""
    cpu_seconds: float = Field(default=0.0, examples=[230.4], json_schema_extra={"unit": "seconds"})
    """Seconds of processors, asking aside."""
    ask: float = Field(default=0.0, examples=[0.47], json_schema_extra={"unit": "seconds"})
    """Seconds of choosing weights."""
    merge: float = Field(default=0.0, examples=[3.27], json_schema_extra={"unit": "seconds"})
    """Seconds of merging."""
    forward: float = Field(default=0.0, examples=[119.1], json_schema_extra={"unit": "seconds"})
    """Seconds of the model's forward passes."""
    backward: float = Field(
        default=0.0,
        examples=[140.2],
        json_schema_extra={"unit": "seconds"},
        exclude_if=lambda value: value == 0,
    )
    """Seconds of taking gradients, in trials that have them."""
    harness: float = Field(default=0.0, examples=[0.23], json_schema_extra={"unit": "seconds"})
    """Seconds of evaluation outside of the forward and backward passes."""
    overhead_share: float = Field(
        default=0.0, examples=[0.03], json_schema_extra={"unit": "share of the seconds"}
    )
    """Share of the seconds that is not the model's forward or backward pass."""


class TrainingCost(FileModel):
    """What some trainings took in total."""

    n: int | None = Field(default=None, examples=[4], json_schema_extra={"unit": "trainings"})
    """Number of trainings. Default: one for each vector."""
    seconds: float = Field(default=0.0, examples=[676.0], json_schema_extra={"unit": "seconds"})
    """Seconds of training."""
    cpu_seconds: float = Field(
        default=0.0, examples=[1_300.0], json_schema_extra={"unit": "seconds"}
    )
    """Seconds of processors."""
    tokens: int = Field(default=0, examples=[133_120], json_schema_extra={"unit": "tokens"})
    """Tokens trained on."""
    tokens_per_second: int = Field(
        default=0, examples=[197], json_schema_extra={"unit": "tokens a second"}
    )
    """Tokens trained on in a second."""
    mfu: float | None = Field(
        default=None,
        exclude_if=lambda value: value is None,
        examples=[0.41],
        json_schema_extra={"unit": "share of the peak"},
    )
    """Share of the peak of the GPU that the arithmetic of the models used, where it is known."""


class MixtureCost(FileModel):
    """What as many data mixtures as there were trials would have cost."""

    attempts: int = Field(examples=[30], json_schema_extra={"unit": "mixtures"})
    """Number of mixtures: as many as trials of the search."""
    seconds: float = Field(examples=[12_291.1], json_schema_extra={"unit": "seconds"})
    """Seconds of training and evaluating them."""
    ratio_search_only: float = Field(
        examples=[66.4], json_schema_extra={"unit": "times the search"}
    )
    """These seconds over those of the search."""
    ratio_end_to_end: float = Field(
        examples=[14.3], json_schema_extra={"unit": "times search and training"}
    )
    """These seconds over those of the search and of training the vectors."""


class StageCost(FileModel):
    """What one stage, or one call of `optimer run`, took."""

    seconds: float = Field(default=0.0, examples=[11.5], json_schema_extra={"unit": "seconds"})
    """Seconds by the clock."""
    peak_bytes: int | None = Field(
        default=None, examples=[2_000_000_000], json_schema_extra={"unit": "bytes"}
    )
    """Largest memory of the process in bytes."""


class Ledger(FileModel):
    """What a study or a run took, by stage."""

    train: TrainingCost | None = Field(
        default=None, examples=[{"n": 4, "seconds": 676.0, "tokens": 133120}]
    )
    """Training of the vectors."""
    search: TrialCost | None = Field(default=None, examples=[{"n": 30, "seconds": 123.1}])
    """Trials of the search."""
    rescore: TrialCost | None = Field(default=None, examples=[{"n": 30, "seconds": 123.1}])
    """Re-scoring of the best trials."""
    data_mixture: MixtureCost | None = Field(
        default=None,
        examples=[
            {
                "attempts": 30,
                "seconds": 12291.1,
                "ratio_search_only": 66.4,
                "ratio_end_to_end": 14.3,
            }
        ],
    )
    """What data mixtures would have cost instead."""
    mixtures: TrainingCost | None = Field(
        default=None, examples=[{"n": 4, "seconds": 676.0, "tokens": 133120}]
    )
    """Training of the data mixtures among the baselines."""
    other_searches: TrialCost | None = Field(
        default=None,
        validation_alias=AliasChoices("other_searches", "other searches"),
        examples=[{"n": 30, "seconds": 123.1}],
    )
    """Trials of the searches among the baselines."""
    sealed: TrialCost | None = Field(default=None, examples=[{"n": 30, "seconds": 123.1}])
    """Rows of the sealed test."""
    write: StageCost | None = Field(default=None, examples=[{"seconds": 11.5}])
    """Writing of the merged model."""
    this_invocation: StageCost | None = Field(default=None, examples=[{"seconds": 1116.0}])
    """The whole of the last call of `optimer run`."""

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Return the stages that the run had as JSON values, by name."""
        return self.model_dump(mode="json", exclude_none=True)


class LedgerFile(Ledger):
    """ledger.json of a run."""

    # no VersionedFile, whose method `write` has the name of a stage
    format_version: Literal[1] = 1


def write_ledger(ledger: Ledger, path: Path) -> None:
    """Write ledger.json at `path`, without the stages that a run did not have."""
    file = LedgerFile(**dict(ledger))
    write_text(path, file.model_dump_json(indent=2, exclude_none=True))


def read_ledger(path: Path) -> Ledger:
    """Return the ledger in a ledger.json. Raises ConfigError for a file that is not one."""
    file = dict(parse(LedgerFile, read_yaml(path), path))
    return Ledger(**{stage: cost for stage, cost in file.items() if stage != "format_version"})


# -- in words --------------------------------------------------------------------------------------

TITLES = {
    "train": "training the vectors",
    "search": "search",
    "rescore": "scoring the best again",
    "data_mixture": "as many data mixtures instead (estimate)",
    "mixtures": "training data mixtures",
    "other_searches": "other searches",
    "sealed": "sealed test",
    "write": "writing the model",
    "this_invocation": "this call of `optimer run`",
}


def describe_ledger(ledger: Ledger) -> list[list[str]]:
    """Return a row for every stage that took something: its name, its time, and what was done."""
    return [
        [TITLES[stage], show_seconds(cost.seconds), _describe_cost(cost)]
        for stage, cost in ledger
        if cost is not None
    ]


def _describe_cost(cost: FileModel) -> str:
    """Return what one stage did, in words."""
    match cost:
        case TrialCost():
            return _describe_trials(cost)
        case TrainingCost():
            trainings = "" if cost.n is None else f"{count(cost.n, 'training')}, "
            mfu = "" if cost.mfu is None else f", {100 * cost.mfu:.0f} % MFU"
            speed = f"{cost.tokens_per_second:,} tokens a second"
            return f"{trainings}{count(cost.tokens, 'token')}, {speed}{mfu}"
        case MixtureCost():
            ends = f"{cost.ratio_search_only:,g} times the search"
            return f"{ends}, {cost.ratio_end_to_end:,g} times search and training together"
        case StageCost(peak_bytes=int(n_bytes)):
            return f"at most {n_bytes / 1e9:.2f} GB of memory"
    return ""


def _describe_trials(cost: TrialCost) -> str:
    """Return what some trials did, with the shares of their time from one percent on."""
    done = f"{count(cost.n, 'merge')}, {count(cost.items, 'item')}, {count(cost.tokens, 'token')}"
    if not cost.items:
        return f"{count(cost.n, 'merge')}, whose scores were known"
    phases = {
        "in the model": cost.forward,
        "in its gradients": cost.backward,
        "in the rest of the scoring": cost.harness,
        "merging": cost.merge,
        "choosing weights": cost.ask,
    }
    total = sum(phases.values()) or 1  # `seconds` is rounded to tenths, which few trials may take
    shares = [(phase, 100 * spent / total) for phase, spent in phases.items()]
    shown = [f"{share:.0f} % {phase}" for phase, share in shares if share >= 0.5]
    return f"{done}: {', '.join(shown)}" if shown else done
