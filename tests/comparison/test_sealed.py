"""sealed.py: what is scored under the seal, once, and what recorded trials
predict.
"""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from optimer_hf.comparison import baselines
from optimer_hf.comparison.baselines import ModelContender, ready_model
from optimer_hf.comparison.result import table, verdicts
from optimer_hf.comparison.results_file import results_of
from optimer_hf.comparison.rows import list_rows, title_of
from optimer_hf.comparison.sealed import compare, list_own_contenders
from optimer_hf.comparison.sealed_file import SealedLog, read_comparison
from optimer_hf.comparison.tables import to_markdown
from optimer_hf.errors import ConfigError, EvaluationError, ModelError, StudyError
from optimer_hf.report.answer import answer_of
from optimer_hf.report.evidence import read_evidence
from optimer_hf.searching.loop import search
from optimer_hf.searching.runner import InProcess
from optimer_hf.study.prediction import best_scale, predict, reweight
from optimer_hf.vectors.delta import warn_of_norm
from tests.support.landscapes import (
    TEST,
    FunctionPool,
    TellingPool,
    config_of,
    failing_at,
    landscape,
    with_test,
)


class CountingPool(FunctionPool):
    opened: list["CountingPool"] = []

    def __init__(self, config):
        super().__init__(config)
        self.opened.append(self)


@pytest.fixture(autouse=True)
def _count_from_zero():
    CountingPool.opened.clear()


def no_pool(config):
    pytest.fail("everything is scored already, the pool must stay closed")


@pytest.fixture
def study(tmp_path):
    return search(with_test(), tmp_path / "s", runner=InProcess(TellingPool))


@pytest.mark.parametrize(
    ("kind", "subject", "title"),
    [
        ("mixture", "uniform", "mixture: uniform"),
        ("scaled_mixture", "half ja", "mixture: half ja at its best scale"),
        ("mixture", "Mixture, uniform", "Mixture, uniform"),
        ("model", "uniform", "uniform"),
        ("average", "", "uniform average"),
        ("attempts", "4", "best of 4 data mixtures at equal cost"),
    ],
)
def test_the_title_of_a_mixture_says_that_it_is_one(kind, subject, title):
    assert title_of(kind, subject) == title


def test_the_title_of_a_row_has_the_weight_that_is_searched_not_that_of_fixed_groups(tmp_path):
    by = {"mlp": {}, "self_attn": {"fixed": 0.5}, "else": {"fixed": 0.5}}
    config = with_test(vectors={"x": {"source": "a/x", "by": by}, "y": "a/y"})
    rows = list_own_contenders(search(config, tmp_path / "s", runner=InProcess(TellingPool)))
    of_x = {row.kind: row for row in rows if row.subject == "x"}
    assert of_x["alone"].title == "x at 1.0"
    own = of_x["best_scale"].weights["x.mlp"]
    assert of_x["best_scale"].title == f"x at its best scale, {own:g}" and own != 0.5


def test_constraints_of_the_test_are_scored_and_shown_like_terms(tmp_path):
    constraint = {"task": "c_test", "name": "q", "metric": "loss", "max_relative_to_base": 0.1}
    terms = TEST["terms"][:2]
    study = search(
        with_test(test={"terms": terms, "constraints": [constraint]}),
        tmp_path / "s",
        runner=InProcess(FunctionPool),
    )
    comparison = compare(study, pool=FunctionPool)
    assert set(comparison.merge.scores) == {"t", "u", "q"}
    assert results_of(comparison) and to_markdown(comparison)


def test_all_baselines_stand_beside_the_merge(study):
    rows = {(row.kind, row.subject): row for row in list_own_contenders(study)}
    assert next(iter(rows)) == ("base", "") and ("merge", "") in rows
    assert {(kind, name) for kind in ("alone", "best_scale") for name in "wxyz"} <= set(rows)
    assert rows["base", ""].weights == dict.fromkeys("wxyz", 0.0)
    assert rows["alone", "x"].weights == {"w": 0, "x": 1, "y": 0, "z": 0}
    assert rows["average", ""].weights == dict.fromkeys("wxyz", 0.25)
    titles = [row.title for row in rows.values()]
    assert {"w at 1.0", "x at 1.0", "uniform average", "uniform sum", "searched merge"} <= set(
        titles
    )
    assert sum("at its best scale, " in title for title in titles) == 4


class ThirdsPool(FunctionPool):
    """Its best weights are the average of three vectors."""

    n_items = 12

    def score(self, weights, asked, *, gradients=False):
        scored = super().score(dict.fromkeys("wxyz", 0.0), asked)
        loss = sum((weight - 1 / 3) ** 2 for weight in weights.values())
        for score in scored.terms.values():
            score.items[:] = [(top + loss, bottom) for top, bottom in score.items]
        return scored


