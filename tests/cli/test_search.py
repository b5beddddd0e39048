"""search and retarget on tiny models."""

import json
import re

import pytest
import torch
import yaml

from optimer_hf.errors import StudyError
from optimer_hf.searching.workers import Cluster, Workers
from tests.support.cli import assert_is_merge, optimer, search_merge
from tests.support.landscapes import config_of


def test_a_mergekit_yaml_of_base_plus_adapter_is_searched(
    folder, make_base, make_adapter, tmp_path
):
    base = make_base("llama", torch.float32)
    adapter = make_adapter(base, 1)
    config = yaml.safe_load((folder / "my-merge.yml").read_text())
    config["models"] = [{"model": f"{base.path}+{adapter}", "parameters": {"weight": 0.5}}]
    path = tmp_path / "m.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    objective = ("--objective", folder / "obj.yaml")
    result = optimer("search", path, tmp_path / "s", *objective, "--n-trials", "3")
    (model,) = yaml.safe_load(result.stdout)["models"]
    assert model["model"] == f"{base.path}+{adapter}"


def test_a_mergekit_yaml_is_searched_and_comes_back_as_a_yaml_with_weights(folder, pool, tmp_path):
    result = search_merge(folder, tmp_path / "s", 4)
    config = yaml.safe_load(result.stdout)
    assert config["merge_method"] == "task_arithmetic"
    assert [list(model["parameters"]) for model in config["models"]] == [["weight"], ["weight"]]
    assert len((tmp_path / "s" / "trials.jsonl").read_text().splitlines()) >= 4
    weights = [model["parameters"]["weight"] for model in config["models"]]
    (tmp_path / "s" / "printed.yml").write_text(result.stdout, encoding="utf-8")
    optimer("merge", tmp_path / "s" / "printed.yml", tmp_path / "merged")
    assert_is_merge(tmp_path / "merged", pool, weights)

    assert "without recipe.yaml" in optimer("build", tmp_path, tmp_path / "b", ok=False).stderr
    optimer("build", tmp_path / "s", tmp_path / "built")  # its recipe.yaml
    assert_is_merge(tmp_path / "built", pool, weights)
    assert (
        "the weights are those of"
        in optimer("verify", tmp_path / "s" / "recipe.yaml", tmp_path / "built").stdout
    )
    assert "recipe" in optimer("validate", tmp_path / "s" / "recipe.yaml").stdout

    again = optimer(
        *("search", folder / "my-merge.yml", tmp_path / "s", "--objective", folder / "obj.yaml"),
        *("--n-trials", "4", "--format", "json"),
    )
    assert list(json.loads(again.stdout)["weights"].values()) == weights


def test_an_objective_beside_a_study_that_has_its_own_is_refused(folder, tmp_path):
    (tmp_path / "study.yaml").write_text(
        "base_model: a/b\nvectors: {w: {source: a/w}}\nobjective: {terms: [{task: piqa}]}\n",
        encoding="utf-8",
    )
    arguments = [
        "search",
        tmp_path / "study.yaml",
        tmp_path / "s",
        "--objective",
        folder / "obj.yaml",
    ]
    assert "has its own objective" in optimer(*arguments, ok=False).stderr


def test_search_prints_front_and_ledger_beside_the_merge_config(searched):
    _, result = searched
    assert yaml.safe_load(result.stdout)["merge_method"] == "task_arithmetic"
    assert "Pareto front" in result.stderr and "| pick | trial | aaa" in result.stderr
    assert re.search(r"\* search: [\d.]+ s \(6 merges, 36 items, [\d,]+ tokens: ", result.stderr)
    assert re.search(r"minus the base: \+\d+\.\d\d % \[[+-]\d+\.\d\d, \+\d+\.\d\d\]", result.stderr)
    assert "minus the next best, trial" in result.stderr


def test_another_objective_is_answered_from_the_record_and_verified(searched, tmp_path):
    study, _ = searched
    target = tmp_path / "target.yaml"
    terms = [{"text": "xyz.search.jsonl", "weight": 1.0}]
    target.write_text(yaml.safe_dump({"terms": terms}), encoding="utf-8")
    before = (study / "trials.jsonl").read_bytes()
    text = optimer("retarget", study, target).stdout
    assert "predicted: value" in text and "xyz: gain" in text
    assert re.search(r"weights: \S+ [\d.]+, \S+ [\d.]+\n", text)
    result = json.loads(
        optimer(
            *("retarget", study, target, tmp_path / "new", "--n-trials", 1, "--format", "json")
        ).stdout
    )
    assert result["verified"]["ledger"]["search"]["n"] == 7
    assert (study / "trials.jsonl").read_bytes() == before
    lines = (tmp_path / "new" / "trials.jsonl").read_text().splitlines()
    assert json.loads(lines[6])["weights"] == result["prediction"]["weights"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("retarget", ".", "obj.yaml", "--n-trials", "3"), "OUT and --n-trials go together"),
        (
            ("retarget", ".", ".", "O", "--n-trials", "3", "--workers", "2", "--scheduler", "x"),
            "--workers starts a cluster and --scheduler uses one",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused(folder, monkeypatch, arguments, message):
    monkeypatch.chdir(folder)
    assert message in optimer(*arguments, ok=False).stderr


def test_a_search_says_that_it_waits_for_its_workers(monkeypatch, caplog):
    def never(cluster):
        raise StudyError("no worker")

    caplog.set_level("INFO")
    monkeypatch.setattr(Cluster, "_wait_for_workers", never)
    with pytest.raises(StudyError):
        Workers(n_workers=2).open(config_of()).digest_inputs()
    assert caplog.messages == ["search: opening base, vectors and tasks in the workers"]
