"""smac.py: every surrogate asks inside the box, and pending trials are not asked
for again.
"""

import time

import numpy as np
import pytest

from optimer_hf.errors import StudyError
from optimer_hf.files.model import parse
from optimer_hf.scoring.objective import is_feasible
from optimer_hf.scoring.scores import TermScore
from optimer_hf.searching import next_weights
from optimer_hf.searching.loop import search
from optimer_hf.searching.next_weights import Asker
from optimer_hf.searching.runner import InProcess
from optimer_hf.study import gp as gp_module
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.prediction import front, predict
from optimer_hf.study.space import anchors, from_unit, to_unit, within_total
from optimer_hf.study.trials import Trial
from tests.support.landscapes import DearGradientPool, FunctionPool, GradientPool, config_of

SURROGATES = ["per_term", "black_box", "random_forest", "random"]
TERMS = [{"task": "t", "metric": "loss"}, {"task": "u", "metric": "loss"}]


def told(config: StudyConfig, scratch) -> Asker:
    """Return an asker that knows the anchors."""
    asker, pool = Asker(config, scratch), FunctionPool(config)
    for number, (origin, weights) in enumerate(anchors(config)):
        terms = pool.score(weights, config.objective.asked_terms("search")).terms
        asker.tell(Trial(number, origin, "search", weights, "ok", terms, {}))
    return asker


def apart(a: dict, b: dict) -> float:
    return float(np.linalg.norm(np.array(list(a.values())) - np.array(list(b.values()))))


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_every_surrogate_asks_inside_the_bounds_and_resumes_to_the_same_trials(surrogate, tmp_path):
    config = config_of(search={"n_trials": 9, "rescore_top": 0, "surrogate": surrogate})
    whole = search(config, tmp_path / "whole", runner=InProcess(FunctionPool)).log.trials
    assert all(0 <= w <= 1.5 for trial in whole for w in trial.weights.values())
    assert len({tuple(trial.weights.values()) for trial in whole}) == 9
    half = tmp_path / "half"
    half.mkdir()
    for name in ("study.json", "trials.jsonl"):
        lines = (tmp_path / "whole" / name).read_bytes().splitlines(keepends=True)
        (half / name).write_bytes(b"".join(lines[:7] if name == "trials.jsonl" else lines))
    resumed = search(config, half, runner=InProcess(FunctionPool)).log.trials
    assert [trial.weights for trial in resumed] == [trial.weights for trial in whole]


def test_weights_asked_while_others_run_keep_their_distance_from_them(tmp_path):
    asker = told(config_of(), tmp_path)
    pending: list[dict[str, float]] = []
    for number in range(6, 12):
        pending.append(asker.ask(number, pending))
    distances = [apart(a, b) for i, a in enumerate(pending) for b in pending[:i]]
    assert min(distances) > 0.02
    blind = [asker.ask(number) for number in (12, 13)]  # without them, the best place is the same
    assert apart(*blind) < 0.5 * min(distances)


def test_asking_again_for_a_number_gives_the_same_weights(tmp_path):
    first, second = told(config_of(), tmp_path / "a"), told(config_of(), tmp_path / "b")
    assert first.ask(7) == second.ask(7)
    assert first.ask(8) != first.ask(9)


@pytest.mark.parametrize("surrogate", ["per_term", "random"])
def test_a_total_bounds_the_sum_of_the_weights_in_every_trial_but_the_base(surrogate, tmp_path):
    settings = {"n_trials": 12, "rescore_top": 0, "surrogate": surrogate, "total": [0.8, 1.2]}
    trials = search(
        config_of(search=settings), tmp_path / "s", runner=InProcess(FunctionPool)
    ).log.trials
    assert sum(trials[0].weights.values()) == 0
    for trial in trials[1:]:
        assert 0.8 - 4e-4 <= sum(trial.weights.values()) <= 1.2 + 4e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"surrogate": "black_box", "pareto": True}, "supports no total, constraints or p"),
        ({"surrogate": "random_forest", "total": [0, 1]}, "supports no total, constraints or p"),
        ({"total": [1.0, 1.0]}, "search.total: .* cannot be met"),
        ({"total": [7.0, 8.0]}, "search.total: .* cannot be met"),
        ({"surrogate": "tpe"}, "per_term"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message, tmp_path):
    from optimer_hf.errors import ConfigError

    data = config_of().model_dump(mode="json") | {"search": settings}
    with pytest.raises(ConfigError, match=message):
        parse(StudyConfig, data, tmp_path / "study.yaml")


