"""How a task generates: settings that lm-eval or transformers would not take are refused before any
work, and none is dropped in silence.
"""

import logging

import pytest
import torch

from optimer_hf.errors import EvaluationError
from optimer_hf.scoring.generation import generation_settings
from optimer_hf.scoring.objective import Term

OWN = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}


def settings_of(generation, own=OWN):
    return generation_settings(Term(task="toy", metric="acc", generation=generation), own)


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"do_sample": True}, r"generation\.do_sample: found True, .* temperature above 0"),
        ({"do_sample": True, "temperature": 0}, r"temperature above 0\. Add one"),
        ({"do_sample": True, "temperature": -1}, r"generation\.temperature: found -1"),
        ({"use_cache": False}, r"generation\.use_cache: lm-eval sets it itself\. Leave it out"),
        ({"use_cache": True}, r"generation\.use_cache"),
        ({"pad_token_id": 0}, r"generation\.pad_token_id: lm-eval takes that of the tokenizer"),
        ({"max_length": 9}, r"generation\.max_length: it counts the prompt.* Give max_gen_toks"),
        ({"max_time": 1.5}, r"generation\.max_time: .* speed of the machine"),
        ({"stop_strings": ["x"]}, r"generation\.stop_strings: .*`until`"),
        ({"return_dict_in_generate": True}, r"generation\.return_dict_in_generate: found True"),
        ({"penalty_alpha": 0.5, "top_k": 4}, r"generation\.penalty_alpha: found 0\.5"),
        ({"num_beam_groups": 2, "num_beams": 4}, r"generation\.num_beam_groups: found 2"),
        ({"prompt_lookup_num_tokens": 2}, r"generation\.prompt_lookup_num_tokens: found 2"),
        ({"token_healing": True}, r"generation\.token_healing: found True"),
        ({"cache_implementation": "no"}, r"generation\.cache_implementation: found 'no'"),
        ({"repetition_penalty": -2}, r"generation\.repetition_penalty: found -2"),
        ({"bad_words_ids": [[-1]]}, r"generation\.bad_words_ids: found \[\[-1\]\]"),
        ({"watermarking_config": {"bias": "x"}}, r"generation\.watermarking_config: found"),
        ({"max_tokens": 3, "max_gen_toks": 4}, r"max_gen_toks and max_tokens are names of one"),
        ({"until": ""}, r"generation\.until: found ''\. Expected a text"),
    ],
)
def test_settings_that_would_end_a_trial_in_a_traceback_are_refused(generation, message):
    with pytest.raises(EvaluationError, match=f"term 'toy': .*{message}"):
        settings_of(generation)


def test_a_task_that_asks_for_several_texts_of_a_prompt_is_refused():
    with pytest.raises(
        EvaluationError, match=r"task 'toy': .* not return one text for each prompt"
    ):
        settings_of({}, OWN | {"num_beams": 2, "num_return_sequences": 2})


def test_a_bad_setting_of_the_task_itself_is_said_to_be_the_task_s():
    with pytest.raises(EvaluationError, match=r"generation_kwargs of task 'toy': .*use_cache"):
        settings_of({}, OWN | {"use_cache": False})


@pytest.mark.parametrize(
    "generation",
    [
        {},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
        {"temperature": 0.0},
        {"num_beams": 3, "length_penalty": 0.5},
        {"repetition_penalty": 1.2},
        {"bad_words_ids": [[250_000]]},
        {"num_return_sequences": 1},
        {"until": "END"},
    ],
)
def test_settings_that_work_are_handed_on_as_they_are(generation):
    state = torch.random.get_rng_state()
    assert settings_of(generation) == OWN | generation
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("own", "generation", "expected"),
    [
        ({}, {}, {"max_gen_toks": 256}),
        ({"max_gen_toks": 4}, {"max_new_tokens": 2}, {"max_new_tokens": 2}),
        ({"max_gen_toks": 4}, {"max_tokens": 2}, {"max_tokens": 2}),
        ({"max_tokens": 4}, {"max_gen_toks": 2}, {"max_gen_toks": 2}),
        ({"max_new_tokens": 4}, {}, {"max_new_tokens": 4}),
    ],
)
def test_the_length_that_was_given_last_counts_under_whatever_name(own, generation, expected):
    assert settings_of(generation, own) == expected


def test_settings_that_say_nothing_beside_others_are_said_once(caplog):
    with caplog.at_level(logging.WARNING):
        settings_of({"top_p": 0.25})
        settings_of({"top_p": 0.25})
    assert len(caplog.records) == 1
    assert "`top_p` is set to `0.25`" in caplog.text
