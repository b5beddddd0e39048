"""Parameters of a live model <-> tensors of its checkpoint."""

import re
from contextlib import suppress
from typing import Any

import torch

from optimer_hf.errors import ModelError
from optimer_hf.models.blocks import matrix_rows

_Place = tuple[torch.Size, list[int], int]  # shape, steps and offset, in numbers


def as_stored(model: Any, name: str, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a parameter under the names, and in the form, that its checkpoint has it: transformers
    renames (multimodal Gemma 3) and fuses (experts) while it loads.
    """
    from transformers.core_model_loading import revert_weight_conversion

    try:
        return dict(revert_weight_conversion(model, {name: parameter}))
    except torch.OutOfMemoryError:
        raise
    except (LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{name}: has no form of its own in a checkpoint ({error}).") from error


def stored_views(model: Any) -> dict[str, torch.Tensor]:
    """Return the tensors of a model's checkpoint by name, each a view of the parameter or buffer
    that holds it: writing to one changes the model. A tied head has the name of its own, too.

    Tensors that are spread over several parameters, or whose rows are not regular parts of one, are
    left out.
    """
    found: dict[str, torch.Tensor] = {}
    known: dict[Any, list[_Place | None]] = {}  # of one layer: others are stored alike
    for name, whole in model.state_dict().items():  # buffers, too: Gemma 4 scales its layers by one
        with suppress(ModelError):
            stored = _names_as_stored(model, name, whole)
            if isinstance(stored, str):
                found[stored] = whole
                continue
            layer = (re.sub(r"(?<=\.)\d+(?=\.)", "#", name), whole.shape)
            if layer not in known:
                known[layer] = _places(model, name, whole.shape)
            for key, place in zip(stored, known[layer], strict=True):
                if place is not None:
                    shape, steps, offset = place
                    view = whole.as_strided(shape, steps, offset + whole.storage_offset())
                    if _has_rows(view):
                        found[key] = view
    return found


def _names_as_stored(model: Any, name: str, whole: torch.Tensor) -> str | list[str]:
    """Return the name of a parameter that is stored as it is, or those of its parts."""
    probe = torch.empty_like(whole, device="meta")
    stored = as_stored(model, name, probe)
    if len(stored) == 1 and next(iter(stored.values())) is probe:
        return next(iter(stored))
    return list(stored)


def _places(model: Any, name: str, shape: torch.Size) -> list[_Place | None]:
    """Return where in a parameter the tensors lie that its checkpoint has of it, found out by
    storing the numbers of the places; None where they lie in no regular steps.
    """
    n = shape.numel()
    numbers = torch.arange(n, dtype=torch.int32 if n < 2**31 else torch.int64).view(shape)
    found: list[_Place | None] = []
    for stored in as_stored(model, name, numbers).values():
        first = (0,) * stored.dim()
        offset = int(stored[first])
        steps = [
            int(stored.select(d, 1)[first[1:]]) - offset if size > 1 else 0
            for d, size in enumerate(stored.shape)
        ]
        try:
            is_regular = torch.equal(numbers.as_strided(stored.shape, steps, offset), stored)
        except RuntimeError:  # steps back, or beyond the end
            is_regular = False
        found.append((stored.shape, steps, offset) if is_regular else None)
    return found


def _has_rows(tensor: torch.Tensor) -> bool:
    """Whether the matrix form of a tensor is a view of it."""
    try:
        matrix_rows(tensor, slice(None))
    except RuntimeError:
        return False
    return True
