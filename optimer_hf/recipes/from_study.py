"""Write the recipe of a study directory, with the evidence that the study holds."""

from pathlib import Path

from optimer_hf.comparison.costs import ledger_of_study
from optimer_hf.comparison.sealed_file import read_comparison
from optimer_hf.errors import StudyError
from optimer_hf.recipes.record import MERGE_CONFIG, Recipe
from optimer_hf.recipes.write import write_recipe
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

    The merge is that of the best trial, or of point `pick` of the Pareto front, counted from 1.
    `vanilla` adds a config for unmodified mergekit. Raises StudyError if there is no such point.
    """
    study = load_study(study_dir)
    trial = _pick_trial(study, pick, study_dir)
    name = study_dir.resolve().name
    write_with_evidence(study, recipe_yaml, name=name, pick=trial, derived_from=derived_from)
    folder = recipe_yaml.resolve().parent
    beside = [f"{recipe_yaml.stem}.lock.json", MERGE_CONFIG]
    if vanilla:
        from optimer_hf.recipes.vanilla import write_vanilla  # imports torch

        write_vanilla(study, folder / VANILLA_CONFIG, pick=trial, may_write_deltas=True)
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
    """Write the recipe of a study like `write_recipe`, with its ledger, and return it.

    The recipe of the best trial also gets the figures and what the sealed test said.
    """
    from optimer_hf.report.page import write_figures

    sealed = read_comparison(study) if pick is None else None  # the best trial was sealed
    recipe = write_recipe(
        study,
        path,
        name=name,
        sealed=sealed,
        ledger=ledger_of_study(study),
        pick=pick,
        derived_from=derived_from,
    )
    if pick is None:  # the figures show the best trial
        write_figures(study, path.resolve().parent / FIGURES)
    return recipe


def _pick_trial(study: Study, pick: int | None, study_dir: Path) -> Trial | None:
    if pick is None:
        return None
    choices = front(study)
    if pick > len(choices):
        raise StudyError(f"--pick {pick}: the front of {study_dir} has {len(choices)} points.")
    return choices[pick - 1].trial
