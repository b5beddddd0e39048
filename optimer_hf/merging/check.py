"""A merged model that lies in its staging directory -> an error unless it is what its config
promises.

mergekit does not look at what it wrote: it logs that a tokenizer could not be copied, a layer count
not be set, and reports success. So names, shapes, dtypes, values, tokenizer and chat template are
compared here, for both engines. What a reader would not guess: faults that the model has which gave
the config, unread buffers for instance, are not the merge's.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimer_hf.errors import ModelError
from optimer_hf.models.blocks import row_blocks
from optimer_hf.models.checkpoint import DTYPES, Checkpoint
from optimer_hf.models.layout import ANY_WEIGHTS
from optimer_hf.models.loader import CONFIG, Loading, loading_of, read_settings, read_tokenizer
from optimer_hf.models.resolve import TOKENIZER_FILES
from optimer_hf.models.ties import ties_of


@dataclass(frozen=True)
class Promise:
    """What a merge config and its flags say of the output."""

    config_of: Path | None  # the model that gives config and layers; None: not at hand
    dtype: str | None = None  # that config.json names
    out_dtype: str | None = None  # of every tensor; without it some methods compute in another
    tokenizer: bool = True
    new_tokenizer: bool = False  # written by transformers; others are copied as they are
    chat_template: str | None = None
    runs_code: bool = False  # a person lets mergekit run the model's own code, which we do not


def check_merged(out: Path, promise: Promise) -> None:
    """Raise ModelError, naming the first fault, for a merge that is not what was promised.

    Reads every tensor once, and lets transformers compare names and shapes.
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
    ties_of(merged)  # refuses a head that the config ties and that differs from the embedding


def _dtype_faults(merged: Checkpoint, promise: Promise) -> Iterator[str]:
    expected = DTYPES.get(promise.out_dtype or "")
    for name in merged.names if expected is not None else ():
        found = merged.dtype(name)
        if found.is_floating_point and found != expected:
            yield f"tensor {name!r} was written as {found}, expected {expected}."
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
    """Yield where files and config do not fit, unless those of the model behind it do not."""
    found = loading_of(merged.path)
    nothing = Loading(frozenset(), frozenset(), frozenset())
    is_compared = config_of is not None and any(config_of.glob(ANY_WEIGHTS))  # mergekit reads .bin
    known = loading_of(config_of) if config_of is not None and is_compared else nothing
    for what, names in (
        ("it lacks", found.missing - known.missing),
        (
            "its config.json, that of the base, has another shape of",
            found.misshapen - known.misshapen,
        ),
        ("its config.json has no place for", found.unread - known.unread),
    ):
        if names:
            yield (
                f"{what} {min(names)!r} ({len(names)} in all, of {len(merged.names)} tensors "
                "written). Give a model that has it as base_model; if all have, mergekit does not "
                "know this architecture."
            )


def _tokenizer_faults(out: Path, promise: Promise) -> Iterator[str]:
    if not any((out / name).is_file() for name in TOKENIZER_FILES):
        yield "it has no tokenizer. With --no-copy-tokenizer none is expected."
        return
    if promise.runs_code or not promise.new_tokenizer:
        return
    found: Any = read_tokenizer(out).chat_template
    if promise.chat_template is not None and found != promise.chat_template:
        yield "its tokenizer lacks the chat template that was asked for."
