"""Match the tensors of two checkpoints of one model that use different names.

The same model is stored under many names: those of the bare model or of the model with a head
(`h.0...` and `transformer.h.0...`), those of a multimodal model or of its language part, with or
without buffers that older programs saved. The model class, built without weights, decides what
they mean, using the rules by which transformers loads a file. Only headers are read. Names that are
equal on both sides need no class.
"""

import copy
import functools
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from optimer_hf.errors import ModelError
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.headers import BUFFERS
from optimer_hf.models.loader import text_model_without_weights, whole_model_without_weights
from optimer_hf.models.stored import stored_views

BESIDE_MODEL = re.compile(r"^(model\.)?(mtp|v_head)\.")  # multi-token prediction; PPO's value head
N_NAMES_SHOWN = 3


class Key(NamedTuple):
    """The parameter of a class that a tensor in a file goes into.

    `part` says which part of it the tensor is, if transformers fuses several (experts).
    """

    parameter: str
    part: str = ""


@dataclass(frozen=True)
class ClassNames:
    """The parameter names of a model class, and the places of its text model and its heads."""

    model: Any
    parameters: frozenset[str]
    decoder: str
    vocabulary: frozenset[str]  # embedding and output layer
    head: str = ""  # the output layer

    @classmethod
    def of(cls, model: Any) -> "ClassNames":
        """Read the names of a model, with or without weights."""
        modules = {id(module): name for name, module in model.named_modules()}
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        prefixes = tuple(f"{modules[id(end)]}." for end in ends if id(end) in modules)
        parameters = frozenset(model.state_dict())
        return cls(
            model,
            parameters,
            modules.get(id(model.get_decoder()), ""),
            frozenset(name for name in parameters if name.startswith(prefixes)),
            modules.get(id(ends[1]), ""),
        )

    def keys(self, names: Iterable[str]) -> dict[str, Key]:
        """Return the key of each tensor in a file, by the rules by which transformers loads it.

        Some rules depend on all names, so pass them all at once.
        """
        from transformers import core_model_loading as loading
        from transformers.conversion_mapping import get_model_conversion_mapping

        rules = get_model_conversion_mapping(self.model)
        renamings = [rule for rule in rules if isinstance(rule, loading.WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, loading.WeightConverter)]
        known = dict.fromkeys(self.parameters, True)
        prefix = self.model.base_model_prefix
        keys = {}
        for name in sorted(names, key=loading.dot_natural_key):
            parameter, source = loading.rename_source_key(
                name, renamings, converters, prefix, known
            )
            if parameter not in known and name in known:
                keys[name] = Key(name)
            elif source is None:
                keys[name] = Key(parameter)
            else:
                own, _ = loading.rename_source_key(name, renamings, [])
                whole, _ = loading.rename_source_key(own, [], converters)
                keys[name] = Key(parameter, _drop_common_front(own, whole))
        return keys


def _drop_common_front(name: str, other: str) -> str:
    parts, others = name.split("."), other.split(".")
    while parts and others and parts[0] == others[0]:
        del parts[0], others[0]
    return ".".join(parts)


@dataclass(frozen=True)
class BaseClass:
    """The class of a base and, if it is multimodal, the class of its language part."""

    whole: ClassNames
    text: ClassNames | None

    def keys(self, names: Iterable[str]) -> dict[str, Key]:
        """Return the key of each tensor in a file, in the names of the base's class.

        The file may contain only the language part, under the names of that part.
        """
        keys = self.whole.keys(names)
        if self.text is not None:
            others = [name for name, key in keys.items() if not self.loads(key)]
            for name, key in self.text.keys(others).items():
                if key.parameter in self.text.parameters:
                    keys[name] = Key(self._in_whole(key.parameter), key.part)
        return keys

    def loads(self, key: Key) -> bool:
        """Whether the class has a parameter for a tensor."""
        return key.parameter in self.whole.parameters

    def _in_whole(self, parameter: str) -> str:
        assert self.text is not None
        text, whole = self.text, self.whole
        for part, place in ((text.head, whole.head), (text.decoder, whole.decoder)):
            front = f"{part}." if part else ""  # Llama 4's causal model is its own decoder
            if parameter.startswith(front):
                return f"{place}.{parameter.removeprefix(front)}"
        return parameter

    def part_beside_text(self, key: Key) -> str | None:
        """Return the part of a multimodal model (such as its vision tower) that has a parameter.

        It is None for the text model and its heads.
        """
        decoder = self.whole.decoder
        in_text = key.parameter.startswith(f"{decoder}.") or key.parameter in self.whole.vocabulary
        if self.text is None or in_text or not decoder:
            return None
        parts, others = key.parameter.split("."), decoder.split(".")
        common = 0
        while common < len(others) and parts[common] == others[common]:
            common += 1
        return ".".join(parts[: common + 1])

    def is_beside(self, name: str, key: Key) -> bool:
        """Whether a tensor without a parameter is known not to be part of the model.

        It may be a buffer, or meant for other programs.
        """
        model, config = self.whole.model, self.whole.model.config.get_text_config()
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
        if BUFFERS.search(name) or BESIDE_MODEL.search(name):
            return True
        if any(re.search(pattern, text) for pattern in ignored for text in {name, key.parameter}):
            return True
        layer = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
        n_layers = int(getattr(config, "num_hidden_layers", 0) or 0)
        n_more = int(getattr(config, "num_nextn_predict_layers", 0) or 0)
        return layer is not None and n_layers <= int(layer[1]) < n_layers + n_more


