"""hardware.py: time and memory on devices that are not here, against sums by hand."""

from dataclasses import replace

import pytest
import torch

from optimer_hf.experiment.hardware import (
    CHECKPOINTING,
    HOST_BANDWIDTH,
    OPTIMIZER,
    RESERVED,
    Hardware,
    TrainingSettings,
    TrialModel,
    item_seconds,
    merge_seconds,
    place_training,
    place_trial,
    read_settings,
    training_bytes,
    training_seconds,
)
from optimer_hf.models.devices import Accelerator
from optimer_hf.models.flops import Attention, ModelSizes
from optimer_hf.models.sizes import measure_sizes
from optimer_hf.scoring.work import ItemWork
from optimer_hf.training.config import TrainConfig
from tests.support.tiny import tiny_model

GB = 10**9
DEVICE = Accelerator("D", "", 100e12, 80 * GB, 2e12)  # room: 76 GB
BILLION = ModelSizes(
    total=GB,
    trained=GB,
    multiplied=GB,
    trained_multiplied=GB,
    attention=(Attention(1000, 500),) * 10,
    largest_layer=10**8,
    n_layers=10,
    width=1000,
    kept_bytes=10**6,
)
STEP = TrainingSettings(n_tokens=1000, checkpointing=False, mixed=True, frozen_bytes=4)
READING = ItemWork(n_items=100, n_inputs=4, n_read=50, n_written=0)
WRITING = ItemWork(n_items=100, n_inputs=1, n_read=50, n_written=20)


def scale(sizes: ModelSizes, factor: int) -> ModelSizes:
    numbers = ("total", "trained", "multiplied", "trained_multiplied", "largest_layer")
    return replace(sizes, **{name: factor * getattr(sizes, name) for name in numbers})


def test_training_takes_its_flops_at_a_share_of_the_peak():
    hardware = Hardware(8, DEVICE, 0.5)
    flops = 6 * GB + 12 * 10 * 1000 * 512
    seconds = training_seconds(BILLION, 512, hardware, checkpointing=False)
    assert seconds == pytest.approx(flops / 50e12)
    again = training_seconds(BILLION, 512, hardware, checkpointing=True)
    assert again == pytest.approx((flops + 2 * GB + 4 * 10 * 1000 * 512) / 50e12)


def test_training_takes_weights_gradients_means_copies_and_activations():
    assert training_bytes(BILLION, STEP) == (4 + 4 + 8 + 2) * GB + GB + RESERVED
    lora = replace(BILLION, trained=10**7, trained_multiplied=10**7)
    frozen = replace(STEP, frozen_bytes=2)
    expected = 2 * (GB - 10**7) + (16 + 2) * 10**7 + GB + RESERVED
    assert training_bytes(lora, frozen) == expected
    sharded = 16 * GB // 8 + 2 * 2 * 10**8 + GB + RESERVED
    assert training_bytes(BILLION, STEP, 8) == sharded
    assert training_bytes(BILLION, replace(STEP, mixed=False)) == 16 * GB + 2 * GB + RESERVED


def test_a_real_step_holds_as_much_for_its_optimizer():
    model = tiny_model("llama")
    optimizer = torch.optim.AdamW(model.parameters())
    ids = torch.arange(3, 19).unsqueeze(0)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    means = [
        state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")
    ]
    held = sum(each.nbytes for each in (*means, *(p.grad for p in model.parameters())))
    assert held == OPTIMIZER * measure_sizes(model).trained


@pytest.mark.parametrize(
    ("factor", "n_devices", "words"),
    [(1, 1, "one GPU"), (4, 8, "a copy on each"), (16, 8, "sharded over 8")],
)
def test_a_training_is_sharded_only_if_it_has_to_be(factor: int, n_devices: int, words: str):
    hardware = Hardware(n_devices, DEVICE, 0.4)
    placement = place_training("v", scale(BILLION, factor), STEP, hardware)
    assert placement.words == words and placement.warning is None
    assert RESERVED < placement.memory_bytes <= 0.95 * DEVICE.memory_bytes


