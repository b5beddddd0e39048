"""mixture.py: weights to mixture ratios, and the run that retrains with them."""

import json

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from optimer_hf.cli import main
from optimer_hf.corpus.config import CorpusConfig
from optimer_hf.errors import ConfigError
from optimer_hf.training.config import MixturePart, TrainConfig
from optimer_hf.training.mixture import mix_runs, ratios_of, training_tokens, write_mixture
from optimer_hf.training.run import train
from optimer_hf.vectors.delta import write_record

LORA = {"r": 2, "target_modules": "all-linear"}


def run(name: str, path, **fields) -> TrainConfig:
    settings = {"base_model": "a/base", "block_size": 32, "max_tokens": 320, "lora": LORA}
    return TrainConfig(name=name, corpus=CorpusConfig(path=path), **settings | fields)


def test_shares_are_in_proportion_to_weight_times_tokens():
    ratios = ratios_of({"ja": 0.5, "zh": 0.25, "math": 0.5}, {"ja": 100, "zh": 100, "math": 50})
    assert ratios.shares == {"ja": 0.5, "zh": 0.25, "math": 0.25}
    assert ratios.left_out == []


def test_weights_that_are_not_above_zero_have_no_share_and_are_named():
    ratios = ratios_of({"ja": 0.5, "zh": -0.2, "math": 0.0}, {"ja": 1, "zh": 1, "math": 1})
    assert (ratios.shares, ratios.left_out) == ({"ja": 1.0}, ["zh", "math"])
    with pytest.raises(ConfigError, match="no weight is above 0"):
        ratios_of({"ja": -1.0}, {"ja": 1})


def test_the_weight_of_a_mixture_counts_for_what_is_in_it():
    weights = {"ja": 0.5, "zh": -0.2, "math": 0.0, "mix": 0.5}
    tokens = {"ja": 100, "zh": 100, "math": 100, "mix": 200}
    mixtures = {"mix": {"ja": 1, "zh": 1, "math": 2}}  # 25, 25 and 50 of its 100 weighted tokens
    ratios = ratios_of(weights, tokens, mixtures)
    expected = {"ja": 75 / 130, "zh": 5 / 130, "math": 50 / 130}
    assert ratios.shares == pytest.approx(expected, abs=1e-6) and ratios.left_out == []
    below = ratios_of(weights | {"mix": -0.3}, tokens, mixtures)
    assert (below.shares, below.left_out) == ({"ja": 1.0}, ["zh", "math"])
    alone = ratios_of({"math": 1.0, "mix": 1.0}, tokens, mixtures)
    assert alone.shares == {"math": 1.0}, "what is left out has no share, in a mixture either"


@given(st.lists(st.tuples(st.floats(1e-3, 2), st.integers(1, 10**9)), min_size=1, max_size=9))
def test_shares_sum_to_one(pairs):
    weights = {str(number): weight for number, (weight, _) in enumerate(pairs)}
    tokens = {str(number): n for number, (_, n) in enumerate(pairs)}
    assert sum(ratios_of(weights, tokens).shares.values()) == pytest.approx(1, abs=1e-9)


def test_a_mixture_keeps_the_settings_of_the_runs_and_flattens_their_own_mixtures(tmp_path):
    nested = [
        MixturePart(path=tmp_path / "b", share=0.25),
        MixturePart(path=tmp_path / "c", share=0.75),
    ]
    runs = {
        "a": run("a", tmp_path / "a", seed=3),
        "b": run("b", tmp_path / "b").model_copy(update={"corpus": None, "mixture": nested}),
    }
    mixed = mix_runs(runs, {"a": 0.2, "b": 0.8}, name="m", max_tokens=640)
    assert [(part.path.name, part.share) for part in mixed.mixture] == [
        ("a", 0.2),
        ("b", 0.2),
        ("c", pytest.approx(0.6)),
    ]
    assert all(part.upsample for part in mixed.mixture)
    assert (mixed.name, mixed.max_tokens, mixed.lora, mixed.seed) == ("m", 640, LORA, 3)


def test_runs_that_are_not_alike_are_not_mixed(tmp_path):
    runs = {"a": run("a", tmp_path / "a"), "b": run("b", tmp_path / "b", block_size=64)}
    with pytest.raises(
        ConfigError, match=r"settings of 'b' differ from those of 'a' \(block_size: found 64"
    ):
        mix_runs(runs, {"a": 0.5, "b": 0.5}, name="m", max_tokens=1)
    with pytest.raises(ConfigError, match="no training run is called 'c'; known: a, b"):
        mix_runs(runs, {"c": 1.0}, name="m", max_tokens=1)
    with pytest.raises(ConfigError, match="no share may be below 0"):
        mix_runs(runs, {"a": 0.0}, name="m", max_tokens=1)


