"""Which engine runs a merge config, and what both refuse."""

import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimer_hf.errors import ConfigError, ModelError
from optimer_hf.merging.engines import merge
from optimer_hf.merging.mergekit_pool import (
    optimer_config,
)
from optimer_hf.vectors.delta import extract
from optimer_hf.vectors.opening import open_vector
from tests.support.merges import (
    assert_same_bits,
    merged_by,
    optimer_yaml,
    read_all,
    write_config,
)


@pytest.mark.parametrize("engine", ["native", "mergekit"])
@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"wieght": 1.0},
            r"c\.yml:6: models\.0\.parameters: unknown field 'wieght'.*Did you mean 'weight'\?",
        ),
        ({}, r"tuned: parameters\.weight is missing"),
        ({"weight": "x"}, r"models\.0\.parameters\.weight: found 'x', expected a number"),
    ],
)
def test_a_vector_without_its_weight_is_an_error_for_both_engines(
    tmp_path, engine, parameters, message
):
    path = write_config(
        tmp_path / "c.yml", optimer_yaml(models=[{"model": "./tuned", "parameters": parameters}])
    )
    with pytest.raises(ConfigError, match=message):
        merge(path, tmp_path / "out", engine=engine)
    assert not (tmp_path / "out").exists()


def test_base_plus_adapter_is_merged_as_the_adapter_is(pool, tmp_path):
    base, sources = pool("llama", "adapter", torch.float32)
    other, _ = pool("llama", "checkpoint", torch.float32)
    weights = {"ja": 0.5, "math": -0.25}
    plain = {name: str(path) for name, path in sources.items()}
    layered = {name: f"{base.path}+{path}" for name, path in sources.items()}
    config = optimer_config(str(base.path), layered, weights, "float32")
    plain_config = optimer_config(str(base.path), plain, weights, "float32")
    merged = merged_by(config, tmp_path / "a", "native")
    assert_same_bits(merged, merged_by(plain_config, tmp_path / "b", "native"))
    shutil.copytree(other.path, tmp_path / "other")
    config["models"][0]["model"] = f"{tmp_path / 'other'}+{sources['ja']}"
    with pytest.raises(ConfigError, match=r"other\+.*Give --lora-merge-cache DIR"):
        merged_by(config, tmp_path / "c")


def test_the_engine_follows_the_config_and_the_options(pool, tmp_path):
    from mergekit.options import MergeOptions

    base, sources = pool("llama", "checkpoint", torch.bfloat16)
    config = optimer_config(str(base.path), {"ja": str(sources["ja"])}, {"ja": 0.5}, "bfloat16")
    path = write_config(tmp_path / "c.yml", config)
    assert merge(path, tmp_path / "a") == "native"
    assert (tmp_path / "a" / "mergekit_config.yml").read_text(encoding="utf-8") == path.read_text(
        encoding="utf-8"
    )
    assert (
        merge(path, tmp_path / "b", options=MergeOptions(quiet=True, out_shard_size=20_000))
        == "native"
    )
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 1
    assert (
        merge(path, tmp_path / "c", options=MergeOptions(quiet=True, clone_tensors=True))
        == "mergekit"
    )
    assert_same_bits(read_all(tmp_path / "c"), read_all(tmp_path / "a"))


def test_paths_in_a_config_are_seen_from_its_folder(pool, tmp_path, monkeypatch):
    base, sources = pool("llama", "checkpoint", torch.bfloat16)
    (tmp_path / "base").symlink_to(base.path)
    (tmp_path / "tuned").symlink_to(sources["ja"])
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for prefix in ("./", ""):
        models = [{"model": f"{prefix}tuned", "parameters": {"weight": 1.0}}]
        config = optimer_yaml(base_model=f"{prefix}base", models=models)
        path = write_config(tmp_path / "c.yml", config)
        for engine in ("native", "mergekit"):
            out = tmp_path / f"{engine}{len(prefix)}"
            merge(path, out, engine=engine)
            assert_same_bits(read_all(out), read_all(sources["ja"]))


