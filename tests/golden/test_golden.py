"""Whatever an earlier version wrote is read: studies, runs, recipes with their locks, vectors."""

import json
from pathlib import Path

import pytest

from optimer_hf.comparison.sealed_file import read_comparison
from optimer_hf.files.digest import sha256_file
from optimer_hf.models.resolve import resolve_base
from optimer_hf.recipes.record import Recipe
from optimer_hf.searching.loop import search
from optimer_hf.searching.runner import InProcess
from optimer_hf.study.directory import load_study
from optimer_hf.study.prediction import front, predict
from optimer_hf.training.config import TrainConfig
from optimer_hf.training.run import is_trained
from optimer_hf.vectors.opening import open_vector
from optimer_hf.vectors.record import read_record
from tests.support.experiments import run_optimer
from tests.support.landscapes import no_pool_for

KINDS = {
    "adapter": "adapter",
    "checkpoint": "checkpoint",
    "delta-bfloat16": "delta",
    "delta-int8": "delta",
}


def test_a_study_is_read(golden: Path):
    study = load_study(golden / "runs" / "tiny")
    recipe = Recipe.read(golden / "runs" / "tiny" / "recipe.yaml")
    assert study.is_finished
    assert study.best_trial.weights == recipe.weights
    assert recipe.study is not None and study.best_trial.number == recipe.study.incumbent
    assert study.value(study.best_trial) == recipe.scores["rescore"].value
    assert (
        set(predict(study).weights) == set(predict(study, {"xyz": 1.0}).weights) == {"aaa", "xyz"}
    )
    assert front(study)


def test_a_finished_study_is_not_searched_again(golden: Path):
    study = load_study(golden / "runs" / "tiny")
    again = search(study.config, study.directory, runner=InProcess(no_pool_for("the study")))
    assert again.log.trials == study.log.trials and again.best_trial == study.best_trial


def test_the_rows_of_the_sealed_test_are_read(golden: Path):
    study = load_study(golden / "runs" / "tiny")
    comparison = read_comparison(study)
    results = json.loads((golden / "runs" / "tiny" / "results.json").read_text(encoding="utf-8"))
    known = {row["name"]: row["value"] for row in results["rows"]}
    assert comparison is not None
    assert comparison.value(comparison.merge) == known["searched merge"]
    # of rows with equal weights one was scored
    assert {comparison.value(row) for row in comparison.rows} == set(known.values())


def test_a_report_is_written_of_a_study(golden: Path, tmp_path: Path):
    result = run_optimer("report", golden / "runs" / "tiny" / "study", tmp_path / "report.html")
    assert result.exit_code == 0, result.output
    assert "searched merge" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_run_that_is_finished_has_nothing_to_do(golden: Path, caplog: pytest.LogCaptureFixture):
    run = golden / "runs" / "tiny"
    before = {path: sha256_file(path) for path in run.rglob("*") if path.is_file()}
    with caplog.at_level("INFO"):
        result = run_optimer("run", golden / "recipes" / "tiny", run)
    assert result.exit_code == 0, result.output
    assert "nothing to do" in caplog.text
    after = {path: sha256_file(path) for path in run.rglob("*") if path.is_file()}
    assert after == before


def test_a_recipe_is_built_again_to_the_locked_model(golden: Path, tmp_path: Path):
    recipe = golden / "runs" / "tiny" / "recipe.yaml"
    for arguments in (
        ("verify", recipe, golden / "runs" / "tiny" / "merged"),
        ("build", recipe, tmp_path / "merged"),
        ("verify", recipe, tmp_path / "merged"),
    ):
        result = run_optimer(*arguments)
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", KINDS)
def test_a_vector_of_each_kind_is_opened(golden: Path, name: str):
    path = golden / "vectors" / name
    vector = open_vector(name, str(path), resolve_base(str(golden / "base")))
    record = read_record(path)
    assert record is not None
    assert vector.kind == record.kind == KINDS[name]
    assert record.norm > 0 and vector.names


def test_a_trained_vector_is_not_trained_again(golden: Path):
    config = TrainConfig.read(golden / "train-full.yaml")
    assert is_trained(config, golden / "vectors" / "checkpoint")
    of_run = TrainConfig.read(golden / "recipes" / "tiny" / "train-aaa.yaml")
    assert is_trained(of_run, golden / "runs" / "tiny" / "vectors" / "aaa")
