"""Digests of files and values, and the differences between two records."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimer_hf.files.digest import differences, digest, fingerprint, sha256_file

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
)


@given(st.dictionaries(st.text(max_size=5), VALUES, max_size=4))
def test_digest_does_not_depend_on_the_order_of_keys(value):
    assert digest(value) == digest(dict(reversed(value.items())))


@given(VALUES, VALUES)
def test_digests_are_equal_only_for_equal_json(a, b):
    assert (digest(a) == digest(b)) == (
        json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
    )


def test_sha256_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "f").write_bytes(b"abc")
    assert (
        sha256_file(tmp_path / "f")
        == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def test_differences_name_every_field_that_differs_and_both_values():
    other = {"a": 1, "b": {"c": [1, 2], "d": [1]}, "e": None}
    expected = {"a": 1, "b": {"c": [1, 3], "d": [1, 2]}, "f": 2}
    assert differences(other, expected) == [
        "b.c.1: found 2, expected 3",
        "b.d: found [1], expected [1, 2]",
        "f: found nothing, expected 2",
    ]
    assert differences(other, other) == []


def test_a_difference_is_short_and_leaves_out_what_nobody_has_given():
    term = {"text": "t.jsonl", "task": None, "weight": 1.0, "generation": {}, "limit": None}
    (told,) = differences({}, {"test": {"terms": [term] * 40, "constraints": []}})
    assert told.startswith("test: found nothing, expected {'terms': [{'text': 't.jsonl', 'weight'")
    assert len(told) < 300


@pytest.mark.parametrize("n_bytes", [0, 1, 100_000, 5 * 2**20])
def test_versions_of_a_file_have_different_fingerprints(tmp_path, n_bytes):
    content = random.Random(0).randbytes(n_bytes)
    (tmp_path / "f").write_bytes(content)
    (tmp_path / "g").write_bytes(content)
    first = fingerprint(tmp_path / "f")
    assert first == fingerprint(tmp_path / "g")
    for other in (content + b"x", random.Random(1).randbytes(n_bytes), content[:-1]):
        if other != content:
            (tmp_path / "g").write_bytes(other)
            assert first != fingerprint(tmp_path / "g")
