"""gradients.py: which trials take them, and what they say about the objective."""

from dataclasses import replace

import numpy as np
import pytest

from optimer_hf.errors import ConfigError
from optimer_hf.files.model import parse
from optimer_hf.scoring.objective import combine
from optimer_hf.scoring.scores import TermScore
from optimer_hf.searching.loop import search
from optimer_hf.searching.runner import InProcess
from optimer_hf.searching.trial import Scored, run_trial
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.gradients import (
    cost_ratio,
    has_all_gradients,
    next_anchor,
    saves_time,
    takes_gradients,
    value_gradient,
)
from optimer_hf.study.trials import Candidate
from tests.support.landscapes import DearGradientPool, FunctionPool, GradientPool, config_of

LOSSES = config_of().objective.model_dump()["terms"][:2]


def searching(gradients: str, **changes) -> StudyConfig:
    return config_of(search={"n_trials": 12, "rescore_top": 2, "gradients": gradients}, **changes)


def trial_of(config, *, pool=GradientPool, number=0, weights=None, with_gradients=True):
    weights = weights or dict.fromkeys(config.free, 0.0)
    candidate = Candidate(number, "base", weights, with_gradients=with_gradients)
    return run_trial(pool(config), candidate, config.objective.asked_terms("search"))


@pytest.mark.parametrize(
    ("setting", "pool", "first", "later"),
    [
        ("never", GradientPool, False, False),
        ("always", DearGradientPool, True, True),
        ("auto", GradientPool, True, True),
        ("auto", DearGradientPool, True, False),
    ],
)
def test_auto_measures_the_base_and_takes_what_saves_time(setting, pool, first, later):
    config = searching(setting)
    assert takes_gradients(config, []) is first
    base = trial_of(config, pool=pool)
    assert takes_gradients(config, [base]) is later
    without = trial_of(config, with_gradients=False)
    assert takes_gradients(config, [without]) is first  # a study that began without them
    assert takes_gradients(config, [without, base]) is later
    dearer = trial_of(config, pool=DearGradientPool, number=1)
    assert takes_gradients(config, [base, dearer]) is later  # the first one has decided


def test_the_cost_of_gradients_is_read_from_the_trial_that_has_them():
    assert cost_ratio(trial_of(searching("auto"))) == 2
    assert cost_ratio(trial_of(searching("auto"), pool=DearGradientPool)) == 9


@pytest.mark.parametrize("terms", [("t", "u"), ("t",)])
@pytest.mark.parametrize("n", [1, 2, 4, 8, 16])
def test_gradients_pay_with_many_vectors_and_when_all_terms_have_them(terms, n):
    names = [f"v{i}" for i in range(n)]
    config = searching("auto", vectors={name: {"source": f"a/{name}"} for name in names})
    base = trial_of(config, pool=FunctionPool, weights=dict.fromkeys("wxyz", 0.0))
    gradients = {label: dict.fromkeys(names, 0.0) for label in terms}
    for backward, ratio in ((1.0, 2), (1.5, 2.5), (3.0, 4)):
        seconds = {"merge": 0.1, "evaluate": 0.9 + backward, "backward": backward}
        measured = type(base)(
            0, "base", "search", {}, "ok", base.terms, seconds, gradients=gradients
        )
        assert cost_ratio(measured) == pytest.approx(ratio)
        pays = saves_time(config, measured)
        assert not pays if len(terms) == 1 else pays == (1 + 0.7 * n > ratio)


@pytest.mark.parametrize("combination", ["relative_to_base", "worst", "weighted_mean"])
@pytest.mark.parametrize("higher", [False, True])
def test_the_gradient_of_the_value_equals_central_differences(combination, higher, monkeypatch):
    objective = config_of().objective.model_dump() | {"combine": combination}
    objective["terms"][1]["weight"] = 2.5
    config = searching("always", objective=objective)
    weights, step = {"w": 0.3, "x": 0.9, "y": 0.2, "z": 0.7}, 1e-5
    base = trial_of(config)

    def as_reward(trial):  # the other direction of one term
        terms = {
            label: type(term)(term.items, higher if label == "u" else False)
            for label, term in trial.terms.items()
        }
        return type(trial)(**(vars(trial) | {"terms": terms}))

    base, here = as_reward(base), as_reward(trial_of(config, weights=weights))
    gradient = value_gradient(config.objective, here, base.terms)
    for name in weights:
        low, high = (
            as_reward(trial_of(config, weights=weights | {name: weights[name] + move}))
            for move in (-step, step)
        )
        difference = combine(config.objective, high.terms, base.terms) - combine(
            config.objective, low.terms, base.terms
        )
        assert gradient[name] == pytest.approx(difference / (2 * step), rel=1e-4, abs=1e-7)


