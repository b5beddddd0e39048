"""Checkpoint, adapter or delta -> DistributionVector: what one dataset did to the base model.

A vector is read lazily, a few rows of one tensor at a time, whatever its kind: a whole checkpoint
(its delta is taken on the fly), a LoRA adapter (kept as factors; a row block of B times A is made
when it is asked for), or a delta directory. A directory of ours is complete when `vector.json`,
written last, is there.
"""

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from optimer_hf.convert import ResolvedModel, moves_base, resolve_model
from optimer_hf.errors import ModelError, OutputError
from optimer_hf.files import FileModel, VersionedFile, sha256_file, staged_directory

logger = logging.getLogger(__name__)

CHUNK_ELEMENTS = (
    2**20
)  # of one row block: 4 MiB in float32, so that a sum stays in the cache of a CPU
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SAFETENSORS_DTYPES = {
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}
COPIED_BESIDE_WEIGHTS = [
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*processor_config.json",
    "LICENSE*",
    "NOTICE*",
]


# -- checkpoints on disk ---------------------------------------------------------------------------


class Checkpoint:
    """The tensors of a safetensors directory, single-file or sharded, read lazily."""

    def __init__(self, path: Path, pattern: str = "*.safetensors") -> None:
        """Open every weights file of `path`; raise ModelError for missing, damaged or pickled
        weights.
        """
        self.path = path
        files = sorted(path.glob(pattern))
        if not files:
            pickles = [*path.glob("*.bin"), *path.glob("*.pt")]
            hint = (
                " It holds pickled weights; convert them to safetensors first." if pickles else ""
            )
            raise ModelError(f"{path}: no safetensors weights in this directory.{hint}")
        self._handles: dict[str, Any] = {}
        for file in files:
            try:
                handle = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{file}: not a readable safetensors file ({error}). Fetch it again."
                ) from error
            for name in handle.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118  # not a mapping
                if name in self._handles:
                    raise ModelError(
                        f"{file}: tensor {name!r} is in two weights files. Remove the stale file."
                    )
                self._handles[name] = handle
        self._refuse_lost_shards(pattern)

    def _refuse_lost_shards(self, pattern: str) -> None:
        """A lost shard would look like tensors that no one moved: compare with the index, where
        there is one.
        """
        for index in self.path.glob(f"{pattern}.index.json"):
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            lost = sorted({file for name, file in weight_map.items() if name not in self._handles})
            if lost:
                raise ModelError(
                    f"{self.path / lost[0]}: missing, or without tensors of {index.name}. Fetch it "
                    "again."
                )

    @property
    def names(self) -> list[str]:
        """Tensor names, sorted."""
        return sorted(self._handles)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header."""
        return tuple(self._handles[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """dtype of a tensor, from the header."""
        found = self._handles[name].get_slice(name).get_dtype()
        for dtype, label in SAFETENSORS_DTYPES.items():
            if label == found:
                return dtype
        raise ModelError(f"{self.path}: tensor {name!r} has dtype {found}, which cannot be merged.")

    def read(self, name: str, rows: slice = slice(None)) -> torch.Tensor:
        """Return rows of a tensor (all of a 0-d one) in the dtype of the file."""
        if not self.shape(name):
            return self._handles[name].get_tensor(name)  # type: ignore[no-any-return]
        return self._handles[name].get_slice(name)[rows]  # type: ignore[no-any-return]


def row_blocks(shape: tuple[int, ...]) -> list[slice]:
    """Split a tensor of this shape along its first axis into blocks of at most CHUNK_ELEMENTS
    elements (>= 1 row).
    """
    if not shape:
        return [slice(None)]
    n_rows = max(1, CHUNK_ELEMENTS // max(1, math.prod(shape[1:])))
    return [slice(start, min(start + n_rows, shape[0])) for start in range(0, shape[0], n_rows)]


def weight_files(path: Path) -> dict[str, str]:
    """Return file name -> sha256 of the weights in a directory: the identity of a model."""
    record = path / "conversion.json"
    if record.exists():
        return dict(json.loads(record.read_text(encoding="utf-8"))["sha256"])
    return {file.name: sha256_file(file) for file in sorted(path.glob("*.safetensors"))}


def write_safetensors(
    out: Path,
    specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    blocks: Iterable[torch.Tensor],
) -> None:
    """Write one safetensors file from row blocks that come in the order of `specs`, holding one
    block at a time.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in specs.items():
        n_bytes = math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, offset + n_bytes],
        }
        offset += n_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(out, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        written = sum(file.write(_raw_bytes(block)) for block in blocks)
    if written != offset:
        raise OutputError(f"{out}: wrote {written:,} of {offset:,} bytes. The disk may be full.")


def _raw_bytes(block: torch.Tensor) -> Any:
    return block.contiguous().view(-1).view(torch.uint8).numpy().data


def write_sharded(
    out_dir: Path,
    prefix: str,
    specs: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    blocks_of: Callable[[str], Iterable[torch.Tensor]],
    max_shard_size: int,
) -> None:
    """Write tensors as `prefix.safetensors`, or as shards of at most `max_shard_size` bytes with an
    index.
    """
    shards: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    size = total = 0
    for name, (dtype, shape) in specs.items():
        n_bytes = math.prod(shape) * dtype.itemsize
        if shards[-1] and size + n_bytes > max_shard_size:
            shards.append({})
            size = 0
        shards[-1][name] = (dtype, shape)
        size += n_bytes
        total += n_bytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        suffix = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
        file = f"{prefix}{suffix}.safetensors"
        write_safetensors(
            out_dir / file, shard, (block for name in shard for block in blocks_of(name))
        )
        weight_map.update(dict.fromkeys(shard, file))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out_dir / f"{prefix}.safetensors.index.json").write_text(
            json.dumps(index, indent=2), encoding="utf-8"
        )


