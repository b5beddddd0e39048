"""Two config.json files -> the settings by which their models compute other functions.

A merge has the config of its base. Where a fine-tune changed a number that no tensor shows (the
theta of RoPE, an activation, a window of attention, what logits are multiplied by), the merge at
weight 1 is not the fine-tune, although every name and shape fits. What a reader would not guess:
configs are compared as transformers completes them, and every field of a class counts that is not
known to be harmless, so that a field of a new class is not overlooked.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimer_hf.errors import ModelError
from optimer_hf.models.loader import read_config

HARMLESS = re.compile(  # of training, generation, caches and programs; sizes that tensors show
    r"_token_ids?$|_token_index$|dropout|_pdrop$|layerdrop|drop$|initializer|(^|_)init(_|$)"
    r"|cache|loss|jitter|pretraining_tp|vocab_size|summary_|classifier|output_router_logits"
    r"|logits_to_keep|kernels?$|mambapy|associative_scan|chunk_size|nextn|mtp_|_version$"
    r"|^(dtype|architectures|id2label|label2id|problem_type|return_dict|output_hidden_states"
    r"|output_attentions|_name_or_path|torchscript|is_decoder|add_cross_attention|use_sliding_window"
    r"|max_window_layers|tie_word_embeddings|quantization_config|prefix|pruned_heads"
    r"|rescale_prenorm_residual|slow_but_exact|seed|suppress_tokens|begin_suppress_tokens)$"
)
POSITIONS = re.compile(  # how long a text may be: of no effect on RoPE of a fixed scale
    r"^(max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length)$"
)
BY_LENGTH = {"dynamic", "longrope", "yarn", "su", "proportional"}  # RoPE that looks at it
SAME = {  # names of one function
    "swish": "silu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu_python": "gelu",
    "mistral": "llama",  # but for the window of attention, which is a setting
}
LONGEST = 500  # characters shown
CLOSE = 1e-6  # a config made of a GGUF file has float32 numbers


def differing_settings(tuned: Path, base: Path) -> dict[str, tuple[Any, Any]]:
    """Return the settings of two model directories that make their functions differ, by name with
    the value of the tuned model and that of the base (None: not set); nothing where transformers
    does not know the class of one.
    """
    try:
        one, other = _settings(read_config(tuned)), _settings(read_config(base))
    except ModelError:
        return {}
    names = sorted(one.keys() | other.keys())
    pairs = {name: (one.get(name), other.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if not _are_same(*pair)}


def shown_settings(differing: Mapping[str, tuple[Any, Any]]) -> str:
    """Return what `differing_settings` found as it is shown."""
    parts = (f"{key}: {one!r}, base {other!r}" for key, (one, other) in differing.items())
    return "; ".join(parts)[:LONGEST]


def _settings(config: Any) -> dict[str, Any]:
    """Return the fields of the language part that say how it computes; unset ones are left out."""
    text = config.get_text_config(decoder=True)
    fields = {field.name for field in dataclasses.fields(text)} | {"model_type"}
    found = {
        name: value
        for name, value in text.to_dict().items()
        if name in fields and not HARMLESS.search(name) and not _says_nothing(value)
    }
    if not _looks_at_length(found.get("rope_parameters")):
        found = {name: value for name, value in found.items() if not POSITIONS.search(name)}
    if set(found.get("layer_types", ())) == {"full_attention"}:
        found.pop("layer_types")
        found.pop("sliding_window", None)
    heads, size = found.get("num_attention_heads"), found.get("hidden_size")
    if isinstance(heads, int) and isinstance(size, int):
        found.setdefault("num_key_value_heads", heads)
        found.setdefault("head_dim", size // heads)
    return found


def _looks_at_length(rope: Any) -> bool:
    """Whether the parameters of RoPE, which may be those of kinds of layers, look at lengths."""
    if not isinstance(rope, Mapping):
        return False
    kinds = {rope.get("rope_type"), rope.get("type")}
    return bool(kinds & BY_LENGTH) or any(map(_looks_at_length, rope.values()))


def _says_nothing(value: Any) -> bool:
    """Whether a value is that of a setting which is not there: of 0 some mean something."""
    return value is None or value is False or value == [] or value == {}


def _are_same(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        one, other = _plain(one), _plain(other)
        return all(_are_same(one.get(key), other.get(key)) for key in one.keys() | other.keys())
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_are_same, one, other))
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=CLOSE)
    if isinstance(one, str) and isinstance(other, str):
        return SAME.get(one, one) == SAME.get(other, other)
    return bool(one == other)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of a part (RoPE, mostly) without those that say nothing; `type` is the older
    `rope_type`.
    """
    found = {
        key: value
        for key, value in settings.items()
        if not _says_nothing(value) and not HARMLESS.search(str(key))
    }
    if "type" in found:
        found.setdefault("rope_type", found.pop("type"))
        found.pop("type", None)
    return {key: value for key, value in found.items() if (key, value) not in _DEFAULTS}


_DEFAULTS = (("rope_type", "default"), ("partial_rotary_factor", 1.0))
