"""Pools of two vectors of each kind."""

from pathlib import Path

import pytest
import torch

from optimer_hf.models.layout import ResolvedModel
from optimer_hf.vectors.delta import extract
from optimer_hf.vectors.opening import open_vector


@pytest.fixture(scope="module")
def pool(make_base, make_tuned, make_adapter, tmp_path_factory):
    """Return a function architecture, kind of vector, dtype -> base and two sources; made once."""
    made: dict[tuple[str, str, torch.dtype], tuple[ResolvedModel, dict[str, Path]]] = {}

    def sources(
        kind: str, vectors: str, dtype: torch.dtype
    ) -> tuple[ResolvedModel, dict[str, Path]]:
        if (kind, vectors, dtype) not in made:
            base = make_base(kind, dtype)
            if vectors == "adapter":
                paths = {name: make_adapter(base, seed) for seed, name in enumerate(("ja", "math"))}
            else:
                paths = {
                    name: make_tuned(base, kind, seed, dtype)
                    for seed, name in enumerate(("ja", "math"))
                }
            if vectors == "delta":
                folder = tmp_path_factory.mktemp("deltas")
                for name, path in paths.items():
                    extract(open_vector(name, str(path), base), base, folder / name)
                paths = {name: folder / name for name in paths}
            made[kind, vectors, dtype] = base, paths
        return made[kind, vectors, dtype]

    return sources


@pytest.fixture(scope="module")
def models(tmp_path_factory, make_base, make_tuned):
    """A folder with a base and two fine-tunes, and paths that mergekit's short form cannot say."""
    folder = tmp_path_factory.mktemp("models")
    base = make_base("llama", torch.float32)
    (folder / "base").symlink_to(base.path)
    for name, seed in (("a", 1), ("b", 2)):
        tuned = make_tuned(base, "llama", seed, torch.float32, 0.02)
        (folder / name).symlink_to(tuned)
        (folder / f"{name}+{name}@1").symlink_to(tuned)
    return folder


@pytest.fixture
def world(models, tmp_path):
    """Return a folder of one test with the models beside the config."""
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path.resolve())
    return tmp_path