def copy_beside_weights(source: Path, out: Path) -> None:
    """Copy config, tokenizer, chat template and licence files of a model."""
    for pattern in COPIED_BESIDE_WEIGHTS:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, out / path.name)


# -- vector.json -----------------------------------------------------------------------------------


class BaseRecord(FileModel):
    """The base model a vector was trained from."""

    reference: str
    commit: str | None = None
    files: dict[str, str]


class VectorFile(VersionedFile):
    """vector.json: what the vector is, where it comes from, how large it is."""

    name: str
    kind: Literal["adapter", "delta", "checkpoint"]
    base: BaseRecord
    source_files: dict[str, str] | None = None  # sha256 of the weights a delta was taken from
    dtype: str | None = None
    norm: float
    relative_norm: float
    corpus: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    versions: dict[str, str] = {}


# -- the three kinds -------------------------------------------------------------------------------


class DistributionVector(Protocol):
    """What merging needs of a vector: its name, the tensors it moves, and rows of its delta in
    float32.
    """

    name: str
    kind: str

    @property
    def path(self) -> Path:
        """The directory that holds its weights."""
        ...

    @property
    def names(self) -> frozenset[str]:
        """Tensors with a delta; all others are zero."""
        ...

    def delta(self, name: str, rows: slice) -> "torch.Tensor | LowRank":
        """Return rows of the delta of a tensor, float32 on the CPU, dense or as the product it is
        stored as.
        """
        ...


@dataclass
class CheckpointVector:
    """A whole tuned model; its delta, tuned minus base, is taken in float32 when it is read."""

    name: str
    tuned: Checkpoint
    base: Checkpoint
    kind: str = "checkpoint"

    @property
    def path(self) -> Path:
        return self.tuned.path

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.base.names) & frozenset(self.tuned.names)

    def delta(self, name: str, rows: slice) -> torch.Tensor:
        return self.tuned.read(name, rows).float() - self.base.read(name, rows).float()


