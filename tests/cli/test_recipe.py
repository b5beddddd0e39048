"""recipe, build and verify on tiny models."""

import json

import yaml

from optimer_hf.files.staging import write_text
from tests.support.cli import assert_is_merge, optimer, search_merge


def test_recipe_of_a_study_also_comes_as_a_config_for_unmodified_mergekit(folder, pool, tmp_path):
    search_merge(folder, tmp_path / "s", 2)
    optimer("recipe", tmp_path / "s", tmp_path / "r" / "recipe.yaml", "--vanilla")
    recipe = yaml.safe_load((tmp_path / "r" / "recipe.yaml").read_text(encoding="utf-8"))
    config = yaml.safe_load((tmp_path / "r" / "mergekit_config.yml").read_text(encoding="utf-8"))
    assert config["merge_method"] == "task_arithmetic"
    assert config["parameters"]["normalize"] is False
    optimer("merge", tmp_path / "r" / "mergekit_config.yml", tmp_path / "merged")
    assert_is_merge(
        tmp_path / "merged", pool, [entry["weight"] for entry in recipe["vectors"].values()]
    )


def test_a_recipe_says_whether_mergekit_alone_makes_its_merge(folder, tmp_path):
    search_merge(folder, tmp_path / "s", 2)
    plain, recipe = tmp_path / "r" / "mergekit_config.yml", tmp_path / "r" / "recipe.yaml"
    said = optimer("recipe", tmp_path / "s", recipe).stderr
    assert f"with mergekit alone: mergekit-yaml {plain} OUT\n" in said
    assert "optimer.yml, mergekit_config.yml\n" in said
    first, config = plain.read_text(encoding="utf-8").split("\n", 1)
    assert first.endswith("Run: mergekit-yaml mergekit_config.yml OUT")
    assert yaml.safe_load(config)["merge_method"] == "task_arithmetic"

    study = tmp_path / "s" / "study.json"
    data = json.loads(study.read_text(encoding="utf-8"))
    data["tokenizer_source"] = next(iter(data["vectors"]))
    study.write_text(json.dumps(data), encoding="utf-8")
    said = optimer("recipe", tmp_path / "s", recipe).stderr
    assert "it would cut the embedding to the tokens of tokenizer_source; --vanilla" in said
    assert not plain.exists()

    write_text(plain, "merge_method: ties\n")
    assert (
        "was not written with a recipe"
        in optimer("recipe", tmp_path / "s", recipe, ok=False).stderr
    )


def test_verify_refuses_a_model_that_was_changed(folder, tmp_path):
    search_merge(folder, tmp_path / "s", 1)
    recipe = tmp_path / "s" / "recipe.yaml"
    assert (
        "records no built model" in optimer("verify", recipe, tmp_path / "built", ok=False).stderr
    )
    optimer("build", recipe, tmp_path / "built")
    (weights,) = (tmp_path / "built").glob("*.safetensors")
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "sha256 differs" in optimer("verify", recipe, tmp_path / "built", ok=False).stderr


def test_a_point_of_the_front_becomes_a_recipe(searched, tmp_path):
    study, _ = searched
    optimer("recipe", study, tmp_path / "recipe.yaml", "--pick", 1)
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    trials = [json.loads(line) for line in (study / "trials.jsonl").read_text().splitlines()]
    search_trials = [trial for trial in trials if trial["fidelity"] == "search"]
    best = min(search_trials, key=lambda t: sum(a for a, _ in t["terms"]["aaa"]["items"]))
    assert recipe["study"]["incumbent"] == best["number"]
    assert recipe["ledger"]["search"]["n"] == 6
    again = optimer("recipe", study, tmp_path / "recipe.yaml", "--pick", 1)
    assert "recipe.lock.json, optimer.yml" in again.stderr
    theirs = tmp_path / "theirs"
    for name in ("optimer.yml", "notes.yaml"):
        write_text(theirs / name, "merge_method: ties")
    for name, lost in (("recipe.yaml", "optimer.yml"), ("notes.yaml", "notes.yaml")):
        refused = optimer("recipe", study, theirs / name, ok=False)
        assert f"{lost}: exists and was not written with a recipe" in refused.stderr
    assert {path.read_text() for path in theirs.iterdir()} == {"merge_method: ties\n"}
    result = optimer("recipe", study, tmp_path / "recipe.yaml", "--pick", 99, ok=False)
    assert "--pick 99: the front of" in result.stderr
