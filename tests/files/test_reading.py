"""YAML and JSON from anybody: they are read in a moment, or refused with the line."""

import json
import time
import tracemalloc
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from optimer_hf.errors import ConfigError, OptimerError
from optimer_hf.files.model import VersionedFile
from optimer_hf.files.reading import LARGEST_YAML, MOST_VALUES, line_of, read_yaml, yaml_text
from optimer_hf.files.staging import write_text
from optimer_hf.recipes.record import Recipe
from optimer_hf.scoring.objective import ObjectiveFile
from optimer_hf.study.config import StudyConfig
from optimer_hf.training.config import TrainConfig
from tests.support.files import write_example

ROOT = Path(__file__).parents[2]


def bomb(width: int = 10, depth: int = 9) -> str:
    """Return YAML whose last value stands for width ** depth others."""
    names = "abcdefghijklmnop"[:depth]
    lines = [f"a: &a [{', '.join(['x'] * width)}]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * width)}]" for a, b in pairwise(names)]
    return "\n".join([*lines, f"last: *{names[-1]}", ""])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb(), r":\d: not valid YAML\. stands for more than 100,000 values"),
        (bomb().replace("[", "{k: [").replace("]", "]}"), "stands for more than"),
        (
            "a: &o {b: *o}\n",
            ":1: not valid YAML. an alias stands for a value that contains the alias",
        ),
        ("a: 1\nb: &o [1, [*o]]\n", ":2: not valid YAML. an alias stands for a value that"),
        ("a: 1\nb: !!bool maybe\n", ":2: .*this value is not a valid tag:yaml.org,2002:bool"),
        ('a: 1\nb: [!!int ""]\n', ":2: .*this value is not a valid tag:yaml.org,2002:int"),
        ('b: {c: !!float ""}\n', ":1: .*this value is not a valid tag:yaml.org,2002:float"),
        ("b: !!timestamp abc\n", ":1: .*this value is not a valid tag:yaml.org,2002:timestamp"),
        ("b: 2020-13-01\n", ":1: .*this value is not a valid tag:yaml.org,2002:timestamp"),
        ("b: !!python/name:os.system\n", ":1: not valid YAML. could not determine a construct"),
        ("b: !!binary é\n", ":1: not valid YAML"),
        (f"a: 1\nb: {'9' * 4000}\n", ":2: not valid YAML. a whole number of 4000 digits"),
        (f"b: {2**63}\n", ":1: not valid YAML. a whole number above 9223372036854775807"),
        (f"b: 0x{'f' * 17}\n", ":1: not valid YAML. a whole number above"),
        ('b: "a\\0b"\n', ":1: not valid YAML. .*a null byte or half a character"),
        ('"a\\0b": 1\n', ":1: not valid YAML. .*a null byte or half a character"),
        ("b: " + "[" * 10_000 + "\n", ":1: not valid YAML. nested too deeply"),
        ("b: " + "{a: " * 10_000 + "\n", ":1: not valid YAML. nested too deeply"),
        ("- " * 10_000 + "a\n", ":1: not valid YAML. nested too deeply"),
        ("? " * 10_000 + "a\n", ":1: not valid YAML"),
        ("b: [" + "1, " * (MOST_VALUES + 1) + "]\n", "stands for more than 100,000 values"),
        ("b: " + "x" * LARGEST_YAML + "\n", r"has more than 1,048,576 bytes"),
        ("? {a: 1}\n: b\n", ":1: not valid YAML. .*found unhashable key"),
        ("a: 1\nb: *nobody\n", ":2: not valid YAML. .*undefined alias"),
    ],
)
def test_yaml_that_costs_more_than_its_size_says_or_means_nothing_is_refused(
    tmp_path, text, message
):
    (tmp_path / "a.yaml").write_text(text)
    started = time.process_time()
    with pytest.raises(ConfigError, match=rf"a\.yaml.*{message}"):
        read_yaml(tmp_path / "a.yaml")
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": ' + "9" * 5000 + "}", "a whole number of 5000 digits"),
        ('{"a": -' + "9" * 19 + "}", "a whole number of 20 digits"),
        ('{"a": ["x", "\\ud800"]}', "a null byte or half a character"),
        ('{"a\\u0000": 1}', "a null byte or half a character"),
        ("{" + '"a": {' * 10**5, "nested too deeply"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "key 'c' is given twice"),
    ],
)
def test_json_that_costs_more_than_its_size_says_is_refused(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"a\.json.*{message}"):
        read_yaml(tmp_path / "a.json")


