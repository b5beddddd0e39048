"""records.py and the decisions of a study: damage is named, what was decided stays decided."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optimer_hf.cli import main
from optimer_hf.comparison.costs import ledger_of_study
from optimer_hf.comparison.results_file import results_of
from optimer_hf.comparison.sealed import compare
from optimer_hf.comparison.sealed_file import read_comparison
from optimer_hf.comparison.tables import to_markdown
from optimer_hf.errors import EvaluationError, HubError, OptimerError, StudyError
from optimer_hf.hub.untrusted import check_pulled
from optimer_hf.recipes.record import Lock, Recipe
from optimer_hf.report.page import write_report
from optimer_hf.scoring.scores import TermScore
from optimer_hf.searching.loop import search
from optimer_hf.searching.runner import InProcess
from optimer_hf.searching.trial import Scored
from optimer_hf.study import directory as directory_module
from optimer_hf.study import surrogate as surrogate_module
from optimer_hf.study.config import StudyConfig
from optimer_hf.study.directory import Study, load_study
from optimer_hf.study.gp import fit
from optimer_hf.study.prediction import front, predict
from optimer_hf.study.trials import Candidate, TrialLog

N_TRIALS = 7
Lines = list[dict[str, Any]]


def config_of(**changes) -> StudyConfig:
    terms = [
        {"task": "loss", "metric": "loss"},
        {"task": "accuracy", "metric": "acc"},
        {"task": "perplexity", "metric": "word_perplexity", "weight": 0.5},
        {"task": "late", "metric": "loss", "rescore_only": True},
    ]
    constraint = {"task": "kept", "metric": "loss", "max_relative_to_base": 0.5}
    data = {
        "base_model": "a/b",
        "vectors": {
            "x": {"source": "a/x", "bounds": [-0.5, 1.0]},
            "y": {"source": "a/y"},
            "f": {"source": "a/f", "fixed": 0.3},
        },
        "objective": {"terms": terms, "constraints": [constraint], "limit": 4},
        "test": {"terms": [term | {"name": term["task"]} for term in terms[:2]]},
        "retarget": {"other": {"accuracy": 1.0}},
        "search": {"n_trials": N_TRIALS, "rescore_top": 2, "rescore_limit": 6},
    }
    for term in data["test"]["terms"]:
        term["task"] += "_test"
    return StudyConfig.model_validate(data | changes)


class Pool:
    """Scores three kinds of terms by functions of two weights."""

    inputs = {"base_model": "0" * 64, "vectors.x": "1" * 64}

    def __init__(self, config: StudyConfig) -> None:
        pass

    def score(self, weights, asked, *, gradients=False):
        loss = 2 + (weights["x"] - 0.4) ** 2 + (weights["y"] - 0.2) ** 2
        noise = np.random.default_rng(0).normal(size=asked[0].limit or 8) * 0.05
        scores = {}
        for term in asked:
            values = loss + noise
            if term.label == "accuracy":
                values = (values < 2.1).astype(float)
            items = [(float(value), 1.0) for value in values]
            scores[term.label] = TermScore(
                items, term.label == "accuracy", 3, term.label == "perplexity"
            )
        return Scored(scores, {"merge": 0.01, "evaluate": 0.1, "forward": 0.1}, 30)


def no_pool(config):
    pytest.fail("everything is scored already, the pool must stay closed")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Study:
    study = search(config_of(), tmp_path_factory.mktemp("record") / "s", runner=InProcess(Pool))
    compare(study, pool=Pool)
    return study


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return shutil.copytree(finished.directory, tmp_path / "copy")


def read(path: Path) -> Lines:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, lines: Lines) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


# -- damage ----------------------------------------------------------------------------------------


def scores_of(line: dict[str, Any]) -> dict[str, Any]:
    """Return the scores of a trial or of a sealed row."""
    return line["terms"] if "terms" in line else line["scores"]


def items(value: Any, label: str = "loss", line: int = 2) -> Callable[[Lines], Any]:
    def change(lines: Lines) -> None:
        scores_of(lines[line])[label]["items"] = value

    return change


def term(line: int = 2, label: str = "loss", **changes) -> Callable[[Lines], Any]:
    return lambda lines: scores_of(lines[line])[label].update(changes)


def trial(line: int = 2, **changes) -> Callable[[Lines], Any]:
    return lambda lines: lines[line].update(changes)


def weights(line: int = 2, **changes) -> Callable[[Lines], Any]:
    return lambda lines: lines[line]["weights"].update(changes)


def gradient(label: str = "loss", **changes) -> Callable[[Lines], Any]:
    return trial(gradients={label: {"x": 0.1, "y": 0.2} | changes})


def swapped(lines: Lines) -> None:
    lines[2]["terms"]["loss"], lines[2]["terms"]["accuracy"] = (
        lines[2]["terms"]["accuracy"],
        lines[2]["terms"]["loss"],
    )


FOUR = [[1.0, 1.0]] * 4
DAMAGES = {
    "a line twice": (lambda lines: lines.insert(3, dict(lines[2])), ":4: .*number 2 a second"),
    "a number twice": (trial(number=1), ":3: .*number 1 a second time"),
    "a number beyond the study": (trial(number=N_TRIALS), ":3: .*expected one below 7"),
    "a number below 0": (trial(number=-1), ":3: .*expected one from 0 on"),
    "a number of 400 digits": (trial(number=10**400), ":3: .*found number 1000"),
    "a number of 5,000 digits": (trial(number="DIGITS"), ":3: not a trial"),
    "a number that is a text": (trial(number="2"), ":3: not a trial"),
    "another base": (weights(0, x=0.1), ":1: .*expected the base"),
    "a base that crashed": (trial(0, status="crashed", terms={}), ":1: .*status 'crashed'"),
    "no base": (lambda lines: lines.pop(0), ":1: .*expected number 0"),
    "a re-scored base that crashed": (
        trial(N_TRIALS, status="crashed", terms={}),
        ":8: .*status 'crashed'",
    ),
    "no re-scored base": (lambda lines: lines.pop(N_TRIALS), ":8: .*comes first"),
    "a weight above its bound": (weights(x=1.01), r":3: .*x at 1.01, expected \[-0.5, 1\]"),
    "a weight below its bound": (weights(x=-0.51), ":3: .*x at -0.51"),
    "a fixed weight that moved": (weights(f=0.4), r":3: .*f at 0.4, expected \[0.3, 0.3\]"),
    "an unknown vector": (weights(z=0.4), ":3: .*found a weight of 'z'"),
    "a missing vector": (lambda lines: lines[2]["weights"].pop("y"), ":3: .*lacks 'y'"),
    "an enormous weight": (weights(x=1e308), ":3: .*weight 1e[+]308"),
    "weights of another trial, re-scored": (weights(8, y=0.123), ":9: .*expected those of search"),
    "a re-scored trial that was not searched": (
        trial(8, number=5000),
        ":9: .*(no search trial|expected one below 7)",
    ),
    "an unknown term": (
        lambda lines: lines[2]["terms"].update(new=lines[2]["terms"]["loss"]),
        ":3: .*found scores of 'new'",
    ),
    "a missing term": (lambda lines: lines[2]["terms"].pop("kept"), ":3: .*lacks 'kept'"),
    "scores of a crashed trial": (trial(status="crashed"), ":3: .*found scores of"),
    "an unknown status": (trial(status="fine"), ":3: not a trial"),
    "an unknown fidelity": (trial(fidelity="final"), ":3: not a trial"),
    "a sealed trial among the others": (trial(fidelity="sealed"), ":3: .*fidelity 'sealed'"),
    "terms that changed places": (swapped, ":3: .*higher_is_better"),
    "another direction": (term(higher_is_better=True), ":3: .*higher_is_better True"),
    "a perplexity that was none": (term(is_perplexity=True), ":3: .*is_perplexity True"),
    "fewer items": (items([[1.0, 1.0]]), ":3: .*items 1, but the base has 4"),
    "more items": (items(FOUR + FOUR), ":3: .*items 8, but the base has 4"),
    "fewer items, re-scored": (items([[1.0, 1.0]], line=8), ":9: .*items 1, but the base has 6"),
    "no items": (items([]), ":3: .*lacks 'loss'"),
    "denominators of 0": (items([[1.0, 0.0]] * 4), ":3: .*denominators that sum to 0"),
    "a negative denominator": (items([[1.0, -1.0], *FOUR[1:]]), ":3: .*found an item"),
    "an enormous item": (items([[1e308, 1.0], *FOUR[1:]]), ":3: .*found an item"),
    "a tiny denominator": (items([[1e200, 1e-200], *FOUR[1:]]), None),
    "only tiny denominators": (items([[1e200, 1e-200]] * 4), ":3: .*found a score|gain"),
    "a million bits": (items([[1e6, 1.0]] * 4, "perplexity"), ":3: .*found a score of inf"),
    "a base next to nothing": (
        lambda lines: [items([[1e-280, 1.0]] * 4, line=i)(lines) for i in range(2)],
        None,
    ),
    "NaN": (items([[float("nan"), 1.0], *FOUR[1:]]), ":3: not a trial"),
    "Infinity": (items([[float("inf"), 1.0], *FOUR[1:]]), ":3: not a trial"),
    "items of three numbers": (items([[1.0, 1.0, 1.0]] * 4), ":3: not a trial"),
    "items that are texts": (items([["a", "b"]] * 4), ":3: not a trial"),
    "negative seconds": (trial(seconds={"ask": -1.0}), ":3: .*-1.0 seconds of 'ask'"),
    "endless seconds": (trial(seconds={"ask": 1e300}), ":3: .*seconds of 'ask'"),
    "negative tokens": (trial(n_tokens=-1), ":3: .*-1 tokens"),
    "enormous tokens": (trial(n_tokens=10**400), ":3: .*tokens"),
    "negative tokens of a term": (term(n_tokens=-1), ":3: .*-1 tokens"),
    "an origin that is a number": (trial(origin=3), ":3: not a trial"),
    "an unknown field": (trial(note="x"), ":3: not a trial"),
    "a gradient of an unknown term": (gradient("new"), ":3: .*found a gradient of 'new'"),
    "a gradient of a crashed trial": (
        trial(status="crashed", terms={}, gradients={"loss": {"x": 0.1, "y": 0.2}}),
        r":3: .*gradient of 'loss', expected one of \[\]",
    ),
    "a gradient without a vector": (
        trial(gradients={"loss": {"x": 0.1}}),
        r":3: .*in \['x'\], expected one in \['x', 'y'\]",
    ),
    "a gradient in a fixed vector": (
        gradient(f=0.1),
        r":3: .*expected one in \['x', 'y'\]",
    ),
    "an enormous gradient": (gradient(y=1e200), ":3: .*gradient 1e[+]200 of 'loss' in y"),
    "a gradient that is NaN": (gradient(y=float("nan")), ":3: not a trial"),
    "scores taken over by the search": (term(taken_over=True), ":3: .*were taken over"),
    "an empty line": (lambda lines: lines.insert(2, "EMPTY"), ":3: not a trial"),
    "a list": (lambda lines: lines.insert(2, []), ":3: not a trial"),
    "deep nesting": (trial(origin="DEEP"), ":3: not a trial"),
}


def damage(path: Path, change: Callable[[Lines], Any]) -> None:
    lines = read(path)
    change(lines)
    write(path, lines)
    text = path.read_text().replace('"EMPTY"\n', "\n").replace('"DIGITS"', "9" * 5000)
    path.write_text(text.replace('"DEEP"', "[" * 5000 + "]" * 5000))


def use(directory: Path) -> None:
    """Do with a study what the commands do that read it."""
    study = load_study(directory, unfinished=True)
    assert study.best_trial and study.over_base(study.best_trial)
    study.over_next(), study.rank_trials(), front(study), ledger_of_study(study)
    assert np.isfinite(predict(study).value)
    if (sealed := read_comparison(study)) is not None:
        json.dumps(results_of(sealed).model_dump(mode="json"), allow_nan=False)
        to_markdown(sealed)


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_in_the_trials_is_named_with_file_and_line(name, copy):
    change, message = DAMAGES[name]
    damage(copy / "trials.jsonl", change)
    readers = [
        lambda: search(config_of(), copy, runner=InProcess(no_pool)),
        lambda: load_study(copy),
    ]
    for reader in readers:
        if message is None:  # strange, and harmless
            reader()
            use(copy)
            continue
        with pytest.raises(StudyError, match=f"trials.jsonl(?:{message})"):
            reader()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines.insert(1, lines[0]), ":2: .*weights that were sealed before"),
        (items([[1.0, 1.0]], line=1), ":2: .*items 1, but the base has 8"),
        (term(1, higher_is_better=True), ":2: .*higher_is_better True"),
        (lambda lines: lines[1]["scores"].pop("loss"), ":2: .*lacks 'loss'"),
        (trial(1, kind="search"), ":2: not a row"),
        (trial(1, kind="alone", subject="nobody"), ":2: .*no weight of 'nobody'"),
        (trial(1, n_trials_known=-1), ":2: .*-1 trials known"),
        (weights(1, x=1e308), ":2: .*weight 1e[+]308"),
    ],
)
def test_damage_in_the_sealed_scores_is_named_with_file_and_line(change, message, copy):
    damage(copy / "sealed.jsonl", change)
    study = load_study(copy)
    for reader in (read_comparison, lambda study: compare(study, pool=no_pool)):
        with pytest.raises(StudyError, match=f"sealed.jsonl(?:{message})"):
            reader(study)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"incumbent": 99}, "found trial 99, expected one that was scored"),
        ({"rescore": [0, 99]}, "found trial 99"),
        ({"incumbent": "UNSCORED"}, "found incumbent 1, expected one that was scored again"),
        ({"incumbent": 10**400}, "found trial 1000"),
        ({"rows": {"merge": {"x": 1.0}}}, "found weights of"),
        ({"rows": {"merge": {"x": 1e308, "y": 0, "f": 0}}}, "found x at 1e[+]308"),
        ({"note": 1}, "not a decision"),
        ({"incumbent": 1.5}, "not a decision"),
    ],
)
def test_damage_in_the_decisions_is_named_with_file_and_line(changes, message, copy):
    lines = read(copy / "decisions.jsonl")
    if changes.get("incumbent") == "UNSCORED":
        others = set(range(N_TRIALS)) - set(lines[-1]["rescore"])
        changes = {"incumbent": min(others)}
    write(copy / "decisions.jsonl", [*lines[:-1], lines[-1] | changes])
    with pytest.raises(StudyError, match=f"decisions.jsonl:{len(lines)}: {message}"):
        load_study(copy)


@pytest.mark.parametrize("name", ["trials.jsonl", "decisions.jsonl", "sealed.jsonl"])
@pytest.mark.parametrize("keep", [1, 40])
def test_a_torn_last_line_is_left_out_by_readers(finished, copy, name, keep):
    whole = (copy / name).read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    (copy / name).write_bytes(whole + last[:keep])
    assert load_study(copy).best_trial == finished.best_trial
    assert (copy / name).read_bytes() == whole + last[:keep]
    search(config_of(), copy, runner=InProcess(no_pool))
    compare(load_study(copy), pool=no_pool)
    assert (copy / name).read_bytes() == whole


def test_a_row_that_is_decided_after_a_torn_line_does_not_join_it(tmp_path):
    study = search(config_of(), tmp_path / "s", runner=InProcess(Pool))
    decisions = study.directory / "decisions.jsonl"
    whole = decisions.read_bytes()
    decisions.write_bytes(whole + whole.splitlines(keepends=True)[-1][:40])
    compare(load_study(study.directory), pool=Pool)
    assert decisions.read_bytes().startswith(whole)
    assert load_study(study.directory).decision.rows


def test_a_line_with_half_a_character_is_written_and_read(tmp_path):
    log = TrialLog(tmp_path / "trials.jsonl")
    log.append(Candidate(0, "base", {"x": 0.0}).to_crashed_trial("OSError: \udcff.jsonl"))
    assert TrialLog(log.path).trials[0].error == "OSError: ?.jsonl"


def test_a_search_that_ends_while_its_study_is_read_contradicts_nothing(copy, monkeypatch):
    trials, decisions = (read(copy / f"{name}.jsonl") for name in ("trials", "decisions"))
    best = decisions[-1]["incumbent"]
    last = next(t for t in trials if (t["fidelity"], t["number"]) == ("rescore", best))
    write(copy / "trials.jsonl", [each for each in trials if each != last])
    write(copy / "decisions.jsonl", decisions[:1])

    class ReadInBetween(TrialLog):
        def __init__(self, path, *, repair):
            super().__init__(path, repair=repair)
            write(copy / "trials.jsonl", [*(each for each in trials if each != last), last])
            write(copy / "decisions.jsonl", decisions)

    monkeypatch.setattr(directory_module, "TrialLog", ReadInBetween)
    assert not load_study(copy, unfinished=True).is_finished


@pytest.mark.parametrize("command", ["report", "recipe", "retarget", "ratios", "compare"])
def test_commands_name_damage_in_one_line(command, copy, tmp_path):
    damage(copy / "trials.jsonl", items([[1.0, 0.0]] * 4))
    target = tmp_path / "target.yaml"
    target.write_text("terms: [{task: accuracy, metric: acc}]")
    extra = {"recipe": [str(tmp_path / "r.yaml")], "retarget": [str(target)]}
    result = CliRunner().invoke(main, [command, str(copy), *extra.get(command, [])])
    assert result.exit_code == 1 and not isinstance(result.exception, ZeroDivisionError)
    assert "trials.jsonl:3: trial 2 (search): term 'loss'" in " ".join(result.output.split())


HOSTILE = st.sampled_from(
    [
        *(None, True, 0, -1, 3, 0.5, 1e308, -1e308, 1e200, 1e-308, 5e-324, 2**63, 10**30, 10**400),
        *("x", "", "search", "rescore", "crashed", [], {}, {"loss": 1}),
        *([[0.0, 0.0]], [[1.0, 1.0]] * 4),
    ]
)


def places(value: Any, at: tuple = ()) -> list[tuple]:
    inside = [at] if at else []
    pairs = value.items() if isinstance(value, dict) else ()
    pairs = enumerate(value) if isinstance(value, list) else pairs
    for key, inner in pairs:
        inside += places(inner, (*at, key))
    return inside


def mutated(data: st.DataObject, path: Path) -> str:
    """Mutate one file and return how."""
    lines = read(path) if path.suffix == ".jsonl" else [json.loads(path.read_text())]
    number = data.draw(st.integers(0, len(lines) - 1))
    kind = data.draw(st.sampled_from(["value", "value", "value", "drop", "twice", "swap", "cut"]))
    if kind == "value":
        *outer, last = data.draw(st.sampled_from(places(lines[number])))
        target = lines[number]
        for key in outer:
            target = target[key]
        target[last] = data.draw(HOSTILE)
    elif kind == "drop" and len(lines) > 1:
        lines.pop(number)
    elif kind == "twice" and path.suffix == ".jsonl":
        lines.insert(data.draw(st.integers(0, len(lines))), lines[number])
    elif kind == "swap":
        other = data.draw(st.integers(0, len(lines) - 1))
        lines[number], lines[other] = lines[other], lines[number]
    write(path, lines)
    if kind == "cut":  # the last mutation: not every line can be read any longer
        path.write_bytes(path.read_bytes()[: data.draw(st.integers(0, path.stat().st_size))])
    return kind


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_mutated_record_is_refused_or_every_reader_works(finished, tmp_path_factory, data):
    copy = shutil.copytree(finished.directory, tmp_path_factory.mktemp("mutated") / "s")
    names = ["trials.jsonl", "trials.jsonl", "trials.jsonl", "sealed.jsonl", "decisions.jsonl"]
    names += ["study.json", "inputs.json", "sealed.json"]
    for _ in range(data.draw(st.integers(1, 2))):
        kind = mutated(data, copy / data.draw(st.sampled_from(names)))
        try:
            use(copy)
        except OptimerError as error:
            assert str(copy) in str(error)
            break
        if kind == "cut":
            break


# -- while a search runs ---------------------------------------------------------------------------


def pool_giving(change: Callable[[dict[str, TermScore], int], dict[str, TermScore]]):
    class Changing(Pool):
        n_calls = 0

        def score(self, weights, asked, *, gradients=False):
            scored = super().score(weights, asked)
            self.n_calls += 1
            return replace(scored, terms=change(scored.terms, self.n_calls))

    return Changing


@pytest.mark.parametrize(
    "items", [[(1e6, 1.0)] * 4, [(1e300, 1.0)] * 4, [(1.0, 0.0)] * 4, [(float("nan"), 1.0)] * 4]
)
def test_scores_that_nothing_can_be_made_of_are_a_crash_and_the_record_stays_readable(
    items, tmp_path
):
    def change(scores, n_calls):
        if n_calls != 3:
            return scores
        return scores | {"perplexity": replace(scores["perplexity"], items=items)}

    study = search(config_of(), tmp_path / "s", runner=InProcess(pool_giving(change)))
    assert study.log.trials[2].status == "crashed"
    assert load_study(tmp_path / "s").best_trial == study.best_trial


def test_a_function_that_scores_other_items_each_time_ends_the_search(tmp_path):
    def change(scores, n_calls):
        return {
            label: replace(term, items=term.items[: 3 if n_calls == 3 else 4])
            for label, term in scores.items()
        }

    with pytest.raises(EvaluationError, match=r"trial 2: .*items 3, but the base has 4"):
        search(config_of(), tmp_path / "s", runner=InProcess(pool_giving(change)))


# -- what was decided ------------------------------------------------------------------------------


def upside_down(points, scores, gradients):
    """Another surrogate, to whom the worst is the best."""
    return FIT(points, -scores, -gradients)


FIT = fit


def no_fit(points, scores, gradients):
    pytest.fail("a finished study was decided already, nothing may be fitted")


def test_a_finished_study_is_read_without_a_fit(finished, copy, monkeypatch):
    rows = compare(finished, pool=no_pool).rows
    monkeypatch.setattr(surrogate_module, "fit", no_fit)
    loaded = load_study(copy)
    assert loaded.is_finished and loaded.best_trial == finished.best_trial
    assert loaded.trials_to_rescore() == [] and loaded.over_next() == finished.over_next()
    assert search(config_of(), copy, runner=InProcess(no_pool)).best_trial == finished.best_trial
    assert compare(loaded, pool=no_pool).rows == rows


@pytest.mark.parametrize("rescore_top", [0, 2])
def test_another_surrogate_changes_no_finished_study(rescore_top, tmp_path, monkeypatch):
    settings = {"n_trials": N_TRIALS, "rescore_top": rescore_top, "rescore_limit": 6}
    config = config_of(search=settings)
    study = search(config, tmp_path / "s", runner=InProcess(Pool))
    rows = compare(study, pool=Pool).rows
    before = (tmp_path / "s" / "trials.jsonl").read_bytes()
    monkeypatch.setattr(surrogate_module, "fit", upside_down)
    assert {t.number for t in study.rank_trials()[:2]} != set(study.decision.rescore) - {0}
    again = search(config, tmp_path / "s", runner=InProcess(no_pool))
    assert again.best_trial == study.best_trial
    assert compare(load_study(tmp_path / "s"), pool=no_pool).rows == rows
    write_report(again, tmp_path / "report.html")
    result = CliRunner().invoke(main, ["report", str(tmp_path / "s")])
    assert result.exit_code == 0 and "not finished" not in result.output
    target = tmp_path / "target.yaml"
    target.write_text("terms: [{task: accuracy, metric: acc}]")
    result = CliRunner().invoke(main, ["retarget", str(tmp_path / "s"), str(target)])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "s" / "trials.jsonl").read_bytes() == before


def test_an_older_study_that_was_scored_again_whole_is_finished_under_any_surrogate(
    finished, copy, monkeypatch
):
    (copy / "decisions.jsonl").unlink()
    monkeypatch.setattr(surrogate_module, "fit", no_fit)
    assert load_study(copy).best_trial == finished.best_trial
    assert not (copy / "decisions.jsonl").exists()  # readers write nothing
    search(config_of(), copy, runner=InProcess(no_pool))
    assert len(read(copy / "decisions.jsonl")) == 2


def test_what_was_decided_of_other_trials_does_not_count(copy):
    lines = read(copy / "trials.jsonl")
    write(copy / "trials.jsonl", [line for line in lines[:N_TRIALS] if line["number"] != 4])
    with pytest.raises(StudyError, match="the search is not finished"):
        load_study(copy)
    study = search(config_of(), copy, runner=InProcess(Pool))
    assert study.is_finished and len(study.log.trials_at("rescore")) >= 2


def test_a_longer_search_is_decided_anew_and_keeps_what_was_decided_before(copy):
    settings = {"n_trials": N_TRIALS + 2, "rescore_top": 2, "rescore_limit": 6}
    before = read(copy / "decisions.jsonl")
    study = search(config_of(search=settings), copy, runner=InProcess(Pool))
    assert study.is_finished
    assert read(copy / "decisions.jsonl")[: len(before)] == before
    assert study.decision.trials != before[-1]["trials"]


# -- what was pulled -------------------------------------------------------------------------------


@pytest.fixture
def pulled(finished, tmp_path) -> Path:
    """A recipe with its study, as a push leaves them."""
    commit = "0" * 40
    sources = {name: {"source": f"a/{name}@{commit}", "weight": 0.1} for name in "xyf"}
    Recipe(
        name="r", base_model=f"a/b@{commit}", dtype="bfloat16", vectors=sources,
        objective={}, scores={}, study={},
    ).write(tmp_path / "recipe.yaml")  # fmt: skip
    lock = Lock(base={}, vectors={name: {} for name in "xyf"}, weights={}, dtype="bfloat16")
    lock.write(tmp_path / "recipe.lock.json")
    shutil.copytree(finished.directory, tmp_path / "study")
    return tmp_path


def test_a_pulled_study_is_taken_as_it_is(pulled):
    assert check_pulled("recipe", pulled).name == "r"
    assert load_study(pulled / "study").is_finished


@pytest.mark.parametrize("name", ["a line twice", "denominators of 0", "another direction"])
def test_a_damaged_study_is_not_pulled(pulled, name):
    damage(pulled / "study" / "trials.jsonl", DAMAGES[name][0])
    with pytest.raises(StudyError, match=r"study/trials\.jsonl:\d: trial"):
        check_pulled("recipe", pulled)


@pytest.mark.parametrize("file", ["decisions.jsonl", "sealed.jsonl", "inputs.json", "study.json"])
def test_no_damaged_file_of_a_study_is_pulled(pulled, file):
    (pulled / "study" / file).write_text("[]\n")
    with pytest.raises(OptimerError, match=file):
        check_pulled("recipe", pulled)


TERM = {"metric": "bits_per_byte"}


@pytest.mark.parametrize(
    "change",
    [
        {"base_model": "/etc/model"},
        {"base_model": "../../model"},
        {"base_model": "~/model"},
        {"base_model": "a/b/c"},
        {"base_model": "hf://../x"},
        {"tokenizer_source": "/etc/model"},
        {"vectors": {"x": {"source": "./x"}, "y": {"source": "a/y"}}},
        {"baselines": {"models": {"m": "/etc/model"}}},
        {"objective": {"terms": [TERM | {"text": "/etc/passwd"}]}},
        {"objective": {"terms": [TERM | {"text": "../secret.jsonl"}]}},
        {"objective": {"terms": [{"task": "t"}], "include_path": "/tmp/tasks"}},
        {"test": {"terms": [TERM | {"text": "~/notes.jsonl"}]}},
        {"objective": {"terms": [{"task": "t"}], "constraints": [{"text": "a/b.jsonl"}]}},
    ],
)
def test_a_pulled_study_names_no_local_files(pulled, change):
    file = pulled / "study" / "study.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(HubError, match=r"study\.json: .*may not name local files"):
        check_pulled("recipe", pulled)


def test_the_digest_of_a_log_is_of_its_search_trials_only(finished, tmp_path):
    log, digests = TrialLog(tmp_path / "trials.jsonl"), []
    for trial in finished.log.trials:
        log.append(trial)
        digests.append(log.digest())
    n_search = len(finished.log.trials_at("search"))
    assert len(set(digests)) == n_search
    assert digests[-1] == digests[n_search - 1] == finished.decisions.decisions[-1].trials
