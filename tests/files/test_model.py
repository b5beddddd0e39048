"""Records: errors name every mistake, with its line, its field and what was expected."""

import re
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from optimer_hf.errors import ConfigError
from optimer_hf.files.model import VersionedFile
from tests.support.files import Example, Part, write_example


def mistakes(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        Example.read(write_example(tmp_path, text))
    return str(caught.value)


def test_unknown_key_is_refused_with_the_closest_known_one(tmp_path):
    message = mistakes(tmp_path, "base_modell: a/b\nbase_model: a/b\n")
    assert (
        "example.yaml" in message
        and "'base_modell'" in message
        and "Did you mean 'base_model'?" in message
    )


def test_unknown_key_inside_a_part_names_the_whole_field(tmp_path):
    message = mistakes(tmp_path, "base_model: a/b\nparts: {x: {source: a/b, shar: 2}}\n")
    assert "'parts.x.shar'" in message and "Did you mean 'share'?" in message


def test_unknown_key_that_resembles_none_lists_the_known_ones(tmp_path):
    assert "Known: base_model, corpus" in mistakes(tmp_path, "base_model: a/b\nqqqqqq: 1\n")


@pytest.mark.parametrize("name", ["no", "2024", "1.5", "2024-01-01"])
def test_a_name_that_yaml_does_not_read_as_text_is_said_to_need_quotes(tmp_path, name):
    message = mistakes(tmp_path, f"base_model: a/b\nparts:\n  {name}: {{source: a/b}}\n")
    assert "example.yaml:2: parts: found the name" in message and "Put it in quotes" in message
    read = write_example(tmp_path, f"base_model: a/b\nparts:\n  '{name}': {{source: a/b}}\n")
    assert [*Example.read(read).parts] == [name]


def test_missing_field_is_named(tmp_path):
    assert mistakes(tmp_path, "n_trials: 3\n").endswith("field 'base_model' is missing.")


def test_all_mistakes_are_listed_at_once_each_with_the_file(tmp_path):
    lines = mistakes(
        tmp_path, "n_trials: many\nparts: {x: {source: a/b, share: -1}}\nwhat: 1\n"
    ).splitlines()
    assert len(lines) == 4
    assert all(re.search(r"example\.yaml(:\d+)?: ", line) for line in lines)
    assert any("n_trials: found 'many'" in line for line in lines)
    assert any("parts.x.share: found -1" in line for line in lines)


def test_long_wrong_values_are_shortened_in_the_message(tmp_path):
    line = mistakes(tmp_path, f"base_model: a/b\nn_trials: {'x' * 500}\n")
    assert "..." in line and len(line) < 400


def test_infinite_numbers_are_refused(tmp_path):
    assert "share" in mistakes(
        tmp_path, "base_model: a/b\nparts: {x: {source: a/b, share: .inf}}\n"
    )


class Whole(VersionedFile):
    parts: dict[str, Part] = Field(default_factory=dict)
    limits: list[int] = []
    kind: Literal["fast", "slow"] = "fast"

    def mistakes(self):
        yield from ((("parts", name), "its name has a blank") for name in self.parts if " " in name)
        if len(self.limits) < 2:
            yield ("limits",), "give at least two"


def test_mistakes_between_fields_are_reported_at_once_each_with_its_line(tmp_path):
    path = write_example(
        tmp_path, "parts:\n  a b: {source: a/b}\n  c d: {source: a/b}\nlimits: [1]\n"
    )
    with pytest.raises(ConfigError) as caught:
        Whole.read(path)
    assert str(caught.value).splitlines() == [
        f"{path}:2: parts.a b: its name has a blank.",
        f"{path}:3: parts.c d: its name has a blank.",
        f"{path}:4: limits: give at least two.",
    ]


def test_a_value_that_is_not_a_choice_is_refused_with_the_closest_one(tmp_path):
    with pytest.raises(ConfigError, match=r":1: kind: found 'fsat'\..*Did you mean 'fast'\?"):
        Whole.read(write_example(tmp_path, "kind: fsat\nlimits: [1, 2]\n"))


def test_an_unknown_field_is_compared_with_those_of_its_place_only(tmp_path):
    message = mistakes(tmp_path, "base_model: a/b\nsource: 1\nparts: {x: {source: a/b, corpus: 1}}")
    assert "unknown field 'source'. Known: base_model, corpus" in message
    assert "unknown field 'parts.x.corpus'. Known: share, source." in message


def test_a_later_format_version_is_refused(tmp_path):
    assert "format_version: found 2" in mistakes(tmp_path, "format_version: 2\nbase_model: a/b\n")


def test_duplicate_key_is_refused_with_its_line(tmp_path):
    message = mistakes(
        tmp_path, "base_model: a/b\nparts:\n  x: {source: a/b}\n  x: {source: c/d}\n"
    )
    assert "example.yaml:4: not valid YAML. key 'x' is given twice." in message


def test_invalid_yaml_is_refused_with_its_line(tmp_path):
    message = mistakes(tmp_path, "base_model: a/b\nparts: [1, 2\n")
    assert "example.yaml:3: not valid YAML" in message and "expected ',' or ']'" in message


def test_a_written_file_reads_back_equal(tmp_path):
    example = Example(base_model="a/b", parts={"é": Part(source="hf://c/d@main", share=0.1)})
    example.write(tmp_path / "deep" / "example.json")
    assert Example.read(tmp_path / "deep" / "example.json") == example
    assert "é" in (tmp_path / "deep" / "example.json").read_text(encoding="utf-8")


def test_all_mistakes_in_a_study_file_are_listed_at_once_with_their_lines(tmp_path: Path):
    from optimer_hf.study.config import StudyConfig

    path = tmp_path / "study.yaml"
    path.write_text(
        "base_model: org/base\n"
        "vectors:\n"
        "  a: {source: org/a}\n"
        "  b:\n"
        "    sorce: org/b\n"
        "    bounds: [0, x]\n"
        "objective:\n"
        "  terms:\n"
        "    - task: piqa\n"
        "      wieght: 2\n"
    )
    with pytest.raises(ConfigError) as error:
        StudyConfig.read(path)
    lines = str(error.value).splitlines()
    assert {line.removeprefix(f"{path}:").split(":")[0] for line in lines} == {"5", "6", "10"}
    assert any("Did you mean 'weight'?" in line for line in lines)
    assert all(line.startswith(f"{path}:") for line in lines)


def test_a_record_is_shown_with_what_differs_from_its_defaults():
    example = Example(base_model="a/b", parts={"x": Part(source="a/x", share=1.0)})
    assert repr(example) == "Example(base_model='a/b', parts={'x': Part(source='a/x')})"
    assert str(Example(base_model="a/b", n_trials=4)) == "base_model='a/b' n_trials=4"
