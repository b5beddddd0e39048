"""config.py: what a train file may say."""

import re

import pytest

from optimer_hf.training.config import TrainConfig


def test_a_mixture_needs_shares_that_sum_to_one_and_a_budget(tmp_path):
    def config(shares, **fields):
        parts = [{"path": tmp_path / "a.jsonl", "share": share} for share in shares]
        return TrainConfig(name="m", base_model="a/b", mixture=parts, **fields)

    with pytest.raises(ValueError, match=r"the shares of the mixture sum to 0\.9, not to 1"):
        config([0.5, 0.4], max_tokens=64)
    with pytest.raises(ValueError, match="a mixture needs max_tokens"):
        config([0.5, 0.5])
    with pytest.raises(ValueError, match="exactly one of 'corpus' and 'mixture'"):
        TrainConfig(name="m", base_model="a/b")


@pytest.mark.parametrize(
    ("target", "source"),
    [
        ("corpus-v3.jsonl", lambda file: {"path": file}),
        ("corpus-v3.jsonl", lambda file: {"dataset": "json", "data_files": str(file)}),
        ("0123", lambda file: {"dataset": "json", "data_files": [str(file)]}),
    ],
)
def test_a_link_to_a_corpus_does_not_change_the_digest_of_a_training(tmp_path, target, source):
    (tmp_path / target).touch()
    (tmp_path / "corpus.jsonl").symlink_to(target)
    digests = {
        TrainConfig(name="x", base_model="a/b", corpus=source(tmp_path / name)).digest()
        for name in (target, "corpus.jsonl")
    }
    assert len(digests) == 1


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ("corpus: {path: a.jsonl, split: validation}", "corpus.split"),
        (
            "corpus: a.jsonl\ntrainer: {max_steps: 9, num_train_epochs: 2}",
            "trainer.num_train_epochs",
        ),
        (
            "corpus: a.jsonl\nmax_tokens: 99\nreplay: {path: b.jsonl, share: 0.1, split: test}",
            "replay.split",
        ),
    ],
)
def test_a_field_that_does_nothing_is_named_once(tmp_path, caplog, more, field):
    file = tmp_path / "train.yaml"
    file.write_text(f"name: a\nbase_model: a/base\n{more}\n")
    assert TrainConfig.read(file) == TrainConfig.read(file)
    (line,) = caplog.messages
    assert re.match(rf".*train\.yaml:\d+: {field}: does nothing beside .*; leave it out", line)
