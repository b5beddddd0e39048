"""Commands that find weights: search, retarget."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from optimer_hf.cli.options import (
    FORMAT,
    OBJECTIVE_FILE,
    PATH,
    SCORED_FILE,
    STUDY,
    STUDY_FILE,
    LoadingCommand,
    echo,
    n_trials,
    runner_of,
    runners,
)
from optimer_hf.cli.tables import echo_markdown
from optimer_hf.errors import ConfigError

if TYPE_CHECKING:
    from optimer_hf.study.directory import Study
    from optimer_hf.study.prediction import Prediction


@click.command(cls=LoadingCommand, epilog="Example: optimer search study.yaml my-study")
@click.argument("study", type=STUDY_FILE)
@click.argument("study_dir", type=PATH)
@click.option(
    "--objective", type=SCORED_FILE, help="Objective file; needed when STUDY is a mergekit YAML."
)
@click.option(
    "--test", type=SCORED_FILE, help="Objective file of the sealed test of a mergekit YAML."
)
@n_trials("Trials in total; raise it to continue a search (default: the study's number, or 30).")
@runners
@FORMAT
def search(
    study: Path,
    study_dir: Path,
    output: str,
    workers: int | None,
    scheduler: str | None,
    **options: Any,
) -> None:
    """Search the weights of a study.yaml, or of a mergekit YAML whose models are the pool.

    STUDY is that file. STUDY_DIR gets the trials and the recipe of the best trial; the same command
    resumes the search. Prints the best merge as a mergekit YAML.
    """
    from optimer_hf.comparison.summary import study_lines, study_to_json
    from optimer_hf.recipes.from_search import search_study, why_not_mergekit

    runner = runner_of(workers, scheduler)
    result, merge_config = search_study(study, study_dir, runner=runner, **options)
    if output == "json":
        echo(json.dumps(study_to_json(result), indent=2))
        return
    _print_merge_config(study, result, merge_config, why_not_mergekit(result, study, study_dir))
    echo_markdown("\n".join(study_lines(result)), err=True)
    if result.config.test is not None:
        echo(f"compare it: optimer compare {study_dir}", err=True)
    echo(f"see it: optimer report {study_dir}", err=True)
    echo(f"build it: optimer build {study_dir / 'recipe.yaml'} OUT", err=True)


def _print_merge_config(
    given: Path, result: "Study", merge_config: Mapping[str, Any], obstacle: str | None
) -> None:
    """Print a mergekit YAML; whatever else stdout gets is a comment."""
    from optimer_hf.comparison.summary import headline
    from optimer_hf.searching.study_file import merge_text

    notes = [headline(result), *([obstacle] if obstacle else [])]
    echo(merge_text(given, merge_config, *notes).rstrip("\n"))


@click.command(cls=LoadingCommand, epilog="Example: optimer retarget my-study other-objective.yaml")
@click.argument("study_dir", type=STUDY)
@click.argument("objective", type=OBJECTIVE_FILE)
@click.argument("out", type=PATH, required=False)
@n_trials("Number of real trials that verify the prediction, in a study of their own at OUT.")
@runners
@FORMAT
def retarget(
    study_dir: Path,
    objective: Path,
    out: Path | None,
    output: str,
    n_trials: int | None,
    workers: int | None,
    scheduler: str | None,
) -> None:
    """Predict the best weights for another OBJECTIVE over the terms that a study recorded.

    STUDY_DIR contains the study. With --n-trials, OUT gets the study that verifies the prediction.
    """
    from optimer_hf.searching import retargeting

    if (out is None) != (n_trials is None):
        raise ConfigError("OUT and --n-trials go together: the study that verifies, and its size.")
    target, prediction = retargeting.predict_for(study_dir, objective)
    if output == "text":
        echo(retargeting.prediction_text(prediction, target))
    verified = None
    if out is not None and n_trials is not None:
        runner = runner_of(workers, scheduler)
        verified = retargeting.verify_prediction(study_dir, target, out, n_trials, runner=runner)
    if output == "json":
        echo(json.dumps(_results(prediction, verified), indent=2))
    else:
        _print_verified(study_dir, objective, out, verified)


def _results(prediction: "Prediction", verified: "Study | None") -> dict[str, Any]:
    from optimer_hf.comparison.summary import study_to_json

    results = {"prediction": asdict(prediction)}
    return results if verified is None else results | {"verified": study_to_json(verified)}


def _print_verified(
    study_dir: Path, objective: Path, out: Path | None, verified: "Study | None"
) -> None:
    from optimer_hf.searching.retargeting import verification_text

    if verified is not None:
        echo(verification_text(verified))
    if out is None:
        command = f"optimer retarget {study_dir} {objective} OUT --n-trials 3"
        echo(f"verify it with three trials: {command}", err=True)
    else:
        echo(f"build it: optimer recipe {out} recipe.yaml", err=True)
        echo("          optimer build recipe.yaml OUT", err=True)
