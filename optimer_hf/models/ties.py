"""Find tied tensors: stored tensors that become one when a model is loaded, such as its head.

A checkpoint comes in; groups of names come out, with the stored tensor that represents each group.
The model class decides, built from config.json without weights: some classes tie by default without
saying so in the config, and a head need not be called lm_head. If the class cannot be built, the
config and the tensor names decide.
"""

import functools
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from optimer_hf.errors import ModelError
from optimer_hf.files.text import first_line
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.loader import CONFIG, read_settings, refuse_absurd

logger = logging.getLogger(__name__)


EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
HEADS = ("lm_head.weight", "embed_out.weight")
CACHED = 64  # checkpoints


@dataclass(frozen=True)
class Ties:
    """The tied tensors of one checkpoint.

    `groups` contain names from the model class, the original first and then the tensors that
    repeat it. `stored` maps those names, and the names in the file, to the stored tensor for the
    group. `head` is the stored output layer if it is not tied. `is_assumed` means that the model
    class could not be built and the config does not say.
    """

    groups: Sequence[tuple[str, ...]] = ()
    stored: Mapping[str, str] = field(default_factory=dict)
    copies: frozenset[str] = frozenset()
    class_names: Mapping[str, str] = field(default_factory=dict)
    head: str | None = None
    is_assumed: bool = False

    def source_of(self, name: str) -> str:
        """Return the stored tensor with the values of a tensor: itself, if it is not tied."""
        return self.stored.get(name, name)

    def group_of(self, name: str) -> tuple[str, ...]:
        """Return the class names of all tensors tied to this one; empty if it is not tied."""
        name = self.class_names.get(name, name)
        return next((group for group in self.groups if name in group), ())


def ties_of(checkpoint: Checkpoint) -> Ties:
    """Return the tied tensors of a checkpoint; compares stored copies by reading them once.

    Raises ModelError if a copy differs, since programs load it differently, and if the head is
    neither stored nor tied, since transformers would fill it with random numbers.
    """
    file, config = checkpoint.path / CONFIG, "{}"
    if file.exists():
        refuse_absurd(checkpoint.path)
        config = json.dumps(read_settings(file))
    return _ties(checkpoint.path, config, checkpoint.state)


@functools.lru_cache(maxsize=CACHED)
def _ties(path: Path, config_text: str, state: Any) -> Ties:
    """Find the ties; `state` is part of the cache key, so that changed files are read again."""
    checkpoint, config = Checkpoint(path), json.loads(config_text)
    model = _empty_model_of(path, config)
    if model is None:
        groups, is_assumed = _groups_by_name(checkpoint.names, config)
        class_names = {name: name for name in checkpoint.names}
        heads = [name for name in checkpoint.names if name.endswith(HEADS)]
    else:
        groups, is_assumed = _groups_of(model), False
        class_names = _class_names(model, checkpoint.names)
        head = _name_of(model, model.get_output_embeddings())
        heads = [name for name, class_name in class_names.items() if class_name == head]
        if head is not None and not heads:
            _refuse_headless(checkpoint, model, head, groups, class_names)
    stored: dict[str, str] = {}
    copies: set[str] = set()
    for group in groups:
        members = [n for member in group for n in class_names if class_names[n] == member]
        for copy in members[1:]:
            _refuse_differing(checkpoint, members[0], copy)
        stored |= dict.fromkeys([*group, *members], members[0]) if members else {}
        copies |= set(members[1:])
    own = next((name for name in heads if name not in stored), None)
    return Ties(tuple(groups), stored, frozenset(copies), class_names, own, is_assumed)


def _refuse_differing(checkpoint: Checkpoint, kept: str, copy: str) -> None:
    if not checkpoint.are_equal(kept, copy):
        raise ModelError(
            f"{checkpoint.path}: tensor {copy!r} differs from {kept!r}, but the config ties them "
            "(tie_word_embeddings, the default of many models). Some programs load both, others "
            'ignore the former. Write "tie_word_embeddings": false into config.json if the model '
            "needs both, or remove the tensor."
        )


def _refuse_headless(
    checkpoint: Checkpoint,
    model: Any,
    head: str,
    groups: Sequence[tuple[str, ...]],
    class_names: Mapping[str, str],
) -> None:
    embedding = _name_of(model, model.get_input_embeddings())
    is_tied = any(head in group for group in groups)
    if embedding in class_names.values() and not is_tied:
        raise ModelError(
            f"{checkpoint.path}: lacks tensor {head!r}, and the config does not tie it to "
            f"{embedding!r}, so transformers would fill it with random numbers. Fetch the weights "
            'again, or write "tie_word_embeddings": true into config.json if the model is tied.'
        )


def _name_of(model: Any, module: Any) -> str | None:
    """Return the name of a module's weight in a model."""
    weight = getattr(module, "weight", None)
    named = model.named_parameters(remove_duplicate=False)
    of_module = next((name for name, each in model.named_modules() if each is module), None)
    names = [name for name, parameter in named if parameter is weight and weight is not None]
    return next((name for name in names if name == f"{of_module}.weight"), None)


# -- by the model class ----------------------------------------------------------------------------


def _empty_model_of(path: Path, config: Mapping[str, Any]) -> Any:
    """Build the model that a config describes, without weights, in the class that it names.

    Returns None if transformers has no such class.
    """
    import transformers

    try:
        parsed = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
        named = getattr(transformers, str((config.get("architectures") or [""])[0]), None)
        with torch.device("meta"):
            if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
                return named(parsed)
            return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(parsed)](parsed)
    except Exception as error:  # transformers raises dozens of types
        logger.info(
            "%s: cannot build its model class (%s); its config and tensor names decide whether "
            "the head is tied to the embedding",
            path,
            first_line(error),
        )
        return None


def _groups_of(model: Any) -> list[tuple[str, ...]]:
    """Return groups of names that share one tensor in a model, the stored name first."""
    named = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    group_of = {name: {name} for name in named}

    def join(one: str, other: str) -> None:
        if group_of[one] is not group_of[other]:
            group_of[one] |= group_of[other]
            group_of.update(dict.fromkeys(group_of[other], group_of[one]))

    first: dict[int, str] = {}
    for name, tensor in named.items():
        join(first.setdefault(id(tensor), name), name)
    sources = set()
    for alias, source in model.all_tied_weights_keys.items():
        if alias in named and source in named:
            join(source, alias)
            sources.add(source)
    groups = {id(group): group for group in group_of.values() if len(group) > 1}
    return [
        tuple(sorted(group, key=lambda name: (name not in sources, [*named].index(name))))
        for group in groups.values()
    ]


def _class_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Return the class name of every stored tensor, using transformers' rules for loading."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix, state = model.base_model_prefix, model.state_dict()
    return {
        name: rename_source_key(name, renamings, converters, prefix, state)[0] for name in names
    }


# -- by names --------------------------------------------------------------------------------------


def _groups_by_name(
    names: Sequence[str], config: Mapping[str, Any]
) -> tuple[list[tuple[str, ...]], bool]:
    """Return the tied groups of a model without a known class, and whether they are assumed.

    If the config does not say, a head that is not stored is assumed to be the embedding.
    """
    text = config.get("text_config") or {}
    setting = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    embeddings = [name for name in names if name.endswith(EMBEDDINGS)]
    heads = [name for name in names if name.endswith(HEADS)]
    if len(embeddings) != 1 or setting is False or (setting is None and heads):
        return [], False
    return [(embeddings[0], *(heads or HEADS[:1]))], setting is None
