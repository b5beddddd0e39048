"""schema.py: the published JSON Schemas are those of the models, and accept what ships."""

import json
import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from jsonschema import Draft202012Validator

from optimer_hf.cli import main, schema

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "optimer_hf" / "schemas"
MARK = re.compile(r"# yaml-language-server: \$schema=(\S+)")
FILES = sorted(ROOT.glob("recipes/*/study.yaml")) + sorted(ROOT.glob("recipes/*/train-*.yaml"))


@pytest.mark.parametrize("kind", schema.KINDS)
def test_the_published_schema_is_the_one_that_the_command_prints(kind: str):
    result = CliRunner().invoke(main, ["schema", kind])
    assert result.exit_code == 0, result.output
    assert result.output == (PUBLISHED / f"{kind}.json").read_text(encoding="utf-8")
    Draft202012Validator.check_schema(json.loads(result.output))


def test_no_schema_is_left_over():
    assert {path.stem for path in PUBLISHED.iterdir()} == set(schema.KINDS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_file_that_ships_names_its_schema_and_keeps_it(path: Path):
    text = path.read_text(encoding="utf-8")
    found = MARK.match(text)
    assert found is not None
    checker = Draft202012Validator(json.loads((path.parent / found[1]).read_text(encoding="utf-8")))
    data = yaml.safe_load(text)
    assert list(checker.iter_errors(data)) == []
    assert list(checker.iter_errors(data | {"bse_model": 1}))
