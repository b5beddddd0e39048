"""loop.py: resuming after any cut, crashes, and a real study on tiny models."""

import json
import random
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from optimer_hf.comparison.costs import ledger_of_study
from optimer_hf.errors import ConfigError, EvaluationError, ModelError, StudyError
from optimer_hf.models.live import compute_dtype, default_device
from optimer_hf.recipes.build import build
from optimer_hf.recipes.write import write_recipe
from optimer_hf.scoring.evaluator import Evaluator
from optimer_hf.scoring.objective import Asked, combine
from optimer_hf.scoring.scores import TermScore
from optimer_hf.searching.loop import search, search_on
from optimer_hf.searching.runner import InProcess
from optimer_hf.searching.trial import Scored
from optimer_hf.searching.workers import Workers
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.directory import Study, load_study
from optimer_hf.study.prediction import reweight
from optimer_hf.study.surrogate import fit_surrogate
from optimer_hf.study.trials import Trial, TrialLog
from tests.support.landscapes import (
    OPTIMA,
    DearGradientPool,
    FunctionPool,
    GradientPool,
    ValuesOnlyPool,
    config_of,
    failing_at,
    landscape,
    no_pool,
    outcome,
    slope,
)
from tests.support.warm import Warm


def test_fixed_vectors_keep_their_weight_in_every_trial(tmp_path):
    vectors = {name: {"source": f"a/{name}"} for name in "wxy"} | {
        "z": {"source": "a/z", "fixed": 0.35}
    }
    study = search(config_of(vectors=vectors), tmp_path / "s", runner=InProcess(FunctionPool))
    assert len(study.trials) == 12
    assert all(trial.weights["z"] == 0.35 for trial in study.log.trials)


# -- the search itself -----------------------------------------------------------------------------


@pytest.mark.parametrize("combination", ["relative_to_base", "worst", "weighted_mean"])
def test_a_smooth_landscape_is_searched_to_near_its_optimum_in_24_trials(tmp_path, combination):
    objective = config_of().objective.model_dump() | {"combine": combination}
    config = config_of(objective=objective, search={"n_trials": 24, "rescore_top": 2})
    study = search(config, tmp_path / "s", runner=InProcess(FunctionPool))
    values = [study.value(trial) for trial in study.trials]
    best_anchor = max(values[:6])
    assert study.value(study.best_trial) > best_anchor
    grid = np.random.default_rng(0).dirichlet(np.ones(4), 20000) * np.random.default_rng(1).uniform(
        0, 1.5, (20000, 1)
    )
    base = {
        label: TermScore([(landscape(label, dict.fromkeys("wxyz", 0.0)), 1.0)], False)
        for label in OPTIMA
    }

    def true_value(point):
        weights = dict(zip("wxyz", point, strict=True))
        scores = {label: TermScore([(landscape(label, weights), 1.0)], False) for label in OPTIMA}
        return combine(config.objective, scores, base)

    optimum = max(true_value(point) for point in grid)
    reached, start = true_value(study.best_trial.weights.values()), true_value([0.0] * 4)
    assert reached - start > 0.93 * (optimum - start)


@pytest.mark.parametrize("is_there", [False, True])
def test_a_search_that_fails_before_its_first_trial_leaves_nothing(tmp_path, is_there):
    folder = tmp_path / "deep" / "s"
    if is_there:
        folder.mkdir(parents=True)

    def refuse(config):
        raise ModelError("vector 'w' does not fit the base.")

    with pytest.raises(ModelError, match="does not fit"):
        search(config_of(), folder, runner=InProcess(refuse))
    assert folder.exists() == is_there and not list(folder.glob("[!.]*"))
    study = search(config_of(), folder, runner=InProcess(FunctionPool))
    more = study.config.search.model_copy(update={"n_trials": 13})
    longer = study.config.model_copy(update={"search": more})
    with pytest.raises(ModelError, match="does not fit"):
        search(longer, folder, runner=InProcess(refuse))
    assert load_study(folder, unfinished=True).trials == study.trials


def test_trials_record_their_origin_number_and_all_items(uninterrupted):
    trials = uninterrupted.log.trials_at("search")
    assert [trial.number for trial in trials] == list(range(12))
    assert [trial.origin for trial in trials[6:]] == ["surrogate"] * 6
    assert all(
        len(trial.terms["t"].items) == 4 and set(trial.terms) == {"t", "u", "q"} for trial in trials
    )
    assert len({json.dumps(trial.weights) for trial in trials}) == 12


def test_base_and_the_best_few_are_scored_again_and_the_incumbent_is_the_best_of_them(
    uninterrupted,
):
    rescored = uninterrupted.log.trials_at("rescore")
    assert rescored[0].number == 0
    assert [trial.number for trial in rescored[1:]] == [
        trial.number for trial in uninterrupted.rank_trials()[:2]
    ]
    assert uninterrupted.value(uninterrupted.best_trial) == max(map(uninterrupted.value, rescored))


def test_rescoring_uses_its_own_limit_and_the_terms_that_join_for_it(tmp_path):
    pools = []

    def pool(config):
        pools.append(FunctionPool(config))
        return pools[-1]

    terms = [
        {"task": "t", "metric": "loss"},
        {"task": "u", "metric": "loss", "rescore_only": True, "limit": 9},
    ]
    config = config_of(
        objective={"terms": terms, "limit": 4},
        search={"n_trials": 7, "rescore_top": 1, "rescore_limit": 50},
    )
    search(config, tmp_path / "s", runner=InProcess(pool))
    assert pools[0].calls[0][1:] == (["t"], {"t": 4})
    assert pools[0].calls[-1][1:] == (["t", "u"], {"t": 50, "u": 9})


