"""A pool of tiny models, a folder with somebody's merge, and a search of it."""

import os

import pytest
import torch
import yaml

from tests.support import publishing
from tests.support.cli import optimer

base, name, published_base = publishing.base, publishing.name, publishing.published_base
make_recipe, make_vector = publishing.make_recipe, publishing.make_vector


@pytest.fixture(scope="session")
def pool(make_base, make_tuned):
    base = make_base("llama", torch.float32)
    return base.path, [make_tuned(base, "llama", seed, torch.float32, 0.02) for seed in (1, 2)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory, pool, corpus_dir):
    """A folder with a mergekit YAML of somebody's fine-tunes, and an objective."""
    out = tmp_path_factory.mktemp("folder")
    base, tuned = pool
    models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in tuned]
    config = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": models,
        "dtype": "float32",
    }
    (out / "my-merge.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    terms = [
        {"text": os.path.relpath(corpus_dir / f"{name}.search.jsonl", out)}
        for name in ("aaa", "xyz")
    ]
    (out / "obj.yaml").write_text(yaml.safe_dump({"terms": terms, "limit": 3}), encoding="utf-8")
    return out


@pytest.fixture(scope="session")
def searched(folder):
    study = folder / "two-terms"
    result = optimer(
        *("search", folder / "my-merge.yml", study, "--objective", folder / "obj.yaml"),
        *("--n-trials", 6, "--workers", 2),
    )
    return study, result
