"""Search the study in a file, and write the recipe of its best merge."""

from pathlib import Path
from typing import Any

from optimer_hf.comparison.costs import ledger_of_study
from optimer_hf.comparison.rows import check_titles
from optimer_hf.recipes.record import LOCK, VANILLA_CONFIG, Lock
from optimer_hf.recipes.write import refuse_foreign_files, write_recipe
from optimer_hf.searching.loop import search
from optimer_hf.searching.runner import Runner
from optimer_hf.searching.study_file import (
    merge_config_of_study,
    naming_groups,
    naming_terms,
    obstacle_of_study,
    read_study,
)
from optimer_hf.study.directory import Study


def search_study(
    path: Path,
    study_dir: Path,
    *,
    objective: Path | None = None,
    test: Path | None = None,
    n_trials: int | None = None,
    runner: Runner | None = None,
) -> tuple[Study, dict[str, Any]]:
    """Search the study in a file, write its recipe into its directory, and return the study with
    the mergekit config of its best merge.

    `read_study` reads the file; `objective`, `test` and `n_trials` go to it.
    `searching.loop.search` runs the trials with `runner`.
    """
    config = read_study(
        path, objective=objective, test=test, n_trials=n_trials, study_dir=study_dir
    )
    check_titles(config, path)
    recipe_yaml = study_dir / "recipe.yaml"
    refuse_foreign_files(recipe_yaml)  # before any trial
    with naming_terms(objective or path, test), naming_groups(path):
        study = search(config, study_dir, runner=runner)
    write_recipe(study, recipe_yaml, name=path.stem, ledger=ledger_of_study(study))
    kinds = Lock.read(study_dir / LOCK).stored_kinds
    return study, merge_config_of_study(config, study.best_trial.weights, path, kinds)


def why_not_mergekit(study: Study, path: Path, study_dir: Path) -> str | None:
    """Return why the config that `search_study` returned for the study in a file is not for
    mergekit alone, as a sentence that names the config that is, if there is one; None if it is.
    """
    kinds = Lock.read(study_dir / LOCK).stored_kinds
    obstacle = obstacle_of_study(study.config, study.best_trial.weights, path, kinds)
    if obstacle is None:
        return None
    plain = study_dir / VANILLA_CONFIG
    if plain.exists():  # as linear, for a pool of deltas
        return f"mergekit alone cannot run this config: {obstacle}. It can run {plain}."
    return f"mergekit alone cannot make this merge: {obstacle}."
