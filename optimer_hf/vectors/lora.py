"""Read a PEFT adapter as the delta of every tensor that it moves, without expanding it.

LoRA factors stay factors (`LowRank`): a merge multiplies row blocks of B by A directly. Biases and
whole modules, which are not products, are kept as stored and compared with the base when they are
read. Adapters whose delta has another form (DoRA, IA3, LoHa, OFT ...) are left to PEFT, on request.
"""

import functools
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.nn import Embedding, Linear

from optimer_hf.errors import ModelError
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.layout import INDEX, ResolvedModel
from optimer_hf.models.live import empty_model
from optimer_hf.models.names import names_in, summarize_names
from optimer_hf.models.ties import Ties, ties_of
from optimer_hf.printable import warn_once
from optimer_hf.vectors.forms import LowRank, OnCopy, Trained
from optimer_hf.vectors.lora_config import (
    TOKENS,
    PatternError,
    is_targeted,
    rank_and_scale,
    read_options,
    saved_modules,
    token_indices,
    why_not_weighted,
)
from optimer_hf.vectors.shapes import PREFIX

logger = logging.getLogger(__name__)


PARTNERS = {
    "lora_A": "lora_B",
    "lora_B": "lora_A",
    "lora_embedding_A": "lora_embedding_B",
    "lora_embedding_B": "lora_embedding_A",
}
TRAINED_TOKENS = ".token_adapter.trainable_tokens_delta"
PARTS = {  # what a stored tensor is, by the end of its name
    ".lora_A.weight": "A",
    ".lora_embedding_A": "embedding A",
    ".lora_B.weight": "B",
    ".lora_embedding_B": "B",
    ".lora_B.bias": "B.bias",
    TRAINED_TOKENS: "tokens",  # rows after training
}
FROZEN_COPY = ".base_layer.weight"  # PEFT saves an adapted embedding itself beside the factors
TOKENS_COPY = f".token_adapter{FROZEN_COPY}"
FACTORS_TWICE = (
    "PEFT's merge would add the product twice. Read the factors as they are: `optimer extract "
    "ADAPTER --base BASE OUT`, without --from-adapter."
)
FACTORS_APART = (
    "PEFT gives each its own factors, which drift apart on a GPU. Train the embedding with "
    "modules_to_save and ensure_weight_tying, with full parameters (leave `lora` out), or not at "
    "all."
)
OWN_NAME = re.compile(  # the name of the adapter in a tensor's name; PEFT's files omit it
    r"\.(?:lora_(?:embedding_)?[AB]|modules_to_save)\.(?!(?:weight|bias)$)([^.]+)"
    r"(?:\.(?:weight|bias))?$|\.(default)(?:\.(?:weight|bias))?$"
)
OF_PEFT = re.compile(  # a part of a tensor name that no model has
    r"^base_model\.model\.|\.(?:lora_|token_adapter\.|modules_to_save\.)"
)
MATERIALISE = "Write it as a delta first: `optimer extract ADAPTER --from-adapter --base BASE OUT`."
LAYERS_SHOWN = 12
CACHED = 16  # models whose layers are remembered


@dataclass(frozen=True)
class Lora:
    """A LoRA before any weights are read: the fields of its config, the shapes of its tensors, and
    its base.

    Error messages begin with `where` and end with `advice`.
    """

    options: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    base: Checkpoint
    where: str
    advice: str

    @cached_property
    def ties(self) -> Ties:
        """The tied tensors of the base."""
        return ties_of(self.base)

    @cached_property
    def names(self) -> frozenset[str]:
        """The tensor names of the base."""
        return frozenset(self.base.names)


@dataclass(frozen=True)
class Part:
    """The role of a stored tensor in the delta of a base tensor.

    `module` has its name in the adapter. Only products and the biases of B have `rank` and `scale`.
    """

    key: str
    kind: str
    target: str
    module: str
    rank: int = 0
    scale: float = 0.0
    is_transposed: bool = False


