"""Count the arithmetic and the memory traffic of a language model.

The sizes of a model come in (`models.sizes` reads them from a model), FLOPs and bytes go out.
Training follows appendix B of PaLM (arXiv 2204.02311): 6 N + 12 L H Q T FLOPs a token, with N
weights, L layers, H heads of size Q and T tokens of context. N has the head, since tokens are
multiplied with it, but not the lookup in the embeddings. As in PaLM, attention counts every token
of the context, although the causal mask hides half of them on average, and nothing counts twice if
it is computed twice (gradient checkpointing). A window shorter than the context replaces it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NO_ATTENTION = {"linear_attention", "conv", "moe", "mamba"}  # kinds of layers, in `layer_types`


@dataclass(frozen=True)
class Attention:
    """The attention of one layer: the width of all heads (H Q), that of the keys and values kept
    for each token (2 KV Q), and the number of tokens it looks back at, if it is limited.
    """

    width: int
    cached_width: int
    window: int | None = None

    def span(self, n_context: int) -> int:
        """Return how many tokens of a context the layer looks at."""
        return n_context if self.window is None else min(self.window, n_context)


@dataclass(frozen=True)
class ModelSizes:
    """Numbers of weights: all of them (`total`) and those that an optimizer trains (`trained`); of
    these two, those that each token is multiplied with, experts as often as they are chosen; and
    those of the largest layer. `kept_bytes` is an estimate of what the forward pass keeps of each
    token for the backward pass in 16-bit precision, in all `n_layers`.
    """

    total: int
    trained: int
    multiplied: int
    trained_multiplied: int
    attention: tuple[Attention, ...]
    largest_layer: int = 0
    n_layers: int = 1
    width: int = 0
    kept_bytes: int = 0


def training_flops(sizes: ModelSizes, n_context: int) -> float:
    """Return the FLOPs of training on one token in a context of `n_context` tokens.

    The forward pass and the gradients of activations take 2 N each, the gradients of weights 2 for
    each trained one. That is 6 N if all are trained, and 4 N + 6 A for an adapter of A weights on
    top of N.
    """
    products = 4 * sizes.multiplied + 2 * sizes.trained_multiplied
    return products + 3 * _attention_flops(sizes, n_context)


def forward_flops(sizes: ModelSizes, n_context: int) -> float:
    """Return the FLOPs of reading or generating one token in a context of `n_context` tokens."""
    return 2 * sizes.multiplied + _attention_flops(sizes, n_context)


def _attention_flops(sizes: ModelSizes, n_context: int) -> int:
    """Return the FLOPs of attention to a context: 4 Q T a head, forward."""
    return 4 * sum(layer.width * layer.span(n_context) for layer in sizes.attention)


def activation_bytes(sizes: ModelSizes, n_tokens: int, *, checkpointing: bool) -> int:
    """Return the bytes that a training step keeps of `n_tokens` tokens for its backward pass. With
    gradient checkpointing they are the inputs of all layers, and everything of one.
    """
    if not checkpointing:
        return n_tokens * sizes.kept_bytes
    return n_tokens * (2 * sizes.width * sizes.n_layers + sizes.kept_bytes // sizes.n_layers)


def cache_bytes(sizes: ModelSizes, n_context: int, bytes_per_number: int = 2) -> int:
    """Return the bytes of keys and values that are kept for a text of `n_context` tokens."""
    numbers = sum(layer.cached_width * layer.span(n_context) for layer in sizes.attention)
    return bytes_per_number * numbers


def generation_bytes(
    sizes: ModelSizes, n_context: int, n_texts: int, bytes_per_number: int = 2
) -> int:
    """Return the bytes that are read to generate the next token of `n_texts` texts at once: all
    weights once, since together the texts choose most experts, and the keys and values of each.
    """
    cached = n_texts * cache_bytes(sizes, n_context, bytes_per_number)
    return bytes_per_number * sizes.total + cached


# -- from a config ---------------------------------------------------------------------------------


def read_attention(config: Mapping[str, Any]) -> tuple[Attention, ...]:
    """Return the attention of each layer that has any, from the config of a language model as
    transformers completes it (`config.get_text_config().to_dict()`).
    """
    n_layers = _first(config, "num_hidden_layers", "n_layer", "n_layers")
    kinds = config.get("layer_types") or ["full_attention"] * n_layers
    window = None
    if config.get("use_sliding_window", True) and not config.get("layer_types"):
        window = config.get("sliding_window")
    overrides = config.get("per_layer_config") or {}
    return tuple(
        _read_layer({**config, **overrides.get(str(number), {})}, kind, window)
        for number, kind in enumerate(kinds)
        if kind not in NO_ATTENTION
    )


def _read_layer(config: Mapping[str, Any], kind: str, window: int | None) -> Attention:
    n_heads = _first(config, "num_attention_heads", "n_head", "n_heads")
    size = config.get("head_dim") or _first(config, "hidden_size", "n_embd", "d_model") // n_heads
    n_cached = config.get("num_key_value_heads") or n_heads
    if "sliding" in kind:
        window = config.get("sliding_window")
    elif "chunked" in kind:
        window = config.get("attention_chunk_size")
    key_size, value_size = size, config.get("v_head_dim") or size
    if "qk_nope_head_dim" in config:  # latent attention: keys and values differ in size
        key_size = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    both = key_size + value_size
    return Attention(n_heads * both // 2, n_cached * both, window)


def read_experts(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return how many experts a layer has and how many each token is sent to; None without any."""
    names = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
    chosen = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k")
    try:
        return _first(config, *names), _first(config, *chosen)
    except KeyError:
        return None


def _first(config: Mapping[str, Any], *names: str) -> int:
    """Return the first of some fields that is set; raises KeyError if none is."""
    for name in names:
        if config.get(name) is not None:
            return int(config[name])
    raise KeyError(names[0])
