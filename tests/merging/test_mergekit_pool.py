"""A merge config read as a pool of vectors."""

import pytest

from optimer_hf.errors import ConfigError
from optimer_hf.merging.engines import merge
from optimer_hf.merging.mergekit_pool import (
    INT8,
    ON_UNREAD,
    UNREAD,
    linear_merge_of,
    obstacle_to_plain,
    plain_config_of,
    pool_of,
)
from optimer_hf.merging.mergekit_yaml import read_merge_config
from tests.support.landscapes import config_of
from tests.support.merges import optimer_yaml, write_config

BASE = "google/gemma-3-270m"


def test_the_vector_of_base_plus_adapter_is_the_adapter(tmp_path):
    texts = [f"{BASE}+you/lora", f"{BASE}+./lora", "./a+b", BASE]
    (tmp_path / "a+b").mkdir()  # a path that exists wins
    config = {"base_model": BASE, "models": [{"model": text} for text in texts]}
    local = {"lora-2": str(tmp_path / "lora"), "a+b": str(tmp_path / "a+b")}
    expected = {"lora": "you/lora"} | local
    assert pool_of(config, tmp_path / "c.yml") == (BASE, expected)
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
        pool_of(config, path)
    assert linear_merge_of(config, path) is None  # mergekit merges it first


def test_a_config_without_base_or_models_is_an_error(tmp_path):
    path = tmp_path / "c.yml"
    with pytest.raises(ConfigError, match="field 'base_model' is missing"):
        pool_of({"models": [{"model": "a/b"}]}, path)
    with pytest.raises(ConfigError, match="found only the base"):
        pool_of({"base_model": "a/b", "models": [{"model": "a/b"}]}, path)
    with pytest.raises(ConfigError, match="modules: has the models of each part"):
        pool_of({"base_model": "a/b", "modules": {"text": {"models": [{"model": "a/c"}]}}}, path)


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
                    "parameters": {"weight": [{"filter": "layers.3", "value": 1}, {"value": 1}]},
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


@pytest.mark.parametrize("kind", [UNREAD, INT8, "delta", "pypi"])
def test_what_mergekit_cannot_read_is_no_obstacle_at_weight_0(kind):
    source = "pypi:some-package" if kind == "pypi" else "you/b"
    kinds = {"a": "checkpoint", "b": "checkpoint" if kind == "pypi" else kind}
    study = config_of(vectors={"a": {"source": "you/a"}, "b": {"source": source}})
    assert obstacle_to_plain(study, {"a": 0.5, "b": 0.5}, kinds) is not None
    assert obstacle_to_plain(study, {"a": 0.5, "b": 0.0}, kinds) is None
    config = plain_config_of(study, {"a": 0.5, "b": 0.0}, kinds, None)
    assert [each["model"] for each in config["models"]] == ["you/a"]
    unread = dict.fromkeys(kinds, ON_UNREAD)  # of the base, which every merge has
    assert obstacle_to_plain(study, {"a": 0.0, "b": 0.0}, unread) is not None
