"""Cards: licences are never guessed, and what a person writes stays."""

import re
from dataclasses import replace

import pytest
from markdown_it import MarkdownIt

from optimer_hf.comparison.costs import mixture_cost
from optimer_hf.comparison.ledger import Ledger, TrialCost
from optimer_hf.comparison.rows import LeftOut
from optimer_hf.errors import HubError
from optimer_hf.hub.card import (
    BEGIN,
    END,
    Facts,
    MergeConfig,
    Origins,
    Picture,
    datasets_of,
    evaluations,
    metadata_of,
    recipe_facts,
    render,
    split_card,
)
from optimer_hf.hub.card import strictest_licence as strictest
from optimer_hf.recipes.record import Ingredient, Recipe, Score
from optimer_hf.report.captions import Caption
from optimer_hf.vectors.training_record import CorpusRecord, Part, PartialCorpus
from tests.support.publishing import results_of_row


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
def test_the_strictest_licence_is_known_or_none(licences, expected):
    assert strictest(licences) == expected


def test_metadata_says_how_a_vector_and_a_merge_relate_to_their_base():
    vector = metadata_of("vector", "adapter", "mit", Origins({}, ("org/base",)))
    assert (vector["base_model_relation"], vector["library_name"]) == ("adapter", "optimer")
    origins = Origins({}, ("org/base", "org/v", "org/base"), ("org/wiki",), ("ja",))
    merge = metadata_of("model", "merge", "mit", origins)
    assert (merge["datasets"], merge["language"]) == (["org/wiki"], ["ja"])
    assert merge["base_model"] == ["org/base", "org/v"]
    assert (merge["base_model_relation"], merge["library_name"]) == ("merge", "transformers")


def test_scores_are_indexed_with_their_metric_and_direction():
    metrics = {"ja": "bits_per_byte", "mc": "acc"}
    results = evaluations({"ja": 1.5, "mc": 0.25, "x": 3.0}, metrics, {"ja": False, "mc": True})
    card = metadata_of("model", "merge", "mit", Origins({}), "my-merge", results)
    (index,) = card["model-index"]
    assert index["name"] == "my-merge"
    entries = [(result["dataset"]["type"], result["metrics"][0]) for result in index["results"]]
    name = "bits per byte, lower is better"
    assert entries == [
        ("ja", {"type": "bits_per_byte", "value": 1.5, "name": name}),
        ("mc", {"type": "acc", "value": 0.25, "name": "acc, higher is better"}),
        ("x", {"type": "score", "value": 3.0}),  # a recipe of 0.1.0 may not know
    ]
    assert "model-index" not in metadata_of("model", "merge", "mit", Origins({}))


def test_a_card_without_metadata_is_all_text():
    assert split_card("# Mine\n") == ({}, "# Mine\n")
    for broken in ("- a list", "a: ["):
        with pytest.raises(HubError, match="Correct it there"):
            split_card(f"---\n{broken}\n---\ntext\n")
    assert split_card("---\nlicense: mit\n---\ntext\n") == ({"license": "mit"}, "text\n")


def recipe_of(**fields) -> Recipe:
    """A recipe that merges `a`, `b` and `c`."""
    weights = {"a": 1.0, "b": -0.5, "c": 0.0}
    vectors = {name: Ingredient(source=f"o/{name}", weight=w) for name, w in weights.items()}
    given = {"name": "r", "base_model": "o/b", "dtype": "float32", "vectors": vectors}
    return Recipe(**given | fields)


def test_bars_are_as_long_as_the_weights_and_costs_are_what_was_measured():
    search = TrialCost(n=3, items=12, seconds=2.5)
    ledger = Ledger(search=search, data_mixture=mixture_cost(1e6, 2.5, search))
    facts = recipe_facts(recipe_of(ledger=ledger), "", [], None)
    assert [len(facts.bars[name]) for name in "abc"] == [20, 11, 0]
    assert "| search | 3 | 12 |  | 2.5 |" in facts.costs
    assert "data_mixture" not in facts.costs
    assert facts.results == ""
    assert BEGIN != END