def base_class_of(path: Path) -> BaseClass:
    """Return the parameter names that the class of a model directory uses.

    Raises ModelError if transformers has no class for its config.
    """
    config = path / "config.json"
    return _base_class_of(path, config.stat().st_mtime_ns if config.exists() else 0)


@functools.lru_cache(maxsize=8)
def _base_class_of(path: Path, changed: int) -> BaseClass:
    text = text_model_without_weights(path)
    whole = ClassNames.of(whole_model_without_weights(path))
    return BaseClass(whole, None if text is None else ClassNames.of(text))


# -- names of a loaded model -----------------------------------------------------------------------


def names_in(base: Checkpoint, names: Collection[str]) -> dict[str, list[str]]:
    """Return the names under which a base stores the tensors that others call `names`.

    Tensors that the base does not have are left out.
    """
    known = set(base.names)
    same = {name: [name] for name in names if name in known}
    if len(same) == len(set(names)) and not _may_repeat(known):
        return same
    try:
        base_class = base_class_of(base.path)
    except ModelError:  # transformers does not know the class, so only equal names match
        return same
    stored = _by_key(base, base_class)
    return same | {
        name: stored[key] for name, key in base_class.keys(names).items() if key in stored
    }


def _may_repeat(names: Collection[str]) -> bool:
    """Whether a file may contain a tensor twice, with and without the prefix of its class."""
    return any(name.partition(".")[2] in names for name in names)


def _by_key(base: Checkpoint, base_class: BaseClass) -> dict[Key, list[str]]:
    """Return the names of the base's tensors by key; raises ModelError if copies differ."""
    by_key: dict[Key, list[str]] = {}
    for name, key in base_class.keys(base.names).items():
        by_key.setdefault(key, []).append(name)
    for first, *others in by_key.values():
        for name in others:
            if not _is_copy(base, name, first):
                raise ModelError(
                    f"{base.path}: tensors {first!r} and {name!r} are the same parameter of "
                    f"{type(base_class.whole.model).__name__}, but their numbers differ. Remove "
                    "the stale one."
                )
    return by_key


def views_in(base: Checkpoint, model: Any) -> dict[str, torch.Tensor]:
    """Return a model's `stored_views` under the names in its base's files.

    A view without a tensor in the base (a tied head) keeps its name. A tensor that the base stores
    in another form is left out: older programs wrote the experts of Qwen3-VL-MoE input-first.
    """
    views = stored_views(model)
    names = names_in(base, views)
    by_name = {known: view for name, view in views.items() for known in names.get(name, [name])}
    known = set(base.names)
    return {
        name: view
        for name, view in by_name.items()
        if name not in known or base.shape(name) == tuple(view.shape)
    }


def vocabulary_names(base: Checkpoint) -> frozenset[str]:
    """Return the tensors in a base that have one row per token."""
    try:
        base_class = base_class_of(base.path)
    except ModelError:
        return frozenset(name for name in base.names if "embed" in name or "lm_head" in name)
    keys = base_class.keys(base.names)
    return frozenset(name for name in keys if keys[name].parameter in base_class.whole.vocabulary)


def names_kept_wide(base: Checkpoint, dtype: torch.dtype) -> frozenset[str]:
    """Return the tensors in a base that its class keeps in float32 when it is loaded in `dtype`."""
    if dtype == torch.float32:
        return frozenset()
    try:
        base_class = base_class_of(base.path)
    except ModelError:
        return frozenset()
    kept = kept_wide(base_class.whole.model, dtype)
    keys = base_class.keys(base.names) if kept else {}
    return frozenset(name for name, key in keys.items() if key.parameter in kept)