@pytest.mark.parametrize(
    ("limit", "rescore_limit"),
    [(None, None), (4, 4), (None, 3), (4, 3), (9, None), (9, 12)],
    ids=["all and all", "as many", "all, then fewer", "fewer", "more than there are", "both more"],
)
@pytest.mark.parametrize("joins", [False, True], ids=["", "a term joins"])
def test_items_that_the_search_saw_are_not_scored_again(tmp_path, limit, rescore_limit, joins):
    """The pool has four items a term."""
    pools = []

    def pool(config):
        pools.append(FunctionPool(config))
        return pools[-1]

    terms = [{"task": "t", "metric": "loss"}]
    terms += [{"task": "u", "metric": "loss", "rescore_only": True}] if joins else []
    settings = {"n_trials": 7, "rescore_top": 2, "rescore_limit": rescore_limit}
    config = config_of(objective={"terms": terms, "limit": limit}, search=settings)
    study = search(config, tmp_path / "s", runner=InProcess(pool))
    assert {tuple(labels) for _, labels, _ in pools[0].calls[:7]} == {("t",)}
    assert [labels for _, labels, _ in pools[0].calls[7:]] == ([["u"]] * 3 if joins else [])
    searched = {trial.number: trial for trial in study.trials}
    rescored = study.log.trials_at("rescore")
    assert rescored[0].number == 0 and len(rescored) == 3
    for trial in rescored:
        assert trial.terms["t"] == replace(searched[trial.number].terms["t"], taken_over=True)
        assert list(trial.terms) == (["t", "u"] if joins else ["t"])
    assert ledger_of_study(study).rescore.items == (12 if joins else 0)
    assert ledger_of_study(study).search.items == 28
    assert study.is_finished
    assert outcome(search(config, tmp_path / "s", runner=InProcess(no_pool))) == outcome(study)


class LimitedPool(FunctionPool):
    """Scores as many of its four items as it is asked for."""

    def score(self, weights, asked, *, gradients=False):
        scored = super().score(weights, asked)
        limits = {each.label: each.limit for each in asked}
        cut = {k: replace(s, items=s.items[: limits[k]]) for k, s in scored.terms.items()}
        return replace(scored, terms=cut)


def test_a_study_rescored_on_fewer_items_goes_on_with_those(tmp_path):
    """As versions did that re-scored `rescore_limit` items even where the search saw more."""
    pools = []

    def pool(config):
        pools.append(LimitedPool(config))
        return pools[-1]

    objective = {"terms": [{"task": "t", "metric": "loss"}]}
    settings = {"n_trials": 7, "rescore_top": 4, "rescore_limit": 3}
    study = search(
        config_of(objective=objective, search=settings), tmp_path / "s", runner=InProcess(pool)
    )
    lines = []
    for trial in study.log.trials[:9]:  # killed while it re-scored
        if trial.fidelity == "rescore":
            score = replace(trial.terms["t"], items=trial.terms["t"].items[:3], taken_over=False)
            trial = replace(trial, terms={"t": score})
        lines.append(trial.to_json() + "\n")
    (tmp_path / "s" / "trials.jsonl").write_text("".join(lines), encoding="utf-8")
    target_study = search(
        config_of(objective=objective, search=settings), tmp_path / "s", runner=InProcess(pool)
    )
    asked = [limits for _, _, limits in pools[1].calls]
    assert asked and all(limits == {"t": 3} for limits in asked)
    assert {len(trial.terms["t"].items) for trial in target_study.log.trials_at("rescore")} == {3}
    assert target_study.over_base(target_study.best_trial) and target_study.over_next()


def test_rescoring_looks_at_more_items_or_at_more_terms(tmp_path):
    config = config_of(search={"n_trials": 7, "rescore_top": 1})
    pools = []

    def pool(config):
        pools.append(FunctionPool(config))
        return pools[-1]

    search(config, tmp_path / "s", runner=InProcess(pool))
    assert pools[0].calls[-1][1:] == (["t", "u", "q"], dict.fromkeys("tuq"))


def test_without_rescoring_the_incumbent_is_the_best_posterior_mean(tmp_path):
    study = search(
        config_of(search={"n_trials": 8, "rescore_top": 0}),
        tmp_path / "s",
        runner=InProcess(FunctionPool),
    )
    assert study.log.trials_at("rescore") == []
    assert study.best_trial == study.rank_trials()[0]
    assert study.is_finished


def test_the_incumbent_is_compared_in_pairs_with_the_base_and_the_next_best(uninterrupted):
    best, next_best = uninterrupted.best_trial, uninterrupted.over_next()
    assert next_best is not None
    other, interval = next_best
    assert other.number != best.number and other.fidelity == best.fidelity
    difference = uninterrupted.value(best) - uninterrupted.value(other)
    assert interval.difference == pytest.approx(difference)
    assert interval.low <= difference <= interval.high
    assert uninterrupted.over_base(best).difference == pytest.approx(uninterrupted.value(best))
    assert uninterrupted.over_base(best).low > 0
    assert uninterrupted.over_base(best).verdict == "too few items to tell (4 in term 't')"


