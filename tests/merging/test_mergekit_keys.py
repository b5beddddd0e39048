"""Keys and values of a merge config are checked before anything runs."""

import pytest
import torch

from optimer_hf.errors import ConfigError
from optimer_hf.merging.mergekit_pool import (
    optimer_config,
)
from optimer_hf.merging.mergekit_yaml import read_merge_config
from tests.support.merges import merged_by, optimer_yaml, write_config


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            optimer_yaml(paramters={}),
            r"c\.yml:8: unknown field 'paramters'.*Did you mean 'parameters'\?",
        ),
        (
            optimer_yaml(models=[{"modle": "./tuned"}]),
            r"models\.0: unknown field 'modle'.*Did you mean 'model'\?",
        ),
        (
            optimer_yaml(models=[{"model": "a", "weight": 1}]),
            r"models\.0: unknown field 'weight'.*Put it under `parameters:`",
        ),
        (optimer_yaml(models=[{"parameters": {}}]), r"models\.0: field 'model' is missing"),
        (optimer_yaml(models=["./tuned"]), r"models\.0: found './tuned', expected a mapping"),
        (optimer_yaml(models=[{"model": 5}]), r"models\.0\.model: found 5, expected a path"),
        (optimer_yaml(dtype="bfloat61"), r"c\.yml:\d+: dtype: found .*Did you mean 'bfloat16'\?"),
        (
            optimer_yaml(models=[{"modle": "./tuned"}], dtyp="float32"),
            r"c\.yml:\d+: unknown field 'dtyp'.*\n.*c\.yml:\d+: models\.0: unknown field 'modle'",
        ),
        (
            {"base_model": "./base", "models": []},
            r"field 'merge_method' is missing.*merge_method: optimer",
        ),
    ],
)
def test_unknown_and_missing_fields_are_errors_with_a_suggestion(tmp_path, config, message):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        read_merge_config(write_config(tmp_path / "c.yml", config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["models"][0]["parameters"].update(wieght=1), r"unknown field 'wieght'"),
        (lambda c: c.update(parameters={"normalise": True}), r"unknown field 'normalise'"),
        (lambda c: c.update(tokenizer={"sourse": "base"}), r"tokenizer: unknown field 'sourse'"),
        (lambda c: c.update(tokenizer={"source": "base", "pad": 1}), r"unknown field 'pad'"),
        (lambda c: c["models"].append("x"), r"models\.2: found 'x'"),
        (lambda c: c.update(models=5), r"models: found 5, expected a list"),
    ],
)
def test_a_key_that_mergekit_would_drop_is_refused_at_any_depth(pool, change, message, tmp_path):
    base, sources = pool("llama", "checkpoint", torch.bfloat16)
    texts = {name: str(path) for name, path in sources.items()}
    config = optimer_config(str(base.path), texts, {"ja": 0.5, "math": 0.5}, "bfloat16")
    config["merge_method"] = "ties"
    for model in config["models"]:
        model["parameters"]["density"] = 0.5
    merged_by(config, tmp_path / "good")
    change(config)
    with pytest.raises(ConfigError, match=message):
        merged_by(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_slices_with_a_misspelt_key_are_refused(pool, tmp_path):
    base, sources = pool("llama", "checkpoint", torch.bfloat16)
    source = {"model": str(sources["ja"]), "layer_range": [0, 2], "layer_rnage": [0, 1]}
    config = {
        "merge_method": "passthrough",
        "base_model": str(base.path),
        "slices": [{"sources": [source]}],
        "dtype": "bfloat16",
    }
    with pytest.raises(ConfigError, match=r"slices\.0\.sources\.0: unknown field 'layer_rnage'"):
        merged_by(config, tmp_path / "out")
