"""Cards: licences are never guessed, and what a person writes stays."""

import pytest

from optimer_hf.card import (
    BEGIN,
    END,
    Origins,
    Picture,
    datasets_of,
    metadata_of,
    model_index,
    recipe_facts,
    render,
    split,
)
from optimer_hf.card import strictest_licence as strictest
from optimer_hf.errors import HubError


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
        ({"a": "mit", "b": "unlicense"}, None),
        ({"a": "apache-2.0", "b": "unlicense"}, "apache-2.0"),
        ({"a": "other"}, None),
        ({"a": "apache-2.0", "b": "house-rules"}, None),
        ({"a": "house-rules", "b": "house-rules"}, "house-rules"),
        ({}, None),
    ],
)
def test_the_strictest_licence_is_told_or_not_guessed(licences, expected):
    assert strictest(licences) == expected


def test_metadata_says_how_a_vector_and_a_merge_stand_to_their_base():
    vector = metadata_of("vector", "adapter", "mit", Origins({}, ("org/base",)), None)
    assert (vector["base_model_relation"], vector["library_name"]) == ("adapter", "optimer")
    origins = Origins({}, ("org/base", "org/v", "org/base"), ("org/wiki",), ("ja",))
    merge = metadata_of("model", "merge", "mit", origins, model_index("m", {}, {}))
    assert (merge["datasets"], merge["language"]) == (["org/wiki"], ["ja"])
    assert merge["base_model"] == ["org/base", "org/v"]
    assert (merge["base_model_relation"], merge["library_name"]) == ("merge", "transformers")


def test_a_card_without_metadata_is_all_text():
    assert split("# Mine\n") == ({}, "# Mine\n")
    for broken in ("- a list", "a: ["):
        with pytest.raises(HubError, match="Mend it there"):
            split(f"---\n{broken}\n---\ntext\n")
    assert split("---\nlicense: mit\n---\ntext\n") == ({"license": "mit"}, "text\n")


def test_bars_are_as_long_as_the_weights_and_costs_are_what_was_measured():
    ledger = {"search": {"n": 3, "seconds": 2.5}, "data_mixture": {"seconds": 1e6}}
    facts = recipe_facts({"a": 1.0, "b": -0.5, "c": 0.0}, ledger, "text\n\n| x |\n| - |\n\nmore")
    assert [len(facts["bars"][name]) for name in "abc"] == [20, 11, 0]
    assert "| search | 3 |  |  | 2.5 |" in facts["costs"]
    assert "data_mixture" not in facts["costs"]
    assert facts["results"].endswith("| x |\n| - |")
    assert BEGIN != END


def test_a_figure_stands_under_its_sentence_which_is_its_text_too():
    drawn = Picture("figures/a.png", "A *title*", "x matters\nmost](evil) <b>").markdown
    said = r"x matters most\](evil) \<b\>"
    assert drawn == rf"**A \*title\*.** {said}" + f"\n\n![{said}](figures/a.png)"
    assert Picture("c.png", "Gains").markdown == "![Gains](c.png)"


def test_only_data_sets_of_the_hub_are_named_as_such():
    assert datasets_of({"name": "ja.train.jsonl.xz + org/wiki"}) == ["org/wiki"]
    assert datasets_of(None) == []


def test_a_card_keeps_what_a_person_set_and_drops_what_no_longer_holds():
    existing = (
        "---\nlicense: other\nlicense_name: house\npipeline_tag: fill-mask\n"
        "base_model: [org/old]\ntags: mine\n---\ntext\n"
    )
    metadata = metadata_of("model", "merge", "other", Origins({}, ("org/new",)), None)
    facts = {"kind": "recipe", "title": "t", "repo_id": "o/r", "recipe_text": "", "results": ""}
    facts |= {"merge_configs": {}, "figures": [], "bars": {}, "costs": "", "headings": {}}
    recipe = {"vectors": {}, "base_model": "b", "dtype": "float32", "scores": {}}
    written, _ = split(
        render(metadata, {**facts, "recipe": recipe | {"derived_from": None}}, existing)
    )
    assert (written["license_name"], written["pipeline_tag"]) == ("house", "fill-mask")
    assert written["base_model"] == ["org/new"]
    assert "mine" in written["tags"] and "merge" in written["tags"]
