"""GGUF files of tiny models, written as llama.cpp's converter writes them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize

Tensors = dict[str, torch.Tensor]


def keep(model: Any, name: str, tensor: torch.Tensor) -> Tensors:
    return {name: tensor}


def interleave_heads(model: Any, name: str, tensor: torch.Tensor) -> Tensors:
    """Interleave the rotary halves of queries and keys."""
    config = model.config
    for part, n_heads in (
        ("q_proj", config.num_attention_heads),
        ("k_proj", config.num_key_value_heads),
    ):
        if part in name:
            halves = tensor.reshape(n_heads, 2, tensor.shape[0] // n_heads // 2, *tensor.shape[1:])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
    return {name: tensor}


def write_gguf(
    path: Path,
    architecture: str,
    model: Any,
    keys: Mapping[str, Any],
    convert: Callable[[Any, str, torch.Tensor], Tensors] = keep,
    more: Mapping[str, torch.Tensor] | None = None,
    *,
    tokenizer: Any = None,
    stored: GGMLQuantizationType = GGMLQuantizationType.F32,
) -> Path:
    """Write a model in F32, or the matrices with rows of whole blocks of 32 quantised as `stored`.

    `keys` belong to the architecture unless they begin with a slash, `convert` returns the tensors
    that are stored for one of the model, and `more` are further tensors. Without a tokenizer, the
    tokens have made-up names.
    """
    writer = GGUFWriter(path, architecture)
    for key, value in keys.items():
        full = key.removeprefix("/") if key.startswith("/") else f"{architecture}.{key}"
        _write_value(writer, full, value)
    _write_tokens(writer, tokenizer, model.config.vocab_size)
    number = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        for each, value in convert(model, name, tensor).items():
            stem, _, suffix = each.rpartition(".")
            is_blocked = value.ndim == 2 and value.shape[1] % 32 == 0
            kind = stored if is_blocked else GGMLQuantizationType.F32
            data = quantize(value.contiguous().float().numpy(), kind)
            writer.add_tensor(f"{names.get_name(stem)}.{suffix}", data, raw_dtype=kind)
    for name, tensor in (more or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_llama(
    path: Path,
    model: Any,
    tokenizer: Any,
    stored: GGMLQuantizationType = GGMLQuantizationType.F32,
) -> Path:
    """Write a Llama with its byte tokenizer in F32, or its matrices quantised as `stored`."""
    config = model.config
    keys = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": config.hidden_size // config.num_attention_heads,
        "vocab_size": config.vocab_size,
    }
    more: dict[str, Any] = {"tokenizer": tokenizer, "stored": stored}
    return write_gguf(path, "llama", model, keys, interleave_heads, **more)


def _write_value(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _write_tokens(writer: GGUFWriter, tokenizer: Any, n_tokens: int) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_token_scores([0.0] * n_tokens)  # transformers derives the merges from them: none
    if tokenizer is None:
        writer.add_token_list([f"t{number}" for number in range(n_tokens)])
        return
    writer.add_token_list(sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get))
    writer.add_token_types([TokenType.CONTROL] * 3 + [TokenType.NORMAL] * (n_tokens - 3))
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
