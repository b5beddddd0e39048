"""fields.py: the names read from source are those of the classes."""

import dataclasses

import pytest
from peft import LoraConfig
from transformers import TrainingArguments

from optimer_hf.training.fields import field_names


@pytest.mark.parametrize(("section", "cls"), [("lora", LoraConfig), ("trainer", TrainingArguments)])
def test_the_names_read_from_source_are_those_of_the_class(section, cls):
    expected = {field.name for field in dataclasses.fields(cls) if field.init}
    assert set(field_names(section)) == expected
