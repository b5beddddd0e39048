"""Commands for YAML files: init, validate, schema."""

from pathlib import Path
from typing import Any

import click

from optimer_hf.cli.options import PATH, echo
from optimer_hf.errors import ConfigError, OptimerError


@click.command(
    epilog="Example: optimer init study.yaml math=you/math ./code-lora --base google/gemma-3-270m"
)
@click.argument("out", type=PATH)
@click.argument("sources", nargs=-1, required=True)
@click.option("--base", required=True, help="Model that the vectors are trained from.")
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="TASK[=METRIC]",
    help="Task of lm-eval to score merges on (metric: acc unless given).",
)
@click.option("--text", "texts", multiple=True, help="Held-out text to score merges on.")
@click.option("--full", is_flag=True, help="Write every field with its explanation.")
def init(out: Path, sources: tuple[str, ...], **options: Any) -> None:
    """Write a study or a recipe folder with the fields that a first search needs.

    OUT is a .yaml file for a study, or a new folder for a recipe. Each of SOURCES is NAME=SOURCE: a
    fine-tune, an adapter or, for a recipe, a text file or a folder of texts to train a vector on.
    """
    from optimer_hf.experiment.templates import init as write_template

    for path in write_template(out, sources, **options):
        echo(path)
    command = f"search {out} STUDY_DIR" if out.is_file() else f"run {out}"
    echo(f"edit it, then: optimer validate {out if out.is_file() else out / '*.yaml'}", err=True)
    echo(f"               optimer {command}", err=True)


@click.command(epilog="Example: optimer validate study.yaml train-*.yaml")
@click.option("--strict", is_flag=True, help="Fail when a local file or a task is missing.")
@click.argument("files", type=PATH, nargs=-1, required=True)
def validate(files: tuple[Path, ...], strict: bool) -> None:
    """Check fields and values of YAML files, and name local files and tasks that are missing.

    FILES are studies, train files, objectives, recipes and mergekit YAMLs. Models and tasks are not
    opened.
    """
    from optimer_hf.experiment.checking import check_file

    errors = []
    for path in files:
        try:
            kind, missing = check_file(path, strict=strict)
            echo("\n".join([f"{path}: a valid {kind}", *missing]))
        except OptimerError as error:
            errors.append(str(error))
    if errors:
        raise ConfigError("\n".join(errors))


@click.command(epilog="Example: optimer schema study > study.schema.json")
@click.argument("kind", type=click.Choice(["study", "train", "objective", "recipe"]))
def schema(kind: str) -> None:
    """Print the JSON Schema of a KIND of file, for editors."""
    from optimer_hf.experiment.inputs import schema_of

    echo(schema_of(kind))
