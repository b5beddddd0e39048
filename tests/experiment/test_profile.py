"""profile.py: mistakes in a profile are named with the profile and their line in it."""

import json
from pathlib import Path

import pytest
import yaml

from optimer_hf.experiment.profile import lay_over, read_profile, read_recipe_files
from optimer_hf.scoring.objective import Objective
from tests.support.experiments import run_optimer


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "study:\n  objective:\n    limt: 3\n",
            "gpu.yaml:3: unknown field 'objective.limt'. Did you mean 'limit'?",
        ),
        (
            "train:\n  max_tokns: 5\n",
            "gpu.yaml:2: unknown field 'max_tokns'. Did you mean 'max_tokens'?",
        ),
        ("train:\n  trainer:\n    lerning_rate: 1\n", "gpu.yaml:3: trainer.lerning_rate: unknown"),
        (
            "train:\n  trainer: {neftune_noise_alpha: 1}\n  max_tokens: many\n",
            "gpu.yaml:3: max_tokens: found 'many'",
        ),
        ("train:\n  block_size: 64\n  replay: {path: gone.jsonl, share: 0.1}\n", "gpu.yaml:3: "),
        (
            "study:\n  objective:\n    terms:\n      xyz:\n        text: gone.jsonl\n",
            "gpu.yaml:5: objective.terms.1.text: ",
        ),
        (
            "study:\n  search: {n_trials: 2}\n  vectors:\n    new:\n      fixed: 1.0\n",
            "gpu.yaml:4: ",
        ),
        ("study:\n  base_model: another/base\n", "gpu.yaml:2: vectors.aaa is trained from"),
        ("study:\n  search: {n_trials: 2}\n  tokenizer_source: aaa\n", "gpu.yaml:3: tokenizer_s"),
        (
            "study:\n  objective:\n    terms:\n      klingon: {limit: 2}\n      xyz: {limit: 2}\n",
            "gpu.yaml:4: nothing is named 'klingon'; known: aaa, xyz, mix.",
        ),
        ("study: {}\ntrain:\n", "gpu.yaml:2: train: found nothing, expected a mapping"),
    ],
)
def test_a_mistake_in_a_profile_is_named_with_its_line_in_the_profile(
    recipe_dir: Path, tmp_path: Path, text: str, message: str
):
    (recipe_dir / "gpu.yaml").write_text(text)
    file = recipe_dir / "gpu.yaml"
    result = run_optimer("run", recipe_dir, tmp_path / "out", "--profile", "gpu")
    assert result.exit_code == 1
    assert f"error: {file}" in result.output and message in result.output
    assert "study.yaml" not in result.output and "train-" not in result.output


def test_a_mistake_in_a_file_below_a_profile_is_named_with_that_file(recipe_dir, tmp_path):
    (recipe_dir / "gpu.yaml").write_text("study: {objective: {limit: 2}}\n")
    file = recipe_dir / "study.yaml"
    file.write_text(f"serch: {{}}\n{file.read_text()}")
    result = run_optimer("run", recipe_dir, tmp_path / "out", "--profile", "gpu")
    assert f"error: {file}:1: unknown field 'serch'" in result.output


@pytest.mark.parametrize(
    "source",
    [
        {"text": "data/mix.val.jsonl"},
        {"text": "a.jsonl", "name": "mix"},
        {"task": "mix"},
        {"function": "my_metrics.py:mix", "higher_is_better": True},
        {"function": "mix", "higher_is_better": True},
    ],
)
def test_a_profile_goes_by_what_tables_call_a_term(recipe_dir: Path, source):
    study = yaml.safe_load((recipe_dir / "study.yaml").read_text())
    study["objective"]["terms"] = [{"text": "other.jsonl"}, source]
    (recipe_dir / "study.yaml").write_text(yaml.safe_dump(study))
    (recipe_dir / "gpu.yaml").write_text("study: {objective: {terms: {mix: {limit: 3}}}}")
    profile = read_profile(recipe_dir / "gpu.yaml")
    terms = lay_over(recipe_dir / "study.yaml", profile, "study").data["objective"]["terms"]
    assert terms == [{"text": "other.jsonl"}, source | {"limit": 3}]
    objective = Objective.model_validate({"terms": terms})
    assert objective.terms[1].label == "mix", "the label of the record, by which the profile went"


