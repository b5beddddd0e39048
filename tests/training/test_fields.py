"""fields.py: what is read from the source of the packages is what they have."""

from typing import Any, get_args

import pytest
from peft import LoraConfig
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SchedulerType
from transformers.training_args import OptimizerNames

from optimer_hf.training import fields
from optimer_hf.training.checks import check_config
from optimer_hf.training.config import BOUNDS, LORA_BOUNDS, PLAIN, TrainConfig
from optimer_hf.training.fields import (
    CHOICES,
    ENUMS,
    SETTLED,
    SOURCES,
    TEXTS,
    field_types,
    is_settled,
    types_of,
    with_both_names,
    with_installed_names,
)

CLASSES = {"lora": LoraConfig, "trainer": TrainingArguments}


@pytest.mark.parametrize("section", CLASSES)
def test_the_fields_read_from_source_are_those_of_the_class(section):
    read, expected = field_types(section), types_of(CLASSES[section])
    assert read.keys() == expected.keys()
    known = {name: kind for name, kind in read.items() if kind is not Any}
    assert known == {name: expected[name] for name in known}
    for name, kind in expected.items():  # the types that are checked
        assert name in known or not set(get_args(kind) or [kind]) <= PLAIN | TEXTS


@pytest.mark.parametrize("section", CLASSES)
def test_a_class_that_is_not_in_its_file_is_imported(monkeypatch, section):
    monkeypatch.setattr(fields, "_fields_in", lambda body: {})
    field_types.cache_clear()
    try:
        assert field_types(section) == types_of(CLASSES[section])
    finally:
        field_types.cache_clear()


OLD, NEW = {"gradient_checkpointing"}, {"activation_checkpointing"}


@pytest.mark.parametrize("installed", [OLD, NEW, OLD | NEW], ids=["old", "new", "both"])
@pytest.mark.parametrize("given", ["gradient_checkpointing", "activation_checkpointing"])
def test_a_renamed_field_is_taken_by_both_names(given, installed):
    assert with_both_names(dict.fromkeys(installed, bool)).keys() == OLD | NEW
    named = with_installed_names({given: True, "seed": 1}, installed | {"seed"})
    assert named.keys() <= installed | {"seed"} and [*named.values()] == [True, 1]
    both = dict.fromkeys(OLD | NEW, True)
    assert with_installed_names(both, installed) == both  # for the package to judge


@pytest.mark.parametrize(
    ("field", "enum"),
    [
        ("optim", OptimizerNames),
        ("lr_scheduler_type", SchedulerType),
        ("logging_strategy", IntervalStrategy),
    ],
)
def test_the_choices_read_from_source_are_those_of_the_enum(field, enum):
    assert fields._values_of(*ENUMS[field]) == [each.value for each in enum]


def test_the_classes_are_where_the_table_says():
    for section, cls in CLASSES.items():
        assert fields._import_class(*SOURCES[section][-1]) is cls


EXAMPLES = {
    "target_modules": ["all-linear", ["q_proj", "x"], []],
    "bias": ["none"],
    "exclude_modules": [["lm_head"], []],
    "modules_to_save": [["lm_head"], []],
    "init_lora_weights": [True, "gaussian"],
    "rank_pattern": [{"q_proj": 4}, {}],
    "alpha_pattern": [{"q_proj": 4}, {}],
    "task_type": ["CAUSAL_LM"],
    "use_rslora": [True, False],
    "optim": ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"],
    "adam_beta1": [0.0, 0.999],
    "adam_beta2": [0.0, 0.999],
    "lr_scheduler_type": [
        *("linear", "cosine", "constant", "constant_with_warmup"),
        *("cosine_with_restarts", "inverse_sqrt"),
    ],
    **{key: [0.5, 1, 10**9] for key in ("logging_steps", "save_steps", "warmup_steps")},
    "tf32": [False, None],
    "use_cpu": [True],
    **{
        key: [{"use_reentrant": True}, {"use_reentrant": False}, {}, None]
        for key in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
    },
    **dict.fromkeys(("log_level", "log_level_replica"), CHOICES["log_level"]),
    **{key: ["no", "steps", "epoch"] for key in ("logging_strategy", "save_strategy")},
    "include_num_input_tokens_seen": CHOICES["include_num_input_tokens_seen"],
    "run_name": ["x"],
    "project": ["x"],
    "report_to": [
        *("none", "all", "tensorboard", "wandb", "mlflow", "trackio", "comet_ml"),
        *([], ["none"], ["wandb", "tensorboard"]),
    ],
    "train_sampling_strategy": ["random", "sequential"],
}


