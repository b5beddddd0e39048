"""mergekit_table.py: the table is that of the installed mergekit."""

import sys
from importlib.metadata import version

import pytest

from optimer_hf.merging import mergekit_yaml
from optimer_hf.merging.mergekit_table import KEYS, VERSION
from optimer_hf.merging.mergekit_yaml import known_keys, mergekit_keys


def test_the_table_has_the_keys_of_mergekit():
    assert version("mergekit") == VERSION
    asked = mergekit_keys()
    assert asked.fields == KEYS.fields
    assert asked.parameters == KEYS.parameters
    assert set(asked.chat_templates) == set(KEYS.chat_templates)


@pytest.mark.parametrize("reason", ["another version", "is imported"])
def test_mergekit_is_asked_where_it_may_know_more(monkeypatch, reason):
    asked = mergekit_keys()  # imports it
    if reason == "another version":
        monkeypatch.delitem(sys.modules, "mergekit.merge_methods.registry")
        assert known_keys() is KEYS
        monkeypatch.setattr(mergekit_yaml, "VERSION", "0.1.4")
    assert known_keys() is asked