class ManyVectorsPool:
    """Two losses over any number of weights, each with an optimum of its own."""

    inputs: dict[str, str] = {}

    def __init__(self, config: StudyConfig) -> None:
        rng, d = np.random.default_rng(3), len(config.free)
        self.optima = {label: rng.dirichlet(np.ones(d)) for label in "tu"}
        self.mixing = {label: np.eye(d) + 0.3 * rng.normal(size=(d, d)) / d**0.5 for label in "tu"}

    def loss(self, label: str, point: np.ndarray) -> float:
        distance = self.mixing[label] @ (point - self.optima[label])
        return float(3 + (distance**2).sum() ** 0.9)

    def score(self, weights, asked, *, gradients=False):
        point = np.array(list(weights.values()))
        steps = 1e-5 * np.eye(len(point))
        scores = {t.label: TermScore([(self.loss(t.label, point), 1.0)], False) for t in asked}
        slopes = {
            t.label: {
                name: (self.loss(t.label, point + step) - self.loss(t.label, point - step)) / 2e-5
                for name, step in zip(weights, steps, strict=True)
            }
            for t in asked
        }
        return Scored(scores, {"evaluate": 1.0}, 1, slopes if gradients else {})


@pytest.mark.parametrize(("n", "n_trials", "pays"), [(2, 9, False), (8, 20, True)])
def test_the_rule_agrees_with_searches_of_a_simulated_landscape(n, n_trials, pays, tmp_path):
    ratio = 2.5  # of the cost of trials; both searches below cost the same
    best = {}
    for setting, trials in (("never", n_trials), ("always", int(n_trials / ratio))):
        config = config_of(
            vectors={f"v{index}": {"source": "a/v", "bounds": [0, 1]} for index in range(n)},
            objective={"terms": LOSSES},
            search={"n_trials": trials, "rescore_top": 0, "gradients": setting},
        )
        study = search(config, tmp_path / setting, runner=InProcess(ManyVectorsPool))
        best[setting] = max(study.value(trial) for trial in study.trials)
    assert (best["always"] > best["never"]) == pays
    seconds = {"merge": 0.0, "evaluate": ratio, "backward": ratio - 1}
    measured = replace(study.trials[0], seconds=seconds)
    assert saves_time(config, measured) == pays


def test_a_value_without_the_gradient_of_a_term_has_none():
    config = searching("always")
    base = trial_of(config)
    del base.gradients["u"]
    assert value_gradient(config.objective, base, base.terms) is None


def test_with_gradients_two_sound_trials_replace_the_single_vectors():
    config = searching("always")
    base = trial_of(config)
    assert next_anchor(config, 1, [base])[0] == "average"
    average = trial_of(config, number=1, weights=next_anchor(config, 1, [base])[1])
    assert next_anchor(config, 2, [base, average]) is None
    crashed = Candidate(1, "average", average.weights).to_crashed_trial("ValueError: no")
    assert next_anchor(config, 2, [base, crashed])[0] == "w alone"
    never = searching("never")  # going on without: the single vectors, but not the average twice
    trials = [base, average]
    for name in "wxyz":
        origin, weights = next_anchor(never, len(trials), trials)
        assert origin == f"{name} alone"
        trials.append(trial_of(config, number=len(trials), weights=weights))
    assert next_anchor(never, len(trials), trials) is None


def test_single_vectors_that_run_are_not_planned_again():
    never, base = searching("never"), trial_of(searching("always"))
    origins, running = [], []
    for number in range(1, 7):
        origin, weights = next_anchor(never, number, [base], running) or ("surrogate", {})
        origins.append(origin)
        running.append(weights)
    assert origins == [*(f"{name} alone" for name in "wxyz"), "average", "surrogate"]


def test_surroundings_are_known_if_all_sound_trials_have_the_gradients_that_count():
    config = searching("always")
    base, without = trial_of(config), trial_of(config, with_gradients=False)
    crashed = Candidate(1, "x", base.weights).to_crashed_trial("ValueError: no")
    partly = replace(base, gradients={"t": base.gradients["t"], "q": base.gradients["q"]})
    unweighted = replace(base, gradients={label: base.gradients[label] for label in "tu"})
    assert has_all_gradients(config, [base, crashed, unweighted])
    assert not has_all_gradients(config, [base, base, without])
    assert not has_all_gradients(config, [base, partly])


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"engine": "vllm"}, "engine vllm has no gradients"),
        ({"device_map": "auto"}, "a model that device_map spreads has no gradients"),
        ({"search": {"surrogate": "random_forest"}}, "surrogate random_forest does not use"),
    ],
)
def test_gradients_that_nothing_can_take_are_refused_and_auto_does_without(changes, why, tmp_path):
    data = config_of().model_dump()
    search = {"n_trials": 3} | changes.get("search", {})
    wrong = data | changes | {"search": search | {"gradients": "always"}}
    with pytest.raises(ConfigError, match=why):
        parse(StudyConfig, wrong, tmp_path / "study.yaml")
    auto = StudyConfig.model_validate(data | changes | {"search": search | {"gradients": "auto"}})
    assert not takes_gradients(auto, [])


def test_whether_gradients_are_taken_is_no_part_of_a_study():
    assert searching("always").identity == searching("never").identity == config_of().identity
