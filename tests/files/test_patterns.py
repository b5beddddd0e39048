"""Regular expressions from others: matched in a process with limits, or not at all."""

import pytest

from optimer_hf.errors import ConfigError
from optimer_hf.files.patterns import ends_with, is_literal, matches
from tests.support.damage import HANGING


def test_literals_are_compared_as_peft_matches_them():
    from peft.utils.other import get_pattern_key

    names = [
        "model.layers.1.q_proj",
        "q_proj",
        "xq_proj",
        "model.q.proj",
        "layers_1.q_proj",
        "model.layers.11.q_proj",
    ]
    keys = [
        "q_proj",
        "q.proj",
        r"q\.proj",
        "^q_proj",
        "q_proj$",
        "layers.1.q_proj",
        r"layers\.1\.q_proj",
        "1.q_proj",
    ]
    for key in keys:
        assert is_literal(key)
        for name in names:
            assert ends_with(name, key) == (
                get_pattern_key([key], name) == key
                and (key == name or get_pattern_key([key, "(.*)"], name) == key)
            ), (key, name)
    assert not any(
        is_literal(text) for text in ("", "a*", "a|b", "(a)", "a+", "[a]", "a\n", r"\d", "^", "$")
    )


def test_patterns_are_matched_in_a_process_with_limited_time_and_memory(monkeypatch):
    assert matches(["a.*", "b"], ["abc", "b", "c"], "file") == [
        [True, False, False],
        [False, True, False],
    ]
    with pytest.raises(ConfigError, match=r"file: not a usable regular expression"):
        matches(["a", "("], ["a"], "file")
    monkeypatch.setattr("optimer_hf.files.patterns.SECONDS", 0.3)
    with pytest.raises(ConfigError, match=r"file: its patterns take longer than 0\.3 s"):
        matches([HANGING], ["model.layers.0.self_attn.q_proj"], "file")
