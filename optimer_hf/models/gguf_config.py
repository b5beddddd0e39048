"""Complete the config that transformers reads from a GGUF file.

transformers drops keys that it does not know and uses the defaults of its own class instead. That
loses the RoPE scaling of Llama 3.x, softcapping, partial rotary embeddings and the attention
scale. Here each key that affects the model's function goes into the config, or is refused by name.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from optimer_hf.errors import ModelError
from optimer_hf.files.text import quote
from optimer_hf.models.gguf_header import GgufHeader
from optimer_hf.models.gguf_loader import known_gguf_keys, read_gguf_rows

EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
FACTORS = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
SAMPLED_ROWS = 64
MOST_FACTORS = 4096  # half the width of a head
LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}  # models that scale attention by hidden size / heads
LLAMA3: dict[str, Any] = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
HARMLESS = {"rope.scaling.finetuned", "tensor_data_layout", "block_count", "vocab_size"}
ONLY = {  # keys that no config has, with the values at which they change nothing
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "expert_weights_scale": (0.0, 1.0),
    "expert_gating_func": (0, 1),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "ssm.dt_b_c_rms": (False,),
    "ssm.group_count": (0,),
}


def fit_config(config: Any, header: GgufHeader) -> Any:
    """Add to transformers' config what the GGUF file says about the model's function.

    Raises ModelError for an unknown key, and for one that changes the function but has no place in
    the config.
    """
    if header.metadata.get("general.type", "model") != "model":
        raise ModelError(
            f"{header.path}: contains a {header.metadata['general.type']!r}, expected a model. "
            "Give the file of the model."
        )
    if header.metadata.get("split.count", 1) != 1:
        raise ModelError(
            f"{header.path}: is one of {header.metadata['split.count']} parts. Join them with "
            "llama.cpp's `llama-gguf-split --merge`."
        )
    values = header.model_metadata
    # for GPT-2, transformers stores context_length where it is never used
    read = known_gguf_keys(header) - {"context_length"}
    for key in sorted(values.keys() - read - HARMLESS):
        if not key.startswith(("rope.scaling.", "rope.scale")) and not _apply_key(
            config, key, values[key], header
        ):
            raise _not_supported(header, key, values[key])
    _apply_widths(config, values, header)
    _apply_rope(config, values, header)
    _apply_rest(config, header)
    return config


def _not_supported(header: GgufHeader, key: str, value: Any) -> ModelError:
    return ModelError(
        f"{header.path}: {header.architecture}.{key} = {quote(value)} may change what the model "
        "computes, and transformers has no place for it. Convert the original weights instead."
    )


# -- one key ---------------------------------------------------------------------------------------


def _apply_key(config: Any, key: str, value: Any, header: GgufHeader) -> bool:
    """Set what a key says; return whether the config now expresses all of it."""
    if key in ONLY:
        return value in ONLY[key]
    rule = _RULES.get(key)
    return rule is not None and rule(config, value, header)


def _setter(*names: str) -> Callable[[Any, Any, GgufHeader], bool]:
    """Return a rule that sets the first of these attributes that a config has."""

    def apply(config: Any, value: Any, header: GgufHeader) -> bool:
        name = next((name for name in names if hasattr(config, name)), None)
        if name is not None:
            setattr(config, name, value)
        return name is not None

    return apply


def _softcap_setter(name: str) -> Callable[[Any, Any, GgufHeader], bool]:
    def apply(config: Any, value: Any, header: GgufHeader) -> bool:
        if hasattr(config, name):
            setattr(config, name, value or None)
            return True
        return not value

    return apply


def _comparer(*names: str) -> Callable[[Any, Any, GgufHeader], bool]:
    """Return a rule that only compares a value with those of these attributes that exist."""

    def apply(config: Any, value: Any, header: GgufHeader) -> bool:
        values = [getattr(config, name) for name in names if hasattr(config, name)]
        return bool(values) and all(each == value for each in values)

    return apply


def _window(config: Any, value: Any, header: GgufHeader) -> bool:
    context = header.model_metadata.get("context_length", 0)
    if not value or value >= context:
        if getattr(config, "sliding_window", None) is not None and config.layer_types is None:
            config.sliding_window = None
        return True
    has_window = hasattr(config, "sliding_window") and not hasattr(config, "use_sliding_window")
    if has_window:
        config.sliding_window = value
    return has_window


def _window_pattern(config: Any, value: Any, header: GgufHeader) -> bool:
    """Set which layers have a window: all but each n-th layer, or as one flag per layer says."""
    if getattr(config, "layer_types", None) is None:
        return False
    n_layers = config.num_hidden_layers
    flags = value if isinstance(value, list) else [bool((i + 1) % value) for i in range(n_layers)]
    if len(flags) != n_layers:
        return False
    config.layer_types = ["sliding_attention" if each else "full_attention" for each in flags]
    return True


def _scale(config: Any, value: Any, header: GgufHeader) -> bool:
    """Set the factor of the attention scores; the default is 1 / sqrt(head width)."""
    if not value:
        return True
    if hasattr(config, "query_pre_attn_scalar"):
        config.query_pre_attn_scalar = value**-2
        return True
    return math.isclose(value, _head_width(config) ** -0.5, rel_tol=1e-5)


def _alibi(config: Any, value: Any, header: GgufHeader) -> bool:
    return bool(value == (8.0 if header.architecture == "bloom" else 0.0))


def _parallel(config: Any, value: Any, header: GgufHeader) -> bool:
    names = ("use_parallel_residual", "parallel_attn")
    return any(getattr(config, name, None) == value for name in names)


_RULES: Mapping[str, Callable[[Any, Any, GgufHeader], bool]] = {
    "context_length": lambda config, value, header: (
        _setter("n_positions", "max_position_embeddings")(config, value, header) or True
    ),
    "feed_forward_length": lambda config, value, header: True,  # the tensor shapes show it
    "embedding_length_out": _comparer("hidden_size"),
    "attention.head_count_kv": _comparer("num_key_value_heads", "num_attention_heads"),
    "attention.layer_norm_epsilon": _setter(*EPSILONS),
    "attention.layer_norm_rms_epsilon": _setter(*EPSILONS),
    "attention.key_length": lambda config, value, header: True,  # _apply_widths
    "attention.value_length": lambda config, value, header: True,
    "rope.dimension_count": lambda config, value, header: True,
    "rope.freq_base": lambda config, value, header: _has_rope(config),  # _apply_rope
    "rope.freq_base_swa": lambda config, value, header: _has_rope(config),
    "rope.dimension_count_swa": lambda config, value, header: (
        value == header.model_metadata.get("rope.dimension_count")
    ),
    "attn_logit_softcapping": _softcap_setter("attn_logit_softcapping"),
    "final_logit_softcapping": _softcap_setter("final_logit_softcapping"),
    "attention.sliding_window": _window,
    "attention.sliding_window_pattern": _window_pattern,
    "attention.scale": _scale,
    "attention.max_alibi_bias": _alibi,
    "use_parallel_residual": _parallel,
    "expert_feed_forward_length": _setter("moe_intermediate_size"),
    "expert_shared_feed_forward_length": _setter("shared_expert_intermediate_size"),
    "expert_weights_norm": _setter("norm_topk_prob"),
}


# -- several keys together -------------------------------------------------------------------------


def _head_width(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _apply_widths(config: Any, values: Mapping[str, Any], header: GgufHeader) -> None:
    """Set the head width; refuse a model whose values and keys differ in width."""
    keys = values.get("attention.key_length")
    if keys is not None and "rope.dimension_count_swa" not in values:
        if hasattr(config, "head_dim"):
            config.head_dim = keys
        elif keys != _head_width(config):
            raise _not_supported(header, "attention.key_length", keys)
    if values.get("attention.value_length", keys) != keys:
        raise _not_supported(header, "attention.value_length", values["attention.value_length"])
    if header.architecture in LAYERS_OF_27B and "attention.scale" not in values:
        is_27b = config.num_hidden_layers == LAYERS_OF_27B[header.architecture]
        config.query_pre_attn_scalar = (
            config.hidden_size // config.num_attention_heads if is_27b else config.head_dim
        )


def _apply_rest(config: Any, header: GgufHeader) -> None:
    """Set the biases of a Llama, and drop special tokens that the vocabulary lacks."""
    if config.model_type == "llama":
        config.attention_bias = "blk.0.attn_q.bias" in header.tensors
        config.mlp_bias = "blk.0.ffn_up.bias" in header.tensors
    if config.tie_word_embeddings and "output.weight" in header.tensors:
        _refuse_other_head(header)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        number = getattr(config, name, None)
        if isinstance(number, int) and number >= config.vocab_size:  # the default of the class
            setattr(config, name, None)


def _refuse_other_head(header: GgufHeader) -> None:
    """Refuse an output head that differs from the embedding if the class ties both.

    A copy is allowed to differ by rounding, since the two may be quantised differently.
    """
    head, embedding = (
        read_gguf_rows(header, name, SAMPLED_ROWS)
        for name in ("output.weight", "token_embd.weight")
    )
    if head.shape != embedding.shape or ((head - embedding) ** 2).sum() > 0.1 * (head**2).sum():
        raise ModelError(
            f"{header.path}: output.weight differs from token_embd.weight, but transformers uses "
            f"one tensor for both in {header.architecture} models. Convert the original weights "
            "instead."
        )


# -- rotary embeddings -----------------------------------------------------------------------------


def _has_rope(config: Any) -> bool:
    return bool(getattr(config, "rope_parameters", None))


def _apply_rope(config: Any, values: Mapping[str, Any], header: GgufHeader) -> None:
    """Set base, rotated fraction and scaling of the rotary embeddings."""
    scaling = _scaling(config, values, header)
    width = values.get("rope.dimension_count")
    if not _has_rope(config):
        if scaling:
            raise _not_supported(header, "rope.scaling", scaling)
        return
    nested = "full_attention" in config.rope_parameters
    rope = config.rope_parameters["full_attention"] if nested else config.rope_parameters
    if "rope.freq_base" in values:
        rope["rope_theta"] = values["rope.freq_base"]
    if nested and "rope.freq_base_swa" in values:
        config.rope_parameters["sliding_attention"]["rope_theta"] = values["rope.freq_base_swa"]
    elif values.get("rope.freq_base_swa", rope["rope_theta"]) != rope["rope_theta"]:
        raise _not_supported(header, "rope.freq_base_swa", values["rope.freq_base_swa"])
    if width is not None and ("partial_rotary_factor" in rope or width != _head_width(config)):
        rope["partial_rotary_factor"] = width / _head_width(config)
    rope |= scaling


def _scaling(config: Any, values: Mapping[str, Any], header: GgufHeader) -> dict[str, Any]:
    """Return the scaling in a file as entries for transformers' `rope_parameters`."""
    kind = values.get("rope.scaling.type", "none")
    factor = values.get("rope.scaling.factor", values.get("rope.scale_linear", 1.0))
    if "rope.scale_linear" in values:
        kind = "linear"
    length = values.get("rope.scaling.original_context_length")
    known = {"type", "factor", "original_context_length", "finetuned", "attn_factor"}
    known |= {"yarn_beta_fast", "yarn_beta_slow"} if kind == "yarn" else set()
    for key, value in values.items():
        if key.startswith("rope.scaling.") and key.removeprefix("rope.scaling.") not in known:
            raise _not_supported(header, key, value)
    attention = values.get("rope.scaling.attn_factor")
    if FACTORS & header.tensors.keys():
        return _scaling_by_factors(config, values, header, attention)
    if kind == "yarn" and factor not in (0.0, 1.0) and length:
        rope = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}
        if attention is not None:
            rope["attention_factor"] = attention * (1 + 0.1 * math.log(factor))
        betas = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
        given = {ours: values.get(f"rope.scaling.{theirs}") for ours, theirs in betas.items()}
        return rope | {key: value for key, value in given.items() if value is not None}
    if attention not in (None, 1.0):
        raise _not_supported(header, "rope.scaling.attn_factor", attention)
    if kind in ("none", "") or factor in (0.0, 1.0):
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    raise _not_supported(header, "rope.scaling.type", kind)