def read_adapter(path: Path, base: Checkpoint, name: str) -> dict[str, LowRank | Trained]:
    """Read a PEFT LoRA adapter into its parts, by base tensor name.

    A product on a resized or changed copy of the base's tensor is `OnCopy`. Raises ModelError if
    the adapter is not a sum of products and trained tensors, or if a tensor would not be used.
    """
    where = f"vector {name!r} ({path})"
    options = read_options(path, where)
    apart = {key: value for key, value in options.items() if key != TOKENS}
    refuse_options(apart, where, MATERIALISE)
    stored = _drop_copies(open_adapter(path, where), where)
    if not any(key.endswith(TRAINED_TOKENS) for key in stored.names):
        refuse_options(options, where, MATERIALISE)
    _check_prefix(stored.names, where)
    shapes = {key: stored.shape(key) for key in stored.names}
    parts: dict[str, LowRank | Trained] = {}
    for part in parts_of(Lora(options, shapes, base, where, MATERIALISE)):
        if part.kind == "tokens":
            trained = Trained(_read_tokens(stored, part, options, base, where))
            parts |= dict.fromkeys(_moved_with(part.target, ties_of(base)), trained)
        elif part.kind == "copy":
            if (copy := _read_changed_copy(stored, part, base)) is not None:
                parts[part.target] = _put_on_copy(parts.get(part.target), copy, part, where)
        elif part.kind == "B.bias":
            before = parts.get(part.target)
            bias = before.tensor if isinstance(before, Trained) else base.read(part.target)
            added = part.scale * stored.read(part.key).float()
            parts[part.target] = Trained(bias.float() + added)
        elif part.kind == "trained":
            parts[part.target] = Trained(stored.read(part.key))
        else:
            parts[part.target] = _read_product(stored, part)
    _warn_of_missing_layers(parts, options, base, where)
    return _merge_tied_parts(parts, ties_of(base), where)


@dataclass(frozen=True)
class Product:
    """A LoRA of one layer as PEFT stores it: scale * (b @ a), with b [out, r] and a [r, in] in
    float32. `module` has its name in the adapter.
    """

    module: str
    b: torch.Tensor
    a: torch.Tensor
    scale: float
    is_embedding: bool = False


def read_products(path: Path, base: Checkpoint, name: str) -> dict[str, Product]:
    """Read the products of a PEFT LoRA adapter, by base tensor name.

    Raises ModelError for an adapter that `read_adapter` refuses, and for a tensor that is no factor
    of a product: a bias, a whole module, the rows of tokens.
    """
    where = f"vector {name!r} ({path})"
    options = read_options(path, where)
    refuse_options(options, where, MATERIALISE)
    stored = open_adapter(path, where)
    _check_prefix(stored.names, where)
    shapes = {key: stored.shape(key) for key in stored.names}
    lora = Lora(options, shapes, base, where, MATERIALISE)
    products = {}
    for part in parts_of(lora):
        if part.kind == "copy":
            continue
        if part.kind not in ("A", "embedding A"):
            raise ModelError(
                f"{where}: tensor {part.key!r} is no factor of a product (it is a bias, a module "
                "of modules_to_save, or trained tokens), so no sum of LoRA factors holds it. Build "
                "the model instead, without --as adapter."
            )
        if lora.ties.group_of(part.target):
            raise ModelError(
                f"{where}: adapts {part.target!r}, which the base ties to another tensor, and PEFT "
                "would adapt one of them. Build the model instead, without --as adapter."
            )
        a, b = stored.read(part.key).float(), stored.read(_partner_key(part.key)).float()
        is_embedding = part.kind == "embedding A"
        products[part.target] = Product(part.module, b, a, part.scale, is_embedding)
    return products


def _warn_of_missing_layers(
    moved: Iterable[str], options: Mapping[str, Any], base: Checkpoint, where: str
) -> None:
    """Warn of layers that an adapter's config targets but that have no tensors in it.

    PEFT leaves them unchanged, too. If the config has a pattern, its layers are not known.
    """
    if not isinstance(options.get("target_modules"), list):
        return
    ties, held = ties_of(base), {*moved}
    listed = {key: value for key, value in options.items() if key != "ensure_weight_tying"}
    lacking = [
        name
        for name in base.names
        if name.endswith(".weight")
        and not {name, ties.source_of(name)} & held
        and ".experts." not in name  # a loaded model stacks these in one tensor
        and len(base.shape(name)) == 2
        and is_targeted(listed, name.removesuffix(".weight"))
    ]
    if lacking:
        warn_once(
            logger,
            f"{where}: holds nothing for {len(lacking)} layers that its config targets "
            f"({_summarize_layers(lacking)}). They stay as in the base. If it was trained on "
            "them, fetch it again.",
        )