def test_a_profile_may_leave_a_field_of_the_whole_run_with_nothing_to_do(recipe_dir: Path, caplog):
    study = yaml.safe_load((recipe_dir / "study.yaml").read_text())
    study["search"] |= {"rescore_top": 1, "rescore_limit": 3}
    (recipe_dir / "study.yaml").write_text(yaml.safe_dump(study))
    (recipe_dir / "gpu.yaml").write_text("study: {search: {rescore_top: 0}}\n")
    read_recipe_files(recipe_dir, read_profile(recipe_dir / "gpu.yaml"))
    assert not caplog.messages
    study["search"]["rescore_top"] = 0
    (recipe_dir / "study.yaml").write_text(yaml.safe_dump(study))
    read_recipe_files(recipe_dir, None)
    (line,) = caplog.messages
    assert "study.yaml:" in line and "search.rescore_limit: does nothing where" in line


def test_a_list_without_names_takes_no_mapping(recipe_dir: Path, tmp_path: Path):
    study = yaml.safe_load((recipe_dir / "study.yaml").read_text())
    study["search"]["report_to"] = ["tensorboard"]
    (recipe_dir / "study.yaml").write_text(yaml.safe_dump(study))
    (recipe_dir / "gpu.yaml").write_text("study:\n  search: {report_to: {wandb: 1}}\n")
    result = run_optimer("run", recipe_dir, tmp_path / "out", "--profile", "gpu")
    file = recipe_dir / "gpu.yaml"
    assert f"error: {file}:2: report_to: found a mapping, but the items" in result.output


@pytest.mark.parametrize("beside", [True, False], ids=["in its folder", "alone"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("study:\n  objective:\n    limt: 3\n", ":3: unknown field 'objective.limt'."),
        ("train:\n  max_tokns: 5\n", ":2: unknown field 'max_tokns'."),
        ("study: {}\ntrain:\n", ":2: train: found nothing, expected a mapping"),
        ("study:\ntrain: {}\n", ":1: study: found nothing, expected a mapping"),
        ("study: {}\ntrian: {}\n", ":2: unknown field 'trian'. Did you mean 'train'?"),
    ],
)
def test_validate_refuses_what_a_run_refuses(recipe_dir, tmp_path, beside, text, message):
    file = (recipe_dir if beside else tmp_path) / "gpu.yaml"
    file.write_text(text)
    assert f"error: {file}{message}" in run_optimer("validate", file).output
    if beside:
        run = run_optimer("run", recipe_dir, tmp_path / "out", "--profile", "gpu")
        assert f"error: {file}{message}" in run.output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("study:\n  base_model: another/base\n", ":2: vectors.aaa is trained from"),
        ("study:\n  test: null\n", ":2: field 'test' is missing. A run ends with"),
        ("study:\n  search: {n_trials: 2}\n  tokenizer_source: aaa\n", ":3: tokenizer_source: "),
        ("study:\n  search: {sampler: nobody}\n", ":2: search.sampler: found 'nobody'"),
        (
            "study:\n  baselines:\n    models: {base: you/model}\n",
            ":3: baselines.models.base: 'base' is the title of another row.",
        ),
        (
            "study:\n  test:\n    terms:\n      xyz: {text: null, function: f, "
            "higher_is_better: true, name: xyz}\n",
            ":4: term 'xyz': found the function 'f', which only Python can give.",
        ),
        (
            "train: {max_tokens: 64}\nstudy:\n  baselines:\n    attempts: [8]\n",
            ":4: baselines.attempts: 8 attempts leave 16 tokens for each, less than a block of 32. "
            "Give fewer attempts, or more tokens to the vectors (max_tokens in gpu.yaml).",
        ),
        (
            "study:\n  vectors: {aaa: {fixed: 0.5}}\n  baselines:\n    attempts: [2]\n",
            ":4: baselines.attempts: vector 'aaa' is trained here and fixed",
        ),
        ("train:\n  trainer:\n    optim: adam_w\n", ":3: trainer.optim: "),
    ],
)
def test_validate_of_a_profile_makes_the_checks_of_a_run(recipe_dir, tmp_path, text, message):
    file = recipe_dir / "gpu.yaml"
    file.write_text(text)
    run = run_optimer("run", recipe_dir, tmp_path / "out", "--profile", "gpu").output
    found = run_optimer("validate", file).output
    assert f"error: {file}{message}" in run
    assert [line for line in run.splitlines() if "error: " in line] == [
        line for line in found.splitlines() if "error: " in line
    ]
    assert "study.yaml" not in run and "study.yaml" not in found


