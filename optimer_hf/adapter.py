"""A PEFT adapter -> the delta of every tensor it moves, kept as small as it is stored.

LoRA factors stay factors (`LowRank`): a row block of B times A is multiplied straight into the
merge. What is not a product (biases, whole modules saved beside it) comes as it is stored, to be
compared with the base when it is read. Adapters whose delta is not of that form (DoRA, IA3, LoHa,
OFT ...) are merged by PEFT itself, on request.
"""

import math
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from optimer_hf.checkpoint import Checkpoint
from optimer_hf.convert import ResolvedModel, loaded_model, moves_base, stored_names
from optimer_hf.errors import ModelError
from optimer_hf.files import first_line
from optimer_hf.kernel import LowRank, Trained
from optimer_hf.loader import model_with_adapter, read_adapter_config
from optimer_hf.ties import Ties, ties_of

PARTNERS = {
    "lora_A": "lora_B",
    "lora_B": "lora_A",
    "lora_embedding_A": "lora_embedding_B",
    "lora_embedding_B": "lora_embedding_A",
}
FROZEN_COPY = ".base_layer.weight"  # of an adapted embedding: PEFT saves it beside the factors
TOKENS = ".token_adapter.trainable_tokens_delta"  # rows of an embedding, as they are after training
VARIANTS = [  # of LoraConfig: each changes what the factors mean
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
    "velora_config",
]
FACTORS_TWICE = (
    "PEFT's merge would add the product twice. Read the factors as they are: `optimer extract "
    "ADAPTER --base BASE OUT`, without --from-adapter."
)
FACTORS_APART = (
    "PEFT gives each its own factors, which part on a GPU. Train the embedding with "
    "modules_to_save and ensure_weight_tying, with full parameters (leave `lora` out), or not at "
    "all."
)
MATERIALISE = "Write it as a delta first: `optimer extract ADAPTER --from-adapter --base BASE OUT`."


def read_adapter(path: Path, base: Checkpoint, name: str) -> dict[str, LowRank | Trained]:
    """Read a PEFT LoRA adapter by base tensor name; refuse what is not a sum of products and
    trained tensors.
    """
    config = _config_of(path, name)
    stored = Checkpoint(path, "adapter_model")
    found: dict[str, LowRank | Trained] = {}
    targets, ties = targets_of(stored.names, base), ties_of(base)
    for key in stored.names:
        target, part = targets[key]
        if key.endswith(FROZEN_COPY):
            _refuse_moved(stored, key, base, ties.kept(target), name)
            continue
        if part != "B" and target in found:
            raise ModelError(
                f"vector {name!r} ({path}): adapts {target!r} in two ways. {MATERIALISE}"
            )
        if part == "A":
            found[target] = _product(stored, key, config, name)
        elif part == "B":
            _partner(stored, key, name)
        elif part == "B.bias":
            found[target] = _moved_bias(stored, key, base, target, config, name)
        elif part == "trained":
            found[target] = Trained(stored.read(key))
        else:
            raise ModelError(
                f"vector {name!r} ({path}): tensor {key!r} is not a LoRA factor of a linear or "
                f"embedding layer. {MATERIALISE}"
            )
    return _joined(found, ties, f"vector {name!r} ({path})")


def _config_of(path: Path, name: str) -> Any:
    """Return the LoraConfig of an adapter whose delta is a sum of products."""
    from peft import LoraConfig

    try:
        config = read_adapter_config(path)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"vector {name!r} ({path}): adapter_config.json cannot be read ({error}). Fetch the "
            "adapter again."
        ) from None
    if not isinstance(config, LoraConfig):
        raise ModelError(
            f"vector {name!r} ({path}): a {config.peft_type} adapter; only LoRA is linear in its "
            f"delta. {MATERIALISE}"
        )
    _refuse_nonlinear(config, path, name)
    return config


def _refuse_nonlinear(config: Any, path: Path, name: str) -> None:
    for option, reason in (
        (
            config.use_dora,
            "DoRA rescales the merged weight, so its delta depends on the other vectors",
        ),
        (
            moves_base(config.init_lora_weights),
            f"init_lora_weights {config.init_lora_weights!r} rewrites the base weights",
        ),
        (config.target_parameters, "target_parameters adapts stacked expert weights"),
        *((getattr(config, field, None), f"{field} is no plain LoRA") for field in VARIANTS),
    ):
        if option:
            raise ModelError(f"vector {name!r} ({path}): {reason}. {MATERIALISE}")


def refuse_unfit(keys: Sequence[str], base: Checkpoint, where: str) -> None:
    """Raise ModelError for a LoRA, by the names of its tensors, that would be trained and then fit
    no merge: of layers that are no tensors of the base's checkpoint, or of a part of what the base
    ties.
    """
    products = [target for target, part in targets_of(keys, base).values() if part == "A"]
    known, ties = set(base.names), ties_of(base)
    if unfit := sorted(name for name in products if ties.kept(name) not in known):
        fit = sorted({name.split(".")[-2] for name in products if name in known})
        raise ModelError(
            f"{where}: adapts {unfit[0].removesuffix('.weight')!r}, which the checkpoint stores in "
            f"another form (fused experts), so that it would fit no merge. Name the layers: "
            f"target_modules: [{', '.join(fit)}]."
        )
    kinds = _kinds_of(keys, base)
    refuse_parted(kinds, ties, where)
    _refuse_both_factors(kinds, ties, where, FACTORS_APART)


