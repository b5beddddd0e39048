"""Translate between the parameters of a live model and the tensors in its checkpoint."""

import re
from contextlib import suppress
from typing import Any

import torch

from optimer_hf.errors import ModelError
from optimer_hf.models.blocks import matrix_rows
from optimer_hf.models.placement import live_state

_Place = tuple[torch.Size, list[int], int]  # shape, strides and offset, in elements


def to_stored(model: Any, name: str, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a parameter with the names and in the form that its checkpoint uses.

    transformers renames tensors (multimodal Gemma 3) and fuses them (experts) while loading.
    """
    from transformers.core_model_loading import revert_weight_conversion

    try:
        return dict(revert_weight_conversion(model, {name: parameter}))
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{name}: cannot be stored in a checkpoint alone ({error}).") from error


def stored_views(model: Any) -> dict[str, torch.Tensor]:
    """Return a view of the live model for each tensor in its checkpoint, by name.

    Writing to a view changes the parameter or buffer behind it. A tied head appears under its own
    name, too. Tensors that are spread over several parameters, or whose rows are not at regular
    steps in one, are left out.
    """
    views: dict[str, torch.Tensor] = {}
    known: dict[Any, list[_Place | None]] = {}  # for one layer, since all are stored alike
    for name, whole in live_state(model).items():  # with buffers: Gemma 4 scales layers by one
        with suppress(ModelError):
            stored = _stored_names(model, name, whole)
            if isinstance(stored, str):
                views[stored] = whole
                continue
            layer = (re.sub(r"(?<=\.)\d+(?=\.)", "#", name), whole.shape)
            if layer not in known:
                known[layer] = _places(model, name, whole.shape)
            for key, place in zip(stored, known[layer], strict=True):
                if place is not None:
                    shape, steps, offset = place
                    view = whole.as_strided(shape, steps, offset + whole.storage_offset())
                    if _has_rows(view):
                        views[key] = view
    return views


def _stored_names(model: Any, name: str, whole: torch.Tensor) -> str | list[str]:
    """Return the stored name of a parameter that is stored unchanged, or the names of its parts."""
    probe = torch.empty_like(whole, device="meta")
    stored = to_stored(model, name, probe)
    if len(stored) == 1 and next(iter(stored.values())) is probe:
        return next(iter(stored))
    return list(stored)


def _places(model: Any, name: str, shape: torch.Size) -> list[_Place | None]:
    """Return where in a parameter each of its stored tensors lies; None without regular steps.

    Storing a tensor of element numbers shows it.
    """
    n = shape.numel()
    numbers = torch.arange(n, dtype=torch.int32 if n < 2**31 else torch.int64).view(shape)
    places: list[_Place | None] = []
    for stored in to_stored(model, name, numbers).values():
        first = (0,) * stored.dim()
        offset = int(stored[first])
        steps = [
            int(stored.select(d, 1)[first[1:]]) - offset if size > 1 else 0
            for d, size in enumerate(stored.shape)
        ]
        try:
            is_regular = torch.equal(numbers.as_strided(stored.shape, steps, offset), stored)
        except RuntimeError:  # a negative step, or one beyond the end
            is_regular = False
        places.append((stored.shape, steps, offset) if is_regular else None)
    return places


def _has_rows(tensor: torch.Tensor) -> bool:
    """Whether the matrix form of a tensor is a view of it."""
    try:
        matrix_rows(tensor, slice(None))
    except RuntimeError:
        return False
    return True