def test_aliases_of_small_values_are_read(tmp_path):
    (tmp_path / "a.yaml").write_text("a: &a {x: 1}\nb: *a\nc: [*a, *a]\nd: {<<: *a, y: 2}\n")
    data = read_yaml(tmp_path / "a.yaml")
    assert data == {"a": {"x": 1}, "b": {"x": 1}, "c": [{"x": 1}] * 2, "d": {"x": 1, "y": 2}}


def test_a_byte_order_mark_is_skipped(tmp_path):
    (tmp_path / "a.yaml").write_text("\ufeffa: 1\n", encoding="utf-8")
    (tmp_path / "a.json").write_text('\ufeff{"a": 1}', encoding="utf-8")
    assert read_yaml(tmp_path / "a.yaml") == read_yaml(tmp_path / "a.json") == {"a": 1}
    assert line_of(tmp_path / "a.yaml", ["a"]) == 1


def test_numbers_are_read_as_yaml_defines_them(tmp_path):
    text = "a: 0x1F\nb: 0b101\nc: 1_000\nd: -12\ne: 017\nf: 1:30\ng: 9223372036854775807\n"
    (tmp_path / "a.yaml").write_text(text)
    assert read_yaml(tmp_path / "a.yaml") == yaml.safe_load(text)


WRITABLE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


def test_exponents_without_a_point_are_numbers(tmp_path):
    path = write_example(tmp_path, "a: 2e-4\nb: -1E+3\nc: 1.e2\nd: 2e\ne: '2e-4'\nf: 12e4f6\n")
    assert list(read_yaml(path).values()) == [2e-4, -1000.0, 100.0, "2e", "2e-4", "12e4f6"]


@pytest.mark.parametrize(
    "text",
    [
        "a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\n",
        "a: &a {x: 1, y: 2}\nb: {x: 3, <<: *a}\n",
        "a: {x: 1, y: 2}\nb: {<<: [{x: 3}, {x: 4, y: 2}]}\n",
        "a: &a {x: 1, y: 2}\nb:\n  <<: *a\n  <<: {x: 3}\n",
        "a: &a {x: 1, y: 2}\nb: &b {<<: *a, x: 3}\nc: {<<: *b, y: 2}\nd: [{<<: *b}, {<<: *b}]\n",
    ],
)
def test_merge_keys_are_read_as_pyyaml_reads_them(tmp_path, text):
    data = read_yaml(write_example(tmp_path, text))
    assert data == yaml.safe_load(text) and data["b"] == {"x": 3, "y": 2}


def test_a_duplicate_key_beside_a_merge_key_is_refused(tmp_path):
    for text in ("a: &a {x: 1}\nb: {<<: *a, y: 1, y: 2}\n", "b: {<<: {y: 1, y: 2}}\n"):
        with pytest.raises(ConfigError, match="key 'y' is given twice"):
            read_yaml(write_example(tmp_path, text))


@pytest.mark.parametrize(
    ("text", "found"), [("", "an empty file"), ("- 1\n", "a list"), ("hello\n", "a str")]
)
def test_a_file_that_holds_no_mapping_is_refused(tmp_path, text, found):
    with pytest.raises(ConfigError, match=f"found {found}, expected a mapping"):
        read_yaml(write_example(tmp_path, text))


