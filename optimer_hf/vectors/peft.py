"""Merge adapters that only PEFT can merge."""

import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from optimer_hf.errors import ModelError
from optimer_hf.files.patterns import matches
from optimer_hf.files.text import first_line
from optimer_hf.models.checkpoint import Checkpoint
from optimer_hf.models.layout import ResolvedModel, copy_tokenizer, has_tokenizer
from optimer_hf.models.live import empty_model, load_model
from optimer_hf.models.loader import model_with_adapter, read_adapter_config, refuse_lack_of_memory
from optimer_hf.models.ties import ties_of
from optimer_hf.vectors.lora import (
    FACTORS_TWICE,
    kinds_of_targets,
    module_of,
    open_adapter,
    refuse_own_names,
    refuse_products_on_ties,
    refuse_split_ties,
)
from optimer_hf.vectors.lora_config import FIELDS, REPLACING, patterns_of, read_options
from optimer_hf.vectors.shapes import PREFIX

# -- through PEFT ----------------------------------------------------------------------------------


@contextmanager
def merge_with_peft(adapter: Path, base: Path) -> Iterator[Path]:
    """Yield a temporary float32 checkpoint: the base plus any adapter that PEFT can merge. If the
    adapter has the embedding of a larger vocabulary, so has the checkpoint, with its tokenizer.

    The whole model is in memory, in float32. Raises ModelError if the adapter cannot be merged.
    """
    if not (adapter / "adapter_config.json").exists():
        raise ModelError(f"{adapter}: is not an adapter (it has no adapter_config.json).")
    check_merge_with_peft(adapter, base, may_grow=True)
    model = load_model(ResolvedModel(base, base.name), torch.float32)
    is_larger = _resize_embedding(model, adapter)
    with _name_failures(adapter):
        merged = model_with_adapter(model, adapter).merge_and_unload()
    with tempfile.TemporaryDirectory(prefix="optimer-") as folder:
        merged.save_pretrained(folder)
        if is_larger:
            copy_tokenizer(adapter, Path(folder))
        yield Path(folder)


def _resize_embedding(model: Any, adapter: Path) -> bool:
    """Give a model rows for the tokens that an adapter has beyond those of its base, and return
    whether there are any. The adapter sets all of these rows.
    """
    stored, embedding = Checkpoint(adapter, "adapter_model"), model.get_input_embeddings()
    place = next(name for name, module in model.named_modules() if module is embedding)
    endings = ("weight", "base_layer.weight", "modules_to_save.weight")
    keys = [f"{PREFIX}{place}.{ending}" for ending in endings]
    n_rows = max((stored.shape(key)[0] for key in keys if key in stored.names), default=0)
    if n_rows <= embedding.num_embeddings or not has_tokenizer(adapter):
        return False
    model.resize_token_embeddings(n_rows, mean_resizing=False)
    return True


@contextmanager
def _name_failures(adapter: Path) -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, ModelError):
        raise
    except Exception as error:  # PEFT raises dozens of types
        refuse_lack_of_memory(error, adapter)
        raise ModelError(
            f"{adapter}: PEFT cannot merge this adapter ({first_line(error)}). Give the base it "
            "was trained from, or fetch it again."
        ) from error


def _refuse_unused(adapter: Path, base: ResolvedModel, *, may_grow: bool) -> None:
    """Raise ModelError if PEFT would use only part of an adapter, or if it does not fit the base,
    which `may_grow` by the tokens of the adapter.

    PEFT itself only warns. The test runs on an empty model; types that need the weights get them.
    """
    where = str(adapter)
    options, stored = read_options(adapter, where), open_adapter(adapter, where)
    _refuse_unreadable(options, stored, where)
    model = empty_model(base)
    if may_grow:
        _resize_embedding(model, adapter)
    if patterns := patterns_of(options):
        matches(patterns, [name for name, _ in model.named_modules()], where)
    with _name_failures(adapter):
        config = read_adapter_config(adapter)
    if config.is_prompt_learning:
        raise ModelError(
            f"{where}: PEFT cannot merge this adapter ({config.peft_type.value} adds tokens and "
            "moves no weight)."
        )
    if "init_lora_weights" in vars(config):
        config.init_lora_weights = True  # other values may decompose weights, which do not exist
    with _name_failures(adapter):
        try:
            unused = _find_unused(model, config, stored)
        except RuntimeError as error:
            if "meta" not in str(error):  # the error is not about a tensor without numbers
                raise _misfit_error(where, first_line(error)) from error
            model = load_model(base, torch.float32)
            if may_grow:
                _resize_embedding(model, adapter)
            unused = _find_unused(model, config, stored)
    if unused:
        raise _misfit_error(where, f"{unused[0]!r} and {len(unused) - 1} more")


def _refuse_unreadable(options: Mapping[str, Any], stored: Checkpoint, where: str) -> None:
    """Raise ModelError for names that PEFT does not find, and for options that no merge obeys."""
    if stored.wrappers:
        raise ModelError(
            f"{where}: its tensor names have the prefix {', '.join(stored.wrappers)} of a wrapper, "
            "under which PEFT finds none of them. Rename the tensors; a LoRA can be read as it is, "
            "without --from-adapter."
        )
    refuse_own_names(stored.names, where)
    for field in REPLACING:
        if options.get(field):
            raise ModelError(
                f"{where}: {FIELDS[field]}, so no merge into the base computes what it does."
            )


def _misfit_error(where: str, misfits: str) -> ModelError:
    return ModelError(
        f"{where}: tensors fit no layer of the base, or layers lack some of them: {misfits}. "
        "PEFT would leave them out. Give the base it was trained from, or fetch it again."
    )


def _find_unused(model: Any, config: Any, stored: Checkpoint) -> list[str]:
    """Return the adapter's tensors that PEFT cannot place on a model, and those that a layer
    lacks.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    device = next(model.parameters()).device
    with warnings.catch_warnings(), torch.device(device):
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, config)
        given = {
            key: torch.empty(stored.shape(key), dtype=stored.dtype(key)) for key in stored.names
        }
        placed = set_peft_model_state_dict(adapted, given)
        known = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    layers = {module_of(key) for key in stored.names}
    missing = [key for key in known if key not in given and module_of(key) in layers]
    return [key.replace(".default", "") for key in placed.unexpected_keys] + sorted(missing)


def check_merge_with_peft(adapter: Path, base: Path, *, may_grow: bool = False) -> None:
    """Raise ModelError if PEFT's merge would differ from the trained model.

    It may use only part of the adapter, adapt only one of two tied tensors, or add the factors of
    both twice. With `may_grow`, the base gets the tokens that the adapter has beyond its own.
    """
    _refuse_unused(adapter, ResolvedModel(base, base.name), may_grow=may_grow)
    stored = Checkpoint(adapter, "adapter_model")  # PEFT would accept pickled weights
    kinds, ties = kinds_of_targets(stored.names, Checkpoint(base)), ties_of(Checkpoint(base))
    refuse_split_ties(kinds, ties, str(adapter))
    refuse_products_on_ties(kinds, ties, str(adapter), FACTORS_TWICE)
