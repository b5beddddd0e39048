"""prediction.py: new objectives from recorded trials, and real trials that go on from them."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from optimer_hf.comparison.sealed import list_own_contenders
from optimer_hf.errors import StudyError
from optimer_hf.scoring.objective import Objective
from optimer_hf.scoring.scores import TermScore
from optimer_hf.searching.loop import search, search_on
from optimer_hf.searching.retargeting import prediction_text
from optimer_hf.searching.runner import InProcess
from optimer_hf.study.prediction import CAUTION, best_scale, match_to_record, predict
from optimer_hf.study.space import to_unit
from optimer_hf.study.surrogate import fit_surrogate
from optimer_hf.study.trials import TrialLog
from tests.support.landscapes import OPTIMA, FunctionPool, GradientPool, config_of, landscape


def no_pool(config):
    pytest.fail("nothing may be evaluated")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    settings = {"n_trials": 30, "rescore_top": 2}
    return search(
        config_of(search=settings),
        tmp_path_factory.mktemp("r") / "s",
        runner=InProcess(FunctionPool),
    )


def objective(**weights: float) -> Objective:
    return Objective.model_validate(
        {
            "terms": [
                {"task": name, "metric": "loss", "weight": weight}
                for name, weight in weights.items()
            ]
        }
    )


def test_a_function_is_the_same_wherever_its_file_is():
    def of(file: str) -> dict:
        return {"terms": [{"name": "t", "function": f"{file}:brevity", "higher_is_better": True}]}

    recorded = SimpleNamespace(config=config_of(objective=of("/data/me/my_metrics.py")))
    matched = match_to_record(recorded, Objective.model_validate(of("/srv/you/metrics.py")))
    assert matched.terms[0].function == "/data/me/my_metrics.py:brevity"
    terms = [of("/data/me/my_metrics.py")["terms"][0] | {"function": "my_metrics.py:norms"}]
    other = Objective.model_validate({"terms": terms})
    with pytest.raises(StudyError, match="'norms', but the study recorded 'brevity'"):
        match_to_record(recorded, other)


@pytest.mark.parametrize("is_there", [True, False])
def test_the_folder_of_tasks_that_stayed_with_the_author_is_that_of_the_target(tmp_path, is_there):
    theirs, mine = tmp_path / "theirs", tmp_path / "mine"
    mine.mkdir()
    if is_there:
        theirs.mkdir()
    term = {"task": "t", "metric": "loss", "limit": 2}
    config = config_of(objective={"terms": [term], "include_path": str(theirs)})
    recorded = SimpleNamespace(config=config)
    target = Objective.model_validate({"terms": [term], "include_path": str(mine)})
    assert match_to_record(recorded, target).include_path == (theirs if is_there else mine)


def regret(weights, label: str) -> float:
    """Return the loss above the optimum, as a share of what the optimum gains over the base."""
    best = landscape(label, dict(zip("wxyz", OPTIMA[label], strict=True)))
    base = landscape(label, dict.fromkeys("wxyz", 0.0))
    return (landscape(label, weights) - best) / (base - best)


@pytest.mark.parametrize("label", ["t", "u", "q"])
def test_any_recorded_term_can_become_the_objective_without_a_trial(study, label):
    prediction = predict(study, match_to_record(study, objective(**{label: 1.0})))
    assert regret(prediction.weights, label) < 0.05
    assert list(prediction.terms) == [label]
    assert prediction.terms[label].value == pytest.approx(prediction.value)
    assert 0 < prediction.deviation < 0.1


def test_gradients_make_predictions_of_other_objectives_better_at_the_same_cost(tmp_path):
    regrets = {}
    for setting, n_trials in (("never", 8), ("always", 4)):  # as long: one takes twice the time
        settings = {"n_trials": n_trials, "rescore_top": 0, "gradients": setting}
        config = config_of(search=settings)
        study = search(config, tmp_path / setting, runner=InProcess(GradientPool))
        assert sum(trial.seconds["evaluate"] for trial in study.trials) == 8
        targets = [{"t": 1.0}, {"u": 1.0}, {"q": 1.0}]
        regrets[setting] = [regret(predict(study, each).weights, *each) for each in targets]
    assert np.mean(regrets["always"]) < 0.2 * np.mean(regrets["never"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "other", "name": "t"}, "'t': source 'other', but the study recorded 't'"),
        ({"text": "t.jsonl"}, r"source 't\.jsonl', but the study recorded 't'"),
        ({"task": "t", "metric": "acc"}, "metric 'acc', but the study recorded 'loss'"),
    ],
)
def test_a_term_of_the_same_name_that_looks_at_something_else_is_refused(study, changes, message):
    target = Objective.model_validate({"terms": [{"metric": "bits_per_byte"} | changes]})
    with pytest.raises(StudyError, match=message):
        match_to_record(study, target)


def test_a_term_that_names_no_metric_has_the_recorded_one(study):
    target = Objective.model_validate({"terms": [{"task": "t"}]})
    assert match_to_record(study, target).terms[0].metric == "loss"


def test_a_prediction_is_careful_where_nothing_was_measured(study):
    posterior = fit_surrogate(study.config, study.trials)
    points = np.array([[0.3] * 4, [1.0] * 4])
    mean, variance = posterior.predict(points)
    np.testing.assert_allclose(posterior.ranking(points, 0.5), mean - 0.5 * np.sqrt(variance))
    prediction = predict(study)
    at = to_unit(study.config, [prediction.weights])
    tried = posterior.ranking(to_unit(study.config, [t.weights for t in study.log.trials]), CAUTION)
    assert posterior.ranking(at, CAUTION)[0] >= tried.max() - 1e-6


def test_an_objective_over_the_record_takes_tasks_and_items_from_it(study):
    matched = match_to_record(study, objective(q=2.0, t=1.0))
    assert [(term.label, term.task, term.weight) for term in matched.terms] == [
        ("q", "q", 2.0),
        ("t", "t", 1.0),
    ]


def test_a_term_that_was_not_recorded_is_an_error_that_names_the_recorded_ones(study):
    with pytest.raises(StudyError, match=r"no term 'v' was recorded; this study has q, t, u"):
        match_to_record(study, objective(v=1.0))


def test_a_prediction_keeps_the_constraints_of_the_new_objective(study):
    free = match_to_record(study, objective(t=1.0))
    constraint = {"task": "q", "metric": "loss", "max_relative_to_base": 0.0}
    target = objective(t=1.0).model_dump() | {"constraints": [constraint]}
    bound = match_to_record(study, Objective.model_validate(target))
    assert predict(study, free).feasible == 1.0
    unbound, prediction = predict(study, free).weights, predict(study, bound)
    base = landscape("q", dict.fromkeys("wxyz", 0.0))
    assert landscape("q", unbound) > base, "the constraint must bind"
    assert landscape("q", prediction.weights) <= base * 1.003
    assert prediction.feasible >= 0.5


def test_verifying_goes_on_from_the_record_and_tries_the_prediction_first(study, tmp_path):
    target = match_to_record(study, objective(q=1.0))
    opened = []

    class Pool(FunctionPool):
        def __init__(self, config):
            super().__init__(config)
            opened.append(self)

    target_study = search_on(study, target, tmp_path / "new", 3, runner=InProcess(Pool))
    trials = target_study.log.trials_at("search")
    assert len(trials) == 33
    assert [t.weights for t in trials[:30]] == [t.weights for t in study.trials]
    assert trials[30].origin == "prediction"
    assert trials[30].weights == predict(study, target).weights
    assert {label for trial in trials for label in trial.terms} == {"q"}
    assert len(opened[0].calls) == 3 + 3  # and the base and two best again
    assert regret(target_study.best_trial.weights, "q") < 0.05
    again = search_on(study, target, tmp_path / "new", 3, runner=InProcess(no_pool))
    assert again.best_trial == target_study.best_trial


def test_a_killed_search_whose_prediction_was_not_finished_first_tries_it_all_the_same(
    study, tmp_path
):
    target = match_to_record(study, objective(q=1.0))
    whole = search_on(
        study, target, tmp_path / "whole", 3, runner=InProcess(FunctionPool)
    ).log.trials_at("search")
    search_on(study, target, tmp_path / "new", 3, runner=InProcess(FunctionPool))
    log = tmp_path / "new" / "trials.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join([*lines[:30], lines[31]]))  # of two workers, the other one was faster
    trials = search_on(
        study, target, tmp_path / "new", 3, runner=InProcess(FunctionPool)
    ).log.trials_at("search")
    assert sorted(trial.number for trial in trials) == list(range(33))
    assert {trial.number for trial in trials if trial.origin == "prediction"} == {30}
    assert whole[30].weights in [trial.weights for trial in trials]


def test_a_search_for_a_new_objective_is_searched_on_for_another(study, tmp_path):
    first = search_on(
        study,
        match_to_record(study, objective(q=1.0)),
        tmp_path / "1",
        3,
        runner=InProcess(FunctionPool),
    )
    target = match_to_record(first, objective(q=0.5))
    search_on(first, target, tmp_path / "2", 3, runner=InProcess(FunctionPool))
    log = tmp_path / "2" / "trials.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:33]))  # killed at once
    trials = search_on(
        first, target, tmp_path / "2", 3, runner=InProcess(FunctionPool)
    ).log.trials_at("search")
    assert sorted(trial.number for trial in trials) == list(range(36))
    assert [trial.number for trial in trials if trial.origin == "prediction"] == [30, 33]


def test_a_record_with_gaps_is_searched_on_without_them(study, tmp_path):
    kept = [trial for trial in study.log.trials if trial.number != 7]
    (tmp_path / "gaps").mkdir()
    (tmp_path / "gaps" / "trials.jsonl").write_text("".join(f"{t.to_json()}\n" for t in kept))
    gaps = replace(study, log=TrialLog(tmp_path / "gaps" / "trials.jsonl"))
    target = match_to_record(gaps, objective(q=1.0))
    trials = search_on(
        gaps, target, tmp_path / "new", 3, runner=InProcess(FunctionPool)
    ).log.trials_at("search")
    assert sorted(trial.number for trial in trials) == list(range(32))
    assert trials[29].origin == "prediction"


@pytest.mark.parametrize("settings", [{"pareto": True}, {"surrogate": "random_forest"}])
def test_any_study_can_be_searched_on(settings, tmp_path):
    config = config_of(search={"n_trials": 8, "rescore_top": 0} | settings)
    study = search(config, tmp_path / "s", runner=InProcess(FunctionPool))
    constraint = {"task": "q", "metric": "loss", "max_relative_to_base": 0.1}
    target = objective(t=1.0).model_dump() | {"constraints": [constraint]}
    over = match_to_record(study, Objective.model_validate(target))
    target_study = search_on(study, over, tmp_path / "new", 1, runner=InProcess(FunctionPool))
    assert target_study.log.trials_at("search")[8].origin == "prediction"
    longer = search(
        config.model_copy(update={"search": config.search.model_copy(update={"n_trials": 10})}),
        tmp_path / "s",
        runner=InProcess(FunctionPool),
    )
    assert (
        search_on(longer, over, tmp_path / "new", 1, runner=InProcess(no_pool)).best_trial
        == target_study.best_trial
    )


def test_what_is_searched_on_has_to_be_what_the_old_trials_scored(tmp_path):
    pools = [type(name, (FunctionPool,), {"inputs": {"vectors.w": name}}) for name in ("A", "B")]
    study = search(
        config_of(search={"n_trials": 8, "rescore_top": 0}),
        tmp_path / "s",
        runner=InProcess(pools[0]),
    )
    over = match_to_record(study, objective(t=1.0))
    for _ in range(2):
        with pytest.raises(StudyError, match=r"vectors\.w: not the weights or items"):
            search_on(study, over, tmp_path / "other", 1, runner=InProcess(pools[1]))
    assert search_on(study, over, tmp_path / "same", 1, runner=InProcess(pools[0])).is_finished


def test_a_prediction_comes_first_even_in_a_study_shorter_than_its_anchors(tmp_path):
    short = search(
        config_of(search={"n_trials": 3, "rescore_top": 0}),
        tmp_path / "s",
        runner=InProcess(FunctionPool),
    )
    target_study = search_on(
        short,
        match_to_record(short, objective(t=1.0)),
        tmp_path / "n",
        1,
        runner=InProcess(FunctionPool),
    )
    assert target_study.log.trials_at("search")[3].origin == "prediction"


def test_a_vector_that_only_subtracts_has_a_best_scale(tmp_path):
    vectors = {name: {"source": f"a/{name}"} for name in "xyz"}
    vectors["w"] = {"source": "a/w", "bounds": [-1.0, -0.2]}
    config = config_of(vectors=vectors, search={"n_trials": 8, "rescore_top": 0})

    class InOrder(FunctionPool):
        def score(self, weights, asked, *, gradients=False):
            return super().score({name: weights[name] for name in "wxyz"}, asked)

    study = search(config, tmp_path / "s", runner=InProcess(InOrder))
    assert -1.0 <= best_scale(study, "w")["w"] <= -0.2


@pytest.mark.parametrize("high", [0.04, 0.18])
def test_the_best_scale_may_be_the_end_of_narrow_bounds(high, tmp_path):
    vectors = {"w": {"source": "a/w", "bounds": [0.0, high]}}  # its optimum is at 0.25
    config = config_of(vectors=vectors, search={"n_trials": 6, "rescore_top": 0})
    study = search(config, tmp_path / "s", runner=InProcess(FunctionPool))
    assert best_scale(study, "w")["w"] == high


def test_uncertainty_is_larger_far_from_what_was_tried(study):
    from optimer_hf.study.space import to_unit
    from optimer_hf.study.surrogate import fit_surrogate

    surrogate = fit_surrogate(study.config, study.trials)
    best = to_unit(study.config, [study.best_trial.weights])
    _, variance = surrogate.predict(np.vstack([best, np.ones_like(best)]))
    assert variance[1] > 4 * variance[0]


def test_an_objective_over_the_record_prompts_as_the_record_did(study):
    chatty = study.config.objective.model_copy(update={"apply_chat_template": True})
    config = study.config.model_copy(update={"objective": chatty})
    recorded = replace(study, config=config)
    assert match_to_record(recorded, objective(q=1.0)).prompting == chatty.prompting


# -- terms on which all trials are alike -----------------------------------------------------------


class DeafPool(FunctionPool):
    """Scores the terms k and l alike, whatever the weights are."""

    def score(self, weights, asked, *, gradients=False):
        heard = [each for each in asked if each.label not in "kl"]
        scored = super().score(weights, heard)
        deaf = {each.label: TermScore([(0.0, 1.0)] * 4, True) for each in asked}
        return replace(scored, terms=deaf | scored.terms)


@pytest.fixture(scope="module")
def deaf(tmp_path_factory):
    deaf_terms = [{"task": name, "metric": "acc", "weight": 0} for name in "kl"]
    loss = [{"task": name, "metric": "loss", "weight": name == "t"} for name in "tuq"]
    config = config_of(
        objective={"terms": [*loss, *deaf_terms], "limit": 4},
        search={"n_trials": 12, "rescore_top": 0},
    )
    return search(config, tmp_path_factory.mktemp("d") / "s", runner=InProcess(DeafPool))


@pytest.mark.parametrize("combine", ["relative_to_base", "weighted_mean", "worst"])
@pytest.mark.parametrize("weights", [{"k": 1.0}, {"k": 1.0, "l": 3.0}])
def test_terms_on_which_all_trials_are_alike_leave_the_best_merge_and_say_so(
    deaf, combine, weights
):
    terms = [{"task": name, "metric": "acc", "weight": weight} for name, weight in weights.items()]
    target = match_to_record(
        deaf, Objective.model_validate({"terms": terms, "combine": combine, "limit": 4})
    )
    prediction = predict(deaf, target)
    assert prediction.weights == deaf.best_weights
    assert prediction.value == pytest.approx(0, abs=1e-6)
    labels = ", ".join(weights)
    note = f"all 12 trials have the same value under this objective ({labels}), so they"
    assert note in prediction.note and f"trial {deaf.best_trial.number}, " in prediction.note
    assert prediction_text(prediction, target).startswith(f"not predicted: {note}")
    assert predict(deaf).note == predict(deaf, {"t": 1.0, "k": 1.0}).note == ""


def test_where_all_trials_are_alike_the_best_one_that_keeps_the_constraints_is_left(deaf):
    base, bound = landscape("q", dict.fromkeys("wxyz", 0.0)), 0.01
    assert landscape("q", deaf.best_weights) > base * (1 + bound), "the constraint must bind"
    constraint = {"task": "q", "metric": "loss", "max_relative_to_base": bound}
    target = {"terms": [{"task": "k", "metric": "acc"}], "constraints": [constraint]}
    prediction = predict(deaf, match_to_record(deaf, Objective.model_validate(target)))
    kept = [t for t in deaf.trials if t.terms["q"].score <= deaf.base["q"].score * (1 + bound)]
    assert prediction.weights in [trial.weights for trial in kept]
    best = min(kept, key=lambda trial: trial.terms["t"].score)
    assert landscape("t", prediction.weights) <= best.terms["t"].score + 0.05
    assert "that keeps the constraints" in prediction.note


def test_a_constraint_on_which_all_trials_are_alike_changes_nothing(deaf):
    constraint = {"task": "k", "metric": "acc", "max_relative_to_base": 0.0}
    fields = {"terms": [{"task": "t", "metric": "loss"}]}
    free, bound = (
        predict(deaf, match_to_record(deaf, Objective.model_validate(fields | more)))
        for more in ({}, {"constraints": [constraint]})
    )
    assert bound.weights == free.weights and bound.feasible == 1.0


def test_a_retargeted_row_that_could_not_be_predicted_is_said(deaf, caplog):
    config = deaf.config.model_copy(update={"retarget": {"listen": {"k": 1.0}}})
    rows = list_own_contenders(replace(deaf, config=config))
    assert rows[-1].weights == deaf.best_weights
    assert "retarget 'listen': not predicted: all 12 trials have the same value" in caplog.text