def test_a_config_mergekit_refuses_is_an_error_that_names_the_file(pool, tmp_path):
    base, sources = pool("llama", "checkpoint", torch.bfloat16)
    config = optimer_config(str(base.path), {"ja": str(sources["ja"])}, {"ja": 0.5}, "bfloat16")
    path = write_config(tmp_path / "c.yml", config | {"merge_method": "optimizer"})
    with pytest.raises(ConfigError, match=r"c\.yml:1: mergekit has no .*Did you mean 'optimer'\?"):
        merge(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_not_there_is_named_before_mergekit_asks_the_hub(pool, tmp_path):
    models = [{"model": str(tmp_path / "gone"), "parameters": {"weight": 1.0}}]
    base, _ = pool("llama", "checkpoint", torch.float32)
    config = optimer_yaml(base_model=str(base.path), models=models, merge_method="ties")
    expected = r"c\.yml:\d+: models\.0\.model: .*gone: no such file or directory\.$"
    with pytest.raises(ConfigError, match=expected):
        merge(write_config(tmp_path / "c.yml", config), tmp_path / "out")


def test_a_merge_with_a_nan_weight_is_refused(pool, tmp_path):
    base, sources = pool("llama", "checkpoint", torch.bfloat16)
    config = optimer_config(
        str(base.path), {"ja": str(sources["ja"])}, {"ja": math.nan}, "bfloat16"
    )
    with pytest.raises(ConfigError, match=r"models\.0\.parameters\.weight: found nan"):
        merge(write_config(tmp_path / "c.yml", config), tmp_path / "out")


def test_added_tokens_are_refused_and_mergekit_aligns_them(
    make_base, save_model, tokenizer, tmp_path
):
    base = make_base("llama")
    model = AutoModelForCausalLM.from_pretrained(base.path)
    model.resize_token_embeddings(len(tokenizer) + 1)
    tuned = save_model(model, "larger")
    larger = AutoTokenizer.from_pretrained(tuned)
    larger.add_tokens(["<new>"])
    larger.save_pretrained(tuned)
    config = optimer_config(str(base.path), {"it": str(tuned)}, {"it": 0.5}, "bfloat16")
    with pytest.raises(ModelError, match=r"vocabularies differ.*`tokenizer:`"):
        merged_by(config, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    merged_by(config | {"tokenizer": {"source": "union"}}, tmp_path / "out", "mergekit")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.get_input_embeddings().weight.shape[0] >= len(tokenizer) + 1
    assert "<new>" in AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()


def test_a_base_that_is_no_model_is_refused_before_anything_is_written(pool, tmp_path):
    base, sources = pool("llama", "checkpoint", torch.bfloat16)
    shutil.copytree(base.path, tmp_path / "base")
    (tmp_path / "base" / "config.json").unlink()
    _, deltas = pool("llama", "delta", torch.bfloat16)
    for path, message in (
        (tmp_path / "base", "no config.json"),
        (deltas["ja"], "is a delta, not a model"),
    ):
        config = optimer_config(str(path), {"ja": str(sources["ja"])}, {"ja": 0.5}, "bfloat16")
        with pytest.raises(ModelError, match=message):
            merged_by(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_int8_delta_is_merged_by_the_writer_and_refused_for_mergekit(pool, tmp_path):
    base, sources = pool("llama", "checkpoint", torch.bfloat16)
    extract(open_vector("ja", str(sources["ja"]), base), base, tmp_path / "ja", dtype="int8")
    config = optimer_config(str(base.path), {"ja": str(tmp_path / "ja")}, {"ja": 0.5}, "float32")
    merged = merged_by(config, tmp_path / "out")
    exact = optimer_config(str(base.path), {"ja": str(sources["ja"])}, {"ja": 0.5}, "float32")
    for name, tensor in merged_by(exact, tmp_path / "exact").items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=2e-4)
    with pytest.raises(ModelError, match=r"an int8 delta, which mergekit cannot read"):
        merged_by(config, tmp_path / "theirs", "mergekit")


def test_an_adapter_is_refused_for_mergekit_and_the_error_says_what_to_do(pool, tmp_path):
    base, sources = pool("llama", "adapter", torch.bfloat16)
    config = optimer_config(str(base.path), {"ja": str(sources["ja"])}, {"ja": 0.5}, "float32")
    config["models"][0]["parameters"]["weight"] = [0.2, 0.5, 0.8]  # to interpolate
    with pytest.raises(ModelError, match=r"an adapter, which mergekit .*`optimer extract"):
        merged_by(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("source", ["base", "the base by name"])
def test_naming_the_base_as_tokenizer_changes_nothing_for_the_writer(pool, tmp_path, source):
    base, sources = pool("llama", "adapter", torch.bfloat16)
    config = optimer_config(str(base.path), {"ja": str(sources["ja"])}, {"ja": 0.5}, "float32")
    named = "base" if source == "base" else str(base.path)
    merged = merged_by(config | {"tokenizer_source": named}, tmp_path / "out", "native")
    assert_same_bits(merged, merged_by(config, tmp_path / "plain"))
