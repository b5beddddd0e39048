"""checks.py: what a library would refuse late is refused before any work, with file and field."""

import dataclasses
from typing import get_args, get_type_hints

import pytest
import yaml
from peft import LoraConfig
from transformers import TrainingArguments

from optimer_hf.errors import ConfigError
from optimer_hf.training.checks import check_config
from optimer_hf.training.config import BOUNDS, LORA_BOUNDS, TrainConfig
from optimer_hf.training.run import train
from tests.support.training import FAST


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dataloader_num_workers", -1),
        ("dataloader_num_workers", 10**6),
        ("dataloader_prefetch_factor", 0),
        ("num_train_epochs", 1e300),
        ("per_device_train_batch_size", 10**9),
        ("gradient_accumulation_steps", 10**18),
        ("logging_steps", -1),
        ("save_steps", 0),
    ],
)
def test_a_number_that_sizes_something_is_bounded_before_the_run(make_config, field, value):
    with pytest.raises(ConfigError, match=rf"trainer\.{field}: found .* Expected (\d|a number)"):
        check_config(make_config(trainer=FAST | {field: value}))


@pytest.mark.parametrize("field", ["r", "lora_alpha", "lora_dropout"])
def test_a_number_of_a_lora_that_no_run_survives_is_refused(make_config, field):
    config = make_config()
    changed = config.model_copy(update={"lora": {"r": 4, "lora_alpha": 8} | {field: 10**18}})
    with pytest.raises(ConfigError, match=rf"lora\.{field}: found .* Expected"):
        check_config(changed)


WRONG: dict[str, list] = {  # by field of `trainer`: read only deep inside a library
    "gradient_checkpointing_kwargs": [
        *({"use_reentrnt": True}, {"use_reentrant": "no"}, "x", 5, []),
        {"determinism_check": "perhaps"},
    ],
    "activation_checkpointing_kwargs": [{"nope": True}],
    "optim": ["adamw", "sgdd", 5, "galore_adamw", "lomo"],
    "optim_args": ["x", "foo=1", "betas=a", {"a": 1}],
    "optim_target_modules": [5, {}, ["q_proj"]],
    "lr_scheduler_type": ["cosinee", 5],
    "lr_scheduler_kwargs": [{"nope": 1}, {"num_cycles": "a"}, "x", 5],
    "accelerator_config": [
        *("x", "none.json", 5, {"nope": True}, {"split_batches": "x"}, {"even_batches": None}),
        *({"gradient_accumulation_kwargs": {"nope": 1}}, {"gradient_accumulation_kwargs": 5}),
    ],
    "fsdp": ["full_shard", True, 5],
    "fsdp_config": [{"min_num_params": 5}, "none.json"],
    "deepspeed": ["none.json", {"a": 1}],
    "parallelism_config": [{"tp_size": 2}],
    "liger_kernel_config": [{"rope": True}],
    "torch_compile_backend": ["nope", 5],
    "torch_compile_mode": ["fast"],
    "ddp_backend": ["nope", 5],
    "ddp_timeout": ["x", 10**18, -1],
    "dataloader_multiprocessing_context": ["nope", 5],
    "train_sampling_strategy": ["nope", "group_by_length"],
    "logging_strategy": ["epochs"],
    "save_strategy": ["best", "epochs"],
    "log_level": ["loud", 5],
    "log_level_replica": ["loud"],
    "report_to": ["nope", 5, {}, ["tensorboard", "x"]],
    "debug": ["nope", 5, ["x"]],
    "label_names": ["labels", [5]],
    "include_num_input_tokens_seen": ["some", 5],
    "run_name": [5],
    "weight_decay": [-1.0],
    "learning_rate": [-1.0, 1e300],
    "warmup_steps": [-5, 1e300],
    "save_total_limit": [-1, 10**18],
}
WRONG_LORA: dict[str, list] = {
    "target_modules": [5, [5], {}],
    "exclude_modules": [5, [5]],
    "modules_to_save": ["lm_head", [5], 5],
    "bias": ["none_", 5],
    "layers_to_transform": ["x", [-1], [1.5], [10**9]],
    "peft_type": ["IA3", "nope"],
    "auto_mapping": [{"a": 1}, 5],
    "loftq_config": [{"nope": 1}, 5],
    "eva_config": [{"rho": 2.0}, 5],
    "corda_config": [{"x": 1}],
    "runtime_config": [{"x": 1}, 5],
    "qalora_group_size": [0],
}


@pytest.mark.parametrize(
    ("part", "field", "values"),
    [
        (part, field, values)
        for part, table in (("trainer", WRONG), ("lora", WRONG_LORA))
        for field, values in table.items()
    ],
)
def test_a_value_that_a_library_reads_late_is_refused_before_any_work(
    tmp_path, part, field, values
):
    for value in values:
        data = {"name": "n", "base_model": "a/b", "corpus": {"path": "absent.jsonl"}}
        path = tmp_path / "train.yaml"
        path.write_text(yaml.safe_dump(data | {part: {field: value}}, sort_keys=False))
        config = TrainConfig.read(path)
        with pytest.raises(ConfigError, match=rf"train\.yaml:\d+: {part}\.{field}") as error:
            check_config(config, path)
        assert "Traceback" not in str(error.value)
        with pytest.raises(ConfigError, match=field):
            train(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "trainer",
    [
        {"activation_checkpointing_kwargs": {"use_reentrant": True}},
        {"activation_checkpointing_kwargs": '{"use_reentrant": false, "early_stop": false}'},
        {"optim": "sgd", "optim_args": "momentum=0.9, nesterov=true"},
        {"learning_rate": 1, "num_train_epochs": 2},
        {"optim": "adafactor", "lr_scheduler_type": "constant"},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-6}},
        {"accelerator_config": {"split_batches": True, "gradient_accumulation_kwargs": {}}},
        {"log_level": "warning", "debug": "", "fsdp": "", "report_to": ["tensorboard"]},
        {"torch_compile_backend": "inductor", "torch_compile_mode": "default"},
        {"torch_compile": False, "save_strategy": "epoch", "neftune_noise_alpha": 5.0},
    ],
)
def test_values_that_libraries_accept_are_accepted(trainer):
    data = {"name": "n", "base_model": "a/b", "corpus": {"path": "x.jsonl"}, "trainer": trainer}
    check_config(TrainConfig.model_validate(data))


def test_every_number_of_a_training_has_bounds():
    of_others = {"seed": "reserved", "data_seed": "reserved"}
    for cls, bounds in ((TrainingArguments, BOUNDS), (LoraConfig, LORA_BOUNDS)):
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            kinds = {*get_args(hints[field.name]), hints[field.name]}
            if field.init and kinds & {int, float} and field.name not in of_others:
                assert field.name in bounds or field.name == "layers_to_transform", field.name
