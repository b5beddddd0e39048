"""folder.py: mistakes in a recipe folder are named before anything is trained."""

from pathlib import Path

import pytest
import yaml

from tests.support.experiments import run_optimer


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("study.yaml", {"objectiv": {}}, "Did you mean 'objective'?"),
        ("study.yaml", {"search": {"n_trails": 3}}, "search.n_trails"),
        ("train-xyz.yaml", {"max_tokens": "many"}, "max_tokens"),
        ("train-xyz.yaml", {"trainer": {"lerning_rate": 1}}, "Did you mean 'learning_rate'?"),
        ("train-xyz.yaml", {"corpus": {"path": "nowhere.jsonl"}}, "no such file"),
        ("train-xyz.yaml", {"base_model": "another/base"}, "Give both the same base"),
        ("study.yaml", {"retarget": {"x": {"klingon": 1}}}, "klingon"),
        ("study.yaml", {"baselines": {"models": {"m": "./gone"}}}, "baselines.models.m: "),
        (
            "study.yaml",
            {"search": {"report_to": ["tensorbord"]}},
            "report_to.0: found 'tensorbord'",
        ),
        ("study.yaml", {"objective": {"terms": [{"function": "f"}]}}, "higher_is_better"),
        (
            "study.yaml",
            {"objective": {"terms": [{"function": "f", "higher_is_better": True}]}, "retarget": {}},
            "found the function 'f', which only Python can give",
        ),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(
    recipe_dir: Path, tmp_path: Path, file: str, change: dict[str, object], message: str
):
    path = recipe_dir / file
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | change))
    result = run_optimer("run", recipe_dir, tmp_path / "out")
    assert result.exit_code == 1
    assert result.output.startswith("error: ")
    assert message in result.output
    assert not (tmp_path / "out" / "vectors").exists()


@pytest.mark.parametrize(
    ("short", "message"),
    [
        ({"trian": {}}, "short.yaml: unknown field 'trian'. Known: study, train."),
        ({"train": "x"}, "short.yaml: train: found 'x', expected a mapping"),
        (
            {"study": {"objective": {"terms": {"klingon": {"weight": 2}}}}},
            "short.yaml: nothing is named 'klingon'; known: aaa, xyz, mix",
        ),
    ],
)
def test_mistakes_of_the_short_budget_are_named(recipe_dir: Path, tmp_path, short, message):
    (recipe_dir / "short.yaml").write_text(yaml.safe_dump(short))
    result = run_optimer("run", recipe_dir, tmp_path / "out", "--short")
    assert result.exit_code == 1 and message in result.output


def test_a_given_vector_that_is_not_there_ends_a_run_before_it_trains(recipe_dir: Path, tmp_path):
    path = recipe_dir / "study.yaml"
    study = yaml.safe_load(path.read_text())
    study["vectors"]["it"] = {"source": "./gone", "fixed": 1.0}
    path.write_text(yaml.safe_dump(study))
    result = run_optimer("run", recipe_dir, tmp_path / "out")
    assert result.exit_code == 1 and "vectors.it.source: " in result.output
    assert not (tmp_path / "out").exists()
