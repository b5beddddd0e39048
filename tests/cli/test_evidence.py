"""evaluate and compare on tiny models."""

import json

import yaml

from tests.support.cli import optimer, search_merge


def test_evaluate_prints_scores_as_text_and_as_json(folder, pool):
    text = optimer("evaluate", pool[0], folder / "obj.yaml", "--dtype", "float32").stdout
    data = json.loads(
        optimer(
            "evaluate", pool[0], folder / "obj.yaml", "--dtype", "float32", "--format", "json"
        ).stdout
    )
    assert set(data) == {"aaa", "xyz"} and data["aaa"]["n_items"] == 3
    assert f"aaa: bits_per_byte {data['aaa']['score']:.4f} on 3 items (limited)" in text


def test_compare_without_a_sealed_test_says_what_is_missing(folder, tmp_path):
    search_merge(folder, tmp_path / "s", 1)
    assert "no `test:` section" in optimer("compare", tmp_path / "s", ok=False).stderr


def test_a_study_is_searched_and_compared(folder, pool, corpus_dir, tmp_path):
    study = {
        "base_model": str(pool[0]),
        "dtype": "float32",
        "vectors": {f"v{index}": {"source": str(path)} for index, path in enumerate(pool[1])},
        "objective": {"terms": [{"text": str(corpus_dir / "aaa.search.jsonl")}], "limit": 3},
        "test": {"terms": [{"text": str(corpus_dir / "aaa.test.jsonl")}]},
        "search": {"n_trials": 5, "rescore_top": 1},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study), encoding="utf-8")
    optimer("search", tmp_path / "study.yaml", tmp_path / "s")
    optimer("recipe", tmp_path / "s", tmp_path / "before" / "recipe.yaml")
    text = optimer("compare", tmp_path / "s").stdout
    data = json.loads(optimer("compare", tmp_path / "s", "--format", "json").stdout)
    names = [row["name"] for row in data["rows"]]
    assert names[0] == "base" and "searched merge" in names
    assert all(f"| {name} |" in text for name in names)
    optimer("recipe", tmp_path / "s", tmp_path / "after" / "recipe.yaml")
    scores = [
        yaml.safe_load((tmp_path / when / "recipe.yaml").read_text(encoding="utf-8"))["scores"]
        for when in ("before", "after")
    ]
    assert "sealed" not in scores[0]
    assert scores[1]["sealed"]["verdicts"] == data["verdicts"]


def test_a_figure_that_cannot_be_written_is_refused_before_anything_is_scored(searched, tmp_path):
    (tmp_path / "file").write_text("mine")
    figure = tmp_path / "file" / "x.png"
    result = optimer("compare", searched[0], "--figure", figure, ok=False)
    assert "file: cannot create this directory" in result.stderr