def test_another_seed_asks_for_other_weights(uninterrupted, tmp_path):
    config = config_of(search={"n_trials": 9, "rescore_top": 0, "seed": 1})
    other = search(config, tmp_path / "s", runner=InProcess(FunctionPool))
    same = [
        a.weights == b.weights
        for a, b in zip(other.log.trials_at("search"), uninterrupted.log.trials, strict=False)
    ]
    assert all(same[:6]) and not all(same[6:])


# -- resuming --------------------------------------------------------------------------------------


def cut(study: Study, directory: Path, n_lines: int, n_bytes: int) -> None:
    """Copy a study as a kill after n_lines whole lines and n_bytes of the next would leave it."""
    directory.mkdir()
    (directory / "study.json").write_bytes((study.directory / "study.json").read_bytes())
    lines = (study.directory / "trials.jsonl").read_bytes().splitlines(keepends=True)
    rest = lines[n_lines][:n_bytes] if n_lines < len(lines) else b""
    (directory / "trials.jsonl").write_bytes(b"".join(lines[:n_lines]) + rest)


@pytest.mark.parametrize("n_lines", range(15))
def test_every_prefix_of_a_log_resumes_to_the_uninterrupted_study(
    uninterrupted, tmp_path, n_lines, caplog
):
    cut(uninterrupted, tmp_path / "s", n_lines, 40)
    caplog.set_level("INFO")
    assert outcome(search(config_of(), tmp_path / "s", runner=InProcess(FunctionPool))) == outcome(
        uninterrupted
    )
    assert len((tmp_path / "s" / "trials.jsonl").read_text().splitlines()) == 15
    told = f"going on from trial {n_lines} of 12" in caplog.text
    assert told == (0 < n_lines < 12)


@pytest.mark.parametrize(
    "vectors",
    [
        {"w": {"source": "a/w", "bounds": [-0.5, 1.3]}},  # the optimum of `far` is in a corner
        {"w": {"source": "a/w", "bounds": [0.0, 0.01]}, "x": {"source": "a/x", "fixed": 1.0}},
    ],
)
def test_weights_that_were_tried_are_not_asked_again_whether_resumed_or_not(vectors, tmp_path):
    class FarPool(FunctionPool):
        def score(self, weights, asked, *, gradients=False):
            self.calls.append(weights)
            loss = 3 - 0.5 * weights["w"]
            return Scored({t.label: TermScore([(loss, 1.0)], False) for t in asked}, {}, 1)

    config = config_of(vectors=vectors, search={"n_trials": 14, "rescore_top": 0})
    whole = search(config, tmp_path / "whole", runner=InProcess(FarPool))
    asked = [trial.weights["w"] for trial in whole.log.trials[2:]]
    assert len(set(asked)) == len(asked)
    for n_lines in (3, 6, 10, 13):
        cut(whole, tmp_path / f"s{n_lines}", n_lines, 10)
        resumed = search(config, tmp_path / f"s{n_lines}", runner=InProcess(FarPool))
        assert outcome(resumed) == outcome(whole)


def test_a_reader_leaves_the_line_that_a_running_search_is_writing(uninterrupted, tmp_path):
    cut(uninterrupted, tmp_path / "s", 15, 0)
    log = tmp_path / "s" / "trials.jsonl"
    with open(log, "ab") as file:
        file.write(b'{"number": 15, "ori')
    before = log.read_bytes()
    load_study(tmp_path / "s")
    assert log.read_bytes() == before


def test_a_torn_line_is_cut_off_and_leaves_the_prefix(uninterrupted, tmp_path):
    whole = (uninterrupted.directory / "trials.jsonl").read_bytes()
    log, n_whole = tmp_path / "trials.jsonl", 0
    lines = whole.splitlines(keepends=True)
    for number, line in enumerate(lines):
        step = 1 if number in (0, len(lines) - 1) else 29
        for n_bytes in range(0, len(line), step):
            torn = whole[: n_whole + n_bytes]
            log.write_bytes(torn)
            assert len(TrialLog(log).trials) == number
            assert log.read_bytes() == whole[:n_whole]
        n_whole += len(line)


def search_slowly(directory: Path, gradients: str, pool: type[FunctionPool]) -> None:
    """Search in this process, with a tenth of a second for each trial."""

    class SlowPool(pool):
        def score(self, *arguments, **options):
            time.sleep(0.1)
            return super().score(*arguments, **options)

    config = config_of(search={"n_trials": 12, "rescore_top": 2, "gradients": gradients})
    search(config, directory, runner=InProcess(SlowPool))


def start_search(
    directory: Path, gradients: str = "never", pool: type[FunctionPool] = FunctionPool
) -> Warm:
    return Warm(search_slowly, directory, gradients, pool)


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_killed_process_leaves_a_study_that_resumes_to_the_same_trials(uninterrupted, tmp_path):
    def is_far_enough() -> bool:
        if count_lines(tmp_path / "s" / "trials.jsonl") < 8:
            return False
        with pytest.raises(StudyError, match="another process is working in it"):
            search(config_of(), tmp_path / "s", runner=InProcess(no_pool))
        return True

    start_search(tmp_path / "s").kill_when(is_far_enough)
    assert 8 <= len(TrialLog(tmp_path / "s" / "trials.jsonl").trials) < 15
    assert outcome(search(config_of(), tmp_path / "s", runner=InProcess(FunctionPool))) == outcome(
        uninterrupted
    )