def test_the_first_weights_asked_for_stay_near_the_usual_total(tmp_path):
    for seed in range(4):
        config = config_of(search={"seed": seed})
        assert sum(told(config, tmp_path / str(seed)).ask(6).values()) < 2.5


def test_the_prior_of_the_total_fades_with_the_trials():
    from optimer_hf.searching.next_weights import log_prior_of_total

    points = np.array([[0.0] * 4, [0.2] * 4, [1.0] * 4])  # sums 0, 1.2, 6
    early = log_prior_of_total(config_of(), 6, points)
    assert early[:2] == pytest.approx([0, 0]) and early[2] < -100
    assert log_prior_of_total(config_of(), 60, points)[2] == pytest.approx(early[2] / 10)


def test_the_prior_takes_the_groups_of_a_vector_together():
    from optimer_hf.searching.next_weights import log_prior_of_total

    whole = config_of(vectors={"w": {"source": "a/w"}, "x": {"source": "a/x"}})
    groups = {"mlp": {}, "attn": {}, "else": {}}
    split = config_of(vectors={"w": {"source": "a/w", "by": groups}, "x": {"source": "a/x"}})
    points = np.random.default_rng(0).random((20, 2))
    expected = log_prior_of_total(whole, 6, points)
    assert expected.min() < -10
    assert log_prior_of_total(split, 6, points[:, [0, 0, 0, 1]]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "pool", "is_cautious"),
    [
        ({"gradients": "always"}, GradientPool, True),
        ({"gradients": "auto"}, DearGradientPool, False),  # only the base has them
        ({"screen": 2}, GradientPool, False),  # only base and average have them
    ],
)
def test_a_search_is_cautious_only_where_its_trials_have_gradients(
    settings, pool, is_cautious, tmp_path, monkeypatch
):
    calls = []
    real = next_weights._cautious
    monkeypatch.setattr(next_weights, "_cautious", lambda *args: calls.append(1) or real(*args))
    search(config_of(search={"n_trials": 9, **settings}), tmp_path, runner=InProcess(pool))
    assert bool(calls) == is_cautious


# -- constraints and fronts ------------------------------------------------------------------------


def test_constraints_are_kept_by_the_incumbent_and_by_most_of_what_is_asked(tmp_path):
    constraint = {"task": "q", "metric": "loss", "max_relative_to_base": 0.02}
    free = config_of(objective={"terms": TERMS}, search={"n_trials": 24, "rescore_top": 2})
    bound = config_of(
        objective={"terms": TERMS, "constraints": [constraint]},
        search={"n_trials": 24, "rescore_top": 2},
    )
    ignored = search(free, tmp_path / "free", runner=InProcess(FunctionPool)).best_trial
    study = search(bound, tmp_path / "bound", runner=InProcess(FunctionPool))
    pool = FunctionPool(bound)
    asked = bound.objective.asked_terms("search")
    assert [each.label for each in asked] == ["t", "u", "q"]
    base = pool.score(dict.fromkeys("wxyz", 0.0), asked).terms

    def keeps(weights) -> bool:
        return is_feasible(bound.objective, pool.score(weights, asked).terms, base)

    assert not keeps(ignored.weights), "the constraint must bind for this test to mean anything"
    assert keeps(study.best_trial.weights)
    assert study.value(study.best_trial) > 0
    suggested = [trial for trial in study.trials if trial.origin == "surrogate"]
    assert np.mean([keeps(trial.weights) for trial in suggested[6:]]) > 0.5


def test_gradients_keep_a_constraint_in_fewer_trials(tmp_path):
    constraint = {"task": "q", "metric": "loss", "max_relative_to_base": 0.02}
    config = config_of(
        objective={"terms": TERMS, "constraints": [constraint]},
        search={"n_trials": 10, "rescore_top": 2, "gradients": "always"},
    )
    study = search(config, tmp_path / "s", runner=InProcess(GradientPool))
    assert is_feasible(config.objective, study.best_trial.terms, study.base)
    longer = config_of(
        objective=config.objective.model_dump(), search={"n_trials": 24, "rescore_top": 2}
    )
    without = search(longer, tmp_path / "without", runner=InProcess(FunctionPool))
    assert study.value(study.best_trial) > 0.98 * without.value(without.best_trial) > 0