def test_an_error_about_two_files_names_both(recipe_dir: Path, tmp_path: Path):
    study = recipe_dir / "study.yaml"
    study.write_text(f"baselines: {{attempts: [8]}}\n{study.read_text()}")
    (recipe_dir / "gpu.yaml").write_text("train: {max_tokens: 64}\n")
    found = run_optimer("validate", recipe_dir / "gpu.yaml").output
    assert f"error: {study}:1: baselines.attempts: 8 attempts leave" in found
    assert "(max_tokens in gpu.yaml)" in found


def test_validate_refuses_the_study_of_a_folder_that_no_run_takes(recipe_dir: Path):
    study = recipe_dir / "study.yaml"
    data = yaml.safe_load(study.read_text())
    study.write_text(yaml.safe_dump(data | {"test": None}))
    assert "field 'test' is missing. A run ends" in run_optimer("validate", study).output
    next(recipe_dir.glob("train-*.yaml")).unlink()
    assert "a valid study" in run_optimer("validate", study).output


@pytest.mark.parametrize(
    ("of_study", "max_tokens", "profile"),
    [
        ({"test": None}, 64, "study: {test: TEST}\n"),
        ({"baselines": {"attempts": [8]}}, 64, "train: {max_tokens: 4096}\n"),
        ({"baselines": {"attempts": [2]}}, None, "train: {max_tokens: 4096}\n"),
        ({"baselines": {"attempts": [2]}}, None, None),  # for `optimer run --tokens`
    ],
)
def test_validate_leaves_to_a_profile_and_to_tokens_what_they_give(
    recipe_dir: Path, of_study, max_tokens, profile
):
    study = recipe_dir / "study.yaml"
    whole = yaml.safe_load(study.read_text())
    study.write_text(yaml.safe_dump(whole | of_study))
    for file in recipe_dir.glob("train-*.yaml"):
        data = yaml.safe_load(file.read_text()) | {"max_tokens": max_tokens}
        file.write_text(yaml.safe_dump(data))
    (recipe_dir / "short.yaml").unlink()
    if profile is not None:
        (recipe_dir / "gpu.yaml").write_text(profile.replace("TEST", json.dumps(whole["test"])))
        assert "a valid profile" in run_optimer("validate", recipe_dir / "gpu.yaml").output
    assert "a valid study" in run_optimer("validate", study).output


@pytest.mark.parametrize("text", ["format_version: 1\ntrain: {max_tokens: 64}\n", "study: {}\n"])
def test_validate_knows_a_profile(recipe_dir: Path, tmp_path: Path, text: str):
    for file in (recipe_dir / "gpu.yaml", tmp_path / "gpu.yaml"):
        file.write_text(text)
        assert f"{file}: a valid profile of a recipe" in run_optimer("validate", file).output


def test_validate_reads_the_folder_with_the_values_of_the_profile(recipe_dir: Path):
    file = recipe_dir / "gpu.yaml"
    file.write_text("study:\n  objective:\n    terms:\n      xyz: {limit: -1}\n")
    output = run_optimer("validate", file).output
    assert f"error: {file}:4: objective.terms.1.limit: found -1" in output


def test_validate_names_the_missing_files_of_a_profile_and_no_others(recipe_dir: Path):
    study = yaml.safe_load((recipe_dir / "study.yaml").read_text())
    study["test"]["terms"].append({"text": "lost.jsonl"})
    (recipe_dir / "study.yaml").write_text(yaml.safe_dump(study))
    file = recipe_dir / "gpu.yaml"
    file.write_text("study:\n  objective: {terms: {xyz: {text: gone.jsonl}}}\n")
    output = run_optimer("validate", file).output
    assert f"{file}:2: objective.terms.1.text: {recipe_dir / 'gone.jsonl'}: no such" in output
    assert "lost.jsonl" not in output
    assert run_optimer("validate", "--strict", file).exit_code == 1