def examples_of(section: str, field: str) -> list:
    """Values of a field: the least and the largest first and last, if it is a number."""
    known = BOUNDS | LORA_BOUNDS
    if field in EXAMPLES or field in known:
        return EXAMPLES.get(field) or [*known[field]]
    assert field_types(section)[field] in (bool, bool | None), field
    return [True, False]


@pytest.mark.parametrize(
    ("section", "field"), [(section, field) for section in SETTLED for field in SETTLED[section]]
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing.* is deprecated:FutureWarning")
def test_a_settled_value_is_one_that_no_package_refuses(section, field):
    if field not in field_types(section):
        pytest.skip("the installed version of the package does not have the field")
    others = {"dataloader_num_workers": 1} if field == "dataloader_prefetch_factor" else {}
    values = examples_of(section, field)
    for value in [*values, 1e-9] if field == "num_train_epochs" else values:
        data = {"name": "n", "base_model": "a/b", "corpus": {"path": "x.jsonl"}}
        config = TrainConfig.model_validate(data | {section: others | {field: value}})
        if not fields.list_field_mistakes(config):
            assert is_settled(config), (field, value)
            check_config(config)


@pytest.mark.parametrize("end", [0, -1])
def test_settled_values_are_not_refused_together_either(end):
    values = {
        section: {  # older versions of the packages lack some
            field: examples_of(section, field)[end]
            for field in SETTLED[section]
            if field in field_types(section)
        }
        for section in SETTLED
    }
    values["trainer"]["fp16"] = not values["trainer"]["bf16"]
    for field in ("num_train_epochs", "dataloader_num_workers"):
        values["trainer"][field] = max(values["trainer"][field], 1)
    data = {"name": "n", "base_model": "a/b", "corpus": {"path": "x.jsonl"}}
    config = TrainConfig.model_validate(data | values)
    assert is_settled(config) and not fields.list_field_mistakes(config)
    check_config(config)


@pytest.mark.parametrize(
    "given",
    [
        {"trainer": {"tf32": True}},
        {"trainer": {"use_cpu": False}},
        {"trainer": {"torch_compile": True}},
        {"trainer": {"adam_beta1": 1}},
        {"trainer": {"lr_scheduler_kwargs": {"num_cycles": 2}}},
        {"trainer": {"optim": "lomo"}},
        {"trainer": {"logging_steps": 1.5}},
        {"lora": {"target_modules": "q_.*"}},
        {"lora": {"use_dora": True}},
    ],
)
def test_values_that_packages_check_are_not_settled(given):
    data = {"name": "n", "base_model": "a/b", "corpus": {"path": "x.jsonl"}}
    assert not is_settled(TrainConfig.model_validate(data | given))


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"bf16": True, "fp16": True}, "trainer.fp16: found true, and bf16 is true as well."),
        ({"dataloader_prefetch_factor": 2}, "trainer.dataloader_prefetch_factor: only workers"),
        ({"bf16": False, "fp16": True}, None),
        ({"dataloader_prefetch_factor": 2, "dataloader_num_workers": 1}, None),
    ],
)
def test_values_that_contradict_each_other_are_named(trainer, message):
    data = {"name": "n", "base_model": "a/b", "corpus": {"path": "x.jsonl"}, "trainer": trainer}
    mistakes = fields.list_field_mistakes(TrainConfig.model_validate(data))
    assert [text.startswith(str(message)) for _, text in mistakes] == [True] * bool(message)
