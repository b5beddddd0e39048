"""facts.py: what went in is named for others to find, and never by a path of this machine."""

import json
import shutil

import pytest

from optimer_hf.report.evidence import read_evidence
from optimer_hf.report.facts import (
    digests_table,
    identity_of,
    inputs_table,
    licence_of,
    link_of,
    name_of_reference,
    objective_in_words,
)
from optimer_hf.scoring.objective import Objective
from optimer_hf.searching.loop import search
from optimer_hf.searching.runner import InProcess
from tests.support.landscapes import FunctionPool, config_of

COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize(
    ("reference", "name", "link"),
    [
        ("org/base", "org/base", "https://huggingface.co/org/base"),
        (
            f"org/base@{COMMIT}",
            "org/base@01234567",
            f"https://huggingface.co/org/base/tree/{COMMIT}",
        ),
        ("hf://org/base", "hf://org/base", "https://huggingface.co/org/base"),
        ("pypi:some-gguf", "pypi:some-gguf", "https://pypi.org/project/some-gguf/"),
        ("/home/me/models/base", "base", None),
        ("org/a b", "org/a b", None),
        ("pypi:../evil", "pypi:../evil", None),
        ("org/x?y=javascript:z", "org/x?y=javascript:z", None),
    ],
)
def test_references_have_a_name_and_a_page_where_there_is_one(reference, name, link):
    assert (name_of_reference(reference), link_of(reference)) == (name, link)


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\ntags: [x]\n---\n# x\n", "apache-2.0"),
        ("---\ntags: [x]\n---\n", "not stated"),
        ("---\nlicense: [a, b]\n---\n", "not stated"),
        ("---\na: [\n---\n", "not stated"),
        ("# no metadata\n", "not stated"),
        (None, "not stated"),
    ],
)
def test_the_licence_is_what_the_card_states(tmp_path, card, licence):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert licence_of(str(tmp_path)) == licence


def test_a_licence_on_the_hub_is_on_its_page():
    assert licence_of("org/base") == "on its page"


def test_the_objective_is_one_sentence_with_what_is_recorded_only():
    terms = [{"task": "a", "weight": 2}, {"task": "b", "weight": 0}]
    constraints = [{"task": "q", "max_relative_to_base": 0.02}]
    objective = Objective.model_validate({"terms": terms, "constraints": constraints})
    assert objective_in_words(objective) == (
        "the weighted mean of the gains over the base: a 2. Recorded only: b. Constraints: q (at "
        "most 2 % worse than the base)."
    )


def test_inputs_are_named_with_licences_and_digests(tmp_path, make_base, make_adapter):
    base = make_base("llama")
    for seed, name in enumerate("wx"):
        shutil.copytree(make_adapter(base, seed), tmp_path / name)
    (tmp_path / "w" / "README.md").write_text("---\nlicense: mit\n---\n")
    vectors = {name: {"source": str(tmp_path / name)} for name in "wx"}
    vectors |= {name: {"source": f"org/{name}"} for name in "yz"}
    config = config_of(
        base_model=str(base.path), vectors=vectors, search={"n_trials": 4, "rescore_top": 0}
    )
    study = search(config, tmp_path / "s", runner=InProcess(FunctionPool))
    evidence = read_evidence(study)
    rows = [[cell.text for cell in row.cells] for row in inputs_table(evidence).rows]
    assert [(row[0], row[2], row[-1]) for row in rows] == [
        ("base", base.path.name, "not stated"),
        ("w", "w", "mit"),
        ("x", "x", "not stated"),
        ("y", "org/y", "on its page"),
        ("z", "org/z", "on its page"),
    ]
    digests = {row.cells[0].text: row.cells[1].text for row in digests_table(evidence).rows}
    assert digests["study"] == study.config.digest()
    shown = json.dumps([rows, [fact.text for fact in identity_of(evidence)], list(digests)])
    assert str(tmp_path) not in shown and str(base.path) not in shown
