"""from_search.py: what a search writes beside its recipe."""

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from optimer_hf.errors import OutputError
from optimer_hf.hub.publication import vanilla_config_of
from optimer_hf.recipes.build import build
from optimer_hf.recipes.from_search import search_study, why_not_mergekit
from optimer_hf.recipes.from_study import recipe_of_study
from optimer_hf.recipes.record import LOCK, VANILLA_CONFIG, Lock, Recipe
from optimer_hf.recipes.write import write_recipe
from optimer_hf.searching.runner import InProcess
from optimer_hf.study.directory import Study, load_study
from optimer_hf.vectors.delta import extract
from optimer_hf.vectors.opening import open_vector
from tests.support.landscapes import FunctionPool
from tests.support.merges import run_plain_mergekit, tensors_in
from tests.support.weights import edit_weights

STUDY = """\
base_model: {base}
vectors: {{w: {{source: {w}}}, x: {{source: {x}}}, y: {{source: {y}}}, z: {{source: {z}}}}}
objective: {{terms: [{{task: t}}, {{task: u}}], limit: 4}}
search: {{n_trials: 7, rescore_top: 0}}
"""


@pytest.fixture
def study_yaml(make_base, make_tuned, tmp_path: Path) -> Path:
    """A study over four checkpoints, whose scores are made up."""
    base = make_base("llama")
    tuned = {name: make_tuned(base, "llama", seed) for seed, name in enumerate("wxyz")}
    path = tmp_path / "study.yaml"
    path.write_text(STUDY.format(base=base.path, **tuned))
    return path


MERGEKIT_YAML = """\
merge_method: task_arithmetic
base_model: {base}
models:
  - {{model: {w}, parameters: {{weight: 1}}}}
  - {{model: {x}, parameters: {{weight: 1}}}}
  - {{model: {y}, parameters: {{weight: 1}}}}
  - {{model: {z}, parameters: {{weight: 1}}}}
dtype: bfloat16
"""


@pytest.fixture(params=["study", "mergekit"])
def unread(request, make_base, make_tuned, tmp_path: Path) -> tuple[Path, Path | None]:
    """A study or a mergekit YAML in which z has a prefix before its names, and its objective."""
    base = make_base("llama")
    tuned = {name: make_tuned(base, "llama", seed) for seed, name in enumerate("wxy")}
    plain = make_tuned(base, "llama", 3)
    tuned["z"] = edit_weights(plain, tmp_path / "vectors" / "z", lambda tensors: None)
    file = tuned["z"] / "model.safetensors"
    save_file({f"policy.{name}": each for name, each in load_file(file).items()}, file)
    path, objective = tmp_path / "given.yaml", tmp_path / "objective.yaml"
    text = {"study": STUDY, "mergekit": MERGEKIT_YAML}[request.param]
    path.write_text(text.format(base=base.path, **tuned))
    objective.write_text("terms: [{task: t}, {task: u}]\nlimit: 4\n")
    return path, objective if request.param == "mergekit" else None


def test_nothing_promises_mergekit_a_vector_whose_tensors_it_does_not_find(unread, tmp_path):
    path, objective = unread
    out, runner = tmp_path / "s", InProcess(FunctionPool)
    study, config = search_study(path, out, objective=objective, n_trials=7, runner=runner)
    assert config["merge_method"] == "optimer"
    name = "z" if objective is None else list(study.config.vectors)[-1]
    reason = f"looks tensors up by the names in the base, and those of {name!r} have others"
    assert reason in str(why_not_mergekit(study, path, out))
    lock, recipe = Lock.read(out / LOCK), Recipe.read(out / "recipe.yaml")
    assert lock.unread == [f"vectors.{name}"]
    assert not (out / VANILLA_CONFIG).exists() and vanilla_config_of(recipe, lock) is None

    said = recipe_of_study(out, tmp_path / "r" / "recipe.yaml").describe()
    assert reason in said and "--vanilla writes a config that it can" in said
    said = recipe_of_study(out, tmp_path / "r" / "recipe.yaml", vanilla=True).describe()
    assert "with mergekit alone: mergekit-yaml" in said
    text = (tmp_path / "r" / VANILLA_CONFIG).read_text()
    run_plain_mergekit(text, tmp_path / "theirs")
    build(tmp_path / "r" / "recipe.yaml", tmp_path / "ours")
    ours, theirs = tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "theirs")
    for key, tensor in ours.items():
        torch.testing.assert_close(theirs[key], tensor, rtol=2**-7, atol=1e-6)


def test_a_pool_of_deltas_is_sent_to_the_config_that_mergekit_runs(make_base, make_tuned, tmp_path):
    base = make_base("llama")
    for seed, name in enumerate("wxyz"):
        tuned = open_vector(name, str(make_tuned(base, "llama", seed)), base)
        extract(tuned, base, tmp_path / name)
    path, objective = tmp_path / "given.yml", tmp_path / "objective.yaml"
    path.write_text(MERGEKIT_YAML.format(base=base.path, **{n: tmp_path / n for n in "wxyz"}))
    objective.write_text("terms: [{task: t}, {task: u}]\nlimit: 4\n")
    out, runner = tmp_path / "s", InProcess(FunctionPool)
    study, config = search_study(path, out, objective=objective, n_trials=7, runner=runner)
    assert config["merge_method"] == "optimer"
    said = why_not_mergekit(study, path, out)
    assert said is not None and "cannot make this merge" not in said
    assert said.endswith(f"It can run {out / VANILLA_CONFIG}.")
    run_plain_mergekit((out / VANILLA_CONFIG).read_text(), tmp_path / "theirs")
    build(out / "recipe.yaml", tmp_path / "ours")
    ours, theirs = tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "theirs")
    for key, tensor in ours.items():
        torch.testing.assert_close(theirs[key], tensor, rtol=2**-7, atol=1e-6)


def search_again(study_yaml: Path, n_trials: int) -> Study:
    out, runner = study_yaml.with_name("s"), InProcess(FunctionPool)
    return search_study(study_yaml, out, n_trials=n_trials, runner=runner)[0]


def weights_of(config: Path) -> list[float]:
    models = yaml.safe_load(config.read_text())["models"]
    return [model["parameters"]["weight"] for model in models]


def test_the_config_for_mergekit_alone_follows_the_recipe_of_a_longer_search(study_yaml: Path):
    recipe = study_yaml.with_name("s") / "recipe.yaml"
    plain = recipe.with_name(VANILLA_CONFIG)
    study = search_again(study_yaml, 7)
    assert weights_of(plain) == list(Recipe.read(recipe).weights.values())
    other = next(trial for trial in study.trials if 0 not in trial.weights.values())
    write_recipe(study, recipe, name="other", pick=other)
    assert weights_of(plain) == list(other.weights.values())
    search_again(study_yaml, 12)
    longer = list(Recipe.read(recipe).weights.values())
    assert weights_of(plain) == longer != list(other.weights.values())


def test_a_search_refuses_a_config_of_somebody_else_before_any_trial(study_yaml: Path):
    search_again(study_yaml, 7)
    plain = study_yaml.with_name("s") / VANILLA_CONFIG
    plain.write_text("merge_method: ties\n")
    n_trials = len(load_study(plain.parent).trials)
    with pytest.raises(OutputError, match="was not written with a recipe"):
        search_again(study_yaml, 12)
    assert len(load_study(plain.parent).trials) == n_trials
    assert plain.read_text() == "merge_method: ties\n"