def test_five_kills_at_random_moments_leave_the_same_study(uninterrupted, tmp_path):
    for _ in range(5):
        process = start_search(tmp_path / "s")
        moment = time.monotonic() + random.SystemRandom().uniform(0, 2)  # any, each time another
        while process.poll() is None and time.monotonic() < moment:
            time.sleep(0.01)
        process.kill()
    assert outcome(search(config_of(), tmp_path / "s", runner=InProcess(FunctionPool))) == outcome(
        uninterrupted
    )


# -- gradients -------------------------------------------------------------------------------------


def with_gradients(setting: str, n_trials: int = 10):
    return config_of(search={"n_trials": n_trials, "rescore_top": 2, "gradients": setting})


@pytest.fixture(scope="module")
def steered(tmp_path_factory) -> Study:
    """A finished study for which gradients pay."""
    directory = tmp_path_factory.mktemp("steered") / "s"
    return search(with_gradients("auto"), directory, runner=InProcess(GradientPool))


def test_gradients_are_recorded_by_every_trial_of_the_search_and_by_no_other(steered):
    assert [trial.origin for trial in steered.trials[:3]] == ["base", "average", "surrogate"]
    for trial in steered.trials:
        assert trial.gradients == {label: slope(label, trial.weights) for label in "tuq"}
        assert trial.seconds["backward"] == 1
    again = steered.log.trials_at("rescore")
    assert len(again) == 3 and not any(trial.gradients for trial in again)
    assert load_study(steered.directory).log.trials == steered.log.trials


@pytest.mark.parametrize("n_lines", [0, 1, 2, 3, 6, 9, 10, 12])
def test_every_prefix_of_a_log_with_gradients_resumes_to_the_whole(steered, tmp_path, n_lines):
    cut(steered, tmp_path / "s", n_lines, 60)
    resumed = search(with_gradients("auto"), tmp_path / "s", runner=InProcess(GradientPool))
    assert outcome(resumed) == outcome(steered)


def test_the_first_choice_of_auto_holds_even_where_gradients_cost_more_by_now(steered, tmp_path):
    cut(steered, tmp_path / "s", 4, 0)
    resumed = search(with_gradients("auto"), tmp_path / "s", runner=InProcess(DearGradientPool))
    assert outcome(resumed) == outcome(steered)
    dear = search(with_gradients("auto"), tmp_path / "dear", runner=InProcess(DearGradientPool))
    assert [bool(trial.gradients) for trial in dear.trials] == [True] + [False] * 9
    assert [t.origin for t in dear.trials[1:6]] == [*(f"{n} alone" for n in "wxyz"), "average"]


@pytest.mark.parametrize(("first", "then"), [("never", "always"), ("always", "never")])
@pytest.mark.parametrize("n_lines", [3, 7])
def test_a_study_goes_on_with_gradients_or_without(tmp_path, first, then, n_lines):
    begun = search(with_gradients(first), tmp_path / "begun", runner=InProcess(GradientPool))
    runs = []
    for name in ("a", "b"):
        cut(begun, tmp_path / name, n_lines, 0)
        config = with_gradients(then)
        runs.append(search(config, tmp_path / name, runner=InProcess(GradientPool)))
    assert outcome(runs[0]) == outcome(runs[1])
    taken = [bool(trial.gradients) for trial in runs[0].trials]
    assert taken == [first == "always"] * n_lines + [then == "always"] * (10 - n_lines)
    assert StudyConfig.read(tmp_path / "a" / "study.json").search.gradients == then


def test_a_killed_search_with_gradients_resumes_to_the_same_trials(steered, tmp_path):
    config = with_gradients("auto", 12)
    whole = search(config, tmp_path / "whole", runner=InProcess(GradientPool))
    assert outcome(whole)[:10] == outcome(steered)[:10]
    process = start_search(tmp_path / "s", "auto", GradientPool)
    process.kill_when(lambda: count_lines(tmp_path / "s" / "trials.jsonl") >= 4)
    assert 4 <= len(TrialLog(tmp_path / "s" / "trials.jsonl").trials) < 15
    resumed = search(config, tmp_path / "s", runner=InProcess(GradientPool))
    assert outcome(resumed) == outcome(whole)


@pytest.mark.parametrize(
    ("settings", "n_trials", "said"),
    [
        ({}, 6, "vectors alone and their average, which every search starts with. From 7 on"),
        ({}, 7, None),
        ({"gradients": "always"}, 2, "the base, the average, which every search with gradients"),
        ({"gradients": "always"}, 3, None),
        ({"gradients": "auto"}, 6, None),
        ({"screen": 2}, 6, None),
    ],
)
def test_a_search_too_short_to_choose_weights_says_so(settings, n_trials, said, tmp_path, caplog):
    config = config_of(search={"n_trials": n_trials, "rescore_top": 0} | settings)
    study = search(config, tmp_path / "s", runner=InProcess(GradientPool))
    assert ("search.n_trials: " in caplog.text) == (said is not None)
    assert said is None or said in caplog.text
    if "gradients" in settings or not settings:
        assert any(trial.origin == "surrogate" for trial in study.trials) == (said is None)