def test_a_merge_that_is_the_average_equals_it_and_is_not_worse_by_a_rounded_digit(tmp_path):
    vectors = {name: f"a/{name}" for name in "xyz"}
    config = with_test(vectors=vectors, search={"n_trials": 5, "rescore_top": 0})
    study = search(config, tmp_path / "s", runner=InProcess(ThirdsPool))
    assert study.best_trial.weights == dict.fromkeys("xyz", 0.3333)
    comparison = compare(study, pool=ThirdsPool)
    best, merge = comparison.best_baseline(), comparison.merge
    assert (best.kind, comparison.value(best)) == ("average", comparison.value(merge))
    assert verdicts(comparison) == [
        "searched merge minus the best of the others (uniform average): +0.00 points: "
        "equal on every item."
    ]
    verdict = answer_of(read_evidence(study)).verdict
    assert re.fullmatch(r"The merge equals the best of .* on every item of the .* test\.", verdict)


def test_guessed_weights_are_rows_with_the_rest_at_0_and_fixed_ones_as_they_are(tmp_path):
    by = {"mlp": {}, "self_attn": {}, "else": {"fixed": 0.5}}
    vectors = {"x": {"source": "a/x", "by": by}, "f": {"source": "a/f", "fixed": 0.75}}
    weights = {
        "by hand": {"x": 1.75},  # beyond the bounds, which are those of the search
        "attention": {"x": 0.25, "x.self_attn": -0.5, "f": 0.75},
        "mlp": {"x.mlp": 0.25},
    }
    config = with_test(vectors=vectors, baselines={"weights": weights})
    study = search(config, tmp_path / "s", runner=InProcess(TellingPool))
    comparison = compare(study, pool=CountingPool)
    rows = {row.title: row.weights for row in comparison.rows if row.kind == "weights"}
    expected = {"by hand": (1.75, 1.75), "attention": (0.25, -0.5), "mlp": (0.25, 0.0)}
    assert rows == {
        title: {"x.mlp": mlp, "x.self_attn": attention, "x.else": 0.5, "f": 0.75}
        for title, (mlp, attention) in expected.items()
    }
    scored = [weights for weights, _, _ in CountingPool.opened[0].calls]
    assert all(weights in scored for weights in rows.values())
    assert len(list_rows(config)) == len(comparison.rows)
    assert "| by hand |" in to_markdown(comparison)


def test_every_row_is_scored_once_and_read_from_disk_the_second_time(study):
    first = compare(study, pool=CountingPool)
    asked = [json.dumps(weights, sort_keys=True) for weights, _, _ in CountingPool.opened[0].calls]
    assert len(asked) == len(set(asked))
    assert {json.dumps(row.weights, sort_keys=True) for row in first.rows} == set(asked)
    second = compare(study, pool=no_pool)
    assert second == first


def test_rows_that_are_missing_after_a_crash_are_the_only_ones_scored_again(study):
    with pytest.raises(EvaluationError, match=r"OSError: no, twice"):
        compare(study, pool=failing_at({4: OSError("no"), 5: OSError("no")}))
    assert len(SealedLog(study.directory, study.config).rows) == 4
    comparison = compare(study, pool=CountingPool)
    assert (
        len(CountingPool.opened[0].calls)
        == len({json.dumps(row.weights) for row in comparison.rows}) - 4
    )
    assert not any(row.chosen_after_seal for row in comparison.rows)


class HugePool(FunctionPool):
    """Scores one vector alone with a number that no record may hold."""

    def score(self, weights, asked, *, gradients=False):
        scored = super().score(weights, asked)
        if weights["z"] != 1 or sum(weights.values()) != 1:
            return scored
        terms = {
            label: replace(term, items=[(1e300, 1.0)] * 4) for label, term in scored.terms.items()
        }
        return replace(scored, terms=terms)


@pytest.mark.parametrize("pool", [failing_at({4: RuntimeError("no")}), HugePool])
def test_a_baseline_that_cannot_be_scored_is_left_out_and_tried_again(study, pool, caplog):
    comparison = compare(study, pool=pool)
    rows = [(row.kind, row.subject) for row in comparison.rows]
    assert ("alone", "z") not in rows and {("alone", "y"), ("sum", ""), ("merge", "")} <= {*rows}
    assert "sealed test: z at 1.0 is left out: " in caplog.text
    assert read_comparison(study).left_out == comparison.left_out
    (left_out,) = results_of(comparison).left_out
    assert (left_out.kind, left_out.subject, left_out.name) == ("alone", "z", "z at 1.0")
    sentence = f"Left out: z at 1.0, because {left_out.reason}."
    assert left_out.reason.startswith("it cannot be scored (")
    assert f"\n* {sentence}\n" in to_markdown(comparison)
    assert sentence in answer_of(read_evidence(study)).notes
    again = compare(study, pool=CountingPool)
    assert again.row("alone", "z") and len(CountingPool.opened[0].calls) == 1
    assert again.left_out == read_comparison(study).left_out == []
    assert "left_out" not in results_of(again).model_dump() and "Left" not in to_markdown(again)


