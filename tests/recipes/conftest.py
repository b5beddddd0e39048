import shutil
from pathlib import Path

import pytest
import yaml

from optimer_hf.models.layout import ResolvedModel, weight_digests
from optimer_hf.recipes.record import Lock
from optimer_hf.vectors.delta import extract
from optimer_hf.vectors.opening import open_vector
from tests.support.recipes import WEIGHTS


@pytest.fixture
def pool(make_base, make_tuned, make_adapter, tmp_path) -> tuple[ResolvedModel, dict[str, Path]]:
    """A base and an adapter, a delta and a checkpoint, copied so that a test may damage them."""
    made = make_base("llama")
    shutil.copytree(made.path, tmp_path / "base")
    base = ResolvedModel(tmp_path / "base", "base")
    vectors = tmp_path / "vectors"
    shutil.copytree(make_adapter(base, 0), vectors / "ja")
    extract(open_vector("math", str(make_tuned(base, "llama", 1)), base), base, vectors / "math")
    shutil.copytree(make_tuned(base, "llama", 2), vectors / "it")
    return base, {name: vectors / name for name in WEIGHTS}


@pytest.fixture
def recipe(pool, tmp_path) -> Path:
    """A recipe written by hand over all three kinds of vector, with its lock, in a folder that uses
    relative paths.
    """
    base, sources = pool
    path = tmp_path / "recipe.yaml"
    data = {
        "format_version": 1,
        "name": "demo",
        "base_model": "./base",
        "dtype": "bfloat16",
        "vectors": {
            name: {"source": f"./vectors/{name}", "weight": weight}
            for name, weight in WEIGHTS.items()
        },
        "objective": {"terms": [{"task": "t"}]},
        "scores": {},
        "study": {"sha256": "0" * 64, "n_trials": 1, "seed": 0, "incumbent": 0},
    }
    path.write_text(yaml.safe_dump(data, sort_keys=False), encoding="utf-8")
    files = {name: weight_digests(source) for name, source in sources.items()}
    lock = Lock(base=weight_digests(base.path), vectors=files, weights=WEIGHTS, dtype="bfloat16")
    lock.write(path.with_suffix(".lock.json"))
    return path