LIMIT_OF_Q = {"task": "q", "metric": "loss", "max_relative_to_base": 0.02}
TERMS = [{"task": "t", "metric": "loss"}, {"task": "u", "metric": "loss"}]
KINDS_OF_SEARCH = {
    "constraint": {"objective": {"terms": TERMS, "constraints": [LIMIT_OF_Q]}},
    "worst": {"objective": {"terms": TERMS, "combine": "worst"}},
    "weighted_mean": {"objective": {"terms": TERMS, "combine": "weighted_mean"}},
    "pareto": {"search": {"pareto": True}},
    "total": {"search": {"total": [0.4, 0.9]}},
    "below zero": {"vectors": {n: {"source": "a/v", "bounds": [-0.5, 1]} for n in "wxyz"}},
}


class SomeGradientsPool(GradientPool):
    """Has gradients of the terms of the objective, and none of the constraint."""

    differentiable = ("t", "u")


@pytest.mark.parametrize("pool", [GradientPool, SomeGradientsPool])
@pytest.mark.parametrize("kind", KINDS_OF_SEARCH)
def test_every_kind_of_search_resumes_with_gradients_to_the_same_trials(kind, pool, tmp_path):
    changes = dict(KINDS_OF_SEARCH[kind])
    settings = {"n_trials": 9, "rescore_top": 2, "gradients": "always"}
    config = config_of(**changes | {"search": settings | changes.get("search", {})})
    whole = search(config, tmp_path / "whole", runner=InProcess(pool))
    for trial in whole.trials:
        assert set(trial.gradients) == set(trial.terms) & set(pool.differentiable)
        assert all(set(each) == set("wxyz") for each in trial.gradients.values())
    assert {trial.origin for trial in whole.trials[2:]} == {"surrogate"}
    for n_lines in (1, 4, 10):
        cut(whole, tmp_path / f"s{n_lines}", n_lines, 30)
        resumed = search(config, tmp_path / f"s{n_lines}", runner=InProcess(pool))
        assert outcome(resumed) == outcome(whole)
        assert resumed.best_trial.number == whole.best_trial.number


def test_without_gradients_a_pool_that_has_them_gives_the_same_bytes(uninterrupted, tmp_path):
    study = search(config_of(), tmp_path / "s", runner=InProcess(GradientPool))
    assert outcome(study) == outcome(uninterrupted)
    assert "gradients" not in study.log.path.read_text(encoding="utf-8")


def test_an_objective_without_a_gradient_is_searched_as_ever_and_says_so(tmp_path, caplog):
    study = search(with_gradients("always"), tmp_path / "s", runner=InProcess(ValuesOnlyPool))
    without = search(with_gradients("never"), tmp_path / "n", runner=InProcess(FunctionPool))
    assert outcome(study) == outcome(without)
    assert caplog.text.count("no term has a gradient at the base") == 1


@pytest.mark.usefixtures("warm_workers")
def test_workers_take_gradients_too(tmp_path):
    runner = Workers(n_workers=2, pool=GradientPool)
    study = search(with_gradients("always"), tmp_path / "s", runner=runner)
    assert sorted(trial.number for trial in study.trials) == list(range(10))
    for trial in study.trials:
        assert trial.gradients == {label: slope(label, trial.weights) for label in "tuq"}
    assert study.is_finished and study.value(study.best_trial) > 0.1


@pytest.mark.usefixtures("warm_workers")
def test_trials_with_gradients_lost_with_a_killed_search_on_workers_are_asked_for_again(tmp_path):
    config = with_gradients("always", 12)
    whole = search(config, tmp_path / "whole", runner=Workers(n_workers=2, pool=GradientPool))
    cut(whole, tmp_path / "s", 0, 0)
    lines = (whole.directory / "trials.jsonl").read_bytes().splitlines(keepends=True)
    kept = [line for line in lines[:9] if json.loads(line)["number"] not in (1, 5)]
    (tmp_path / "s" / "trials.jsonl").write_bytes(b"".join(kept))
    study = search(config, tmp_path / "s", runner=Workers(n_workers=2, pool=GradientPool))
    assert sorted(trial.number for trial in study.trials) == list(range(12))
    assert all(trial.gradients for trial in study.trials)
    assert [trial.number for trial in study.trials[: len(kept)]] == [
        json.loads(line)["number"] for line in kept
    ]
    assert {trial.origin for trial in study.trials} >= {"base", "average", "surrogate"}


def test_a_search_for_another_objective_keeps_the_gradients_of_its_terms(steered, tmp_path):
    target = reweight(steered.config.objective, {"u": 1.0})
    target = target.model_copy(update={"terms": [t for t in target.terms if t.label != "q"]})
    study = search_on(steered, target, tmp_path / "on", 2, runner=InProcess(GradientPool))
    assert all(set(trial.gradients) == {"t", "u"} for trial in study.trials)
    assert study.value(study.best_trial) > 0.99 * 0.5 / 3.5  # the optimum of u


# -- a study that is there -------------------------------------------------------------------------


def test_a_finished_study_does_nothing(uninterrupted):
    before = (uninterrupted.directory / "trials.jsonl").read_bytes()
    again = search(config_of(), uninterrupted.directory, runner=InProcess(no_pool))
    assert again.best_trial == uninterrupted.best_trial
    assert (uninterrupted.directory / "trials.jsonl").read_bytes() == before


