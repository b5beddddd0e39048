"""Convert a GGUF file to safetensors, config and tokenizer, once, in the cache."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from optimer_hf.errors import ConfigError, ModelError
from optimer_hf.files.digest import sha256_file
from optimer_hf.files.paths import cache_dir
from optimer_hf.files.staging import staged_directory, write_once
from optimer_hf.models.gguf_config import FACTORS, fit_config
from optimer_hf.models.gguf_header import GgufHeader, read_header
from optimer_hf.models.gguf_loader import (
    decode_weights,
    gguf_model_without_weights,
    known_gguf_tensors,
    naming_unreadable_gguf,
    read_gguf_config,
    read_gguf_tokenizer,
)
from optimer_hf.models.gguf_record import CONVERSION_FILE, ConversionRecord

CONVERSION = 2  # version of the conversion; 1 dropped what transformers does not read


def convert_once(gguf: Path) -> Path:
    """Return the cached conversion of a GGUF file, converting it first if necessary.

    If several processes need the same file, one converts it and the others wait.
    """
    out = cache_dir() / "converted" / f"{gguf.stem}-{sha256_file(gguf)[:16]}-{CONVERSION}"
    write_once(out, CONVERSION_FILE, lambda: convert_gguf(gguf, out))
    return out


def convert_gguf(gguf: Path, out: Path, *, dtype: str = "bfloat16") -> None:
    """De-quantise a GGUF file into the directory `out`.

    It gets safetensors weights in `dtype`, config, tokenizer and conversion.json, and appears
    complete or not at all. Any architecture that transformers reads from GGUF works. Raises
    ConfigError if the file does not exist, and ModelError if it is not GGUF or transformers does
    not know its architecture.
    """
    import transformers

    if not gguf.is_file():
        found = "found a directory" if gguf.is_dir() else "no such file"
        raise ConfigError(f"{gguf}: {found}. Expected a GGUF file.")
    try:
        header = read_header(gguf)
    except ImportError as error:
        raise ModelError(f"{gguf}: reading GGUF needs a package: {error}") from error
    with staged_directory(out) as staging, _sharing_gguf_reader():
        model = decode_gguf(header, getattr(torch, dtype))
        with naming_unreadable_gguf(gguf):
            tokenizer = read_gguf_tokenizer(gguf)
        _forget_quantisation(model)
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        ConversionRecord(
            source=gguf.name,
            source_sha256=sha256_file(gguf),
            dtype=dtype,
            transformers=transformers.__version__,
            sha256={path.name: sha256_file(path) for path in sorted(staging.glob("*.safetensors"))},
        ).write(staging / CONVERSION_FILE)


def decode_gguf(header: GgufHeader, dtype: torch.dtype) -> Any:
    """Return the model in a GGUF file, de-quantised to `dtype`.

    Everything in the file is accounted for. Raises ModelError for a tensor or a key that changes
    the model's function but is never read.
    """
    with naming_unreadable_gguf(header.path):
        config = fit_config(read_gguf_config(header.path), header)
        _refuse_unread_tensors(gguf_model_without_weights(config), header)
        return decode_weights(header.path, config, dtype)


def _refuse_unread_tensors(model: Any, header: GgufHeader) -> None:
    """Raise ModelError for tensors without a parameter, and for more parameters than numbers."""
    unread = sorted(header.tensors.keys() - known_gguf_tensors(model, header) - FACTORS)
    if unread:
        raise ModelError(
            f"{header.path}: transformers has no place for the tensor {unread[0]!r} "
            f"({len(unread)} in all), so the model would change. Convert the original weights "
            "instead."
        )
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    n_stored = sum(tensor.n_elements for tensor in header.tensors.values())
    if n_parameters > n_stored:
        raise ModelError(
            f"{header.path}: describes a model with {n_parameters:,} parameters but contains only "
            f"{n_stored:,} numbers. Fetch it again."
        )


@contextmanager
def _sharing_gguf_reader() -> Iterator[None]:
    """Make transformers share one GGUFReader.

    It would open one each for config, weights and tokenizer, and each walks the whole vocabulary
    in Python (15 s for 262 k tokens).
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
    """Remove the attributes that make save_pretrained refuse a model read from GGUF."""
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(name, None)
    model.config.__dict__.pop("quantization_config", None)
    model.config.__dict__.pop("_name_or_path", None)
