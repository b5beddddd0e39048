"""Load transformers models and tokenizers; choose devices and compute dtypes."""

import gc
import logging
import platform
import tempfile
from typing import Any

import torch

from optimer_hf.models.checkpoint import OUTER_WRAPPER, WRAPPERS, Checkpoint
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.models.loader import model_without_weights, read_model, read_tokenizer
from optimer_hf.models.placement import Placement, live_state


def load_model(base: ResolvedModel, dtype: Any, placement: Placement | None = None) -> Any:
    """Load the causal language model in a directory, on the CPU or where a placement puts its
    parts; raises ModelError with the reason.
    """
    gc.collect()  # reference cycles in the Trainer may keep the previous model alive
    torch.cuda.empty_cache()  # and its memory would count as taken; does nothing without a GPU
    unwrapping = unwrapping_patterns(Checkpoint(base.path))
    options: dict[str, Any] = {"dtype": dtype, "key_mapping": unwrapping or None}
    if placement is None:
        model = read_model(base.path, **options)
    else:
        logging.getLogger("accelerate.big_modeling").setLevel(
            logging.ERROR
        )  # tells what we ask for
        placement.check(empty_model(base))
        with tempfile.TemporaryDirectory() as folder:
            model = read_model(base.path, **options, **placement.options(folder))
            live_state(model)  # takes what lies in the folder
    if unwrapping:  # otherwise saving the model would restore the names of the wrappers
        model._weight_conversions = model._weight_conversions[len(unwrapping) :]
    return model


def unwrapping_patterns(checkpoint: Checkpoint) -> dict[str, str]:
    """Return patterns (pattern -> replacement) that remove wrapper prefixes as `Checkpoint` does.

    Each pattern replaces one occurrence.
    """
    inner, patterns = "|".join(WRAPPERS), {}
    for number in range(checkpoint.n_wrappers):  # transformers replaces one occurrence per rule
        patterns[rf"(?#{number})(?:^|(?<=\.))(?:{inner})\."] = ""
        if OUTER_WRAPPER in checkpoint.wrappers:
            patterns[rf"(?#{number})^module\."] = ""
    return patterns


def default_device() -> str:
    """Return the device for models: the first GPU if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def compute_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """Return `dtype` if a device has fast matrix products for it, else float32.

    Without them, PyTorch's fallbacks are 3 to 90 times slower than float32
    (benchmarks/precision.py). GPUs before Ampere have none for bfloat16.
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
        has_kernels = _multiplies_bfloat16()
    else:
        has_kernels = torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype if has_kernels else torch.float32


def _multiplies_bfloat16() -> bool:
    """Whether this processor has instructions that multiply bfloat16. oneDNN supports it on every
    x86 processor with AVX-512, but emulates it where they are missing.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return not is_x86 or (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def load_tokenizer(base: ResolvedModel) -> Any:
    """Load the tokenizer in a directory; raises ModelError with the reason."""
    return read_tokenizer(base.path)


def empty_model(base: ResolvedModel) -> Any:
    """Build the model in a directory without its weights, at almost no cost.

    This finds errors in its config, its index and its layers before any long work starts.
    """
    Checkpoint(base.path)
    return model_without_weights(base.path)