def test_more_trials_go_on_from_a_finished_study_and_can_become_the_incumbent(tmp_path):
    search(
        config_of(search={"n_trials": 6, "rescore_top": 2}),
        tmp_path / "s",
        runner=InProcess(FunctionPool),
    )
    longer = config_of(search={"n_trials": 14, "rescore_top": 2})
    study = search(longer, tmp_path / "s", runner=InProcess(FunctionPool))
    assert [trial.number for trial in study.trials] == list(range(14))
    assert {trial.number for trial in study.rank_trials()[:2]} <= {
        trial.number for trial in study.log.trials_at("rescore")
    }
    assert study.best_trial.origin == "surrogate"
    assert study.is_finished
    search(longer, tmp_path / "s", runner=InProcess(no_pool))


# -- failures --------------------------------------------------------------------------------------


def test_a_trial_that_fails_is_recorded_and_the_search_goes_on(tmp_path):
    pool = failing_at(
        {
            3: RuntimeError("probability tensor contains either inf, nan or element < 0"),
            8: EvaluationError("the score of item 0 is not a finite"),
        }
    )
    study = search(config_of(), tmp_path / "s", runner=InProcess(pool))
    crashed = [trial for trial in study.trials if trial.status == "crashed"]
    assert [trial.number for trial in crashed] == [3, 8]
    assert "RuntimeError: probability tensor" in crashed[0].error
    assert "Traceback" in crashed[0].error
    assert crashed[0].terms == {}
    assert len(study.trials) == 12
    assert study.best_trial.status == "ok" and study.value(study.best_trial) > 0


@pytest.mark.parametrize(
    "error",
    [
        "OutOfMemoryError: CUDA out of memory.\nTraceback",
        "MemoryError",
        "KilledWorker: its worker died 4 times. It has too little memory",
        "RuntimeError: [enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate",
        "FileNotFoundError: [Errno 2] No such file or directory",
        "ConnectionError",
    ],
)
def test_an_old_crash_for_lack_of_memory_teaches_the_surrogate_nothing(error, uninterrupted):
    config, trials = config_of(), uninterrupted.log.trials_at("search")
    crash = replace(trials[9], status="crashed", terms={}, error=error)
    points = np.random.default_rng(0).random((5, 4))
    with_crash = fit_surrogate(config, [*trials[:9], crash]).predict(points)
    without = fit_surrogate(config, trials[:9]).predict(points)
    assert np.array_equal(with_crash, without)
    blamed = replace(crash, error="ValueError: the score is not a number")
    assert not np.array_equal(fit_surrogate(config, [*trials[:9], blamed]).predict(points), without)


def test_a_study_with_crashed_trials_resumes_to_the_same_trials(tmp_path):
    class CliffPool(FunctionPool):
        def score(self, weights, asked, *, gradients=False):
            if weights["y"] > 0.5:
                raise RuntimeError("fell off")
            return super().score(weights, asked)

    whole = search(config_of(), tmp_path / "whole", runner=InProcess(CliffPool))
    assert any(trial.status == "crashed" for trial in whole.log.trials)
    cut(whole, tmp_path / "s", 9, 10)
    assert outcome(search(config_of(), tmp_path / "s", runner=InProcess(CliffPool))) == outcome(
        whole
    )


def test_a_study_whose_trials_mostly_crash_is_finished_all_the_same(tmp_path):
    config = config_of(search={"n_trials": 6, "rescore_top": 3})
    pool = failing_at({number: RuntimeError("no") for number in (2, 3, 4, 5)})
    assert search(config, tmp_path / "s", runner=InProcess(pool)).is_finished
    search(config, tmp_path / "s", runner=InProcess(no_pool))


def test_a_base_that_cannot_be_scored_ends_the_search(tmp_path):
    with pytest.raises(
        EvaluationError, match="the base model itself cannot be scored: ValueError: no"
    ) as caught:
        search(config_of(), tmp_path / "s", runner=InProcess(failing_at({0: ValueError("no")})))
    assert "Traceback" not in str(caught.value)
    assert TrialLog(tmp_path / "s" / "trials.jsonl").trials == []


def test_anchors_that_all_crash_end_the_search_with_the_first_cause(tmp_path):
    pool = failing_at({number: ValueError(f"cause {number}") for number in range(1, 30)})
    message = "none of the 5 first merges can be scored; the first one: ValueError: cause 1"
    with pytest.raises(EvaluationError, match=message):
        search(config_of(), tmp_path / "s", runner=InProcess(pool))
    assert len(TrialLog(tmp_path / "s" / "trials.jsonl").trials) == 5  # the base, and four of them


@pytest.mark.usefixtures("warm_workers")
def test_two_workers_run_the_same_number_of_trials_each_once_the_base_first(tmp_path):
    config = config_of(search={"n_trials": 12, "rescore_top": 2})
    study = search(config, tmp_path / "s", runner=Workers(n_workers=2, pool=FunctionPool))
    trials = study.trials
    assert sorted(trial.number for trial in trials) == list(range(12))
    assert trials[0].origin == "base"
    assert len({trial.worker for trial in trials}) == 2
    pool = FunctionPool(config)
    for trial in trials:
        expected = pool.score(trial.weights, config.objective.asked_terms("search"))
        assert trial.terms == expected.terms
    assert study.is_finished and study.value(study.best_trial) > 0.1
    again = search(config, tmp_path / "s", runner=Workers(n_workers=2, pool=no_pool))
    assert again.best_trial == study.best_trial


