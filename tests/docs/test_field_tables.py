"""docs/reference/files.md has a table for every part of every file, made from the schemas."""

import importlib.util
import json
import re
from types import ModuleType

import pytest

from optimer_hf.experiment.inputs import KINDS
from tests.support.pages import ROOT

PAGE = ROOT / "docs" / "reference" / "files.md"


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_part_of_every_file_has_a_table(hooks):
    shown = {(kind, part) for kind, part, _ in hooks.MARKER.findall(PAGE.read_text("utf-8"))}
    parts = {part or kind for kind, part in shown}
    for path in hooks.SCHEMAS.glob("*.json"):
        schema = json.loads(path.read_text("utf-8"))
        missing = {path.stem, *schema.get("$defs", {})} - parts
        assert missing <= {"Objective"}, path.stem  # the fields of an objective file


def test_every_link_of_a_table_leads_to_a_heading(hooks):
    page = hooks.on_page_markdown(PAGE.read_text("utf-8"))
    assert set(re.findall(r"\(#(\w+)\)", page)) <= set(re.findall(r"\{#(\w+)\}", page))
    assert "<!--" not in page


@pytest.mark.parametrize(
    ("table", "row"),
    [
        (
            ("study", "SearchConfig"),
            "| `n_trials` | whole number, 1 to 10,000 (trials) | `30` | `100` | Number ",
        ),
        (
            ("study",),
            "| `vectors` | mapping of names to text or [VectorConfig](#VectorConfig) | re",
        ),
        (
            ("study", "VectorConfig"),
            "| `bounds` | two values: number, -1,000 to 1,000 (weight) | `[0.0",
        ),
        (
            ("train", "MixturePart", "CorpusConfig"),
            "| `share` | number, above 0 to 1 (share of max_tokens) | required | `0.25` |",
        ),
        (("objective",), "| `combine` | `relative_to_base`, `weighted_mean`, `worst` | `relative_"),
    ],
)
def test_a_row_has_type_bounds_unit_default_example_and_meaning(hooks, table, row):
    assert any(line.startswith(row) for line in hooks.field_table(*table).splitlines())


def test_the_tables_say_what_the_models_say(hooks):
    page = hooks.on_page_markdown(PAGE.read_text("utf-8"))
    for kind, cls in KINDS.items():
        whole = cls.model_json_schema()
        for part in (whole, *whole.get("$defs", {}).values()):
            for name, field in part["properties"].items():
                meaning = " ".join(field["description"].split()).replace("|", "\\|")
                assert f"| {meaning} |" in page, (kind, name)


def test_a_table_beyond_a_part_leaves_out_what_both_have_alike(hooks):
    table = hooks.field_table("objective", "Constraint", "Term")
    assert "`weight`" in table and "`max_relative_to_base`" in table and "`limit`" not in table