def test_scores_have_their_unit_and_direction_and_the_sealed_ones_come_first():
    direction = {"ja": False, "mc": True}
    scores = {
        "search": Score(terms={"ja": 1.25}, value=0.1, summary="over the base +10.00 %"),
        "sealed": Score(
            terms={"ja": 1.5, "mc": 0.5, "law": 0.25},
            value=0.05,
            higher_is_better=direction | {"law": False},
            metrics={"law": "byte_perplexity"},  # of a term that only the test has
        ),
    }
    terms = [{"text": "/ja.jsonl"}, {"task": "mc", "metric": "acc"}]
    recipe = recipe_of(scores=scores, objective={"terms": terms})
    facts = recipe_facts(recipe, "", [], None)
    assert facts.scores.splitlines() == [
        "| term | measured in | sealed test | search |",
        "| --- | --- | --- | --- |",
        "| ja | bits per byte, lower is better | 1.5000 | 1.2500 |",
        "| mc | acc, higher is better | 0.5000 |  |",
        "| law | byte perplexity, lower is better | 0.2500 |  |",
    ]
    (sealed, _), (search, value) = facts.values
    assert "after the search" in sealed and "flatters" in search and "+10.00 %" in value


@pytest.mark.parametrize(
    ("fidelity", "verdicts", "said"),
    [
        ("search", None, []),  # nobody has opened the seal
        ("rescore", None, []),
        ("sealed", None, []),  # as 0.1.0 recorded it
        ("sealed", ["it beats.", "it is small."], ["it beats.", "it is small."]),
    ],
)
def test_the_verdicts_of_the_sealed_test_are_in_the_card_if_there_was_one(fidelity, verdicts, said):
    score = Score(terms={"ja": 1.25}, value=0.1, verdicts=verdicts)
    about = recipe_facts(recipe_of(scores={fidelity: score}), "", [], None)
    lines = render({}, Facts("t", "o/r", about), None).splitlines()
    start = "* Sealed test, "
    assert [
        line.removeprefix(start)
        for line in lines
        if line.startswith(start) and "scored once" not in line
    ] == said
    assert "| ja |" in "\n".join(lines)


def test_the_citation_is_a_whole_bibtex_entry():
    card = render({}, FACTS, None)
    entry = card.partition("```bibtex\n")[2].partition("```")[0]
    assert entry.startswith("@misc{song2026optimer,\n") and entry.endswith("}\n")
    assert entry.count("{") == entry.count("}")
    fields = dict(re.findall(r"^  (\w+)=\{(.*)\},?$", entry, re.MULTILINE))
    assert fields["title"].startswith("{OptiMer}: Optimal Distribution Vector Merging")
    assert fields["author"] == "Song, Haiyue and Utiyama, Masao"
    assert fields["eprint"] in fields["url"]


def test_a_card_begins_with_its_name_and_the_verdict_and_marks_what_is_left_out():
    lines = split_card(render({}, replace(FACTS, verdict="It beats."), None))[1].splitlines()
    assert [line for line in lines if line][1:3] == ["# t", "**It beats.**"]
    assert "| c | 0 | left out | `o/c` |" in lines


def test_the_table_of_the_sealed_test_is_that_of_the_results():
    facts = recipe_facts(recipe_of(), "", [], results_of_row("x|y"))
    assert facts.results.splitlines()[2:] == [
        r"| weights | x\|y (6 items) | objective |",
        "| --- | --- | --- |",
        "| base | 1.2500 | +0.00\N{NO-BREAK SPACE}% |",
        r"| x\|y (chosen after the seal was opened) | +20.00 % | +10.00 % |".replace(
            " %", "\N{NO-BREAK SPACE}%"
        ),
    ]


def test_baselines_that_could_not_be_scored_are_named_below_the_table():
    left_out = LeftOut(kind="method", subject="ties", name="ties|x", reason="no room in /home/me")
    results = results_of_row("x").model_copy(update={"left_out": [left_out]})
    about = recipe_facts(recipe_of(), "", [], results).results
    assert about.endswith("|\n\nNot in the table, since they could not be scored: ties\\|x.")
    assert "/home" not in about