def test_trials_lost_with_a_killed_search_on_workers_are_asked_for_again(tmp_path):
    config = config_of(search={"n_trials": 12, "rescore_top": 0})
    whole = search(config, tmp_path / "whole", runner=InProcess(FunctionPool))
    lines = (whole.directory / "trials.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "study.json").write_bytes((whole.directory / "study.json").read_bytes())
    lost = lines[:3] + lines[4:7] + lines[8:9]  # 3 and 7 ran beside others when it was killed
    (tmp_path / "s" / "trials.jsonl").write_bytes(b"".join(lost))
    trials = search(config, tmp_path / "s", runner=InProcess(FunctionPool)).log.trials_at("search")
    assert sorted(trial.number for trial in trials) == list(range(12))
    assert trials[7].number == 3 and trials[7].origin == "y alone"


def test_a_model_error_is_not_a_bad_trial_and_ends_the_search(tmp_path):
    with pytest.raises(ModelError, match="damaged"):
        search(
            config_of(), tmp_path / "s", runner=InProcess(failing_at({4: ModelError("damaged")}))
        )


def test_a_base_that_cannot_be_scored_again_ends_the_search(tmp_path):
    config = config_of(search={"n_trials": 6, "rescore_top": 1})
    with pytest.raises(EvaluationError, match="the base model itself cannot be scored again"):
        search(config, tmp_path / "s", runner=InProcess(failing_at({6: ValueError("no")})))
    assert search(config, tmp_path / "s", runner=InProcess(FunctionPool)).is_finished


# -- the study directory ---------------------------------------------------------------------------


def test_a_damaged_line_in_the_middle_is_an_error_with_its_number(uninterrupted, tmp_path):
    cut(uninterrupted, tmp_path / "s", 9, 0)
    path = tmp_path / "s" / "trials.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], b'{"number": 3, "ori\n', *lines[4:]]))
    with pytest.raises(StudyError, match=r"trials\.jsonl:4: not a trial"):
        search(config_of(), tmp_path / "s", runner=InProcess(FunctionPool))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda trials: trials.pop(0),
            r":1: trial 1 \(search\): comes first, expected",
        ),
        (lambda trials: trials[2]["weights"].pop("w"), r":3: trial 2 \(search\): lacks 'w'"),
        (lambda trials: trials[2]["terms"].pop("t"), r":3: trial 2 \(search\): lacks 't'"),
        (
            lambda trials: trials[2]["terms"]["t"].update(items=[]),
            r":3: trial 2 \(search\): lacks 't'",
        ),
        (
            lambda trials: trials[2]["terms"]["t"].update(items=[[float("nan"), 1]]),
            r"trials\.jsonl:3: not a trial",
        ),
    ],
)
def test_a_record_that_the_study_cannot_go_on_from_is_refused(
    uninterrupted, tmp_path, change, message
):
    cut(uninterrupted, tmp_path / "s", 9, 0)
    path = tmp_path / "s" / "trials.jsonl"
    trials = [json.loads(line) for line in path.read_text().splitlines()]
    change(trials)
    path.write_text("".join(f"{json.dumps(trial)}\n" for trial in trials))
    with pytest.raises(StudyError, match=message):
        search(config_of(), tmp_path / "s", runner=InProcess(no_pool))


def test_a_trial_reads_back_equal(uninterrupted):
    for trial in uninterrupted.log.trials:
        assert Trial.from_json(trial.to_json()) == trial
    assert TrialLog(uninterrupted.directory / "trials.jsonl").trials == uninterrupted.log.trials


def test_another_config_is_refused_naming_the_fields(uninterrupted):
    other = config_of(dtype="float32", search={"n_trials": 12, "rescore_top": 2, "seed": 9})
    told = r"dtype: found 'float32', expected 'bfloat16'; search\.seed: found 9, expected 0"
    with pytest.raises(StudyError, match=f"these fields differ: {told}"):
        search(other, uninterrupted.directory, runner=InProcess(no_pool))


def test_a_study_of_a_newer_format_is_refused(uninterrupted, tmp_path):
    cut(uninterrupted, tmp_path / "s", 3, 0)
    file = tmp_path / "s" / "study.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format_version": 2}))
    for opened in (
        lambda: search(config_of(), tmp_path / "s", runner=InProcess(no_pool)),
        lambda: load_study(tmp_path / "s"),
    ):
        with pytest.raises(ConfigError, match=r"study\.json: format_version"):
            opened()


def test_a_loaded_study_is_the_one_that_ran(uninterrupted):
    loaded = load_study(uninterrupted.directory)
    assert loaded.config == uninterrupted.config and loaded.best_trial == uninterrupted.best_trial