def test_a_directory_in_place_of_a_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="found a directory, expected a file"):
        read_yaml(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1,\n "b": }', r"example\.json:2: not valid JSON\. Expecting value"),
        ('{"a": 1, "a": 2}', r"example\.json: not valid JSON\. key 'a' is given twice"),
        ("[" * 10**5, r"example\.json: is nested too deeply"),
    ],
)
def test_invalid_json_is_refused(tmp_path, text, message):
    (tmp_path / "example.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_yaml(tmp_path / "example.json")


def test_missing_and_binary_files_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such file"):
        read_yaml(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read as UTF-8"):
        read_yaml(tmp_path / "binary.yaml")


@given(
    st.dictionaries(
        st.from_regex(r"[a-z0-9.+-]{1,8}", fullmatch=True),
        st.from_regex(r"[0-9.eE+-]{1,8}", fullmatch=True) | WRITABLE | st.floats(allow_nan=False),
    )
)
@example({"1e6": "2e-4", "3e5-model": "1e3 tokens"})
@example({"0": "\x85", "1": "a\u2028b\u2029", "2": "a\r\nb\n\n", "3": "\ufeffa"})
def test_data_written_as_yaml_is_read_back_equal(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("yaml") / "data.yaml"
    write_text(file, yaml_text(data))
    assert read_yaml(file) == data


# -- mutated files of ours ---------------------------------------------------------------

FILES: list[tuple[type[VersionedFile], Path]] = [
    (StudyConfig, ROOT / "recipes/gemma-3-270m-demo/study.yaml"),
    (TrainConfig, ROOT / "recipes/gemma-3-270m-demo/train-math.yaml"),
]
OBJECTIVE = (
    "terms:\n- {text: a.jsonl, weight: 2.0}\n- {task: gsm8k, metric: 'acc,none'}\nlimit: 9\n"
)
RECIPE = {
    "name": "a",
    "base_model": "a/b@" + "0" * 40,
    "dtype": "bfloat16",
    "vectors": {"m": {"source": "c/d@" + "1" * 40, "weight": 0.5}},
    "objective": {"terms": [{"task": "t", "metric": "acc"}]},
    "scores": {},
}
HOSTILE = st.sampled_from(
    [
        *("!!int", "!!bool x", "&a *a", "*a", "[", "]", "{", "}", ":", "- ", "|", ">", "\0", "? "),
        *("\ud800", "\ufeff", "\x1b]0;x\x07", "1e999", "-1", "9" * 400, ".inf", ".nan", "~", "#"),
        *("null", "<<: *a", "../../etc/passwd", "pypi:os", "%s", "{{ x }}", "2020-13-45", "0x"),
        *("'", '"', "\t"),
    ]
)


@st.composite
def mutated(draw, text: str) -> str:
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        stop = min(start + draw(st.integers(0, 30)), len(text))
        text = text[:start] + draw(HOSTILE | st.text(max_size=5)) + text[stop:]
    return text


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
@given(data=st.data())
@settings(max_examples=120, deadline=10_000)
def test_a_mutated_file_is_read_or_refused_by_an_error_of_ours(tmp_path_factory, suffix, data):
    sources = [(cls, path.read_text(encoding="utf-8")) for cls, path in FILES]
    sources += [(ObjectiveFile, OBJECTIVE), (Recipe, json.dumps(RECIPE, indent=1))]
    cls, text = data.draw(st.sampled_from(sources))
    if suffix == ".json":
        text = json.dumps(yaml.safe_load(text), default=str)
    changed = data.draw(mutated(text))
    file = tmp_path_factory.mktemp("mutated") / f"a{suffix}"
    file.write_bytes(changed.encode("utf-8", "surrogatepass"))
    tracemalloc.start()
    try:
        cls.read(file).model_dump(mode="json")
    except OptimerError as error:
        assert str(file) in str(error)
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 2**28