def test_a_written_mixture_reads_back_and_names_no_path_of_this_machine(tmp_path):
    (tmp_path / "a.jsonl").touch()
    mixed = mix_runs({"a": run("a", tmp_path / "a.jsonl")}, {"a": 1.0}, name="m", max_tokens=64)
    write_mixture(mixed, tmp_path / "train-mixture.yaml")
    assert str(tmp_path) not in (tmp_path / "train-mixture.yaml").read_text(encoding="utf-8")
    assert TrainConfig.read(tmp_path / "train-mixture.yaml") == mixed


def test_a_vector_without_a_training_record_is_an_error_that_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match=r"vector 'a' .* --tokens a=N"):
        training_tokens({"a": str(tmp_path)})


def test_from_a_recipe_to_a_model_trained_on_the_mixture(make_base, corpus_dir, tmp_path):
    base = make_base("gemma", torch.float32)
    trainer = {"bf16": False, "save_strategy": "no"}
    fields = {"base_model": str(base.path), "trainer": trainer}
    for name in ("aaa", "mix"):
        own = {"mix": "train-mix"}.get(name, name)  # a study may call a vector otherwise
        config = run(own, corpus_dir / f"{name}.train.jsonl", **fields)
        config.write(tmp_path / f"train-{name}.yaml")
        train(config, tmp_path / name)
        write_record(tmp_path / name, base, name=own, kind="adapter")
    recipe = {
        "name": "r",
        "base_model": str(base.path),
        "dtype": "float32",
        "vectors": {
            "aaa": {"source": "./aaa", "weight": 0.6},
            "mix": {"source": "./mix", "weight": 0.2},
        },
        "objective": {},
        "scores": {},
        "study": {},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe), encoding="utf-8")
    out = tmp_path / "train-mixture.yaml"
    files = [str(tmp_path / f"train-{name}.yaml") for name in ("aaa", "mix")]
    result = CliRunner().invoke(
        main, ["ratios", str(tmp_path / "recipe.yaml"), *files, "--out", str(out)]
    )
    assert result.exit_code == 0, result.output
    assert "aaa: 75.00 %  (weight 0.6)" in result.output
    mixed = TrainConfig.read(out)
    alone = CliRunner().invoke(
        main, ["ratios", str(tmp_path / "recipe.yaml"), "--without", "mix", "--format", "json"]
    )
    assert json.loads(alone.output) == {"shares": {"aaa": 1.0}, "left_out": ["mix"]}
    assert mixed.max_tokens == 640, "the tokens of both vectors"
    write_record(tmp_path / "mix", base, name="mix", kind="adapter")  # as `optimer run` names it
    again = CliRunner().invoke(
        main, ["ratios", str(tmp_path / "recipe.yaml"), *files, "--out", str(out)]
    )
    assert again.exit_code == 0, again.output
    assert TrainConfig.read(out) == mixed
    train(mixed, tmp_path / "mixed")
    record = json.loads((tmp_path / "mixed" / "training.json").read_text(encoding="utf-8"))
    assert [part["n_tokens"] for part in record["corpus"]["parts"]] == [480, 160]
    assert record["training"]["n_tokens"] == 640


def test_ratios_of_the_command_line_refuses_what_does_not_fit(tmp_path):
    recipe = {
        "name": "r",
        "base_model": "a/b",
        "dtype": "float32",
        "vectors": {"a": {"source": "a/v", "weight": 1.0}},
        "objective": {},
        "scores": {},
        "study": {},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe), encoding="utf-8")
    for arguments, message in (
        (["--tokens", "b=1"], "--tokens 'b=1': expected NAME=N with one of a"),
        (["--tokens", "a=1", "--out", "x.yaml"], "TRAIN_YAML and --out go together"),
        ([], "vector 'a' (a/v) does not say how many tokens"),
        (["--without", "b"], "--without b: there is no such vector. Known: a."),
        (["--without", "a"], "no weight is above 0"),
    ):
        result = CliRunner().invoke(main, ["ratios", str(file), *arguments])
        assert result.exit_code == 1 and message in result.output
