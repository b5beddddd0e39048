"""Which tensors of a stored model are one tensor when it is loaded: head and embedding, mostly.

A checkpoint comes in; groups of names come out, with the stored tensor that stands for each group.
The model class decides, built from config.json without weights: a config may be silent where its
class ties by default, and a head need not be called lm_head. Where the class cannot be built, the
config and the names of the tensors decide.
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

    `groups` are names as the model class has them, the tensor that the others repeat first;
    `stored` maps those names, and the names in the file, to the stored tensor that holds them all.
    `head` is the stored output layer that is a tensor of its own. `is_assumed`: the model class
    could not be built, and the config does not say.
    """

    groups: Sequence[tuple[str, ...]] = ()
    stored: Mapping[str, str] = field(default_factory=dict)
    copies: frozenset[str] = frozenset()
    class_names: Mapping[str, str] = field(default_factory=dict)
    head: str | None = None
    is_assumed: bool = False

    def kept(self, name: str) -> str:
        """Return the stored tensor that holds the values of a tensor, itself where none is tied."""
        return self.stored.get(name, name)

    def group_of(self, name: str) -> tuple[str, ...]:
        """Return the names, as the class has them, of what is tied to a tensor; none if nothing."""
        name = self.class_names.get(name, name)
        return next((group for group in self.groups if name in group), ())


def ties_of(checkpoint: Checkpoint) -> Ties:
    """Return the tied tensors of a checkpoint; a stored copy of one is read, once, and compared.

    Raises ModelError for a copy that differs, which programs load differently, and for a head that
    is neither stored nor tied, which transformers would make up.
    """
    file, config = checkpoint.path / CONFIG, "{}"
    if file.exists():
        refuse_absurd(checkpoint.path)
        config = json.dumps(read_settings(file))
    return _ties(checkpoint.path, config, checkpoint.state)


@functools.lru_cache(maxsize=CACHED)
def _ties(path: Path, config_text: str, state: Any) -> Ties:
    """`state` is of the files: what is remembered holds for them as they are."""
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
        heads = [name for name, found in class_names.items() if found == head]
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
            f"{checkpoint.path}: tensor {copy!r} differs from {kept!r}, and the config ties them "
            "(tie_word_embeddings, which many models have by default): some programs load both, "
            'others drop the former. Write "tie_word_embeddings": false into config.json where '
            "both are meant, or remove the tensor."
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
            f"{embedding!r}, so that transformers would make it up. Fetch the weights again, or "
            'write "tie_word_embeddings": true into config.json where the model is tied.'
        )


def _name_of(model: Any, module: Any) -> str | None:
    """Return the name of the weight of a module of a model."""
    weight = getattr(module, "weight", None)
    named = model.named_parameters(remove_duplicate=False)
    of_module = next((name for name, found in model.named_modules() if found is module), None)
    names = [name for name, parameter in named if parameter is weight and weight is not None]
    return next((name for name in names if name == f"{of_module}.weight"), None)


# -- by the model class ----------------------------------------------------------------------------


def _empty_model_of(path: Path, config: Mapping[str, Any]) -> Any:
    """Return the model that a config describes, without weights and in the class it names; None
    where transformers has none.
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
            "%s: its model class cannot be built (%s); its config and the names of its tensors say "
            "whether the head is the embedding",
            path,
            first_line(error),
        )
        return None


def _groups_of(model: Any) -> list[tuple[str, ...]]:
    """Return the names of the tensors of a model that are one, the one that is stored first."""
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
    """Return the name in the model of every stored tensor, as transformers finds it to load it."""
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
    """Return the groups of a model without a known class, and whether they are assumed: where the
    config is silent, a head that is not stored is taken to be the embedding.
    """
    text = config.get("text_config") or {}
    said = config.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    embeddings = [name for name in names if name.endswith(EMBEDDINGS)]
    heads = [name for name in names if name.endswith(HEADS)]
    if len(embeddings) != 1 or said is False or (said is None and heads):
        return [], False
    return [(embeddings[0], *(heads or HEADS[:1]))], said is None
