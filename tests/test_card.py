"""Cards: licences are never guessed, and what a person writes stays."""

import pytest

from optimer_hf.card import BEGIN, END, datasets_of, metadata_of, model_index, recipe_facts, split
from optimer_hf.card import strictest_licence as strictest


@pytest.mark.parametrize(
    ("licences", "expected"),
    [
        ({"a": "mit", "b": "mit"}, "mit"),
        ({"a": "mit", "b": "apache-2.0"}, "apache-2.0"),
        ({"a": "apache-2.0", "b": "gemma"}, "gemma"),
        ({"a": "Gemma", "b": "gemma"}, "gemma"),
        ({"a": "gemma", "b": "llama3"}, None),
        ({"a": "gemma", "b": None}, None),
        ({"a": "mit", "b": "bsd-3-clause"}, None),
        ({}, None),
    ],
)
def test_the_strictest_licence_is_told_or_not_guessed(licences, expected):
    assert strictest(licences) == expected


def test_metadata_says_how_a_vector_and_a_merge_stand_to_their_base():
    vector = metadata_of("vector", "mit", ["org/base"], None)
    assert (vector["base_model_relation"], vector["library_name"]) == ("adapter", "optimer")
    merge = metadata_of("model", "mit", ["org/base", "org/v", "org/base"], model_index("m", {}, {}))
    assert merge["base_model"] == ["org/base", "org/v"]
    assert (merge["base_model_relation"], merge["library_name"]) == ("merge", "transformers")


def test_a_card_without_metadata_is_all_text():
    assert split("# Mine\n") == ({}, "# Mine\n")
    assert split("---\n- a list\n---\ntext\n") == ({}, "text\n")
    assert split("---\nlicense: mit\n---\ntext\n") == ({"license": "mit"}, "text\n")


def test_bars_are_as_long_as_the_weights_and_costs_are_what_was_measured():
    ledger = {"search": {"n": 3, "seconds": 2.5}, "data_mixture": {"seconds": 1e6}}
    facts = recipe_facts({"a": 1.0, "b": -0.5, "c": 0.0}, ledger, "text\n\n| x |\n| - |\n\nmore")
    assert [len(facts["bars"][name]) for name in "abc"] == [20, 11, 0]
    assert "| search | 3 |  |  | 2.5 |" in facts["costs"]
    assert "data_mixture" not in facts["costs"]
    assert facts["results"].endswith("| x |\n| - |")
    assert BEGIN != END


def test_only_data_sets_of_the_hub_are_named_as_such():
    assert datasets_of({"name": "ja.train.jsonl.xz + org/wiki"}) == ["org/wiki"]
    assert datasets_of(None) == []