def _summarize_layers(names: Iterable[str]) -> str:
    """Summarise tensor names in a few words, with their layer numbers."""
    numbers = sorted({int(part) for name in names for part in name.split(".") if part.isdigit()})
    shown = ", ".join(map(str, numbers[:LAYERS_SHOWN])) + ", ..." * (len(numbers) > LAYERS_SHOWN)
    return summarize_names(names) + (f"; of layer {shown}" if numbers else "")


def open_adapter(path: Path, where: str) -> Checkpoint:
    """Open the tensors of an adapter; raises ModelError if there are none, if one is empty, or if
    the weights beside its config are those of a model.
    """
    has_model, has_adapter = (
        any((path / f"{prefix}{end}").exists() for end in (".safetensors", INDEX))
        for prefix in ("model", "adapter_model")
    )
    stored = Checkpoint(path, "adapter_model")
    if has_model and not has_adapter and not any(map(OF_PEFT.search, stored.names)):
        raise ModelError(
            f"{where}: has an adapter_config.json, but the weights of a whole model and none of an "
            "adapter. If the model is meant, take adapter_config.json out of its directory."
        )
    if has_model and has_adapter:
        warn_once(
            logger,
            f"{where}: has the weights of an adapter and of a whole model. The adapter is read; if "
            "the model is meant, take the files of the adapter out of its directory.",
        )
    if not stored.names:
        raise ModelError(f"{where}: holds no tensors, so it moves nothing. Fetch it again.")
    for name in stored.names:
        if 0 in stored.shape(name):
            raise empty_tensor_error(where, name)
    return stored


def empty_tensor_error(where: str, name: str) -> ModelError:
    """Return the error for a tensor without elements."""
    return ModelError(
        f"{where}: tensor {name!r} is empty. DeepSpeed ZeRO-3 leaves it so where the weights were "
        "saved without being gathered. Save them with `stage3_gather_16bit_weights_on_model_save`, "
        "or convert the checkpoint of the training with its zero_to_fp32.py."
    )


def _check_prefix(names: Sequence[str], where: str) -> None:
    """Warn if tensor names lack PEFT's prefix, as after `inject_adapter_in_model`.

    PeftModel would load none of them, but transformers' `load_adapter` does, and so do we. Raises
    ModelError if only some names lack the prefix.
    """
    bare = sorted(name for name in names if not name.startswith(PREFIX))
    if not bare:
        return
    if len(bare) < len(names):
        raise ModelError(
            f"{where}: tensor {bare[0]!r} lacks the prefix {PREFIX!r} that other tensors have, so "
            "PEFT would ignore it. Rename it, or save the adapter with PEFT's `save_pretrained`."
        )
    warn_once(
        logger,
        f"{where}: its tensor names lack the prefix {PREFIX!r}, so PEFT's PeftModel would ignore "
        "them. They are applied to the layers that they name, as transformers' load_adapter does. "
        "PEFT's `save_pretrained` adds the prefix.",
    )


def refuse_options(options: Mapping[str, Any], where: str, advice: str) -> None:
    """Raise ModelError if a LoRA has fields that make it impossible to weight its delta."""
    if reason := why_not_weighted(options):
        raise ModelError(f"{where}: {reason}. {advice}")


def parts_of(lora: Lora) -> list[Part]:
    """Return the role of each tensor of a LoRA.

    Raises a ModelError that names a tensor if it would be ignored or fits no layer.
    """
    refuse_own_names(lora.shapes, lora.where)
    parts: dict[str, Part] = {}
    last = []
    for key, (target, kind) in targets_of(lora.shapes, lora.base).items():
        part = Part(key, kind, target, module_of(key))
        _refuse_unused_tensor(part, lora)
        if key.endswith(TOKENS_COPY):
            continue  # read with the tokens
        if key.endswith(FROZEN_COPY):
            last.append(replace(part, kind="copy"))
            continue
        if kind in ("A", "embedding A", "B"):
            partner = _partner_of(part, lora)
            if kind == "B":
                continue
            part = _complete_product(part, partner, lora)
        elif kind == "B.bias":  # added after the layer's own bias, which may be trained, too
            last.append(_complete_bias(part, lora))
            continue
        if target in parts:
            raise ModelError(f"{lora.where}: adapts {target!r} in two ways. {lora.advice}")
        parts[target] = part
    _refuse_missing_modules(parts, lora)
    return [*parts.values(), *last]


