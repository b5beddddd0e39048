"""objective.py: what an objective may say."""

import pytest
from pydantic import ValidationError

from optimer_hf.errors import ConfigError
from optimer_hf.scoring.objective import Objective, ObjectiveFile


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"terms": []}, "at least 1 item"),
        ({"terms": [{}]}, "exactly one of 'task'"),
        ({"terms": [{"task": "a", "text": "b"}]}, "exactly one of 'task'"),
        ({"terms": [{"text": "a", "metric": "acc"}]}, "has the metric bits_per_byte"),
        (
            {"terms": [{"text": "ja.a"}, {"text": "ja.b"}]},
            "two terms are called 'ja'; give each its own 'name'",
        ),
        ({"terms": [{"task": "a", "weight": 0}]}, "every term has weight 0"),
        ({"terms": [{"task": "a", "weight": -1}]}, "greater than or equal to 0"),
        ({"terms": [{"task": "a", "limit": 0}]}, "greater than 0"),
        ({"terms": [{"task": "a", "rescore_only": True}]}, "the search needs at least one"),
        (
            {"combine": "weighted_mean", "terms": [{"text": "a"}, {"task": "b", "metric": "acc"}]},
            "mixes units",
        ),
        ({"combine": "best", "terms": [{"text": "a"}]}, "weighted_mean"),
    ],
)
def test_an_impossible_objective_is_refused_with_its_reason(data, message):
    with pytest.raises(ValidationError, match=message):
        Objective.model_validate(data)


def test_an_objective_file_names_itself_in_its_mistakes(tmp_path):
    (tmp_path / "objective.yaml").write_text("terms: [{task: a, metrik: acc}]\n", encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"objective\.yaml:1: unknown field 'terms\.0\.metrik'.*'metric'"
    ):
        ObjectiveFile.read(tmp_path / "objective.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{until: 2024-01-31}", r"generation\.until: found datetime"),
        ("{until: !!set {a, b}}", r"generation\.until: found {'[ab]', '[ab]'}"),
        ("{bad_words_ids: [[1, .nan]]}", r"generation\.bad_words_ids\.0\.1: found nan"),
        ("{temperature: .inf}", r"generation\.temperature: found inf"),
        ("{until: [!!binary YQ==]}", r"generation\.until\.0: found b'a'"),
        ("{watermarking_config: {1: 2}}", r"generation\.watermarking_config: found the key 1"),
        ("{max_gen_toks: 1000000000}", r"max_gen_toks: found 1000000000\. .* 1 to 131,072"),
        ("{max_gen_toks: 0}", r"max_gen_toks: found 0"),
        ("{max_gen_toks: 8.5}", r"max_gen_toks: found 8\.5\. Expected a whole number"),
        ("{max_gen_toks: true}", r"max_gen_toks: found True"),
        ("{max_tokens: null}", r"max_tokens: found None"),
        ('{max_new_tokens: "8"}', r"max_new_tokens: found '8'"),
        ("{num_beams: 100000}", r"num_beams: found 100000\. .* 1 to 1,024"),
        ("{top_k: -1}", r"top_k: found -1"),
        ("{num_return_sequences: 4}", r"num_return_sequences: found 4"),
        ('{do_sample: "yes"}', r"do_sample: found 'yes'\. Expected true or false"),
        ("{temperature: hot}", r"temperature: found 'hot'\. Expected a number"),
        ("{until: [x, 5]}", r"until: found \['x', 5\]\. Expected a text or a list of texts"),
        ("{temperature: 1e300}", r"temperature: found 1e\+300"),
    ],
)
def test_generation_is_plain_json_of_bounded_numbers(tmp_path, text, message):
    path = tmp_path / "objective.yaml"
    path.write_text(f"terms:\n- task: t\n  generation: {text}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"objective\.yaml:3: terms\.0\.{message}|{message}"):
        ObjectiveFile.read(path)
