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
    ENUMS,
    SETTLED,
    SOURCES,
    TEXTS,
    field_types,
    is_settled,
    types_of,
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
    "optim": ["adamw_torch"],
    "report_to": ["none"],
    "lr_scheduler_type": ["linear", "cosine", "constant", "constant_with_warmup"],
    "task_type": ["CAUSAL_LM"],
    "use_rslora": [True, False],
    "activation_checkpointing": [True, False],
    "logging_first_step": [True, False],
}


@pytest.mark.parametrize(
    ("section", "field"), [(section, field) for section in SETTLED for field in SETTLED[section]]
)
def test_a_settled_value_is_one_that_no_package_refuses(section, field):
    least, most = (BOUNDS | LORA_BOUNDS).get(field, (None, None))
    smallest = [least, 1e-9] if field == "num_train_epochs" else [least]
    for value in EXAMPLES.get(field, [*smallest, most]):
        data = {"name": "n", "base_model": "a/b", "corpus": {"path": "x.jsonl"}}
        config = TrainConfig.model_validate(data | {section: {field: value}})
        if not fields.list_field_mistakes(config):
            assert is_settled(config), (field, value)
            check_config(config)


@pytest.mark.parametrize("end", [0, -1])
def test_settled_values_are_not_refused_together_either(end):
    values = {
        section: {
            field: EXAMPLES[field][end] if field in EXAMPLES else (BOUNDS | LORA_BOUNDS)[field][end]
            for field in SETTLED[section]
        }
        for section in SETTLED
    }
    for field in ("num_train_epochs", "logging_steps", "save_steps"):  # above 0
        values["trainer"][field] = max(values["trainer"][field], 1)
    data = {"name": "n", "base_model": "a/b", "corpus": {"path": "x.jsonl"}}
    config = TrainConfig.model_validate(data | values)
    assert is_settled(config) and not fields.list_field_mistakes(config)
    check_config(config)


@pytest.mark.parametrize(
    "given",
    [
        {"trainer": {"bf16": True}},
        {"trainer": {"optim": "lomo"}},
        {"trainer": {"logging_steps": 1.5}},
        {"lora": {"target_modules": "q_.*"}},
        {"lora": {"use_dora": True}},
    ],
)
def test_values_that_packages_check_are_not_settled(given):
    data = {"name": "n", "base_model": "a/b", "corpus": {"path": "x.jsonl"}}
    assert not is_settled(TrainConfig.model_validate(data | given))
