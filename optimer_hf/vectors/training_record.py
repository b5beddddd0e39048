"""training.json: what a training run read, did and took. It is written last, so it makes the
directory of a vector complete. A vector.json repeats its corpus and its run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field

from optimer_hf.files.model import FileModel, VersionedFile

TRAINING_FILE = "training.json"


def _is_none(value: object) -> bool:
    return value is None


@dataclass(frozen=True)
class Part:
    """What was packed of one corpus: tokens, documents, and how many documents were read again
    because the corpus was too small for its share.
    """

    name: str
    n_tokens: int
    n_documents: int
    n_repeats: int = 0


class CorpusRecord(FileModel):
    """The text that a run was trained on. `sha256` is the digest of the packed blocks; `parts` has
    the corpora of a mixture.
    """

    name: str
    n_tokens: int
    n_documents: int
    sha256: str
    parts: list[Part] | None = Field(default=None, exclude_if=_is_none)

    @property
    def names(self) -> list[str]:
        """The name of the corpus, or those of the corpora of a mixture."""
        return [part.name for part in self.parts] if self.parts else [self.name]


class ReplayRecord(FileModel):
    """The text that was mixed into a run: its name, and its share of the tokens."""

    name: str
    share: float


Head = Literal["stock", "blocked", "liger"]


class Speed(FileModel):
    """How a run computed its steps, and how fast. A resumed run repeats the choices, so its numbers
    are those of a run without an interruption.

    `head` is the loss that was used, and `head_ms` has the milliseconds that each candidate took
    for the loss of a batch and its gradients, if they were measured; `compiled_head_ms` is that of
    the blocked loss when compiled, and `compiled_head` whether it was, apart from the layers.
    `batch_size` is in blocks on each device, if it was found. `cuda_graph` (steps were captured)
    and `compiled` are None while that is not decided; `seconds_before` is the time of a batch
    before its layers were compiled. `mfu` is the share of the peak of the device (`device`) that
    the arithmetic of the model used, after PaLM; it is None for a device whose peak is not known.
    """

    model_config = ConfigDict(frozen=False)  # a run fills it in

    head: Head | None = None
    head_ms: dict[Head, float] = {}
    compiled_head: bool = False
    compiled_head_ms: float | None = None
    batch_size: int | None = None
    cuda_graph: bool | None = None
    compiled: bool | None = None
    seconds_before: float | None = None
    device: str | None = None
    tokens_per_second: int | None = None
    mfu: float | None = None


class RunRecord(FileModel):
    """The settings of a run, as its train file has them, and what came of them.

    There is a loss for each time that the Trainer logs, and the norm of the vector (`norms`) after
    some steps (`norm_steps`). `n_tokens` counts the tokens of all steps; `seconds` and
    `cpu_seconds` include every interrupted attempt.
    """

    # a run that diverged records losses that are not finite
    model_config = ConfigDict(allow_inf_nan=True, ser_json_inf_nan="constants")

    block_size: int
    max_tokens: int | None
    lora: dict[str, Any] | None
    trainer: dict[str, Any]
    seed: int
    replay: ReplayRecord | None = Field(default=None, exclude_if=_is_none)
    mixed_precision: str
    n_steps: int
    n_tokens: int
    losses: list[float]
    norms: list[float] | None = Field(default=None, exclude_if=_is_none)
    norm_steps: list[int] | None = Field(default=None, exclude_if=_is_none)
    seconds: float
    cpu_seconds: float = 0.0
    speed: Speed | None = Field(default=None, exclude_if=_is_none)


class PartialCorpus(FileModel):
    """The corpus in a vector.json of another program, which may lack any field or have more."""

    model_config = ConfigDict(extra="allow")

    name: str | None = None
    n_tokens: int | None = None
    sha256: str | None = None

    @property
    def names(self) -> list[str]:
        """The name of the corpus, if it has one."""
        return [self.name] if self.name is not None else []


class PartialRun(FileModel):
    """The run in a vector.json of another program, which may lack any field or have more."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=True, ser_json_inf_nan="constants")

    n_steps: int | None = None
    n_tokens: int | None = None
    losses: list[float] | None = None
    norms: list[float] | None = None
    norm_steps: list[int] | None = None
    seconds: float | None = None


class TrainingRecord(VersionedFile):
    """training.json. `config_sha256` is the digest of everything that decides the result; `inputs`
    has the digests of the local base and texts, by field of the train file.
    """

    config_sha256: str
    name: str
    base_model: str
    corpus: CorpusRecord
    training: RunRecord
    versions: dict[str, str]
    inputs: dict[str, str] = {}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the run, and what came of them."""
        return self.training.model_dump(mode="json")


def read_training(directory: Path) -> TrainingRecord | None:
    """Return the training.json of a directory, or None when there is none.

    Raises ConfigError for one that is damaged.
    """
    file = directory / TRAINING_FILE
    return TrainingRecord.read(file) if file.exists() else None
