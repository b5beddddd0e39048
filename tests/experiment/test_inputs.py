"""inputs.py: the published JSON Schemas are those of the models, and accept what ships."""

import json
import re
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from jsonschema import Draft202012Validator

from optimer_hf.cli import main
from optimer_hf.comparison.sealed_file import Seal
from optimer_hf.experiment.inputs import KINDS
from optimer_hf.hub.pulling import PulledFile
from optimer_hf.merging.geometry_file import GeometryFile
from optimer_hf.recipes.record import Lock
from optimer_hf.study.directory import Inputs
from optimer_hf.vectors.record import VectorFile

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "optimer_hf" / "schemas"
MARK = re.compile(r"# yaml-language-server: \$schema=(\S+)")
FILES = sorted(ROOT.glob("recipes/*/study.yaml")) + sorted(ROOT.glob("recipes/*/train-*.yaml"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_published_schema_is_the_one_that_the_command_prints(kind: str):
    result = CliRunner().invoke(main, ["schema", kind])
    assert result.exit_code == 0, result.output
    assert result.output == (PUBLISHED / f"{kind}.json").read_text(encoding="utf-8")
    Draft202012Validator.check_schema(json.loads(result.output))


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_of_a_file_says_what_it_is_for(kind: str):
    whole = KINDS[kind].model_json_schema()
    for name, part in {kind: whole, **whole.get("$defs", {})}.items():
        for field, schema in part["properties"].items():
            assert schema.get("description", "").endswith((".", "...")), f"{name}.{field}"


WITHOUT_UNIT = {"format_version", "seed", "incumbent", "device_map", "engine", "trainer", "lora"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_of_a_file_has_an_example_that_is_valid_and_every_number_a_unit(kind: str):
    whole = KINDS[kind].model_json_schema()
    for name, part in {kind: whole, **whole.get("$defs", {})}.items():
        for field, schema in part["properties"].items():
            checker = Draft202012Validator(schema | {"$defs": whole.get("$defs", {})})
            examples = schema.get("examples", [])
            assert examples, f"{name}.{field}"
            for example in examples:
                assert list(checker.iter_errors(example)) == [], f"{name}.{field}: {example}"
            has_number = re.search(r'"type": "(integer|number)"', json.dumps(schema))
            assert "unit" in schema or not has_number or field in WITHOUT_UNIT, f"{name}.{field}"


def test_no_schema_is_left_over():
    assert {path.stem for path in PUBLISHED.iterdir()} == set(KINDS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_file_that_ships_names_its_schema_and_keeps_it(path: Path):
    text = path.read_text(encoding="utf-8")
    match = MARK.match(text)
    assert match is not None
    checker = Draft202012Validator(json.loads((path.parent / match[1]).read_text(encoding="utf-8")))
    data = yaml.safe_load(text)
    assert list(checker.iter_errors(data)) == []
    assert list(checker.iter_errors(data | {"bse_model": 1}))


MEASURED = "measured by us and only shown: it sizes nothing"
UNBOUNDED = {  # number fields without bounds, and why that is no harm
    "format_version": "one value",
    "constraints[].weight": "one value",
    "norm": MEASURED,
    "relative_norm": MEASURED,
    "relative_error": MEASURED,
    "relative_errors[]": MEASURED,
    "Lock.weights[]": "compared with those of the recipe, which have bounds",
    "StudyConfig.device_map": "the number of a GPU, which a trial looks for",
    "StudyConfig.engine": "options of vLLM, which knows their bounds",
    "GeometryFile": "a cache of ours, made again where it does not fit",
    "Recipe.scores": MEASURED,
    "Recipe.study": MEASURED,
    "Recipe.ledger": MEASURED,
    "VectorFile.corpus": MEASURED,
    "VectorFile.training": MEASURED,
    "terms[].generation": "every number in it is checked by Term",
    "constraints[].generation": "every number in it is checked by Term",
    "TrainConfig.lora": "bounds in test_train",
    "TrainConfig.trainer": "bounds in test_train",
}
READ = [*KINDS.values(), VectorFile, Lock, GeometryFile, Seal, PulledFile, Inputs]


def numbers(part, definitions, at):
    """Yield place and schema of the numbers of a JSON Schema, and of what may hold any value."""
    if "$ref" in part:
        yield from numbers(definitions[part["$ref"].rpartition("/")[2]], definitions, at)
    if part.get("type") in ("integer", "number") or part.get("additionalProperties") is True:
        yield at, part
    for key in ("anyOf", "oneOf", "allOf", "prefixItems"):
        for inner in part.get(key, []):
            yield from numbers(inner, definitions, at)
    for key in ("items", "additionalProperties"):
        if isinstance(part.get(key), dict):
            yield from numbers(part[key], definitions, f"{at}[]")
    for key, inner in part.get("properties", {}).items():
        yield from numbers(inner, definitions, f"{at}.{key}")


@pytest.mark.parametrize("cls", READ)
def test_every_number_of_a_file_has_bounds_or_a_reason(cls):
    whole = cls.model_json_schema()
    for at, schema in numbers(whole, whole.get("$defs", {}), cls.__name__):
        least = schema.keys() & {"minimum", "exclusiveMinimum"}
        most = schema.keys() & {"maximum", "exclusiveMaximum"}
        is_excused = any(
            f"{at}.".startswith(f"{name}.") or at.startswith(f"{name}[") or f".{name}" in at
            for name in UNBOUNDED
        )
        assert (least and most) or is_excused, at