# -- a real study ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_built_recipe_scores_what_its_incumbent_scored_on_the_same_device(
    tmp_path, make_base, make_adapter, corpus_dir, dtype
):
    base = make_base("gemma", torch.float32)
    config = StudyConfig.model_validate(
        {
            "base_model": str(base.path),
            "dtype": dtype,
            "vectors": {f"v{seed}": {"source": str(make_adapter(base, seed))} for seed in (1, 2)},
            "objective": {
                "terms": [
                    {"text": str(corpus_dir / f"{name}.search.jsonl")} for name in ("aaa", "xyz")
                ],
                "limit": 4,
            },
            "search": {"n_trials": 5, "rescore_top": 1},
        }
    )
    study = search(config, tmp_path / "study")
    best = study.best_trial
    write_recipe(study, tmp_path / "recipe.yaml", name="tiny")
    build(tmp_path / "recipe.yaml", tmp_path / "built")
    device = default_device()  # as in the trials: a GPU adds in another order than a CPU
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "built", dtype=compute_dtype(getattr(torch, dtype), device)
    )
    model = model.to(device).eval()
    evaluator = Evaluator(
        model, AutoTokenizer.from_pretrained(tmp_path / "built"), [config.objective]
    )
    limit = None if best.fidelity == "rescore" else 4
    scores = evaluator.evaluate([Asked(term, limit) for term in config.objective.terms])
    assert {label: term.items for label, term in scores.items()} == {
        k: term.items for k, term in best.terms.items()
    }
    assert any(best.weights.values()) or study.value(best) == 0
    assert all(trial.status == "ok" and trial.n_tokens > 0 for trial in study.log.trials)


def test_a_study_that_moved_goes_on_and_one_of_other_weights_or_items_does_not(
    tmp_path, make_base, make_adapter, corpus_dir
):
    base = make_base("gemma", torch.float32)
    adapters = {f"v{seed}": make_adapter(base, seed) for seed in (1, 2, 3)}
    text = (corpus_dir / "aaa.search.jsonl").read_text()

    def searched(place: str, n_trials: int, base: str = "base"):
        folder = tmp_path / place
        config = {
            "base_model": str(folder / base),
            "vectors": {name: {"source": str(folder / name)} for name in ("v1", "v2")},
            "objective": {"terms": [{"name": "t", "text": str(folder / "t.jsonl")}], "limit": 3},
            "search": {"n_trials": n_trials, "rescore_top": 0},
        }
        return search(StudyConfig.model_validate(config), folder / "s")

    shutil.copytree(base.path, tmp_path / "one" / "base")
    for name in ("v1", "v2"):
        shutil.copytree(adapters[name], tmp_path / "one" / name)
    (tmp_path / "one" / "t.jsonl").write_text(text)
    began = (searched("one", 4).directory / "trials.jsonl").read_bytes()

    (tmp_path / "one").rename(tmp_path / "two")
    assert load_study(tmp_path / "two" / "s").config.base_model == str(tmp_path / "two" / "base")
    study = searched("two", 5)
    assert (study.directory / "trials.jsonl").read_bytes().startswith(began)
    assert len(study.trials) == 5
    (tmp_path / "two").rename(tmp_path / "three")
    finished = searched("three", 4)
    assert len(finished.log.trials_at("search")) == 5  # all there, and taken on
    there = load_study(tmp_path / "three" / "s").config
    assert there.base_model == str(tmp_path / "three" / "base") and there.search.n_trials == 5

    elsewhere = tmp_path / "three" / "other" / "base"
    elsewhere.parent.mkdir()

    def refused(what: str) -> None:
        with pytest.raises(
            StudyError, match=rf"s: {what}: not the weights or items that its trials scored"
        ):
            searched("three", 6)
        (tmp_path / "three" / "base").rename(elsewhere)
        with pytest.raises(
            StudyError, match=rf"s: {what}: not the weights or items that its trials scored"
        ):
            searched("three", 5, "other/base")  # finished, but files lie elsewhere: looked at again
        elsewhere.rename(tmp_path / "three" / "base")

    (tmp_path / "three" / "t.jsonl").write_text(text.replace("a", "b", 1))
    refused(r"objective\.t")
    (tmp_path / "three" / "t.jsonl").write_text(text)
    shutil.rmtree(tmp_path / "three" / "v2")
    shutil.copytree(adapters["v3"], tmp_path / "three" / "v2")
    refused(r"vectors\.v2")
    with pytest.raises(StudyError, match=r"vectors\.v2: not the weights"):
        write_recipe(finished, tmp_path / "recipe.yaml", name="tiny")
    assert not (tmp_path / "recipe.yaml").exists()
    shutil.copytree(adapters["v2"], tmp_path / "three" / "v2", dirs_exist_ok=True)
    assert len(searched("three", 6).log.trials_at("search")) == 6

    (tmp_path / "three" / "base").rename(elsewhere)
    assert len(searched("three", 6, "other/base").log.trials_at("search")) == 6
    assert load_study(tmp_path / "three" / "s").config.base_model == str(elsewhere)

    (tmp_path / "three" / "s" / "inputs.json").unlink()  # of an earlier version: nothing to go by
    elsewhere.rename(tmp_path / "three" / "base")
    with pytest.raises(StudyError, match="these fields differ: base_model: found"):
        searched("three", 6)


def test_a_vector_that_must_be_trained_first_says_so(tmp_path, make_base, make_adapter, corpus_dir):
    base = make_base("gemma", torch.float32)
    config = config_of(
        base_model=str(base.path),
        vectors={"w": {"train": "train-w.yaml"}},
        objective={"terms": [{"text": str(corpus_dir / "aaa.search.jsonl")}]},
    )
    with pytest.raises(
        ConfigError, match=r"vectors\.w\.train: 'train-w\.yaml' has to be trained first"
    ):
        search(config, tmp_path / "s")
