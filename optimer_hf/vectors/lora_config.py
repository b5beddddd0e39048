"""Turn the fields of a LoRA config into rank and scale, or say why its delta cannot be weighted.

The fields come from adapter_config.json or a train file. One table decides about every field of
peft.LoraConfig; an unknown field is refused unless it has its default value. The file is untrusted,
so nothing here compiles a pattern from it or passes it to PEFT.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from optimer_hf.errors import ModelError
from optimer_hf.files.patterns import ends_with, is_literal
from optimer_hf.models.loader import read_settings, refuse_code

LARGEST_RANK, LARGEST_ROW = 2**16, 2**25
TOKENS = "trainable_token_indices"

# Decisions. HANDLED: read here or in `lora`. HARMLESS: describes the origin or training of the
# adapter, matters only together with a refused field, or can be seen from the tensors.
HANDLED, HARMLESS = "handled", "harmless"
FIELDS: dict[str, str] = {  # of LoraConfig; any other text is the reason for refusing the field
    "peft_type": HANDLED,
    "base_model_name_or_path": HANDLED,
    "r": HANDLED,
    "lora_alpha": HANDLED,
    "rank_pattern": HANDLED,
    "alpha_pattern": HANDLED,
    "use_rslora": HANDLED,
    "target_modules": HANDLED,
    "exclude_modules": HANDLED,
    "layers_to_transform": HANDLED,
    "layers_pattern": HANDLED,
    "modules_to_save": HANDLED,
    "init_lora_weights": HANDLED,
    "ensure_weight_tying": HANDLED,
    "bias": HARMLESS,  # the tensors show which biases moved
    "lora_bias": HARMLESS,
    "fan_in_fan_out": HARMLESS,  # the layer shows it
    "task_type": HARMLESS,
    "auto_mapping": HARMLESS,
    "peft_version": HARMLESS,
    "revision": HARMLESS,
    "inference_mode": HARMLESS,
    "lora_dropout": HARMLESS,
    "runtime_config": HARMLESS,
    "megatron_core": HARMLESS,
    "loftq_config": HARMLESS,
    "eva_config": HARMLESS,
    "corda_config": HARMLESS,
    "lora_ga_config": HARMLESS,
    "qalora_group_size": HARMLESS,
    "use_dora": "DoRA rescales the merged weight, so its delta depends on the other vectors",
    "layer_replication": "layer_replication gives the model other layers than its base has",
    "target_parameters": "target_parameters adapts stacked expert weights",
    "trainable_token_indices": "trainable_token_indices replaces rows of the embedding",
    "megatron_config": "megatron_config is for layers that are split over processes",
    "alora_invocation_tokens": "alora_invocation_tokens adapts some tokens of a text only",
    "arrow_config": "arrow_config chooses among adapters token by token",
    "kasa_config": "kasa_config truncates the base weights",
    "monteclora_config": "monteclora_config draws its weights at random",
    "use_bdlora": "use_bdlora has factors in blocks",
    "use_qalora": "use_qalora pools the input of the layer",
    "velora_config": "velora_config compresses what the layer keeps",
}
OTHERS = dict.fromkeys(  # training fields that ms-swift adds to PEFT's
    ("lora_dtype", "lorap_lr_ratio", "lorap_emb_lr"), HARMLESS
)
KEEPING_INITS = {"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"}
FIELD_OF = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
REPLACING = ("layer_replication",)  # replaces layers, so a merge cannot have the same function
PATTERNS = {  # how PEFT matches names with these fields; {} is the value of the field
    "target_modules": "(?:{})\\Z",
    "exclude_modules": "(?:{})\\Z",
    "feedforward_modules": "(?:{})\\Z",
    "modules_to_save": "(^|.*\\.){}($|\\..*)",
    "rank_pattern": "(.*\\.)?({})$",
    "alpha_pattern": "(.*\\.)?({})$",
    "layers_pattern": "(?:^|.*?\\.){}\\.(?P<idx>\\d+)\\.",
}


class PatternError(ValueError):
    """A key of rank_pattern or alpha_pattern is a real pattern, which is never compiled."""


def read_options(path: Path, where: str) -> dict[str, Any]:
    """Return adapter_config.json as a mapping; raises ModelError if it cannot be read."""
    try:
        refuse_code(path)
        options = read_settings(path / "adapter_config.json")
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from None
    if options.get("peft_type") is None:
        raise ModelError(
            f"{where}: its adapter_config.json has no peft_type, so it is not one of PEFT's "
            "(mlx-lm gives its own this name). Save the adapter in the format of PEFT, or merge it "
            "into its base with the program that trained it, and give the whole model."
        )
    return options


def why_not_weighted(options: Mapping[str, Any]) -> str | None:
    """Return why a LoRA's delta is not the sum of the products and trained tensors in its file.

    Returns None if it is. Takes the fields of a LoraConfig, with or without those at their
    defaults.
    """
    kind = options.get("peft_type")
    if str(getattr(kind, "value", kind)) != "LORA":
        return f"a {str(kind)[:80]} adapter; only LoRA is linear in its delta"
    start = options.get("init_lora_weights")
    if str(start).lower() not in KEEPING_INITS:
        return f"init_lora_weights {str(start)[:80]!r} rewrites the base weights"
    for field, value in options.items():
        decision = FIELDS.get(field) or OTHERS.get(field)
        if decision is None and value and value != _default_of(field):
            return (
                f"{field[:80]}: {_short_repr(value)} is no field of a LoRA that this version knows"
            )
        if decision not in (None, HANDLED, HARMLESS) and not _is_unset(value):
            return decision
    return None


def why_not_trained(options: Mapping[str, Any]) -> str | None:
    """Return why a LoRA with these fields cannot be trained here, or None if it can."""
    if options.get("inference_mode"):
        return "inference_mode freezes the factors, so nothing would be trained"
    task = options.get("task_type")
    if task is not None and str(getattr(task, "value", task)) != "CAUSAL_LM":
        return f"task_type {str(task)[:80]!r}, expected CAUSAL_LM"
    if str(options.get("init_lora_weights")).lower() == "eva":
        return "init_lora_weights 'eva' needs a pass over the data before training"
    try:
        for field in ("rank_pattern", "alpha_pattern"):
            values = _mapping_in(options, field).values()
            for value in values:
                rank_and_scale({**options, FIELD_OF[field]: value, field: {}}, "")
        rank_and_scale({**options, "rank_pattern": {}, "alpha_pattern": {}}, "")
    except ValueError as error:
        return f"found {error}"
    return None


def _default_of(field: str) -> Any:
    """Return the default of a field in the installed PEFT, or None if it has no such field."""
    from peft import LoraConfig

    known = {item.name: item for item in dataclasses.fields(LoraConfig)}
    if field not in known or known[field].default is dataclasses.MISSING:
        return None
    return known[field].default


def _is_unset(value: Any) -> bool:
    """Whether a field has the value of a plain LoRA; {} does not, it selects a variant."""
    return value is None or value is False or value == []


def rank_and_scale(options: Mapping[str, Any], module: str) -> tuple[int, float]:
    """Return the rank and scale of a module's product, as PEFT determines them.

    Raises ValueError for invalid values, and PatternError for a pattern that is not a name.
    """
    rank = _value_for(options, "rank_pattern", module, options.get("r"))
    alpha = _value_for(options, "alpha_pattern", module, options.get("lora_alpha"))
    stabilised = options.get("use_rslora")
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 < rank <= LARGEST_RANK:
        raise ValueError(f"rank {_short_repr(rank)}, expected 1 to {LARGEST_RANK:,}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise ValueError(f"alpha {_short_repr(alpha)}, expected a number")
    if not isinstance(stabilised, bool | None):
        raise ValueError(f"use_rslora {_short_repr(stabilised)}, expected true or false")
    try:
        scale = float(alpha / math.sqrt(rank) if stabilised else alpha / rank)
    except OverflowError:
        scale = math.inf
    if not math.isfinite(scale):
        raise ValueError(f"alpha {_short_repr(alpha)}, expected a finite number")
    return rank, scale


def _value_for(options: Mapping[str, Any], field: str, module: str, default: Any) -> Any:
    """Return the value of the first key in a pattern field that matches a module, else default."""
    given = _mapping_in(options, field)
    for key in given:
        if not is_literal(key):
            raise PatternError(
                f"{field} {_short_repr(key)}, a pattern; expected the end of a name of a layer"
            )
    return next((value for key, value in given.items() if ends_with(module, key)), default)


def _mapping_in(options: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    given = options.get(field)
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise ValueError(f"{field} {_short_repr(given)}, expected a mapping from names")
    return given


def _short_repr(value: Any) -> str:
    """Return a short repr; an integer may have more digits than Python prints."""
    try:
        return repr(value)[:80]
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} that is too large"


# -- which layers ----------------------------------------------------------------------------------


def is_targeted(options: Mapping[str, Any], module: str) -> bool:
    """Whether a config lets PEFT adapt a module; a pattern (a string) is assumed to match."""
    excluded, wanted = _names(options, "exclude_modules"), _names(options, "target_modules")
    if excluded is not None and _is_among(module, excluded):
        return False
    if wanted is None or module in wanted or options.get("ensure_weight_tying"):
        return True
    return _is_among(module, wanted) and _is_in_layers(options, module)


def _names(options: Mapping[str, Any], field: str) -> list[str] | None:
    """Return the names listed in a field; None for a pattern, a PEFT keyword or a missing field."""
    given = options.get(field)
    return [str(name) for name in given] if isinstance(given, list | set | tuple) else None


def _is_among(module: str, names: Iterable[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _is_in_layers(options: Mapping[str, Any], module: str) -> bool:
    """Whether the first number in a name is among layers_to_transform."""
    wanted = options.get("layers_to_transform")
    if wanted is None or wanted == [] or options.get("layers_pattern"):
        return True
    parts = module.split(".")
    layer = next((int(part) for part in parts[2:-1] if part.isascii() and part.isdigit()), None)
    return layer in (wanted if isinstance(wanted, list | tuple) else [wanted])


def saved_modules(options: Mapping[str, Any]) -> list[str]:
    """Return the names in modules_to_save."""
    given = options.get("modules_to_save")
    return [str(name) for name in given] if isinstance(given, list | tuple) else []


def token_indices(options: Mapping[str, Any], module: str) -> list[int] | None:
    """Return the rows of an embedding or a head that trainable_token_indices names; None if it
    names none. A list is for the embedding and what is tied to it.
    """
    given = options.get(TOKENS)
    if isinstance(given, Mapping):
        ends = (value for key, value in given.items() if ends_with(module, str(key)))
        given = next(ends, next(iter(given.values())) if len(given) == 1 else None)
    rows = [*given] if isinstance(given, list | tuple) else []
    are_rows = all(type(row) is int and 0 <= row < LARGEST_ROW for row in rows)
    return rows if rows and are_rows and len(set(rows)) == len(rows) else None


def patterns_of(options: Mapping[str, Any]) -> list[str]:
    """Return the regular expressions that PEFT would compile from a config, except plain names."""
    patterns = []
    for field, frame in PATTERNS.items():
        given = options.get(field)
        texts = given if isinstance(given, list | tuple | set | Mapping) else [given]
        if field in ("target_modules", "exclude_modules", "feedforward_modules"):
            texts = [given]  # a list contains names, not patterns
        patterns += [
            frame.replace("{}", text)
            for text in texts
            if isinstance(text, str) and not is_literal(text)
        ]
    return patterns
