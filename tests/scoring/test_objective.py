"""objective.py: what an objective may say, and how it combines scores."""

import pytest
from pydantic import ValidationError

from optimer_hf.errors import ConfigError
from optimer_hf.scoring.objective import Objective, ObjectiveFile, combine, gains
from tests.support.scores import BASE, OTHER, TERMS, objective_of


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


def test_terms_for_rescoring_only_stay_out_of_the_search():
    objective = objective_of(
        {"text": "a"}, {"text": "b", "rescore_only": True, "limit": 7}, limit=5
    )
    assert [term.label for term in objective.terms_at("search")] == ["a"]
    assert [term.label for term in objective.terms_at("rescore")] == ["a", "b"]
    assert [objective.limit_of(term) for term in objective.terms] == [5, 7]


def test_gains_are_relative_for_losses_and_points_for_accuracies():
    assert gains(OTHER, BASE) == pytest.approx({"loss": 0.5, "acc": 0.25, "free": -8.0})


def test_relative_to_base_is_the_weighted_mean_of_the_gains():
    assert combine(objective_of(*TERMS), OTHER, BASE) == pytest.approx((3 * 0.5 + 0.25) / 4)


def test_worst_is_the_smallest_gain_of_the_counting_terms():
    assert combine(objective_of(*TERMS, combine="worst"), OTHER, BASE) == pytest.approx(0.25)


def test_weighted_mean_turns_losses_around():
    same_unit = objective_of(TERMS[0], {**TERMS[2], "weight": 1}, combine="weighted_mean")
    assert combine(same_unit, OTHER, BASE) == pytest.approx(-(3 * 1.5 + 9) / 4)
    assert combine(objective_of(TERMS[1], combine="weighted_mean"), OTHER, BASE) == pytest.approx(
        0.75
    )


@pytest.mark.parametrize("rule", ["relative_to_base", "worst"])
def test_the_base_is_worth_nothing(rule):
    assert combine(objective_of(*TERMS, combine=rule), BASE, BASE) == 0


@pytest.mark.parametrize(
    ("term", "said"),
    [
        ({"function": "f"}, "is missing: say whether larger values are better"),
        ({"task": "t", "higher_is_better": True}, "goes with 'function'"),
    ],
)
def test_only_a_function_has_to_say_which_direction_is_better(term, said):
    with pytest.raises(ValidationError, match=f"'higher_is_better' {said}"):
        Objective.model_validate({"terms": [term]})