class UnfitPool(FunctionPool):
    """Cannot be opened with a model of another shape, or with one that its code refuses."""

    def __init__(self, config):
        if "you/unfit" in config.sources.values():
            raise ModelError("vector 'unfit': another shape")
        if "you/broken" in config.sources.values():
            raise KeyError("layers")
        super().__init__(config)


def test_a_model_that_cannot_be_built_is_left_out(tmp_path):
    models = {name: f"you/{name}" for name in ("unfit", "broken", "fit")}
    config = with_test(baselines={"models": models, "searches": {}})
    study = search(config, tmp_path / "s", runner=InProcess(FunctionPool))
    comparison = compare(study, pool=UnfitPool)
    assert [row.subject for row in comparison.rows if row.kind == "model"] == ["fit"]
    assert {each.name: each.reason for each in comparison.left_out} == {
        "unfit": "it cannot be built (ModelError: vector 'unfit': another shape)",
        "broken": "it cannot be built (KeyError: 'layers')",
    }


def test_a_trained_mixture_that_cannot_be_built_ends_the_sealed_test(tmp_path):
    baselines = {"mixtures": {"unfit": {"shares": "uniform"}}}
    study = search(with_test(baselines=baselines), tmp_path / "s", runner=InProcess(FunctionPool))
    with pytest.raises(EvaluationError, match="row 'mixture: unfit' cannot be built: ModelError"):
        compare(study, mixtures={"unfit": "you/unfit"}, pool=UnfitPool)


def test_a_merge_that_cannot_be_scored_ends_the_sealed_test(study):
    n_others = len({row.key for row in list_own_contenders(study) if row.kind != "merge"})
    message = "sealed test: row 'searched merge' cannot be scored: RuntimeError: no"
    with pytest.raises(EvaluationError, match=message):
        compare(study, pool=failing_at({n_others: RuntimeError("no")}))


def test_the_sealed_test_scores_the_terms_of_the_test_section(tmp_path):
    test = {"terms": [{"task": "u_test", "name": "u", "metric": "loss"}], "limit": 7}
    compare(
        search(with_test(test=test), tmp_path / "s", runner=InProcess(FunctionPool)),
        pool=CountingPool,
    )
    assert {(tuple(labels), limits["u"]) for _, labels, limits in CountingPool.opened[0].calls} == {
        (("u",), 7)
    }


def test_a_candidate_chosen_after_the_seal_was_opened_is_marked(tmp_path):
    short = search(
        with_test(search={"n_trials": 6, "rescore_top": 2}),
        tmp_path / "s",
        runner=InProcess(FunctionPool),
    )
    assert not any(row.chosen_after_seal for row in compare(short, pool=FunctionPool).rows)
    longer = search(
        with_test(search={"n_trials": 16, "rescore_top": 2}),
        tmp_path / "s",
        runner=InProcess(FunctionPool),
    )
    comparison = compare(longer, pool=CountingPool)
    assert comparison.merge.weights != short.best_trial.weights
    assert comparison.merge.chosen_after_seal
    assert not comparison.base.chosen_after_seal
    assert any(
        "searched merge (chosen after the seal was opened)" in line[0]
        for line in table(comparison)[1]
    )


def test_a_study_without_a_test_section_cannot_be_compared(tmp_path):
    study = search(config_of(), tmp_path / "s", runner=InProcess(FunctionPool))
    with pytest.raises(ConfigError, match="no `test:` section"):
        compare(study, pool=no_pool)


def test_the_merge_is_compared_with_the_best_of_the_others(study):
    comparison = compare(study, pool=TellingPool)
    others = [row for row in comparison.rows if row.kind != "merge"]
    assert comparison.best_baseline().title == max(others, key=comparison.value).title
    interval = comparison.interval(comparison.merge, comparison.best_baseline())
    assert interval.difference == pytest.approx(
        comparison.value(comparison.merge) - comparison.value(comparison.best_baseline())
    )
    assert interval.difference > 0 and interval.low <= interval.difference <= interval.high
    (sentence,) = verdicts(comparison)
    assert comparison.best_baseline().title in sentence and sentence.endswith("better.")