def covered(study) -> float:
    """Return the area that the front of two terms dominates, from the base on."""
    area = reached = 0.0
    for first, second in (choice.gains.values() for choice in front(study)):
        if first > 0 and second > reached:
            area += first * (second - reached)
            reached = second
    return area


def test_a_constraint_to_be_no_worse_than_the_base_leaves_a_search_and_a_prediction(tmp_path):
    constraint = {"task": "q", "metric": "loss", "max_relative_to_base": 0}
    config = config_of(
        objective={"terms": TERMS, "constraints": [constraint]},
        search={"n_trials": 20, "rescore_top": 0},
    )
    study = search(config, tmp_path / "s", runner=InProcess(FunctionPool))
    assert is_feasible(config.objective, study.best_trial.terms, study.base)
    assert study.value(study.best_trial) > 0
    assert predict(study).feasible > 0.4
    other = study.over_next()
    assert other is not None and other[1].difference >= 0


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.5, 0.075], [0.2, 0.1], [1.5, 1.5]])
def test_any_point_is_moved_to_an_allowed_total(weights):
    vectors = {name: {"source": f"a/{name}"} for name in "wx"}
    config = config_of(vectors=vectors, search={"total": [2.0, 2.9]})
    point = within_total(config, to_unit(config, [dict(zip("wx", weights, strict=True))]))
    chosen = list(from_unit(config, point[0]).values())
    assert 2.0 - 2e-4 <= sum(chosen) <= 2.9 + 2e-4
    assert all(0 <= weight <= 1.5 for weight in chosen)


def test_a_front_is_searched_where_no_merge_improves_one_of_the_terms(tmp_path):
    class OnlyDown(FunctionPool):
        def score(self, weights, asked, *, gradients=False):
            scored = super().score(weights, asked)
            loss = 3 + sum(weights.values())
            scored.terms["u"] = TermScore([(loss, 1.0)], False)
            return scored

    settings = {"n_trials": 20, "rescore_top": 0, "pareto": True}
    study = search(config_of(search=settings), tmp_path / "s", runner=InProcess(OnlyDown))
    assert len(front(study)) >= 6  # not all of them at the base


def test_pareto_spreads_the_trials_along_the_front(tmp_path):
    settings = {"n_trials": 24, "rescore_top": 0}
    one = search(config_of(search=settings), tmp_path / "one", runner=InProcess(FunctionPool))
    many = search(
        config_of(search=settings | {"pareto": True}),
        tmp_path / "m",
        runner=InProcess(FunctionPool),
    )
    assert covered(many) > 1.05 * covered(one)
    assert len(front(many)) >= 4
    gains = np.array([list(choice.gains.values()) for choice in front(many)])
    assert (np.diff(gains[:, 0]) <= 0).all() and (np.diff(gains[:, 1]) >= 0).all()


def test_gradients_spread_the_trials_along_the_front_as_well(tmp_path):
    settings = {"rescore_top": 0, "pareto": True}
    studies = [
        search(
            config_of(search=settings | {"n_trials": n_trials, "gradients": gradients}),
            tmp_path / gradients,
            runner=InProcess(GradientPool),
        )
        for gradients, n_trials in (("never", 24), ("always", 12))
    ]
    assert covered(studies[1]) > 0.95 * covered(studies[0])
    assert len(front(studies[1])) >= 4


def test_late_trials_spread_over_other_objectives_and_resume_to_the_same(tmp_path):
    settings = {"n_trials": 26, "rescore_top": 0}
    spread = search(config_of(search=settings), tmp_path / "spread", runner=InProcess(FunctionPool))
    alone = search(
        config_of(search=settings | {"spread": False}),
        tmp_path / "alone",
        runner=InProcess(FunctionPool),
    )
    weights = [[trial.weights for trial in study.log.trials] for study in (spread, alone)]
    assert weights[0][:20] == weights[1][:20] and weights[0][20] != weights[1][20]
    assert covered(spread) > 1.02 * covered(alone)
    cut = tmp_path / "cut"
    cut.mkdir()
    for name, n_lines in (("study.json", None), ("trials.jsonl", 22)):
        lines = (tmp_path / "spread" / name).read_bytes().splitlines(keepends=True)
        (cut / name).write_bytes(b"".join(lines[:n_lines]))
    resumed = search(config_of(search=settings), cut, runner=InProcess(FunctionPool))
    assert [trial.weights for trial in resumed.log.trials] == weights[0]


