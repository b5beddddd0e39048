"""Copies of models with other weights."""

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file


def edit_weights(source: Path, out: Path, edit) -> Path:
    """Copy a model directory, change its tensors with `edit`, and return the copy."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    edit(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out
