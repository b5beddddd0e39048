"""Write the recipe of a study directory, with the evidence that the study holds."""

from dataclasses import dataclass
from pathlib import Path

from optimer_hf.comparison.costs import ledger_of_study
from optimer_hf.comparison.sealed_file import read_comparison
from optimer_hf.errors import StudyError
from optimer_hf.files.reading import read_yaml
from optimer_hf.merging.mergekit_pool import BASE_FIELD, mergekit_command, obstacle_to_plain
from optimer_hf.recipes.record import (
    DELTAS,
    MERGE_CONFIG,
    VANILLA_CONFIG,
    Lock,
    Recipe,
    path_beside,
)
from optimer_hf.recipes.write import write_recipe
from optimer_hf.report.captions import FIGURES
from optimer_hf.study.directory import Study, load_study
from optimer_hf.study.prediction import front
from optimer_hf.study.trials import Trial


@dataclass(frozen=True)
class WrittenRecipe:
    """What lies beside a recipe, by name, and how mergekit alone makes its merge, or why it cannot
    and whether `--vanilla` would help.
    """

    beside: list[str]
    command: str | None
    obstacle: str | None = None
    is_vanilla_possible: bool = True

    def describe(self) -> str:
        """Return lines for the person who wrote the recipe."""
        alone = f"with mergekit alone: {self.command}"
        if self.command is None:
            alone = f"mergekit alone cannot make this merge: {self.obstacle}"
            alone += "; --vanilla writes a config that it can" * self.is_vanilla_possible
        return f"beside it: {', '.join(self.beside)}\n{alone}"


def recipe_of_study(
    study_dir: Path,
    recipe_yaml: Path,
    *,
    vanilla: bool = False,
    pick: int | None = None,
    derived_from: str | None = None,
) -> WrittenRecipe:
    """Write the recipe of a study with its lock, figures and merge configs: optimer.yml and, if
    mergekit alone can make the merge, mergekit_config.yml.

    The merge is that of the best trial, or of point `pick` of the Pareto front, counted from 1.
    With `vanilla`, vectors that mergekit cannot read are written as deltas for it. Raises
    StudyError if there is no such point.
    """
    study = load_study(study_dir)
    trial = _pick_trial(study, pick, study_dir)
    name = study_dir.resolve().name
    vanilla_yml = path_beside(recipe_yaml, VANILLA_CONFIG)
    recipe = write_with_evidence(
        study, recipe_yaml, name=name, pick=trial, derived_from=derived_from
    )
    beside = [f"{recipe_yaml.stem}.lock.json", path_beside(recipe_yaml, MERGE_CONFIG).name]
    if vanilla:
        from optimer_hf.recipes.vanilla import write_vanilla  # imports torch

        folder = path_beside(recipe_yaml, DELTAS)
        write_vanilla(study, vanilla_yml, pick=trial, deltas=folder)
    command = None
    if vanilla_yml.exists():
        command = mergekit_command(read_yaml(vanilla_yml), str(vanilla_yml))
        deltas = path_beside(recipe_yaml, DELTAS).name
        beside.append(f"{vanilla_yml.name}{f', with {deltas}/ where it needs them' * vanilla}")
    lock = Lock.read(recipe_yaml.with_suffix(".lock.json"))
    obstacle = obstacle_to_plain(recipe, recipe.weights, lock.stored_kinds)
    return WrittenRecipe(beside, command, obstacle, BASE_FIELD not in lock.unread)


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
        write_figures(study, path_beside(path, FIGURES))
    return recipe


def _pick_trial(study: Study, pick: int | None, study_dir: Path) -> Trial | None:
    if pick is None:
        return None
    choices = front(study)
    if pick > len(choices):
        raise StudyError(f"--pick {pick}: the front of {study_dir} has {len(choices)} points.")
    return choices[pick - 1].trial
