"""Tiny real models, and how tensors are compared."""

import torch
from transformers import (
    DeepseekV3Config,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3_5Config,
)

from optimer_hf.models.blocks import matrix_shape
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.layout import ResolvedModel
from optimer_hf.vectors.vector import dense_rows

PAD, EOS, BOS = 0, 1, 2
VOCABULARY = 3 + 256
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
WIDE = SIZES | {"intermediate_size": 48}
GROUPED = WIDE | {"num_key_value_heads": 2}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "vision_use_head": False,
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
}


def deepseek_v3() -> DeepseekV3Config:
    """One dense layer, and one of experts, which its files store one by one."""
    return DeepseekV3Config(
        **WIDE,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
    )


def gemma3_multimodal(head_dim: int = 8) -> Gemma3Config:
    return Gemma3Config(
        text_config=GROUPED | {"head_dim": head_dim}, vision_config=VISION, mm_tokens_per_image=1
    )


def qwen35_multimodal() -> Qwen3_5Config:
    """Loaded as its language part alone, under names without the prefix of the checkpoint."""
    return Qwen3_5Config(
        text_config=GROUPED | {"head_dim": 8, "layer_types": ["full_attention"] * 2},
        vision_config=QWEN_VISION,
    )


def tiny_model(kind: str = "gemma", *, seed: int = 0, dtype: torch.dtype = torch.float32):
    """Return a 2-layer Gemma 3 text model (tied) or Llama (untied) with random weights."""
    torch.manual_seed(seed)
    common = GROUPED | {"max_position_embeddings": 256}
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**common, tie_word_embeddings=False))
    else:
        config = Gemma3TextConfig(
            **common, head_dim=16, sliding_window=64, query_pre_attn_scalar=16
        )
        model = Gemma3ForCausalLM(config)
        with torch.no_grad():  # the norms of a fresh Gemma are all zero; real ones are not
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype)


INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bits of a tensor: unlike its numbers, -0.0 and 0.0 are not equal."""
    return tensor.contiguous().view(INTEGERS[tensor.dtype])


def ulps_apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Count representable bfloat16 numbers between two tensors, element by element."""

    def ordered(tensor: torch.Tensor) -> torch.Tensor:
        whole = bits(tensor).int()
        return torch.where(whole < 0, -(whole & 0x7FFF), whole)

    return (ordered(a) - ordered(b)).abs()


def delta_rows(vector, base: ResolvedModel, name: str, rows: slice) -> torch.Tensor:
    return dense_rows(vector, name, rows, Checkpoint(base.path).read_rows(name, rows))


def whole_delta(vector, base: ResolvedModel, name: str) -> torch.Tensor:
    """Return the delta of a tensor in the matrix form."""
    shape = Checkpoint(base.path).shape(name)
    return delta_rows(vector, base, name, slice(0, matrix_shape(shape)[0]))
