"""from_search.py: what a search writes beside its recipe."""

from pathlib import Path

import pytest
import yaml

from optimer_hf.errors import OutputError
from optimer_hf.recipes.from_search import search_study
from optimer_hf.recipes.record import VANILLA_CONFIG, Recipe
from optimer_hf.recipes.write import write_recipe
from optimer_hf.searching.runner import InProcess
from optimer_hf.study.directory import Study, load_study
from tests.support.landscapes import FunctionPool

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