def refuse_own_names(keys: Iterable[str], where: str) -> None:
    """Raise ModelError if tensor names include the adapter's name, as in a running model.

    PEFT would find a place for none of them.
    """
    for key in keys:
        if match := OWN_NAME.search(key):
            name = match[1] or match[2]
            raise ModelError(
                f"{where}: tensor {key!r} has the name of the adapter in its own, as in a state "
                f"dict of the model. Save the adapter with PEFT's `save_pretrained`, or take "
                f"'.{name}' out of the names of its tensors."
            )


def _refuse_unused_tensor(part: Part, lora: Lora) -> None:
    is_unnamed = part.kind == "tokens" and token_indices(lora.options, part.module) is None
    if part.kind == "" or is_unnamed:
        raise ModelError(
            f"{lora.where}: tensor {part.key!r} is not a LoRA factor of a linear or embedding "
            "layer, and nothing in adapter_config.json says what it is. Fetch both again, together."
        )
    is_of_layer = part.kind not in ("trained", "tokens") or ".base_layer." in part.key
    is_of_layer = is_of_layer and not part.key.endswith(TOKENS_COPY)
    if is_of_layer and not is_targeted(lora.options, part.module):
        raise ModelError(
            f"{lora.where}: tensor {part.key!r} adapts a layer that target_modules, "
            "exclude_modules or layers_to_transform of its config leave out, so PEFT would ignore "
            "it. Correct the config, or remove the tensor."
        )
    if lora.ties.source_of(part.target) not in lora.names:
        raise ModelError(
            f"{lora.where}: tensor {part.key!r} belongs to {part.target!r}, which the base "
            f"{lora.base.path} does not have. Give an adapter that was trained from this base; for "
            "one whose modules have other names, see `optimer extract --from-adapter`."
        )


def _refuse_missing_modules(held: Iterable[str], lora: Lora) -> None:
    """Refuse an adapter without tensors for a module in modules_to_save that the base has."""
    names = [f".{target}" for target in held]
    for module in saved_modules(lora.options):
        in_base = any(f".{module}." in f".{tensor}" for tensor in lora.base.names)
        if in_base and not any(f".{module}." in name for name in names):
            raise ModelError(
                f"{lora.where}: modules_to_save names {module!r}, but the file has no tensor "
                "of it. Fetch the adapter again."
            )


def refuse_unmergeable(keys: Sequence[str], base: Checkpoint, where: str) -> None:
    """Raise ModelError before training a LoRA that no merge could use, given its tensor names.

    Its layers may not be tensors in the base's checkpoint, or may be only part of a tied group.
    """
    products = [target for target, part in targets_of(keys, base).values() if part.endswith("A")]
    known, ties = set(base.names), ties_of(base)
    if unfit := sorted(name for name in products if ties.source_of(name) not in known):
        fit = sorted({name.split(".")[-2] for name in products if name in known})
        raise ModelError(
            f"{where}: adapts {unfit[0].removesuffix('.weight')!r}, which the checkpoint stores in "
            f"another form (fused experts), so that it would fit no merge. Name the layers: "
            f"target_modules: [{', '.join(fit)}]."
        )
    kinds = kinds_of_targets(keys, base)
    refuse_split_ties(kinds, ties, where)
    refuse_products_on_ties(kinds, ties, where, FACTORS_APART)


def targets_of(keys: Iterable[str], base: Checkpoint) -> dict[str, tuple[str, str]]:
    """Return the base tensor and the part of every tensor in an adapter, see `_target_of`.

    PEFT names modules as in the loaded model; the checkpoint may use other names.
    """
    targets = {key: _target_of(key) for key in keys}
    known, ties = set(base.names), ties_of(base)
    others = {target for target, _ in targets.values() if ties.source_of(target) not in known}
    names = names_in(base, others)
    return {key: (names.get(target, [target])[0], part) for key, (target, part) in targets.items()}


