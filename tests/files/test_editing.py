"""editing.py: a YAML text whose values change, and nothing else."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimer_hf.files.editing import edit_yaml
from optimer_hf.files.reading import parse_yaml, yaml_text

WHOLE = """\
# A merge of mine
merge_method: ties   # as in the paper
base_model: "./base"
x-common: &common {weight: 0.5, density: 0.5}   # shared
models:
  # first the base, for mergekit
  - model: ./base
  - model: ./math   # maths
    parameters:
      # denser is worse
      density: 0.4   # as in the paper
      weight: 0.5   # by hand
  - model: './code'
    parameters: *common
  - {model: chat, parameters: {density: 0.3, weight: [0, 1]}}
  - parameters:
      <<: *common
      weight: 0.1
    model: e
parameters: {normalize: true, int8_mask: true}

# The dtype
dtype: bfloat16
# the end
"""
CHANGED = """\
# A merge of mine
merge_method: task_arithmetic   # as in the paper
base_model: "./base"
x-common: &common {weight: 0.5, density: 0.5}   # shared
models:
  # first the base, for mergekit
  - model: ./base
  - model: ./math   # maths
    parameters:
      weight: 0.25   # by hand
  - model: './code'
    parameters: {weight: 0.5}
  - {model: chat, parameters: {weight: [0, 0.75]}}
  - parameters:
      {weight: 1.0}
    model: e
parameters: {normalize: false}

# The dtype
dtype: float32
out_dtype: bfloat16
# the end
"""


def change(data: dict) -> dict:
    weights = [None, 0.25, 0.5, [0, 0.75], 1.0]
    models = [
        {"model": entry["model"]} | ({"parameters": {"weight": w}} if w is not None else {})
        for entry, w in zip(data["models"], weights, strict=True)
    ]
    return data | {
        "merge_method": "task_arithmetic",
        "models": models,
        "parameters": {"normalize": False},
        "dtype": "float32",
        "out_dtype": "bfloat16",
    }


def test_all_but_the_changed_values_stays_as_it_is():
    assert edit_yaml(WHOLE, change(parse_yaml(WHOLE, "t"))) == CHANGED
    assert edit_yaml(WHOLE, parse_yaml(WHOLE, "t")) == WHOLE


@pytest.mark.parametrize(
    ("text", "changes", "expected"),
    [
        ("a: &x 1 # one\nb: *x\nc: *x\n", {"a": 2, "b": 1, "c": 2}, "a: &x 2 # one\nb: 1\nc: *x\n"),
        ("{a: 1, b: 2, # two\n c: 3}\n", {"b": None}, "{a: 1, c: 3}\n"),
        ("{a: 1, b: 2, c: 3} # all\n", {"c": None, "b": None}, "{a: 1} # all\n"),
        ("a: [1, 2] # l\n", {"a": [1, 2, 3]}, "a: [1, 2, 3] # l\n"),
        ("a:\n- 1 # l\n# end\n", {"a": [1, {"b": "x, y"}]}, "a:\n- 1 # l\n- {b: 'x, y'}\n# end\n"),
        ("a:\n- 1\n- 2\nb: 1 # b\n", {"a": [3]}, "a:\n [3]\nb: 1 # b\n"),
        ("a:   # nothing\nb: 1", {"a": 1, "c": 2}, "a: 1   # nothing\nb: 1\nc: 2"),
        (
            "--- # d\na: |\n  x\n  y\n\nb: 1\n...\n",
            {"b": 2},
            "--- # d\na: |\n  x\n  y\n\nb: 2\n...\n",
        ),
        ("a: 1\nb:\n  c: 1 # c\n  d: 2\n", {"b": {"c": 3}, "e": 4}, "a: 1\nb:\n  c: 3 # c\ne: 4\n"),
        ("a:\n  c: 1\n  d: 2 # d", {"a": {"c": 1}, "e": 4}, "a:\n  c: 1\ne: 4"),
        (
            "a:\n- b:\n    c: 1 # c\n    d: 2\n    e: 3\n# end\n",
            {"a": [{"b": {"c": 5, "f": 6}}], "g": 7},
            "a:\n- b:\n    c: 5 # c\n    f: 6\ng: 7\n# end\n",
        ),
        ("a: &w # there\n  0.5\nb: *w\n", {"a": 1, "b": 1}, "a: &w # there\n  1\nb: *w\n"),
        ("a: &w !!str 1 # w\n", {"a": 2}, "a: &w 2 # w\n"),
        (
            "# top\n\na:\n  # of c\n  c: 1\n # of both\n  # of d\n  # too\n  d: 1\n",
            {"a": {"c": 2}},
            "# top\n\na:\n  # of c\n  c: 2\n # of both\n",
        ),
        ("a: !!str 1\nb: yes\n", {"a": "2"}, "a: '2'\nb: yes\n"),
    ],
)
def test_awkward_texts(text, changes, expected):
    old = parse_yaml(text, "t")
    data = {key: value for key, value in (old | changes).items() if value is not None}
    edited = edit_yaml(text, data)
    assert edited == expected
    assert parse_yaml(edited, "t") == data


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats(-2, 2)
    | st.text("aä: #*&-,[]{'\"", max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("abc #:-", min_size=1, max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
MAPPINGS = st.dictionaries(st.text("abc", min_size=1, max_size=2), VALUES, min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(MAPPINGS, MAPPINGS)
def test_any_mapping_becomes_any_other(old, new):
    text = yaml_text(old)
    edited = edit_yaml(text, old | new)
    assert edited is not None
    assert parse_yaml(edited, "t") == parse_yaml(yaml_text(old | new), "t")
