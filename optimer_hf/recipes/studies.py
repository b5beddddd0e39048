"""A study on disk -> its recipe, and what one command writes with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from optimer_hf.comparison.costs import ledger
from optimer_hf.comparison.sealed import recorded
from optimer_hf.errors import ConfigError, StudyError
from optimer_hf.recipes.record import MERGE_CONFIG, Recipe
from optimer_hf.recipes.write import write_recipe, write_vanilla
from optimer_hf.report.captions import FIGURES
from optimer_hf.searching.loop import search
from optimer_hf.searching.runner import Runner
from optimer_hf.searching.study_file import merge_config_of_study, read_study
from optimer_hf.study.directory import Study, load_study
from optimer_hf.study.prediction import front
from optimer_hf.study.trials import Trial
from optimer_hf.training import mixture
from optimer_hf.training.config import MOST_TOKENS, TrainConfig, is_count_of_tokens

VANILLA_CONFIG = "mergekit_config.yml"


# -- searching -------------------------------------------------------------------------------------


def search_study(
    path: Path,
    study_dir: Path,
    *,
    objective: Path | None = None,
    n_trials: int | None = None,
    runner: Runner | None = None,
) -> tuple[Study, dict[str, Any]]:
    """Search the study of a file, see `read_study`, into a directory, write its recipe there, and
    return the study with the mergekit config of its best merge. Trials run with `runner`, see
    `searching.loop.search`.
    """
    config = read_study(path, objective=objective, n_trials=n_trials)
    study = search(config, study_dir, runner=runner)
    write_recipe(study, study_dir / "recipe.yaml", name=path.stem, ledger=ledger(study))
    return study, merge_config_of_study(config, study.best_trial.weights, path)


# -- the recipe ------------------------------------------------------------------------------------


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

    sealed = recorded(study) if pick is None else None  # the sealed merge is the incumbent
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


# -- ratios ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SourceRatios:
    """Mixture ratios read from a study or a recipe, the weights behind them, and the vectors
    without a share, each with the reason.
    """

    ratios: mixture.Ratios
    weights: dict[str, float]
    reasons: dict[str, str]


def ratios_of(
    source: Path,
    train_yamls: Sequence[Path] = (),
    *,
    out: Path | None = None,
    max_tokens: int | None = None,
    tokens: Sequence[str] = (),
    without: Sequence[str] = (),
) -> SourceRatios:
    """Return the mixture ratios that the weights of a study directory or a recipe stand for; with
    the train files of its vectors, write the run that retrains with them to `out`.

    `tokens` are texts NAME=N, for vectors that do not record how many tokens they were trained on;
    `without` names the vectors to leave out. `max_tokens` is the length of the run (None: the
    tokens of all vectors together). Raises ConfigError for names that the source does not have.
    """
    if (out is None) != (not train_yamls):
        raise ConfigError("TRAIN_YAML and --out go together: what to mix, and where to write it.")
    weights, sources = _weights_of(source, without)
    given = _numbers(tokens, sources)
    known = given | mixture.training_tokens({n: s for n, s in sources.items() if n not in given})
    ratios = mixture.ratios_of(weights, known)
    reasons = {n: f"weight {weights[n]:g} is not above 0" for n in ratios.left_out}
    reasons |= dict.fromkeys(without, "--without")
    ratios.left_out.extend(without)
    if out is not None:
        trainings = {training.name: training for training in map(TrainConfig.read, train_yamls)}
        n_tokens = max_tokens or sum(known.values())
        mixed = mixture.mix_runs(trainings, ratios.shares, name="mixture", max_tokens=n_tokens)
        mixture.write_mixture(mixed, out)
    return SourceRatios(ratios, weights, reasons)


def _weights_of(source: Path, without: Sequence[str]) -> tuple[dict[str, float], dict[str, str]]:
    """Return weights and sources of the vectors of a study directory or of a recipe, but those of
    some names.
    """
    if source.is_dir():
        study = load_study(source)
        weights = study.best_trial.weights
        sources = {name: str(v.source) for name, v in study.config.vectors.items()}
    else:
        recipe = Recipe.read(source)
        weights = recipe.weights
        sources = {name: vector.source for name, vector in recipe.vectors.items()}
    for name in without:
        if name not in sources:
            raise ConfigError(f"--without {name}: no vector is called so; known: {[*sources]}.")
    kept = [name for name in sources if name not in without]
    return {name: weights[name] for name in kept}, {name: sources[name] for name in kept}


def _numbers(texts: Sequence[str], names: Mapping[str, str]) -> dict[str, int]:
    numbers = {}
    for text in texts:
        name, _, number = text.partition("=")
        if name not in names or not is_count_of_tokens(number):
            raise ConfigError(
                f"--tokens {text!r}: expected NAME=N with one of {sorted(names)} and a number of "
                f"tokens up to {MOST_TOKENS:,}."
            )
        numbers[name] = int(number)
    return numbers
