"""The keys of mergekit as a table, so that a typo is named without importing mergekit, which takes
seconds.

A test compares the table with the mergekit of its version.
"""

from typing import Any

from optimer_hf.merging.mergekit_keys import METHOD, Keys

VERSION = "0.1.5"  # of mergekit

FIELDS = {
    "config": [
        *("modules", "slices", "models", "merge_method", "base_model", "dtype"),
        *("tokenizer_source", "tokenizer", "chat_template", "out_dtype", "parameters"),
    ],
    "module": ["slices", "models", "parameters"],
    "model": ["model", "parameters"],
    "slice": ["sources", "base_model", "residual_weight", "parameters"],
    "source": ["model", "layer_range", "parameters"],
    "tokenizer": ["source", "tokens", "pad_to_multiple_of"],
    "token": ["source", "force"],
    "model_token": ["kind", "model", "token_id", "token"],
    "zero": ["kind"],
}
OF_TASK_ARITHMETIC: dict[str, Any] = {
    **{"int8_mask": bool, "normalize": bool, "rescale": bool},
    **{"lambda": float, "weight": float, "density": float},
}
PARAMETERS: dict[str, dict[str, Any]] = {  # merge method -> parameter -> type of its value
    "multislerp": {"weight": float, "normalize_weights": bool, "eps": float},
    "nearswap": {"t": float},
    "ram": {"epsilon": float},
    "ramplus_tl": {"r": float, "alpha": float, "epsilon": float},
    "sce": {"int8_mask": bool, "select_topk": float},
    "linear": {"weight": float, "normalize": bool},
    "slerp": {"t": float},
    "nuslerp": {"weight": float, "nuslerp_row_wise": bool, "nuslerp_flatten": bool},
    "passthrough": {"scale": float | None},
    "model_stock": {"filter_wise": bool},
    "arcee_fusion": {},
    "karcher": {"max_iter": int, "tol": float},
    **dict.fromkeys(("task_arithmetic", "ties", "dare_ties", "dare_linear"), OF_TASK_ARITHMETIC),
    **dict.fromkeys(("breadcrumbs", "breadcrumbs_ties"), OF_TASK_ARITHMETIC | {"gamma": float}),
    **dict.fromkeys(("della", "della_linear"), OF_TASK_ARITHMETIC | {"epsilon": float}),
    METHOD: {"weight": float, "delta": bool | None},
}
CHAT_TEMPLATES = ["alpaca", "chatml", "exaone", "llama3", "mistral"]

KEYS = Keys(FIELDS, PARAMETERS, CHAT_TEMPLATES)
