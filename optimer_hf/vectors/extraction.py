"""A fine-tuned model or an adapter, named as on a command line -> a delta directory."""

from pathlib import Path

from optimer_hf.files.staging import require_empty
from optimer_hf.models.resolve import (
    AnyModel,
    base_from_here,
    model_from_here,
    vector_reference,
)
from optimer_hf.vectors.delta import extract, extract_any_adapter
from optimer_hf.vectors.int8 import BLOCK_SIZE
from optimer_hf.vectors.record import VectorFile
from optimer_hf.vectors.tokens import open_with_tokens


def extract_vector(
    tuned: AnyModel,
    base: AnyModel,
    out: Path,
    *,
    name: str | None = None,
    dtype: str = "bfloat16",
    block_size: int = BLOCK_SIZE,
    from_adapter: bool = False,
) -> VectorFile:
    """Write `tuned` minus `base` into `out`, which has to be new or empty, and return its record.

    `tuned` and `base` are directories or Hub ids; `tuned` may be an adapter, with `from_adapter`
    one of any type that PEFT can merge. `name` names the vector (default: the name of `out`). For
    `dtype` and `block_size` see `extract`. If `tuned` has other tokens than `base`, the delta has
    its rows and its tokenizer.
    """
    require_empty(out)
    resolved, name = base_from_here(base), name or out.name
    if from_adapter:
        adapter = model_from_here(tuned)
        return extract_any_adapter(name, adapter, resolved, out, dtype=dtype, block_size=block_size)
    vector, tokens = open_with_tokens(name, vector_reference(tuned), resolved)
    return extract(vector, resolved, out, dtype=dtype, block_size=block_size, tokens=tokens)