def _target_of(key: str) -> tuple[str, str]:
    """Return the base tensor that a stored tensor belongs to, and its part.

    The part is a value of PARTS, `trained`, or empty if unknown.
    """
    module = key.removeprefix(PREFIX)
    for suffix, part in PARTS.items():
        if module.endswith(suffix):
            kind = "bias" if part == "B.bias" else "weight"
            return f"{module.removesuffix(suffix)}.{kind}", part
    if "lora_" in module:
        return module, ""
    return module.replace(TOKENS_COPY, ".weight").replace(".base_layer.", "."), "trained"


def module_of(key: str) -> str:
    """Return the layer of a stored tensor, under its name in the adapter."""
    module = re.split(r"\.(?:lora_|token_adapter\.)", key.removeprefix(PREFIX))[0]
    if module != key.removeprefix(PREFIX):
        return module
    return module.rpartition(".")[0].removesuffix(".base_layer")


def _partner_of(part: Part, lora: Lora) -> str:
    """Return the name of the other factor of a product; raises ModelError if it is missing."""
    factor = next(piece for piece in reversed(part.key.split(".")) if piece in PARTNERS)
    before, _, after = part.key.rpartition(f".{factor}")
    partner = f"{before}.{PARTNERS[factor]}{after}"
    if partner not in lora.shapes:
        raise ModelError(f"{lora.where}: tensor {partner!r} is missing. Fetch the adapter again.")
    return partner


def _complete_product(part: Part, partner: str, lora: Lora) -> Part:
    """Check the shapes of a product, and add its rank, scale and direction."""
    a, b = lora.shapes[part.key], lora.shapes[partner]
    if len(a) != 2 or len(b) != 2:
        raise ModelError(
            f"{lora.where}: tensor {part.key!r} has {len(a)} dimensions; only linear and embedding "
            f"layers are products of two matrices. {lora.advice}"
        )
    rank, scale = _rank_and_scale(part.module, lora)
    if not a[0] == b[1] == rank:
        raise ModelError(
            f"{lora.where}: {part.module} has factors of shape {list(a)} and {list(b)}, but rank "
            f"{rank} in adapter_config.json. Fetch the adapter again."
        )
    is_transposed = _is_transposed(part, (b[0], a[1]), lora)
    return replace(part, rank=rank, scale=scale, is_transposed=is_transposed)


def _complete_bias(part: Part, lora: Lora) -> Part:
    """Check the bias of a factor B, which PEFT adds to the layer's bias, and add its scale."""
    if part.key.removesuffix("bias") + "weight" not in lora.shapes:
        raise ModelError(
            f"{lora.where}: tensor {part.key!r} has no factors. Fetch the adapter again."
        )
    shape, expected = lora.shapes[part.key], lora.base.shape(part.target)
    if shape != expected:
        raise ModelError(
            f"{lora.where}: tensor {part.key!r} has shape {list(shape)}, {part.target!r} of the "
            f"base has {list(expected)}. {lora.advice}"
        )
    rank, scale = _rank_and_scale(part.module, lora)
    return replace(part, rank=rank, scale=scale)


def _rank_and_scale(module: str, lora: Lora) -> tuple[int, float]:
    try:
        return rank_and_scale(lora.options, module)
    except PatternError as error:
        raise ModelError(
            f"{lora.where}: found {error}. Write the names out, a key for each. {lora.advice}"
        ) from None
    except ValueError as error:
        raise ModelError(
            f"{lora.where}: adapter_config.json has no usable rank and alpha for {module}: found "
            f"{error}. Enter the values it was trained with, or fetch the adapter again."
        ) from None


