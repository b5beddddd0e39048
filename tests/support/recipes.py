"""The pool of the recipes that tests write by hand, and a change of its weights."""

from pathlib import Path

from safetensors.torch import load_file, save_file

WEIGHTS = {"ja": 0.8, "math": -0.35, "it": 1.0}


def change_weights(directory: Path) -> None:
    """Add a step to one element of one weights file."""
    file = sorted(directory.glob("*.safetensors"))[0]
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
