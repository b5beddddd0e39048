"""Shapes of stored tensors, from the headers of safetensors files alone, without any library."""

import json
import re
from pathlib import Path

from optimer_hf.errors import OptimerError
from optimer_hf.models.layout import INDEX, find_weights_files, read_index

BUFFERS = re.compile(  # computed when a model is built; older programs saved them
    r"(^|\.)((rotary_emb|rotary|rotary_pos_emb)\.\w+|(\w+_)?inv_freq|position_ids|masked_bias"
    r"|(attn|attention|self_attn|self_attention|crossattention)\.bias|cos_cached|sin_cached"
    r"|_extra_state)$"
)
LARGEST_HEADER = 2**25  # bytes; 100,000 tensors take 12 million

Shapes = dict[str, tuple[int, ...]]


def read_shapes(path: Path, prefix: str = "model") -> Shapes:
    """Return the shape of each tensor in a model directory, by name; none if a file cannot be read,
    which is an error for whoever reads its weights. The files are those that `Checkpoint` reads.
    """
    shapes: Shapes = {}
    index = path / f"{prefix}{INDEX}"
    is_sharded = index.exists() and not (path / f"{prefix}.safetensors").exists()
    try:
        weight_map = read_index(index) if is_sharded else None
        for file in find_weights_files(path, prefix, weight_map):
            shapes |= _shapes_in(file)
    except (OptimerError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return shapes


def _shapes_in(file: Path) -> Shapes:
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > LARGEST_HEADER:
            raise ValueError(f"{file}: found a header of {length:,} bytes")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return {name: tuple(map(int, entry["shape"])) for name, entry in header.items()}
