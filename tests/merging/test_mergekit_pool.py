"""A merge config read as a pool of vectors."""

import pytest
import torch

from optimer_hf.errors import ConfigError
from optimer_hf.merging.engines import merge
from optimer_hf.merging.mergekit_pool import (
    linear_merge_of,
    pool_of,
    pool_to_search,
    unsearched_settings,
)
from optimer_hf.merging.mergekit_yaml import read_merge_config
from optimer_hf.vectors.delta import extract
from optimer_hf.vectors.opening import open_vector
from tests.support.merges import optimer_yaml, write_config

BASE = "google/gemma-3-270m"


def test_the_vector_of_base_plus_adapter_is_the_adapter(tmp_path):
    texts = [f"{BASE}+you/lora", f"{BASE}+./lora", "./a+b", BASE]
    (tmp_path / "a+b").mkdir()  # a path that exists wins
    config = {"base_model": BASE, "models": [{"model": text} for text in texts]}
    local = {"lora-2": str(tmp_path / "lora"), "a+b": str(tmp_path / "a+b")}
    expected = {"lora": "you/lora"} | local
    assert pool_to_search(config, tmp_path / "c.yml") == (BASE, expected)
    models = [{"model": "./a+b+you/lora"}]
    base, sources = pool_of({"base_model": "./a+b", "models": models}, tmp_path / "c.yml")
    assert (base, sources) == (str(tmp_path / "a+b"), {"lora": "you/lora"})


@pytest.mark.parametrize(
    ("field", "base", "model"),
    [("models.0.model", BASE, "google/other+you/lora"), ("base_model", f"{BASE}+you/lora", "a/b")],
)
def test_an_adapter_of_another_model_is_no_vector(tmp_path, field, base, model):
    path = write_config(
        tmp_path / "c.yml", optimer_yaml(base_model=base, models=[{"model": model}])
    )
    config = read_merge_config(path)
    with pytest.raises(
        ConfigError, match=rf"{field}: found .*another model than base_model.*Merge"
    ):
        pool_to_search(config, path)
    assert linear_merge_of(config, path) is None  # mergekit merges it first


def test_a_config_without_base_or_models_is_an_error(tmp_path):
    path = tmp_path / "c.yml"
    with pytest.raises(ConfigError, match="field 'base_model' is missing"):
        pool_of({"models": [{"model": "a/b"}]}, path)
    with pytest.raises(ConfigError, match="found only the base"):
        pool_of({"base_model": "a/b", "models": [{"model": "a/b"}]}, path)
    with pytest.raises(ConfigError, match="slices: has weights for each layer"):
        pool_of({"base_model": "a/b", "slices": [{"sources": [{"model": "a/c"}]}]}, path)


def test_vectors_are_named_by_the_last_part_of_their_path(tmp_path):
    models = [{"model": text} for text in ("org/ja@main", "./x/ja", "./x/math", "org/base")]
    base, sources = pool_of({"base_model": "org/base", "models": models}, tmp_path / "c.yml")
    assert base == "org/base"
    assert sources == {
        "ja": "org/ja@main",
        "ja-2": str(tmp_path / "x/ja"),
        "math": str(tmp_path / "x/math"),
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"merge_method": "ties"},
        {"tokenizer": {"source": "union", "tokens": {"<x>": {"source": "./tuned"}}}},
        {
            "models": [
                {
                    "model": "./tuned",
                    "parameters": {"weight": [{"filter": "mlp", "value": [0, 1]}, {"value": 1}]},
                }
            ]
        },
        {"dtype": "bfloat16", "out_dtype": "float32"},
    ],
)
def test_what_only_mergekit_can_do_is_not_taken_by_the_writer(tmp_path, changes):
    path = write_config(tmp_path / "c.yml", optimer_yaml(**changes))
    assert linear_merge_of(read_merge_config(path), path) is None
    with pytest.raises(ConfigError, match="only mergekit can run"):
        merge(path, tmp_path / "out", engine="native")


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "of somebody else"])
def test_a_delta_directory_is_searched_with_our_record_only(pool, tmp_path, ours):
    base, sources = pool("llama", "checkpoint", torch.bfloat16)
    extract(open_vector("ja", str(sources["ja"]), base), base, tmp_path / "ja")
    if not ours:
        (tmp_path / "ja" / "vector.json").unlink()
    models = [{"model": "./ja", "parameters": {"weight": 0.5, "delta": True}}]
    config = optimer_yaml(base_model=str(base.path), models=models)
    path = write_config(tmp_path / "c.yml", config)
    if ours:
        assert pool_to_search(config, path)[1] == {"ja": str(tmp_path / "ja")}
        return
    with pytest.raises(ConfigError, match=r"c\.yml: models: \./ja: parameters\.delta: .*extract"):
        pool_to_search(config, path)


def test_a_search_names_what_it_does_not_keep_of_a_config():
    config = optimer_yaml(
        merge_method="ties",
        parameters={"density": 0.5, "weight": 1.0},
        models=[
            {"model": "a", "parameters": {"weight": [0, 1]}},
            {"model": "b", "parameters": {"weight": 0.5, "delta": True}},
            {"model": "c", "parameters": {"weight": [{"filter": "mlp", "value": 1}], "t": 1}},
            {"model": "d"},
        ],
    )
    assert unsearched_settings(config) == [
        "merge_method: ties",
        "parameters.density",
        "models: a: parameters.weight",
        "models: c: parameters.weight",
        "models: c: parameters.t",
    ]
    assert unsearched_settings(optimer_yaml()) == []
