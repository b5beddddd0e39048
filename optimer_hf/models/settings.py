"""Compare two config.json files for settings that change what the model computes.

A merge uses the config of its base. If a fine-tune changed a setting that no tensor shows (RoPE's
theta, an activation, an attention window, a factor on the logits), the merge at weight 1 is not the
fine-tune, although every name and shape fits. Configs are compared after transformers has completed
them. Every field counts unless it is known to be harmless, so fields of new classes are not
overlooked.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimer_hf.errors import ModelError
from optimer_hf.models.loader import read_config

HARMLESS = re.compile(  # about training, generation, caches and programs; sizes that tensors show
    r"_token_ids?$|_token_index$|dropout|_pdrop$|layerdrop|drop$|initializer|(^|_)init(_|$)"
    r"|cache|loss|jitter|pretraining_tp|vocab_size|summary_|output_router_logits"
    r"|logits_to_keep|kernels?$|mambapy|associative_scan|nextn|mtp_|_version$"
    r"|^(dtype|architectures|id2label|label2id|problem_type|return_dict|output_hidden_states"
    r"|output_attentions|_name_or_path|torchscript|is_decoder|add_cross_attention|use_sliding_window"
    r"|(mamba_)?chunk_size|classifier_(bias|pooling|proj_size)"
    r"|max_window_layers|tie_word_embeddings|quantization_config|prefix|pruned_heads"
    r"|rescale_prenorm_residual|slow_but_exact|suppress_tokens|begin_suppress_tokens)$"
)
POSITIONS = re.compile(  # the longest text, which has no effect on RoPE with a fixed scale
    r"^(max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|context_length)$"
)
BY_LENGTH = {"dynamic", "longrope", "yarn", "su", "proportional"}  # RoPE that depends on length
SAME = {  # two names for one function
    "swish": "silu",
    "gelu_new": "gelu_pytorch_tanh",
    "gelu_fast": "gelu_pytorch_tanh",
    "gelu_python": "gelu",
    "mistral": "llama",  # except for the attention window, which is a setting
}
LONGEST = 500  # characters shown
CLOSE = 1e-6  # a config made from a GGUF file has float32 numbers


def compare_settings(tuned: Path, base: Path) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ between two models: name -> (tuned value, base value).

    None means not set. The result is empty if transformers does not know one of the classes.
    """
    try:
        one, other = _settings(read_config(tuned)), _settings(read_config(base))
    except ModelError:
        return {}
    names = sorted(one.keys() | other.keys())
    pairs = {name: (one.get(name), other.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if not _are_same(*pair)}


def describe_settings(differing: Mapping[str, tuple[Any, Any]]) -> str:
    """Return the result of `compare_settings` as text for a message."""
    parts = (f"{key}: {one!r}, base {other!r}" for key, (one, other) in differing.items())
    return "; ".join(parts)[:LONGEST]


def _settings(config: Any) -> dict[str, Any]:
    """Return the fields that affect what the language part computes, without unset ones."""
    text = config.get_text_config(decoder=True)
    fields = {field.name for field in dataclasses.fields(text)} | {"model_type"}
    settings = {
        name: value
        for name, value in text.to_dict().items()
        if name in fields and not HARMLESS.search(name) and not _is_unset(value)
    }
    if not _depends_on_length(settings.get("rope_parameters")):
        settings = {name: value for name, value in settings.items() if not POSITIONS.search(name)}
    if set(settings.get("layer_types", ())) == {"full_attention"}:
        settings.pop("layer_types")
        settings.pop("sliding_window", None)
    heads, size = settings.get("num_attention_heads"), settings.get("hidden_size")
    if isinstance(heads, int) and isinstance(size, int):
        settings.setdefault("num_key_value_heads", heads)
        settings.setdefault("head_dim", size // heads)
    return settings


def _depends_on_length(rope: Any) -> bool:
    """Whether RoPE, perhaps with parameters for each kind of layer, depends on the text length."""
    if not isinstance(rope, Mapping):
        return False
    kinds = {rope.get("rope_type"), rope.get("type")}
    return bool(kinds & BY_LENGTH) or any(map(_depends_on_length, rope.values()))


def _is_unset(value: Any) -> bool:
    """Whether a value means the same as no value; 0 does not, since it can be a setting."""
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
    """Return nested settings (mostly of RoPE) without unset and default values.

    `type` is the older name of `rope_type`.
    """
    plain = {
        key: value
        for key, value in settings.items()
        if not _is_unset(value) and not HARMLESS.search(str(key))
    }
    if "type" in plain:
        plain.setdefault("rope_type", plain.pop("type"))
        plain.pop("type", None)
    return {key: value for key, value in plain.items() if (key, value) not in _DEFAULTS}


_DEFAULTS = (("rope_type", "default"), ("partial_rotary_factor", 1.0))