def targets_of(keys: Iterable[str], base: Checkpoint) -> dict[str, tuple[str, str]]:
    """Return base tensor and part of every tensor of an adapter, see `_target_of`; PEFT names
    modules as the loaded model does, which is not always as the checkpoint does.
    """
    found = {key: _target_of(key) for key in keys}
    known, ties = set(base.names), ties_of(base)
    if all(ties.kept(target) in known for target, _ in found.values()):
        return found
    names = stored_names(ResolvedModel(base.path, base.path.name))
    return {key: (names.get(target, target), part) for key, (target, part) in found.items()}


def _target_of(key: str) -> tuple[str, str]:
    """Return the base tensor a stored tensor belongs to, and its part: A, B, B.bias, trained, or
    nothing known.
    """
    module = key.removeprefix("base_model.model.")
    for suffix, part in (
        (".lora_A.weight", "A"),
        (".lora_embedding_A", "A"),
        (".lora_B.weight", "B"),
        (".lora_embedding_B", "B"),
    ):
        if module.endswith(suffix):
            return f"{module.removesuffix(suffix)}.weight", part
    if module.endswith(".lora_B.bias"):
        return f"{module.removesuffix('.lora_B.bias')}.bias", "B.bias"
    if module.endswith(TOKENS):
        return f"{module.removesuffix(TOKENS)}.weight", TOKENS
    if "lora_" in module:
        return module, ""
    return module.replace(".base_layer.", "."), "trained"


def _partner(stored: Checkpoint, key: str, name: str) -> str:
    """Return the other factor of a product."""
    factor = next(part for part in key.split(".") if part in PARTNERS)
    partner = key.replace(f".{factor}", f".{PARTNERS[factor]}")
    if partner not in stored.names:
        raise ModelError(
            f"vector {name!r} ({stored.path}): tensor {partner!r} is missing. Fetch the adapter "
            "again."
        )
    return partner


def _product(stored: Checkpoint, key: str, config: Any, name: str) -> LowRank:
    partner = _partner(stored, key, name)
    a, b = stored.read(key).float(), stored.read(partner).float()
    module = key.removeprefix("base_model.model.").split(".lora_")[0]
    if a.dim() != 2 or b.dim() != 2:
        raise ModelError(
            f"vector {name!r} ({stored.path}): tensor {key!r} has {a.dim()} dimensions; only "
            f"linear and embedding layers are products of two matrices. {MATERIALISE}"
        )
    rank, scale = _rank_and_scale(config, module, stored.path, name)
    if not a.shape[0] == b.shape[1] == rank:
        raise ModelError(
            f"vector {name!r} ({stored.path}): {module} has factors of shape {list(a.shape)} and "
            f"{list(b.shape)}, but rank {rank} in adapter_config.json. Fetch the adapter again."
        )
    # embeddings and Conv1D layers store their weight input-first: (b @ a).T
    if "lora_embedding_A" in key or config.fan_in_fan_out:
        a, b = b.T.contiguous(), a.T.contiguous()
    return LowRank(b, a, scale)


def _refuse_moved(stored: Checkpoint, key: str, base: Checkpoint, target: str, name: str) -> None:
    if target not in base.names:
        return
    copy, tensor = stored.read(key), base.read(target)
    if copy.shape != tensor.shape or not torch.equal(copy.to(tensor.dtype), tensor):
        raise ModelError(
            f"vector {name!r} ({stored.path}): tensor {key!r} differs from the base: the embedding "
            "was resized or trained. Train the embedding with full parameters, or leave it out."
        )


def _moved_bias(
    stored: Checkpoint, key: str, base: Checkpoint, target: str, config: Any, name: str
) -> Trained:
    if target not in base.names:
        raise ModelError(
            f"vector {name!r} ({stored.path}): tensor {target!r} is not in the base. {MATERIALISE}"
        )
    _, scale = _rank_and_scale(config, target.removesuffix(".bias"), stored.path, name)
    return Trained(base.read(target).float() + scale * stored.read(key).float())


def _rank_and_scale(config: Any, module: str, path: Path, name: str) -> tuple[int, float]:
    """Return rank and scale of a module's product, as PEFT finds them."""
    from peft.utils.other import get_pattern_key

    try:
        rank_key = get_pattern_key(list(config.rank_pattern), module)
        alpha_key = get_pattern_key(list(config.alpha_pattern), module)
        rank = config.rank_pattern.get(rank_key, config.r)
        alpha = config.alpha_pattern.get(alpha_key, config.lora_alpha)
        return rank, float(alpha / math.sqrt(rank) if config.use_rslora else alpha / rank)
    except (TypeError, ValueError, AttributeError, ZeroDivisionError, re.error) as error:
        raise ModelError(
            f"vector {name!r} ({path}): adapter_config.json has no usable rank and alpha for "
            f"{module} ({error})."
        ) from None


