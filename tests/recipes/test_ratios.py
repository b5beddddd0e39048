"""ratios.py: which train file is that of a vector."""

import json

import pytest

from optimer_hf.errors import ConfigError
from optimer_hf.recipes.ratios import ratios_of
from optimer_hf.training.config import TrainConfig


@pytest.mark.parametrize(
    ("recorded", "text", "expected"),
    [
        ("ja-v2", None, "new.jsonl"),
        ("ja-v2", "new.jsonl", "new.jsonl"),
        ("ja", "new.jsonl", "new.jsonl"),  # of a run, where the train file has another name
        ("ja", "old.jsonl", "old.jsonl"),
        ("ja", "moved.jsonl", "old.jsonl"),
        ("other", "new.jsonl", "new.jsonl"),
        ("other", "old.jsonl", "old.jsonl"),
        ("other", "moved.jsonl", None),
        ("other", None, "old.jsonl"),
        (None, None, "old.jsonl"),
    ],
)
def test_what_a_vector_recorded_goes_before_its_name_in_the_study(
    tmp_path, recorded, text, expected
):
    vector = tmp_path / "vector"
    vector.mkdir()
    if recorded is not None:
        base = {"reference": "a/b", "files": {}}
        record = {"name": recorded, "kind": "adapter", "base": base}
        record |= {"norm": 1.0, "relative_norm": 1.0}
        record |= {} if text is None else {"corpus": {"name": text}}
        (vector / "vector.json").write_text(json.dumps(record))
    recipe = {"name": "r", "base_model": "a/b", "dtype": "float32", "objective": {}, "scores": {}}
    recipe |= {"study": {}, "vectors": {"ja": {"source": "./vector", "weight": 0.5}}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    files = []
    for name, source in {"ja": "old.jsonl", "ja-v2": "new.jsonl"}.items():
        files.append(tmp_path / f"train-{name}.yaml")
        files[-1].write_text(f"name: {name}\nbase_model: a/b\ncorpus: {source}\n")
    asked = {"out": tmp_path / "mix.yaml", "tokens": ["ja=100"]}
    if expected is None:
        with pytest.raises(ConfigError, match="no training run is called 'ja'; known: ja-v2"):
            ratios_of(tmp_path / "recipe.yaml", files, **asked)
        return
    ratios_of(tmp_path / "recipe.yaml", files, **asked)
    (part,) = TrainConfig.read(tmp_path / "mix.yaml").mixture
    assert part.path.name == expected
