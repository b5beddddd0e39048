"""sealed_file.py: rows on disk, and those that version 0.1.0 wrote as trials."""

import json
from dataclasses import asdict, replace

import pytest

from optimer_hf.comparison.result import verdicts
from optimer_hf.comparison.sealed import compare
from optimer_hf.comparison.sealed_file import SealedLog, kind_of_title, read_comparison
from optimer_hf.errors import StudyError
from optimer_hf.searching.loop import search
from optimer_hf.searching.runner import InProcess
from tests.support.landscapes import FunctionPool, config_of, no_pool_for, with_test

CHANGES = {
    "retarget": {"for q": {"q": 1.0}},
    "baselines": {
        "searches": {"random": {"surrogate": "random", "n_trials": 5}},
        "models": {"w at 2.0": "you/model"},
    },
}


@pytest.fixture
def study(tmp_path):
    study = search(with_test(**CHANGES), tmp_path / "s", runner=InProcess(FunctionPool))
    compare(study, pool=FunctionPool)
    return study


def as_trial(row):
    """Return a row as 0.1.0 wrote it."""
    return {
        "number": row.n_trials_known,
        "origin": row.title,
        "fidelity": "sealed",
        "weights": row.weights,
        "status": "ok",
        "terms": {label: asdict(score) for label, score in row.scores.items()},
        "seconds": row.seconds,
        "n_tokens": row.n_tokens,
        "error": None,
        "worker": None,
    }


def write_as_trials(study, n: int | None = None) -> None:
    """Make the first n rows of a study (None: all) what 0.1.0 wrote."""
    path = study.directory / "sealed.jsonl"
    rows = SealedLog(study.directory, study.config).rows
    lines = path.read_text().splitlines()
    old = [json.dumps(as_trial(row)) for row in rows]
    n = len(rows) if n is None else n
    path.write_text("".join(f"{line}\n" for line in [*old[:n], *lines[n:]]))


def test_rows_are_recorded_by_kind_and_subject(study):
    lines = (study.directory / "sealed.jsonl").read_text().splitlines()
    data = {(line["kind"], line["subject"]) for line in map(json.loads, lines)}
    assert ("alone", "x") in data and ("retargeted", "for q") in data
    assert {("other_search", "random"), ("model", "w at 2.0")} <= data


def test_a_row_with_the_weights_of_another_is_read_with_its_scores(study):
    compared = compare(study, pool=no_pool_for("everything"))
    assert len({row.key for row in compared.rows}) < len(compared.rows)
    read = read_comparison(study)
    scores = {(row.kind, row.subject): row.scores for row in read.rows}
    assert scores == {(row.kind, row.subject): row.scores for row in compared.rows}
    assert verdicts(read) == verdicts(compared)
    log = SealedLog(study.directory, study.config)
    assert [row.key for row in log.scored] == list(dict.fromkeys(row.key for row in log.rows))
    assert all(row.seconds for row in log.scored)


def test_weights_that_a_longer_search_chooses_again_are_those_of_the_row(study):
    before = read_comparison(study)
    log = SealedLog(study.directory, study.config)
    log.append(replace(before.merge, weights=before.merge.weights | {"w": 1.23}))
    assert read_comparison(study) is None, "the best trial was not tested"
    compared = compare(study, pool=no_pool_for("everything"))
    assert compared.merge == before.merge
    assert read_comparison(study).merge.weights == before.merge.weights


@pytest.mark.parametrize("n", [None, 3])
def test_rows_of_0_1_0_are_read_as_those_of_today(study, n):
    rows = SealedLog(study.directory, study.config).rows
    before = read_comparison(study)
    write_as_trials(study, n)
    assert SealedLog(study.directory, study.config).rows == rows
    assert read_comparison(study) == before
    assert compare(study, pool=no_pool_for("everything")).rows[0] == before.base


def test_rows_of_0_1_0_without_a_seal_were_planned_when_they_are_the_first(study):
    write_as_trials(study)
    (study.directory / "sealed.json").unlink()
    path = study.directory / "sealed.jsonl"
    trials = [json.loads(line) for line in path.read_text().splitlines()]
    *lines, last = [trial for trial in trials if trial["seconds"]]  # 0.1.0 wrote no equals
    last["number"] += 4
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, last]))
    rows = SealedLog(study.directory, study.config).rows
    assert [row.chosen_after_seal for row in rows] == [False] * len(lines) + [True]
    assert not (study.directory / "sealed.json").exists(), "reading writes nothing"


@pytest.mark.parametrize("changes", [{"status": "crashed", "terms": {}}, {"fidelity": "search"}])
def test_a_trial_that_is_no_row_is_named_with_its_line(study, changes):
    write_as_trials(study)
    path = study.directory / "sealed.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1] |= changes
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(StudyError, match=r"sealed\.jsonl:2: .*expected sealed and ok"):
        read_comparison(study)


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("base", ("base", "")),
        ("x at 1.0", ("alone", "x")),
        ("x at its best scale, 0.65", ("best_scale", "x")),
        ("dare_ties", ("method", "dare_ties")),
        ("random vectors of equal norm", ("random", "")),
        ("x at 2.0", ("mixture", "x at 2.0")),
        ("re-targeted to x at 1.0", ("retargeted", "x at 1.0")),
        ("mine", ("model", "mine")),  # of the command line: no config knows it
    ],
)
def test_titles_of_0_1_0_say_what_a_row_was(title, expected):
    assert kind_of_title(title, config_of(baselines={"mixtures": {"x at 2.0": {}}})) == expected
