"""Check that a merged model in its staging directory is what its config promises.

mergekit does not check what it wrote: when it cannot copy a tokenizer or set a layer count, it logs
that and reports success. So names, shapes, dtypes, values, tokenizer and chat template are checked
here, for both engines. Faults that the model behind the config already has, such as unread buffers,
are ignored.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimer_hf.errors import ModelError
from optimer_hf.models.blocks import row_blocks
from optimer_hf.models.checkpoint import DTYPES, Checkpoint
from optimer_hf.models.layout import ANY_WEIGHTS, has_tokenizer
from optimer_hf.models.loader import (
    CONFIG,
    Loading,
    describe_loading,
    read_settings,
    read_tokenizer,
)
from optimer_hf.models.names import names_kept_wide
from optimer_hf.models.ties import ties_of


@dataclass(frozen=True)
class Promise:
    """What a merge config and its flags say about the output."""

    config_of: Path | None  # the model whose config and layers the merge has; None: not local
    dtype: str | None = None  # named in config.json
    out_dtype: str | None = None  # of every tensor; without it, some methods choose their own
    tokenizer: bool = True
    new_tokenizer: bool = False  # written by transformers instead of copied
    chat_template: str | None = None
    runs_code: bool = False  # mergekit may run the model's own code; we never do


def check_merged(out: Path, promise: Promise) -> None:
    """Raise ModelError that names the first fault, if a merge breaks its promise.

    Reads every tensor once; transformers compares names and shapes.
    """
    try:
        fault = next(_faults(out, promise), None)
    except ModelError as error:
        fault = str(error).replace(str(out), "the merge")
    if fault is not None:
        raise ModelError(f"the merge is not what its config asks for: {fault}")


def _faults(out: Path, promise: Promise) -> Iterator[str]:
    if not (out / CONFIG).is_file():
        yield "it has no config.json."
    merged = Checkpoint(out)
    yield from _dtype_faults(merged, promise)
    yield from _value_faults(merged)
    if promise.tokenizer:
        yield from _tokenizer_faults(out, promise)
    if not promise.runs_code:
        yield from _loading_faults(merged, promise.config_of)
    ties_of(merged)  # refuses a head that differs from the embedding that it is tied to


def _dtype_faults(merged: Checkpoint, promise: Promise) -> Iterator[str]:
    expected = DTYPES.get(promise.out_dtype or "")
    if expected is not None:
        dtypes = {name: merged.dtype(name) for name in merged.names}
        others = [n for n, each in dtypes.items() if each.is_floating_point and each != expected]
        for name in sorted({*others} - names_kept_wide(merged, expected)) if others else ():
            yield f"tensor {name!r} was written as {dtypes[name]}, expected {expected}."
    settings = read_settings(merged.path / CONFIG)
    named = settings.get("dtype", settings.get("torch_dtype"))
    if promise.dtype is not None and named != promise.dtype:
        yield f"config.json names the dtype {named}, expected {promise.dtype}."


def _value_faults(merged: Checkpoint) -> Iterator[str]:
    for name in merged.names:
        blocks = row_blocks(merged.shape(name)) if merged.dtype(name).is_floating_point else []
        if not all(bool(merged.read_rows(name, rows).isfinite().all()) for rows in blocks):
            yield (
                f"tensor {name!r} holds NaN or infinite values. Use smaller weights, or `dtype: "
                "float32`."
            )


def _loading_faults(merged: Checkpoint, config_of: Path | None) -> Iterator[str]:
    """Yield tensors that do not fit the config, except where the model behind it has the fault."""
    loading = describe_loading(merged.path)
    nothing = Loading(frozenset(), frozenset(), frozenset())
    is_compared = config_of is not None and any(config_of.glob(ANY_WEIGHTS))  # mergekit reads .bin
    known = describe_loading(config_of) if config_of is not None and is_compared else nothing
    for what, names in (
        ("it lacks", loading.missing - known.missing),
        (
            "its config.json, copied from the base, has another shape for",
            loading.misshapen - known.misshapen,
        ),
        ("its config.json has no place for", loading.unread - known.unread),
    ):
        if names:
            yield (
                f"{what} {min(names)!r} ({len(names)} in all, of {len(merged.names)} tensors "
                "written). Give a model that has it as base_model; if all models have it, mergekit "
                "does not know this architecture."
            )


def _tokenizer_faults(out: Path, promise: Promise) -> Iterator[str]:
    if not has_tokenizer(out):
        yield "it has no tokenizer. If you want none, pass --no-copy-tokenizer."
        return
    if promise.runs_code or not promise.new_tokenizer:
        return
    template: Any = read_tokenizer(out).chat_template
    if promise.chat_template is not None and template != promise.chat_template:
        yield "its tokenizer lacks the chat template that the config asks for."
