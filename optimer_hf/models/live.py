"""A resolved model -> a live transformers model or tokenizer; devices and compute dtypes."""

import gc
from typing import Any

import torch

from optimer_hf.models.checkpoint import OUTER_WRAPPER, WRAPPERS, Checkpoint
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.models.loader import model_without_weights, read_model, read_tokenizer


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
