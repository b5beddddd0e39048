"""A study on disk -> its recipe, with the evidence that the study holds."""

from pathlib import Path

from optimer_hf.comparison.costs import ledger
from optimer_hf.comparison.sealed_file import read_comparison
from optimer_hf.errors import StudyError
from optimer_hf.recipes.record import MERGE_CONFIG, Recipe
from optimer_hf.recipes.write import write_recipe, write_vanilla
from optimer_hf.report.captions import FIGURES
from optimer_hf.study.directory import Study, load_study
from optimer_hf.study.prediction import front
from optimer_hf.study.trials import Trial

VANILLA_CONFIG = "mergekit_config.yml"


def recipe_of_study(
    study_dir: Path,
    recipe_yaml: Path,
    *,
    vanilla: bool = False,
    pick: int | None = None,
    derived_from: str | None = None,
) -> list[str]:
    """Write the recipe of a study with its lock, merge config and figures, and return the names of
    the files beside it.

    The merge is the incumbent, or point `pick` of the Pareto front, counted from 1. With `vanilla`
    a config for unmodified mergekit is written, too. Raises StudyError where the front has fewer
    points.
    """
    study = load_study(study_dir)
    trial = _picked(study, pick, study_dir)
    name = study_dir.resolve().name
    write_with_evidence(study, recipe_yaml, name=name, pick=trial, derived_from=derived_from)
    folder = recipe_yaml.resolve().parent
    beside = [f"{recipe_yaml.stem}.lock.json", MERGE_CONFIG]
    if vanilla:
        write_vanilla(study, folder / VANILLA_CONFIG, pick=trial)
        beside.append(f"{VANILLA_CONFIG}, with deltas/ where it needs them")
    return beside


def write_with_evidence(
    study: Study,
    path: Path,
    *,
    name: str,
    pick: Trial | None = None,
    derived_from: str | None = None,
) -> Recipe:
    """Write the recipe of a study, as `write_recipe` does, with its ledger and, where the merge is
    the incumbent, what the sealed test said and the figures; return the recipe.
    """
    from optimer_hf.report.page import write_figures

    sealed = read_comparison(study) if pick is None else None  # the sealed merge is the incumbent
    recipe = write_recipe(
        study,
        path,
        name=name,
        sealed=sealed,
        ledger=ledger(study),
        pick=pick,
        derived_from=derived_from,
    )
    if pick is None:  # the figures of a study show its incumbent
        write_figures(study, path.resolve().parent / FIGURES)
    return recipe


def _picked(study: Study, pick: int | None, study_dir: Path) -> Trial | None:
    if pick is None:
        return None
    choices = front(study)
    if pick > len(choices):
        raise StudyError(f"--pick {pick}: the front of {study_dir} has {len(choices)} points.")
    return choices[pick - 1].trial