def _scaling_by_factors(
    config: Any, values: Mapping[str, Any], header: GgufHeader, attention: float | None
) -> dict[str, Any]:
    """Return the scaling for files that give each frequency its own divisor."""
    context = values["context_length"]
    original = values.get("rope.scaling.original_context_length", context)
    factors = {name: _factors(header, name) for name in sorted(FACTORS & header.tensors.keys())}
    always = factors.pop("rope_freqs.weight", None)
    if always is not None:
        if factors or attention not in (None, 1.0):
            raise _not_supported(header, "rope_freqs.weight", always)
        if all(factor == 1 for factor in always):
            return {}
        llama3 = _as_llama3(always, values, _head_width(config))
        if llama3 is not None:
            return llama3
        short = long = always
    elif len(factors) == 2:
        long, short = factors.values()
    else:
        raise _not_supported(header, next(iter(factors)), "without its partner")
    if attention is None:
        stretch = context / original
        attention = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    if hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = original
    return {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "attention_factor": 1.0 if always is not None else attention,
        "original_max_position_embeddings": original,
    }


def _factors(header: GgufHeader, name: str) -> list[float]:
    if header.tensors[name].n_elements > MOST_FACTORS:
        raise _not_supported(header, name, header.tensors[name].shape)
    return [float(value) for value in read_gguf_rows(header, name, MOST_FACTORS)]


def _as_llama3(
    factors: list[float], values: Mapping[str, Any], head_width: int
) -> dict[str, Any] | None:
    """Return Llama 3.x's four numbers if they yield exactly these factors, else None."""
    rope: dict[str, Any] = {"rope_type": "llama3", "factor": max(factors), **LLAMA3}
    original, low, high = (
        rope["original_max_position_embeddings"],
        rope["low_freq_factor"],
        rope["high_freq_factor"],
    )
    width, base = values.get("rope.dimension_count", head_width), values["rope.freq_base"]
    if len(factors) * 2 != width:
        return None
    for index, factor in enumerate(factors):
        turns = original / (2 * math.pi) * base ** (-2 * index / width)
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        expected = 1 / ((1 - smooth) / rope["factor"] + smooth)
        if not math.isclose(factor, expected, rel_tol=1e-5):
            return None
    return rope
