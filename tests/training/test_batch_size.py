"""batch_size.py: a batch is doubled while it fits, gains speed and leaves the run enough steps."""

import pytest

from optimer_hf.corpus.config import CorpusConfig
from optimer_hf.errors import ConfigError
from optimer_hf.training.arguments import finds_batch_size, training_arguments
from optimer_hf.training.batch_size import double_while_faster
from optimer_hf.training.config import TrainConfig
from optimer_hf.training.fields import list_field_mistakes
from optimer_hf.training.sharding import check_sharding


@pytest.mark.parametrize(
    ("seconds", "most", "size"),
    [
        ({1: 1.0, 2: 1.0, 4: 1.0, 8: 1.0}, 8, 8),  # nothing but launches: twice as fast each time
        ({1: 1.0, 2: 1.2, 4: 2.4}, 64, 2),  # the device is busy at two
        ({1: 1.0, 2: 1.0, 4: None}, 64, 2),  # four do not fit
        ({1: None}, 64, 1),  # the run will say so
        ({1: 1.0, 2: 1.0, 4: 1.0}, 3, 2),  # more would leave too few steps
        ({1: 1.0}, 1, 1),
    ],
)
def test_a_batch_is_doubled_while_that_gains(seconds, most, size):
    assert double_while_faster(seconds.__getitem__, most) == size


def config_with(batch_size: object) -> TrainConfig:
    return TrainConfig(
        name="aaa",
        base_model="base",
        corpus=CorpusConfig(path="text.jsonl"),
        trainer={"per_device_train_batch_size": batch_size},
    )


def test_auto_is_a_batch_size(tmp_path):
    config = config_with("auto")
    assert finds_batch_size(config)
    assert list_field_mistakes(config) == []
    assert training_arguments(config, tmp_path).per_device_train_batch_size == 1
    assert not finds_batch_size(config_with(4))


@pytest.mark.parametrize("batch_size", ["large", 0, 1.5, None, [1]])
def test_other_words_and_numbers_are_refused(batch_size):
    ((at, message),) = list_field_mistakes(config_with(batch_size))
    assert at == ("trainer", "per_device_train_batch_size")
    assert "found" in message


def test_auto_needs_the_whole_model_on_each_gpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_sharding(config_with(4))
    with pytest.raises(ConfigError, match="found FSDP and per_device_train_batch_size: auto"):
        check_sharding(config_with("auto"))