@pytest.mark.parametrize(
    ("sizes", "changes", "n_devices", "message"),
    [
        (
            BILLION,
            {"n_tokens": 10**5},
            1,
            r"120.00 GB a device do not fit\. With .*: true.* are 32\.0",
        ),
        (scale(BILLION, 16), {}, 1, r"`activation_checkpointing: true` 4 devices would do"),
        (BILLION, {"n_tokens": 10**8}, 8, r"Lower per_device_train_batch_size.*lora:"),
    ],
    ids=["checkpointing", "more devices", "smaller steps"],
)
def test_what_does_not_fit_is_said_with_what_would(sizes, changes, n_devices, message):
    hardware = Hardware(n_devices, DEVICE, 0.4)
    placement = place_training("v", sizes, replace(STEP, **changes), hardware)
    assert placement.words == "does not fit"
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(placement.warning)


@pytest.mark.parametrize("field", CHECKPOINTING)
def test_the_settings_of_a_step_are_those_of_the_train_file(field: str):
    data = {"name": "v", "base_model": "a/b", "corpus": {"path": "/x.jsonl"}, "block_size": 256}
    plain = read_settings(TrainConfig.model_validate(data), 2)
    assert plain == TrainingSettings(256, False, True, 4)
    trainer = {"per_device_train_batch_size": 8, field: True, "bf16": False}
    lora = data | {"lora": {"r": 4}, "trainer": trainer}
    assert read_settings(TrainConfig.model_validate(lora), 2) == TrainingSettings(
        2048, True, False, 4
    )
    mixed = lora | {"trainer": {"bf16": True}}
    assert read_settings(TrainConfig.model_validate(mixed), 2).frozen_bytes == 2


def model_of(billions: int, source_bytes: int) -> TrialModel:
    return TrialModel(scale(BILLION, billions), 2 * billions * GB, source_bytes)


@pytest.mark.parametrize(
    ("model", "n_devices", "words", "gigabytes", "host"),
    [
        (model_of(10, 30 * GB), 1, "one GPU", 20 + 30 + 2, 0),
        (model_of(10, 90 * GB), 8, "a model on each", 20 + 2, 90 * GB),
        (model_of(100, 300 * GB), 8, "a model on 4 together", 50 + 2, 300 * GB),
        (model_of(1000, 0), 8, "does not fit", 250 + 2, 0),
    ],
    ids=["all beside", "sources on the host", "several devices", "too large"],
)
def test_a_trial_takes_as_few_devices_as_hold_the_model(model, n_devices, words, gigabytes, host):
    placement = place_trial(model, [READING], Hardware(n_devices, DEVICE, 0.4))
    assert (placement.words, placement.host_bytes) == (words, host)
    assert placement.memory_bytes == gigabytes * GB
    assert (placement.warning is None) == (words != "does not fit")


def test_reading_takes_the_flops_of_every_input():
    hardware, model = Hardware(1, DEVICE, 0.5), model_of(1, 0)
    placement = place_trial(model, [READING], hardware)
    flops = 4 * 50 * (2 * GB + 4 * 10 * 1000 * 50)
    assert item_seconds(model, READING, placement, hardware) == pytest.approx(flops / 50e12)


def test_each_generated_token_reads_the_weights_once_for_all_texts():
    hardware, model = Hardware(1, DEVICE, 0.5), model_of(1, 0)
    placement = place_trial(model, [WRITING], hardware)
    cached = 2 * 500 * 10  # bytes for a token
    assert placement.memory_bytes == 2 * GB + RESERVED + 100 * 70 * cached
    read = 50 * (2 * GB + 4 * 10 * 1000 * 50) / 50e12
    step = max(100 * (2 * GB + 4 * 10 * 1000 * 60) / 50e12, (2 * GB + 100 * 60 * cached) / 1e12)
    expected = read + 20 * step / 100
    assert item_seconds(model, WRITING, placement, hardware) == pytest.approx(expected)


def test_little_room_lets_fewer_texts_be_generated_at_a_time():
    roomy, tight = (Hardware(1, replace(DEVICE, memory_bytes=n * GB), 0.5) for n in (80, 5))
    model, work = model_of(1, 0), replace(WRITING, n_written=20_000)
    times = [item_seconds(model, work, place_trial(model, [work], h), h) for h in (roomy, tight)]
    assert times[1] > 5 * times[0]
    assert place_trial(model, [work], tight).memory_bytes <= tight.room


def test_a_merge_reads_its_sources_where_they_are():
    hardware = Hardware(1, DEVICE, 0.5)
    beside, apart = model_of(10, 30 * GB), model_of(10, 90 * GB)
    assert merge_seconds(beside, place_trial(beside, [], hardware), hardware) == 50 * GB / 1e12
    seconds = merge_seconds(apart, place_trial(apart, [], hardware), hardware)
    assert seconds == 90 * GB / HOST_BANDWIDTH