@dataclass
class DeltaVector:
    """Stored deltas, bf16, fp16 or fp32."""

    name: str
    stored: Checkpoint
    kind: str = "delta"

    @property
    def path(self) -> Path:
        return self.stored.path

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.stored.names)

    def delta(self, name: str, rows: slice) -> torch.Tensor:
        return self.stored.read(name, rows).float()


@dataclass(frozen=True)
class LowRank:
    """Rows of a delta as a product: scale * (b @ a), with b [rows, r] and a [r, columns] in
    float32.
    """

    b: torch.Tensor
    a: torch.Tensor
    scale: float

    def dense(self) -> torch.Tensor:
        """Return the rows as one float32 tensor."""
        return (self.b @ self.a) * self.scale

    def to(self, device: torch.device) -> "LowRank":
        """Return the factors on a device."""
        return LowRank(self.b.to(device), self.a.to(device), self.scale)


@dataclass
class AdapterVector:
    """A LoRA adapter, kept as float32 factors in memory."""

    name: str
    path: Path
    factors: dict[str, LowRank] = field(repr=False)
    kind: str = "adapter"

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.factors)

    def delta(self, name: str, rows: slice) -> LowRank:
        whole = self.factors[name]
        return LowRank(whole.b[rows], whole.a, whole.scale)


# -- opening ---------------------------------------------------------------------------------------


def open_vector(name: str, source: str, base: ResolvedModel) -> DistributionVector:
    """Open the vector that `source` (directory or Hub id) holds; its kind is recognised from its
    files.

    Raises ModelError when it was trained from another base, or when its tensors do not fit the
    base.
    """
    resolved = resolve_model(source)
    checkpoint = Checkpoint(base.path)
    record = read_record(resolved.path)
    if record is not None and record.base.files != weight_files(base.path):
        raise ModelError(
            f"vector {name!r} ({source}) was trained from {record.base.reference}, whose weights "
            "differ from those of "
            f"base_model {base.reference}. Retrain it from this base, or drop it."
        )
    vector: DistributionVector
    if (resolved.path / "adapter_config.json").exists():
        if record is None:
            _check_declared_base(name, resolved.path, base)
        vector = AdapterVector(name, resolved.path, _read_factors(resolved.path, checkpoint, name))
    elif record is not None and record.kind == "delta":
        vector = DeltaVector(name, Checkpoint(resolved.path))
    else:
        vector = CheckpointVector(name, Checkpoint(resolved.path), checkpoint)
        _check_same_tensors(name, vector.tuned, checkpoint)
    _check_shapes(vector, checkpoint)
    return vector


