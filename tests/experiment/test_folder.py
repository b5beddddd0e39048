"""folder.py: mistakes in a recipe folder are named before anything is trained."""

from pathlib import Path

import pytest
import yaml

from optimer_hf.errors import ConfigError
from optimer_hf.experiment.folder import check_folder, load_inputs, run_of
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
        ({"trian": {}}, "short.yaml:1: unknown field 'trian'. Did you mean 'train'?"),
        ({"train": "x"}, "short.yaml:1: train: found 'x', expected a mapping"),
        (
            {"study": {"objective": {"terms": {"klingon": {"weight": 2}}}}},
            "short.yaml:4: nothing is named 'klingon'; known: aaa, xyz, mix",
        ),
    ],
)
def test_mistakes_of_the_short_budget_are_named(recipe_dir: Path, tmp_path, short, message):
    (recipe_dir / "short.yaml").write_text(yaml.safe_dump(short))
    result = run_optimer("run", recipe_dir, tmp_path / "out", "--short")
    assert result.exit_code == 1 and message in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--profile", "gpus"], "no profile 'gpus', which would be the file gpus.yaml"),
        (["--profile", "gpus"], "Did you mean 'gpu'?"),
        (["--profile", "study"], "Known: gpu, short."),
        (["--profile", "../tiny/gpu"], "Known: gpu, short."),
        (["--short", "--profile", "gpu"], "--short is --profile short, and --profile gpu is"),
        (["--profile", "gpu"], "gpu.yaml:4: nothing is named 'klingon'; known: aaa, xyz, mix"),
    ],
)
def test_mistakes_with_profiles_are_named(recipe_dir: Path, tmp_path, options, message):
    change = {"objective": {"terms": {"klingon": {"weight": 2}}}}
    (recipe_dir / "gpu.yaml").write_text(yaml.safe_dump({"study": change}))
    for command in ("run", "plan"):
        result = run_optimer(command, recipe_dir, tmp_path / "out", *options)
        assert result.exit_code == 1 and message in result.output


def test_a_profile_is_laid_over_the_files_of_a_folder_and_has_results_of_its_own(recipe_dir: Path):
    terms = [{"name": "xyz", "text": str(recipe_dir / "items.jsonl")}]  # a list replaces a list
    (recipe_dir / "items.jsonl").write_text('{"text": "aaa aaa aaa"}\n')
    profile = {
        "train": {"max_tokens": 512, "trainer": {"per_device_train_batch_size": 2}},
        "study": {"objective": {"terms": terms}},
    }
    (recipe_dir / "gpu.yaml").write_text(yaml.safe_dump(profile))
    plain, short, gpu = (
        run_of(recipe_dir),
        run_of(recipe_dir, short=True),
        run_of(recipe_dir, profile="gpu"),
    )
    assert [run.out.name for run in (plain, short, gpu)] == ["tiny", "tiny-short", "tiny-gpu"]
    assert run_of(recipe_dir, profile="short") == short
    assert len({run.inputs_digest() for run in (plain, short, gpu)}) == 3
    inputs = load_inputs(gpu)
    assert inputs.study.objective.limit == 4, "what the profile does not name stays"
    assert [term.label for term in inputs.study.objective.terms] == ["xyz"]
    for training in inputs.trainings.values():
        assert training.max_tokens == 512 and training.trainer["learning_rate"] == 2e-2
        assert training.trainer["per_device_train_batch_size"] == 2
    assert (
        load_inputs(run_of(recipe_dir, profile="gpu", tokens=64)).trainings["aaa"].max_tokens == 64
    )


def test_a_given_vector_that_is_not_there_ends_a_run_before_it_trains(recipe_dir: Path, tmp_path):
    path = recipe_dir / "study.yaml"
    study = yaml.safe_load(path.read_text())
    study["vectors"]["it"] = {"source": "./gone", "fixed": 1.0}
    path.write_text(yaml.safe_dump(study))
    result = run_optimer("run", recipe_dir, tmp_path / "out")
    assert result.exit_code == 1 and "vectors.it.source: " in result.output
    assert not (tmp_path / "out").exists()


def test_a_mixture_that_cannot_be_trained_is_named_before_libraries_load(recipe_dir: Path):
    study = recipe_dir / "study.yaml"
    data = yaml.safe_load(study.read_text()) | {"baselines": {"attempts": [99]}}
    study.write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match="99 attempts leave"):
        check_folder(run_of(recipe_dir))
