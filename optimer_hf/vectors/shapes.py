"""Vectors that obviously do not fit their base, found in the headers of their files before any
library is imported. `opening.py` checks everything, when the vectors are opened.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optimer_hf.errors import ModelError, OptimerError
from optimer_hf.files.reading import read_json
from optimer_hf.models.headers import BUFFERS, Shapes, read_shapes
from optimer_hf.models.layout import ADAPTER_CONFIG, VECTOR_FILE
from optimer_hf.vectors.groups import OF_LAYER

QUANTIZATION = "quantization_config"
PREFIX = "base_model.model."  # of PEFT, before the name of a module


def refuse_other_shapes(base: str, sources: Mapping[str, str]) -> None:
    """Raise ModelError if a fine-tune or adapter on this disk has a tensor whose shape is another
    one in the base, which is on this disk, too. Rows of the vocabulary may differ.
    """
    if not Path(base).is_dir() or _is_quantised(Path(base)):
        return
    shapes = read_shapes(Path(base))
    for name, source in sources.items():
        path = Path(source)
        if (path / VECTOR_FILE).exists() or not path.is_dir():
            continue  # its record has the sha256 of its base
        if (path / ADAPTER_CONFIG).exists():
            _refuse_factors(name, path, shapes)
        elif not _is_quantised(path):
            _refuse_tensors(name, path, shapes)


def _is_quantised(path: Path) -> bool:
    """Whether tensors are stored in another form, in which their shapes are others."""
    try:
        return bool(quantization_in(read_json(path / "config.json")))
    except (OptimerError, OSError):
        return True


def quantization_in(settings: Mapping[str, Any]) -> Any:
    """Return the quantization_config in the settings of a model or of its language part, or None if
    there is none.
    """
    text = settings.get("text_config")
    parts = (settings, text if isinstance(text, dict) else {})
    return next((part[QUANTIZATION] for part in parts if part.get(QUANTIZATION)), None)


def _refuse_tensors(name: str, path: Path, base: Shapes) -> None:
    for tensor, shape in sorted(read_shapes(path).items()):
        known = base.get(tensor, shape)
        is_compared = OF_LAYER.match(tensor) and not BUFFERS.search(tensor) and 0 not in shape
        if is_compared and sorted(shape) != sorted(known):
            raise _other_shape(name, tensor, shape, known)


def _refuse_factors(name: str, path: Path, base: Shapes) -> None:
    """Raise ModelError for a factor of LoRA with another width than both of its layer."""
    for tensor, shape in sorted(read_shapes(path, "adapter_model").items()):
        module = tensor.partition(".lora_")[0]
        known = base.get(f"{module.removeprefix(PREFIX)}.weight", ())
        is_known = len(known) == len(shape) == 2 and OF_LAYER.match(module) is not None
        if not is_known or tensor.count(".lora_") != 1:
            continue
        width = {".lora_A.weight": shape[1], ".lora_B.weight": shape[0]}.get(tensor[len(module) :])
        if width is not None and width not in known:
            raise _other_shape(name, tensor, shape, known)


def _other_shape(
    name: str, tensor: str, shape: tuple[int, ...], known: tuple[int, ...]
) -> ModelError:
    return ModelError(
        f"vector {name!r}: tensor {tensor!r} has shape {list(shape)}, and the base has "
        f"{list(known)} there. Give a vector trained from this base."
    )