def test_tables_in_markdown_and_json_say_the_same(study):
    comparison = compare(study, pool=FunctionPool)
    data = results_of(comparison).model_dump(mode="json")
    text = to_markdown(comparison)
    for row in data["rows"]:
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {row['name']} |")]
        assert f"{100 * row['value']:+.2f} %" in line
    assert all(sentence in text for sentence in data["verdicts"])
    gain = data["rows"][1]["terms"]["t"]["gain"]
    assert gain["low"] <= gain["difference"] <= gain["high"]


def test_retargeted_rows_are_scored_under_their_own_objective_and_are_no_baselines(tmp_path):
    study = search(
        with_test(retarget={"for q": {"q": 1.0}}), tmp_path / "s", runner=InProcess(FunctionPool)
    )
    comparison = compare(study, pool=FunctionPool)
    row = comparison.row("retargeted", "for q")
    assert not row.is_baseline
    own = reweight(comparison.objective, {"q": 1.0})
    assert comparison.value(row, own) > comparison.value(comparison.merge, own)
    assert comparison.value(row, own) > comparison.value(comparison.base, own)
    assert [sentence.split(" minus")[0] for sentence in verdicts(comparison)] == [
        "searched merge",
        "re-targeted to for q",
    ]


# -- retarget --------------------------------------------------------------------------------------


def test_retarget_predicts_better_weights_for_another_objective_than_average_and_incumbent(study):
    prediction = predict(study, {"q": 1.0})
    value = landscape("q", prediction.weights)
    assert value < landscape("q", dict.fromkeys("wxyz", 0.25))
    assert value < landscape("q", study.best_trial.weights)
    base = landscape("q", dict.fromkeys("wxyz", 0.0))
    assert prediction.value == pytest.approx(
        (base - value) / base, abs=max(0.02, 3 * prediction.deviation)
    )


def test_retarget_to_the_own_objective_is_near_the_incumbent(study):
    own = predict(study)
    same = predict(study, {"t": 1.0, "u": 1.0})
    assert own == same
    gap = np.abs([own.weights[name] - study.best_trial.weights[name] for name in "wxyz"])
    assert gap.max() < 0.3


def test_retargeting_to_a_term_that_was_not_recorded_lists_those_that_were(study):
    with pytest.raises(StudyError, match=r"no term 'nope' was recorded; this study has q, t, u"):
        predict(study, {"t": 1.0, "nope": 2.0})


def test_a_retargeted_objective_counts_only_the_named_terms():
    objective = reweight(config_of().objective, {"q": 2.0})
    assert [(term.label, term.weight) for term in objective.terms] == [("t", 0), ("u", 0), ("q", 2)]


def test_the_best_scale_moves_one_vector_alone_and_keeps_fixed_ones(tmp_path):
    vectors = {name: {"source": f"a/{name}"} for name in "wxy"} | {
        "z": {"source": "a/z", "fixed": 0.2}
    }
    study = search(with_test(vectors=vectors), tmp_path / "s", runner=InProcess(FunctionPool))
    weights = best_scale(study, "x")
    assert weights["w"] == weights["y"] == 0 and weights["z"] == 0.2
    assert weights["x"] == pytest.approx(0.5, abs=0.15)  # the optimum of (t + u) / 2 along x


def test_a_damaged_seal_is_named(study):
    compare(study, pool=FunctionPool)
    (study.directory / "sealed.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"sealed\.json: field 'rows' is missing"):
        compare(study, pool=no_pool)


def test_shares_below_zero_are_refused():
    with pytest.raises(ValueError, match="shares must be >= 0, and one > 0"):
        config_of(baselines={"mixtures": {"m": {"shares": {"w": -1.0}}}})


class LargePool(FunctionPool):
    """Finds all of its vectors larger than their base."""

    def __init__(self, config):
        super().__init__(config)
        for name in config.vectors:
            warn_of_norm(name, 1.0, 3.0)


def test_the_size_of_a_vector_is_a_warning_for_those_that_somebody_trained(
    study, monkeypatch, caplog
):
    def written(name):
        def make(scratch):
            warn_of_norm(f"{name} as it is written", 1.0, 3.0)
            return {name: str(scratch)}

        return make

    rows = [
        ModelContender("method", "ties", {"ties (1a)": 1.0}, written("ties (1a)")),
        ModelContender("random", "", {"random w (2b)": 1.0}, written("random w (2b)")),
        ready_model("model", "mine", "a/mine"),
        ready_model("mixture", "even", "a/even"),
    ]
    monkeypatch.setattr(baselines, "list_models", lambda *_, **__: rows)
    compare(study, pool=LargePool)
    named = re.findall(r"vector (.+?): its delta is larger", caplog.text)
    assert [name.partition(" ")[0] for name in named] == [*"wxyz", "mine", "even"]