def test_a_figure_follows_its_conclusion_and_has_a_text_of_its_own():
    caption = Caption(title="A *title*", conclusion="x matters\nmost](evil) <b>", shows="x: 1.")
    said = r"x matters most\](evil) \<b\>" + "\n\n"
    assert Picture("a.png", None, caption).markdown == f"{said}![x: 1.](a.png)"
    assert Picture("a.png", "a-dark.png", caption).markdown == (
        f"{said}![x: 1.](a.png#hf-light-mode-only)\n![x: 1.](a-dark.png#hf-dark-mode-only)"
    )
    old = Caption(title="Gains", conclusion="")  # of 0.1.0
    assert Picture("c.png", None, old).markdown == "![Gains](c.png)"


def test_only_data_sets_on_the_hub_are_named():
    counts = {"n_tokens": 1, "n_documents": 1}
    names = ["ja.train.jsonl.xz", "org/wiki"]
    parts = [Part(name=name, **counts) for name in names]
    mixture = CorpusRecord(name=" + ".join(names), sha256="0", parts=parts, **counts)
    assert datasets_of(mixture) == ["org/wiki"]
    assert datasets_of(mixture.model_copy(update={"name": "a/b", "parts": None})) == ["a/b"]
    assert datasets_of(PartialCorpus(name="org/wiki")) == ["org/wiki"]
    assert datasets_of(PartialCorpus()) == datasets_of(None) == []


FACTS = Facts("t", "o/r", recipe_facts(recipe_of(), "", [], None))


def test_a_card_keeps_what_a_person_set_and_drops_what_no_longer_holds():
    existing = (
        "---\nlicense: other\nlicense_name: house\npipeline_tag: fill-mask\n"
        "base_model: [org/old]\ntags: mine\n---\ntext\n"
    )
    metadata = metadata_of("model", "merge", "other", Origins({}, ("org/new",)))
    written, _ = split_card(render(metadata, FACTS, existing))
    assert (written["license_name"], written["pipeline_tag"]) == ("house", "fill-mask")
    assert written["base_model"] == ["org/new"]
    assert "mine" in written["tags"] and "merge" in written["tags"]


EVIL = [
    "x\n# Heading",
    "![p](http://evil/x.png)",
    "[click](http://evil)",
    "<img src=x onerror=alert(1)>",
    "a | b | c",
    "`</code>`",
    "```\n# out of the fence\n```",
    "<!-- optimer: end -->",
    "$$x$$ <http://evil>",
]


@pytest.mark.parametrize("evil", EVIL)
def test_names_add_nothing_to_a_card_but_their_letters(evil):
    scores = {"sealed": Score(terms={evil: 0.5}, value=0.1, verdicts=[evil])}
    recipe = recipe_of(scores=scores).model_copy(
        update={
            "vectors": {evil: Ingredient.model_construct(source=evil, weight=1.0)},
            **{"base_model": evil, "derived_from": evil},
        }
    )
    configs = [MergeConfig(evil, evil, evil)]
    about = recipe_facts(recipe, f"a: {evil}", configs, results_of_row(evil))
    caption = Caption(title=evil, conclusion=evil, shows=evil)
    facts = Facts(evil, "o/r", about, figures=[Picture("figures/a.png", "b.png", caption)])
    facts = replace(facts, verdict=evil, has_report=True)

    def pushed(existing: str | None) -> str:
        return render({"license": "mit"}, facts, existing)

    card = pushed(None)
    assert card.count(END) == 1
    assert pushed(pushed(card + "\nmine\n")) == pushed(card + "\nmine\n")
    tokens = MarkdownIt("commonmark").enable("table").parse(split_card(card)[1])
    inline = [child for token in tokens for child in token.children or []]
    assert {t.content.strip() for t in [*tokens, *inline] if t.type.startswith("html")} == {
        BEGIN,
        END,
    }
    assert not [t for t in inline if t.type == "link_open"]
    assert [t.attrs["src"] for t in inline if t.type == "image"] == [
        "figures/a.png#hf-light-mode-only",
        "b.png#hf-dark-mode-only",
    ]
    headings = [t for t in tokens if t.type == "heading_open"]
    assert len(headings) == 6


def test_extra_marks_in_an_older_card_are_removed():
    old = f"above\n{BEGIN}\nx {END} y\n{END}\nbelow\n"
    card = render({}, FACTS, old)
    assert card.count(END) == 1 and "above" in card and "below" in card and "x " + END not in card