def read_record(path: Path) -> VectorFile | None:
    """Return the vector.json of a directory, or None when there is none."""
    file = path / "vector.json"
    if not file.exists():
        return None
    try:
        return VectorFile.model_validate_json(file.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise ModelError(
            f"{file}: not a vector.json of format version 1 ({error.errors()[0]['msg']})."
        ) from None


def _check_declared_base(name: str, path: Path, base: ResolvedModel) -> None:
    """Refuse an adapter that names another Hub model as its base; a local path tells nothing."""
    config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    declared = str(config.get("base_model_name_or_path") or "")
    both_on_hub = declared.count("/") == base.reference.count("/") == 1 and base.commit is not None
    if both_on_hub and declared != base.reference:
        raise ModelError(
            f"vector {name!r} ({path}) was trained from {declared}, but base_model is "
            f"{base.reference}. Retrain it from this base, or drop it."
        )


def _check_same_tensors(name: str, tuned: Checkpoint, base: Checkpoint) -> None:
    """A checkpoint must have the tensors of the base; a tied head may be on one side only."""
    optional = {"lm_head.weight"}
    missing = sorted(set(base.names) - set(tuned.names) - optional)
    extra = sorted(set(tuned.names) - set(base.names) - optional)
    if missing or extra:
        raise ModelError(
            f"vector {name!r} ({tuned.path}): is not a fine-tune of the base: {len(missing)} "
            "tensors are missing "
            f"(first: {missing[:1]}), {len(extra)} are unknown (first: {extra[:1]}). Use a model "
            "of the same architecture."
        )


def _check_shapes(vector: DistributionVector, base: Checkpoint) -> None:
    known = set(base.names)
    for name in sorted(vector.names):
        if name not in known:
            raise ModelError(
                f"vector {vector.name!r}: tensor {name!r} is not in the base {base.path}."
            )
        found = _shape_of(vector, name, base)
        if found == base.shape(name):
            continue
        hint = "Give a vector trained from this base."
        if "embed" in name or "lm_head" in name:
            hint = (
                "The vocabularies differ: the fine-tune added or removed tokens. Align them with "
                "mergekit's "
                "`tokenizer:` through `optimer merge` first."
            )
        raise ModelError(
            f"vector {vector.name!r}: tensor {name!r} has shape {list(found)}, the base has "
            f"{list(base.shape(name))}. {hint}"
        )


def _shape_of(vector: DistributionVector, name: str, base: Checkpoint) -> tuple[int, ...]:
    if isinstance(vector, CheckpointVector):
        return vector.tuned.shape(name)
    if isinstance(vector, DeltaVector):
        return vector.stored.shape(name)
    assert isinstance(vector, AdapterVector)
    factors = vector.factors[name]
    return factors.b.shape[0], factors.a.shape[1]


def _read_factors(path: Path, base: Checkpoint, name: str) -> dict[str, LowRank]:
    """Read a PEFT LoRA adapter as factors by base tensor name; refuse what is not B @ A."""
    from peft import LoraConfig, PeftConfig
    from peft.utils.other import get_pattern_key

    config = PeftConfig.from_pretrained(str(path))
    if not isinstance(config, LoraConfig):
        raise ModelError(
            f"vector {name!r} ({path}): a {config.peft_type} adapter; only LoRA is linear in its "
            "delta."
        )
    for option, reason in (
        (
            config.use_dora,
            "DoRA rescales the merged weight, so its delta depends on the other vectors",
        ),
        (config.modules_to_save, "modules_to_save replaces whole modules"),
        (config.bias != "none", "trained biases are not part of B @ A"),
        (
            moves_base(config.init_lora_weights),
            f"init_lora_weights {config.init_lora_weights!r} rewrites the base weights",
        ),
    ):
        if option:
            raise ModelError(
                f"vector {name!r} ({path}): {reason}. Merge it into its base and give the "
                "checkpoint."
            )
    stored = Checkpoint(path, "adapter_model*.safetensors")
    factors: dict[str, LowRank] = {}
    for key in stored.names:
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        if not key.endswith((".lora_A.weight", ".lora_B.weight")):
            raise ModelError(
                f"vector {name!r} ({path}): tensor {key!r} is not a LoRA factor of a linear layer."
            )
        partner = (
            key.replace(".lora_B.", ".lora_A.")
            if ".lora_B." in key
            else key.replace(".lora_A.", ".lora_B.")
        )
        if partner not in stored.names:
            raise ModelError(
                f"vector {name!r} ({path}): tensor {partner!r} is missing. Fetch the adapter again."
            )
        if key.endswith(".lora_B.weight"):
            continue
        a = stored.read(key).float()
        b = stored.read(key.replace(".lora_A.", ".lora_B.")).float()
        rank_key = get_pattern_key(list(config.rank_pattern), module)
        alpha_key = get_pattern_key(list(config.alpha_pattern), module)
        rank = config.rank_pattern.get(rank_key, config.r)
        alpha = config.alpha_pattern.get(alpha_key, config.lora_alpha)
        scale = alpha / math.sqrt(rank) if config.use_rslora else alpha / rank
        if config.fan_in_fan_out:  # the layer stores its weight input-first: (b @ a).T
            a, b = b.T.contiguous(), a.T.contiguous()
        factors[f"{module}.weight"] = LowRank(b, a, scale)
    return factors


# -- size and storage ------------------------------------------------------------------------------


def dense(delta: torch.Tensor | LowRank) -> torch.Tensor:
    """Return rows of a delta as a tensor, however they are stored."""
    return delta.dense() if isinstance(delta, LowRank) else delta


def norms(vector: DistributionVector, base: Checkpoint) -> tuple[float, float]:
    """Return the Frobenius norm of the delta, and that norm over the norm of the base tensors it
    moves.
    """
    squares = base_squares = 0.0
    for name in sorted(vector.names):
        for rows in row_blocks(base.shape(name)):
            squares += dense(vector.delta(name, rows)).double().square().sum().item()
            base_squares += base.read(name, rows).double().square().sum().item()
    if not math.isfinite(squares):
        raise ModelError(
            f"vector {vector.name!r}: its delta holds NaN or infinite values. Retrain it."
        )
    relative = math.sqrt(squares / max(base_squares, 1e-30))
    if relative > 1:
        logger.warning(
            "vector %s: its delta is larger than the base (%.0f %%). Is that its base?",
            vector.name,
            100 * relative,
        )
    return math.sqrt(squares), relative


def describe(
    path: Path, base: ResolvedModel, *, name: str, kind: Literal["adapter", "checkpoint"]
) -> VectorFile:
    """Write vector.json beside a trained adapter or checkpoint, with what training.json says, and
    return it.
    """
    training_file = path / "training.json"
    training = (
        json.loads(training_file.read_text(encoding="utf-8")) if training_file.exists() else {}
    )
    (path / "vector.json").unlink(missing_ok=True)
    vector = open_vector(name, str(path.resolve()), base)
    norm, relative_norm = norms(vector, Checkpoint(base.path))
    record = VectorFile(
        name=name,
        kind=kind,
        base=BaseRecord(
            reference=base.reference, commit=base.commit, files=weight_files(base.path)
        ),
        norm=norm,
        relative_norm=relative_norm,
        corpus=training.get("corpus"),
        training=training.get("training"),
        versions=training.get("versions", {}),
    )
    record.write(path / "vector.json")
    return record


def extract(
    vector: DistributionVector,
    base: ResolvedModel,
    out: Path,
    *,
    dtype: str = "bfloat16",
    max_shard_size: int = 5 * 10**9,
) -> VectorFile:
    """Write a vector as a delta directory: a tensor for every one of the base, zeros where nothing
    moved.

    A delta keeps its own exponent, so bfloat16 costs 2^-9 of the delta; bfloat16 *checkpoints* cost
    half of it.
    """
    checkpoint = Checkpoint(base.path)
    moved = vector.names
    stored_dtype = DTYPES[dtype]
    specs = {name: (stored_dtype, checkpoint.shape(name)) for name in checkpoint.names}

    def blocks_of(name: str) -> Iterator[torch.Tensor]:
        shape = checkpoint.shape(name)
        for rows in row_blocks(shape):
            if name in moved:
                yield dense(vector.delta(name, rows)).to(stored_dtype)
            else:
                n_rows = () if not shape else (rows.stop - rows.start, *shape[1:])
                yield torch.zeros(n_rows, dtype=stored_dtype)

    norm, relative_norm = norms(vector, checkpoint)
    with staged_directory(out) as staging:
        write_sharded(staging, "model", specs, blocks_of, max_shard_size)
        copy_beside_weights(base.path, staging)
        record = VectorFile(
            name=vector.name,
            kind="delta",
            base=BaseRecord(
                reference=base.reference, commit=base.commit, files=weight_files(base.path)
            ),
            source_files=weight_files(vector.path),
            dtype=dtype,
            norm=norm,
            relative_norm=relative_norm,
            versions={package: version(package) for package in ("torch", "safetensors")},
        )
        record.write(staging / "vector.json")
    return record