def _is_transposed(part: Part, shape: tuple[int, int], lora: Lora) -> bool:
    """Whether a layer stores its weight input-first, (b @ a).T: embeddings and GPT-2's Conv1D.

    The class of the layer decides, since an adapter's config may be wrong and a square matrix fits
    either way.
    """
    from transformers.pytorch_utils import Conv1D

    layers, ties = _layers_of(lora.base), lora.ties
    layer = layers.get(ties.class_names.get(part.target, part.target)) if layers else None
    is_embedding = part.kind == "embedding A"
    if layer is not None and issubclass(layer, Conv1D | Linear | Embedding):
        if issubclass(layer, Embedding) is not is_embedding:
            raise ModelError(
                f"{lora.where}: tensor {part.key!r} is not a factor of a {layer.__name__}, which "
                f"{part.target!r} belongs to. Fetch the adapter again."
            )
        return is_embedding or issubclass(layer, Conv1D)
    if not layers and not is_embedding and shape[0] == shape[1]:
        raise ModelError(
            f"{lora.where}: transformers does not know the class of the base {lora.base.path}, so "
            f"nothing says which way round the square {part.target!r} is stored. Merge the adapter "
            "with the program that trained it."
        )
    return is_embedding or lora.base.shape(ties.source_of(part.target)) == shape[::-1] != shape


def _layers_of(base: Checkpoint) -> Mapping[str, type]:
    """Return the layer class of every weight, by its name in the model.

    The mapping is empty if transformers does not know the model.
    """
    config = base.path / "config.json"
    changed = config.stat().st_mtime_ns if config.exists() else 0
    return _layers(base.path, changed)


@functools.lru_cache(maxsize=CACHED)
def _layers(path: Path, changed: int) -> Mapping[str, type]:
    """Return layer classes; `changed` is part of the cache key, to notice a changed config."""
    try:
        model = empty_model(ResolvedModel(path, path.name))
    except ModelError:
        return {}
    return {f"{name}.weight": type(module) for name, module in model.named_modules()}


def _read_product(stored: Checkpoint, part: Part) -> LowRank:
    a, b = stored.read(part.key).float(), stored.read(_partner_key(part.key)).float()
    if part.is_transposed:
        a, b = b.T.contiguous(), a.T.contiguous()
    return LowRank(b, a, part.scale)


def _partner_key(key: str) -> str:
    """Return the name of the factor B that belongs to a factor A."""
    return key.replace(".lora_embedding_A", ".lora_embedding_B").replace(".lora_A", ".lora_B")


def _drop_copies(stored: Checkpoint, where: str) -> Checkpoint:
    """Return the tensors of an adapter, each once. PEFT saves an embedding that was resized under
    every name that its module has: as trained, as it was, and again as trained.

    Raises ModelError if the two that were trained differ.
    """
    names = {key: key for key in stored.names if ".original_module." not in key}
    for key in stored.names:
        plain = key.replace(".modules_to_save.", ".")
        if plain == key:
            continue
        if plain in names and not stored.are_equal(key, plain):
            raise ModelError(
                f"{where}: tensors {key!r} and {plain!r} are the same one, but their numbers "
                "differ. Save the adapter again."
            )
        del names[key]
        names[plain] = key
    return stored if [*names] == stored.names else stored.rename(names)


def _moved_with(target: str, ties: Ties) -> list[str]:
    """Return the tensors that trained tokens move: PEFT moves what is tied to an embedding with
    it, and a head alone.
    """
    group = ties.group_of(target)
    is_first = group and ties.class_names.get(target, target) == group[0]
    return [target, *group[1:]] if is_first else [target]


def _read_tokens(
    stored: Checkpoint, part: Part, options: Mapping[str, Any], base: Checkpoint, where: str
) -> torch.Tensor:
    """Return an embedding or a head with its trained rows, from the copy of it in the adapter, if
    there is one, or from the base.
    """
    rows, indices = stored.read(part.key), token_indices(options, part.module) or []
    copy = part.key.replace(TRAINED_TOKENS, TOKENS_COPY)
    own = copy in stored.names
    tensor = stored.read(copy) if own else base.read(ties_of(base).source_of(part.target))
    if len(rows) != len(indices) or max(indices) >= len(tensor):
        raise ModelError(
            f"{where}: tensor {part.key!r} has {len(rows)} rows, and {TOKENS} names "
            f"{len(indices)}, up to {max(indices)} of {len(tensor)}. If the embedding was resized, "
            "save the adapter with `save_embedding_layers=True`; otherwise fetch it again."
        )
    tensor = tensor.to(torch.promote_types(tensor.dtype, rows.dtype))
    tensor[indices] = rows.to(tensor.dtype)
    return tensor