def test_a_search_for_the_worst_term_does_not_spread(tmp_path):
    settings = {"n_trials": 22, "rescore_top": 0}
    objective = {"terms": TERMS, "combine": "worst"}
    studies = [
        search(
            config_of(search=settings | {"spread": spread}, objective=objective),
            tmp_path / str(spread),
            runner=InProcess(FunctionPool),
        ).log.trials
        for spread in (True, False)
    ]
    assert [trial.weights for trial in studies[0]] == [trial.weights for trial in studies[1]]


def test_a_constraint_named_as_a_term_of_another_task_is_refused(tmp_path):
    from optimer_hf.errors import ConfigError

    constraint = {"task": "x", "name": "t", "metric": "loss", "max_relative_to_base": 0.1}
    data = config_of().model_dump(mode="json") | {
        "objective": {"terms": TERMS, "constraints": [constraint]}
    }
    with pytest.raises(
        ConfigError, match="constraint 't' has the name of a term with another task"
    ):
        parse(StudyConfig, data, tmp_path / "study.yaml")


def test_a_front_of_an_unknown_study_is_an_error(tmp_path):
    from optimer_hf.study.directory import load_study

    with pytest.raises(StudyError, match="holds no study"):
        load_study(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [{}, {"pareto": True}, {"total": [0.5, 1.2]}],
    ids=["plain", "pareto", "total"],
)
def test_a_search_beyond_the_bound_resumes_to_the_same_trials(settings, tmp_path, monkeypatch):
    """Of more trials than N_KEPT the surrogate looks at some, which are the same after a resume."""
    monkeypatch.setattr(gp_module, "N_KEPT", 12)
    config = config_of(search={"n_trials": 20, "rescore_top": 2} | settings)
    whole = search(config, tmp_path / "whole", runner=InProcess(FunctionPool))
    for n_lines in (13, 17):
        half = tmp_path / f"half-{n_lines}"
        half.mkdir()
        (half / "study.json").write_bytes((tmp_path / "whole" / "study.json").read_bytes())
        lines = (tmp_path / "whole" / "trials.jsonl").read_bytes().splitlines(keepends=True)
        (half / "trials.jsonl").write_bytes(b"".join(lines[:n_lines]))
        resumed = search(config, half, runner=InProcess(FunctionPool))
        assert [t.weights for t in resumed.log.trials] == [t.weights for t in whole.log.trials]
    values = [whole.value(trial) for trial in whole.log.trials_at("search")]
    assert max(values[12:]) > max(values[:6])


def test_asking_beyond_the_bound_keeps_constraints_and_avoids_what_still_runs(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(gp_module, "N_KEPT", 12)
    objective = config_of().objective.model_dump() | {
        "constraints": [{"task": "q", "metric": "loss", "max_relative_to_base": 0.02}]
    }
    config = config_of(objective=objective, search={"n_trials": 20, "rescore_top": 0})
    study = search(config, tmp_path / "s", runner=InProcess(FunctionPool))
    asker = Asker(config, tmp_path)
    for trial in study.trials:
        asker.tell(trial)
    first = asker.ask(20)
    second = asker.ask(21, [first])
    assert first != second
    assert study.best_trial.status == "ok"


def test_asking_after_two_thousand_trials_of_sixteen_vectors_takes_a_moment(tmp_path):
    vectors = {f"v{index}": {"source": f"a/v{index}"} for index in range(16)}
    terms = [{"task": "t", "metric": "loss"}, {"task": "u", "metric": "loss"}]
    config = config_of(vectors=vectors, objective={"terms": terms})
    rng, asker = np.random.default_rng(0), Asker(config, tmp_path)
    weights = dict.fromkeys(vectors, 0.0)
    for number in range(2001):
        loss = 3 + sum((weight - 0.05) ** 2 for weight in weights.values())
        scores = {label: TermScore([(loss, 1.0)] * 4, False) for label in "tu"}
        asker.tell(Trial(number, "x", "search", weights, "ok", scores, {}))
        weights = dict(zip(vectors, rng.dirichlet(np.ones(16)).round(4).tolist(), strict=True))
        if number == 1999:
            asker.ask(2000)  # imports SMAC
    started = time.process_time()
    asker.ask(2001)
    assert time.process_time() - started < 1.0  # 0.15 s on an idle core