def _joined(
    found: Mapping[str, LowRank | Trained], ties: Ties, where: str
) -> dict[str, LowRank | Trained]:
    """Return the parts of an adapter by stored tensor: one for tensors that are one in the base,
    which the adapter has to move alike, as PEFT does with `ensure_weight_tying`.
    """
    refuse_parted({name: type(part).__name__ for name, part in found.items()}, ties, where)
    joined: dict[str, LowRank | Trained] = {}
    for name, part in sorted(found.items(), key=lambda item: item[0] != ties.kept(item[0])):
        other = joined.setdefault(ties.kept(name), part)
        if not _are_alike(part, other):
            raise _parted([name], [ties.kept(name)], where)
    return joined


def _are_alike(one: LowRank | Trained, other: LowRank | Trained) -> bool:
    if isinstance(one, LowRank) and isinstance(other, LowRank):
        return (
            one.scale == other.scale and torch.equal(one.a, other.a) and torch.equal(one.b, other.b)
        )
    if isinstance(one, Trained) and isinstance(other, Trained):
        return torch.equal(one.tensor, other.tensor)
    return False


def refuse_parted(found: Mapping[str, str], ties: Ties, where: str) -> None:
    """Raise ModelError where an adapter, by tensor and kind of its parts, moves one of the tensors
    that are one in the base and leaves another, or moves them in different ways.
    """
    for group in ties.groups:
        moved = {name: kind for name, kind in found.items() if ties.group_of(name) == group}
        names = {ties.class_names.get(name, name) for name in moved}
        left = [name for name in group if name not in names]
        if moved and (left or len(set(moved.values())) > 1):
            raise _parted(sorted(moved), left, where)


def _parted(moved: Sequence[str], left: Sequence[str], where: str) -> ModelError:
    other = f"leaves {left[0]!r} as it is" if left else "does not move them alike"
    return ModelError(
        f"{where}: trains {' and '.join(map(repr, moved))} and {other}, but the base ties them to "
        "one tensor: the model as trained has two, and a merge has one. Train the embedding with "
        "full parameters, with modules_to_save and ensure_weight_tying, or not at all."
    )


# -- through PEFT ----------------------------------------------------------------------------------


@contextmanager
def merged_by_peft(adapter: Path, base: Path) -> Iterator[Path]:
    """Yield a temporary float32 checkpoint: base plus any adapter that PEFT can merge.

    Holds the whole model in memory, in float32. Raises ModelError for adapters without a merge.
    """
    if not (adapter / "adapter_config.json").exists():
        raise ModelError(f"{adapter}: is no adapter (it has no adapter_config.json).")
    refuse_unmerged_by_peft(adapter, base)
    model = loaded_model(ResolvedModel(base, base.name), torch.float32)
    try:
        merged = model_with_adapter(model, adapter).merge_and_unload()
    except (
        AttributeError,
        NotImplementedError,
        ValueError,
        TypeError,
        RuntimeError,
        KeyError,
    ) as error:
        raise ModelError(
            f"{adapter}: PEFT cannot merge this adapter ({first_line(error)}). Give the base it "
            "was trained from, or fetch it again."
        ) from error
    with tempfile.TemporaryDirectory(prefix="optimer-") as folder:
        merged.save_pretrained(folder)
        yield Path(folder)


def refuse_unmerged_by_peft(adapter: Path, base: Path) -> None:
    """Raise ModelError for an adapter that PEFT would merge into another model than it is: of a
    part of what the base ties, or with factors of both halves, which it would add twice.
    """
    stored = Checkpoint(adapter, "adapter_model")  # PEFT would take pickled weights
    kinds, ties = _kinds_of(stored.names, Checkpoint(base)), ties_of(Checkpoint(base))
    refuse_parted(kinds, ties, str(adapter))
    _refuse_both_factors(kinds, ties, str(adapter), FACTORS_TWICE)


def _kinds_of(keys: Iterable[str], base: Checkpoint) -> dict[str, str]:
    """Return how PEFT moves the tensors of a base, by the names of an adapter's tensors. Tokens of
    a tied embedding it trains and merges in both halves.
    """
    ties, kinds = ties_of(base), dict[str, str]()
    for key, (target, part) in targets_of(keys, base).items():
        group = ties.group_of(target)
        if part == TOKENS and group and target == group[0]:
            kinds |= dict.fromkeys(group, part)
        elif not key.endswith(FROZEN_COPY):
            kinds[target] = part if part in (TOKENS, "trained") else "product"
    return kinds


def _refuse_both_factors(kinds: Mapping[str, str], ties: Ties, where: str, advice: str) -> None:
    for target, kind in kinds.items():
        if kind == "product" and (group := ties.group_of(target)):
            raise ModelError(
                f"{where}: adapts both {' and '.join(map(repr, group))}, which the base ties to "
                f"one tensor. {advice}"
            )
