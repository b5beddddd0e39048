"""The replay of a train file: text mixed in, recorded, and the same in every mixture."""

import json

import pytest
import torch
import yaml
from transformers import get_scheduler

from optimer_hf.corpus.config import CorpusConfig
from optimer_hf.errors import ConfigError, OutputError
from optimer_hf.training.arguments import training_arguments
from optimer_hf.training.config import ReplayConfig, TrainConfig
from optimer_hf.training.mixture import mix_runs, write_mixture
from optimer_hf.training.run import is_trained, train
from optimer_hf.vectors.delta import write_record
from optimer_hf.vectors.record import read_record

LORA = {"r": 2, "target_modules": "all-linear"}
SETTINGS = {"block_size": 32, "max_tokens": 320, "lora": LORA}


@pytest.fixture
def config(make_base, corpus_dir) -> TrainConfig:
    """A run with a quarter of general text."""
    return TrainConfig(
        name="aaa",
        base_model=str(make_base("gemma", torch.float32).path),
        corpus=CorpusConfig(path=corpus_dir / "aaa.train.jsonl"),
        replay=ReplayConfig(path=corpus_dir / "mix.train.jsonl", share=0.25),
        trainer={"bf16": False, "save_strategy": "no"},
        **SETTINGS,
    )


def test_a_replay_is_packed_and_recorded(config: TrainConfig, make_base, tmp_path):
    out = tmp_path / "out"
    train(config, out)
    base = make_base("gemma", torch.float32)
    write_record(out, base, name="aaa", kind="adapter")
    record = read_record(out)
    sizes = {part.name: part.n_tokens for part in record.corpus.parts}
    assert sizes == {"aaa.train.jsonl": 256, "mix.train.jsonl": 64}  # 2.5 of 10 blocks, to a block
    trained = json.loads((out / "training.json").read_text())
    expected = {"name": "mix.train.jsonl", "share": 0.25}
    assert trained["training"]["replay"] == expected
    assert (record.training.replay.name, record.training.replay.share) == ("mix.train.jsonl", 0.25)
    assert set(trained["inputs"]) == {"base_model", "corpus", "replay"}
    other = config.replay.model_copy(update={"share": 0.5})
    with pytest.raises(OutputError, match=r"different config \(replay\.share"):
        is_trained(config.model_copy(update={"replay": other}), out)
    with pytest.raises(OutputError, match=r"different config \(replay"):
        is_trained(config.model_copy(update={"replay": None}), out)


def test_a_run_without_replay_has_the_digest_and_the_record_of_earlier_versions(config):
    plain = config.model_copy(update={"replay": None})
    assert "replay" not in plain.model_dump() and "replay" not in plain.settings
    assert plain.digest() != config.digest()


def test_a_mixture_of_runs_has_their_replay(config: TrainConfig, tmp_path):
    other = config.model_copy(update={"name": "b", "corpus": CorpusConfig(path=tmp_path / "b")})
    mixed = mix_runs({"a": config, "b": other}, {"a": 1, "b": 3}, name="m", max_tokens=640)
    assert mixed.replay == config.replay
    assert [part.share for part in mixed.parts] == pytest.approx([0.1875, 0.5625, 0.25])
    (tmp_path / "b").touch()
    write_mixture(mixed, tmp_path / "mixed.yaml")
    assert TrainConfig.read(tmp_path / "mixed.yaml") == mixed
    bare = other.model_copy(update={"replay": None})
    with pytest.raises(ConfigError, match=r"settings of 'b' differ from those of 'aaa' \(replay"):
        mix_runs({"a": config, "b": bare}, {"a": 1, "b": 3}, name="m", max_tokens=640)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": None}, "replay: a replay needs max_tokens"),
        ({"replay": {"path": "x", "share": 1}}, "replay.share"),
        ({"replay": {"share": 0.5}}, "exactly one of 'path'"),
        ({"replay": {"path": "x"}}, "'replay.share' is missing"),
    ],
)
def test_a_replay_that_cannot_be_is_refused(tmp_path, changes, message):
    (tmp_path / "x").touch()
    data = {"name": "a", "base_model": "a/b", "corpus": {"path": "x"}, "max_tokens": 99}
    data |= {"replay": {"path": "x", "share": 0.5}} | changes
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError) as error:
        TrainConfig.read(tmp_path / "train.yaml")
    assert message in str(error.value)


def test_a_constant_schedule_keeps_the_share_of_steps_that_warm_up(config: TrainConfig, tmp_path):
    trainer = config.trainer | {"lr_scheduler_type": "constant_with_warmup", "learning_rate": 0.5}
    arguments = training_arguments(config.model_copy(update={"trainer": trainer}), tmp_path)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=arguments.learning_rate)
    n_warm = arguments.get_warmup_steps(100)
    scheduler = get_scheduler(arguments.lr_scheduler_type, optimizer, n_warm, 100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.5 * min(1, step / 10) for step in range(100)])