def kept_wide(model: Any, dtype: torch.dtype) -> frozenset[str]:
    """Return the tensors of a model that are in float32 when transformers loads it in `dtype`: by
    the plan of its class, or because the class creates them so.
    """
    from transformers.core_model_loading import build_glob_alternation

    plan = model._get_dtype_plan(dtype)
    pattern = build_glob_alternation(list(plan))[0] if plan else None
    with torch.device("meta"):
        twin = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
    return frozenset(
        name
        for name, tensor in twin.state_dict().items()
        if tensor.dtype == torch.float32 or (pattern is not None and pattern.search(name))
    )


# -- two files -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Match:
    """How the tensors of a tuned model correspond to those of its base.

    `tuned_names` maps base names to tuned names for all tensors that both have. `unmoved` are base
    tensors that the tuned model may lack, and `left_out` are tuned tensors that are not part of the
    model. Unless they are tied to others, the tuned model should have the base tensors in
    `missing`, and the base should have the tuned tensors in `unknown`.
    """

    tuned_names: dict[str, str]
    unmoved: list[str]
    left_out: list[str]
    missing: list[str]
    unknown: list[str]
    reason: str = ""  # why the model class could not map the names


def match(tuned: Checkpoint, base: Checkpoint) -> Match:
    """Match each tensor in a tuned model to the one in its base."""
    both = {name: name for name in set(base.names) & set(tuned.names)}
    only_base = sorted(set(base.names) - set(tuned.names))
    only_tuned = sorted(set(tuned.names) - set(base.names))
    is_plain = not only_base and not only_tuned and not any(map(BUFFERS.search, both))
    if is_plain and not _may_repeat(both):
        return Match(both, [], [], [], [])
    try:
        base_class = base_class_of(base.path)
    except ModelError as error:
        return Match(both, [], [], only_base, only_tuned, str(error))
    return _match(tuned, base, base_class)


def _match(tuned: Checkpoint, base: Checkpoint, base_class: BaseClass) -> Match:
    of_base = {name: key for key, names in _by_key(base, base_class).items() for name in names}
    of_tuned = base_class.keys(tuned.names)
    by_key: dict[Key, str] = {}
    for name, key in of_tuned.items():
        by_key.setdefault(key, name)
    pairs = {name: name if name in of_tuned else by_key.get(key) for name, key in of_base.items()}
    tuned_names = {
        name: other
        for name, other in pairs.items()
        if other is not None and (base_class.loads(of_base[name]) or not BUFFERS.search(name))
    }
    lacking = [name for name, other in pairs.items() if other is None]
    parts = {base_class.part_beside_text(key) for key in of_tuned.values() if base_class.loads(key)}
    unmoved = [
        name
        for name in lacking
        if not base_class.loads(of_base[name])
        or base_class.part_beside_text(of_base[name]) not in (None, *parts)
    ]
    paired = set(pairs.values())
    keys = {of_tuned[name]: name for name in paired if name is not None}
    extra = [name for name in of_tuned if name not in paired]
    left_out = [
        name
        for name in extra
        if _is_copy(tuned, name, keys.get(of_tuned[name]))
        or (not base_class.loads(of_tuned[name]) and base_class.is_beside(name, of_tuned[name]))
    ]
    return Match(
        tuned_names,
        sorted(unmoved),
        sorted(left_out),
        sorted(set(lacking) - set(unmoved)),
        sorted(set(extra) - set(left_out)),
    )


def _is_copy(checkpoint: Checkpoint, name: str, other: str | None) -> bool:
    """Whether a tensor is also stored under another name, with the same numbers."""
    if other is None or checkpoint.dtype(name) != checkpoint.dtype(other):
        return False
    return checkpoint.are_equal(name, other)


def summarize_names(names: Iterable[str]) -> str:
    """Summarise many tensor names in a few words, using one name for all layers."""
    kinds = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in names))
    fronts = list(dict.fromkeys(_front(kind) for kind in kinds)) if len(kinds) > 3 else kinds
    shown = ", ".join(fronts[:N_NAMES_SHOWN])
    return f"{shown}, ..." if len(fronts) > N_NAMES_SHOWN else shown


def _front(name: str) -> str:
    parts = name.split(".")
    return ".".join([*parts[: min(2, len(parts) - 1)], "*"])