def _read_changed_copy(stored: Checkpoint, part: Part, base: Checkpoint) -> torch.Tensor | None:
    """Return an adapter's copy of a tensor of the base, or None if it is the same."""
    copy, tensor = stored.read(part.key), base.read(ties_of(base).source_of(part.target))
    is_same = copy.shape == tensor.shape and torch.equal(copy.to(tensor.dtype), tensor)
    return None if is_same else copy


def _put_on_copy(
    product: LowRank | Trained | None, copy: torch.Tensor, part: Part, where: str
) -> OnCopy:
    if not isinstance(product, LowRank) or copy.shape != product.shape:
        raise changed_copy_error(where, part.target)
    return OnCopy(product.b, product.a, product.scale, copy)


def changed_copy_error(where: str, name: str) -> ModelError:
    """Return the error for an adapter whose copy of a tensor differs from the base."""
    return ModelError(
        f"{where}: its copy of {name!r} differs from the base: the embedding was resized or "
        "trained. Train the embedding with full parameters, or leave it out; if it was resized for "
        "new tokens, `vocabulary: union` in a study or recipe matches rows by token."
    )


def _merge_tied_parts(
    parts: Mapping[str, LowRank | Trained], ties: Ties, where: str
) -> dict[str, LowRank | Trained]:
    """Return an adapter's parts by stored tensor, with one part for each group of tied tensors.

    The adapter must move tied tensors alike, as PEFT does with `ensure_weight_tying`.
    """
    refuse_split_ties({name: type(part).__name__ for name, part in parts.items()}, ties, where)
    joined: dict[str, LowRank | Trained] = {}
    for name, part in sorted(parts.items(), key=lambda item: item[0] != ties.source_of(item[0])):
        other = joined.setdefault(ties.source_of(name), part)
        if part is not other and not _are_alike(part, other):  # NaN does not even equal itself
            raise _split_ties_error([name], [ties.source_of(name)], where)
    return joined


def _are_alike(one: LowRank | Trained, other: LowRank | Trained) -> bool:
    if type(one) is not type(other):
        return False
    return all(
        torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
        for mine, theirs in zip(vars(one).values(), vars(other).values(), strict=True)
    )


def refuse_split_ties(kinds: Mapping[str, str], ties: Ties, where: str) -> None:
    """Raise ModelError if an adapter moves only some tensors of a tied group, or not alike.

    `kinds` maps tensor names to the kind of their part.
    """
    for group in ties.groups:
        moved = {name: kind for name, kind in kinds.items() if ties.group_of(name) == group}
        names = {ties.class_names.get(name, name) for name in moved}
        left = [name for name in group if name not in names]
        if moved and (left or len(set(moved.values())) > 1):
            raise _split_ties_error(sorted(moved), left, where)


def _split_ties_error(moved: Sequence[str], left: Sequence[str], where: str) -> ModelError:
    other = f"leaves {left[0]!r} as it is" if left else "does not move them alike"
    return ModelError(
        f"{where}: trains {' and '.join(map(repr, moved))} and {other}, but the base ties them to "
        "one tensor: the model as trained has two, and a merge has one. Train the embedding with "
        "full parameters, with modules_to_save and ensure_weight_tying, or not at all."
    )


def kinds_of_targets(keys: Iterable[str], base: Checkpoint) -> dict[str, str]:
    """Return how PEFT moves each base tensor, given the names of an adapter's tensors.

    PEFT trains and merges tokens of a tied embedding in both tensors.
    """
    ties, kinds = ties_of(base), dict[str, str]()
    for key, (target, part) in targets_of(keys, base).items():
        group = ties.group_of(target)
        if part == "tokens" and group and target == group[0]:
            kinds |= dict.fromkeys(group, part)
        elif not key.endswith(FROZEN_COPY):
            kinds[target] = part if part in ("tokens", "trained") else "product"
    return kinds


def refuse_products_on_ties(kinds: Mapping[str, str], ties: Ties, where: str, advice: str) -> None:
    """Raise ModelError if an adapter adds a product to tensors that the base ties to one."""
    for target, kind in kinds.items():
        if kind == "product" and (group := ties.group_of(target)):
            raise ModelError(
                f"{where}: adapts both {' and '.join(map(repr, group))}, which the base ties to "
                f"one tensor. {advice}"
            )
