"""Commands for YAML files: validate, schema."""

from pathlib import Path

import click

from optimer_hf.cli.options import PATH, echo
from optimer_hf.errors import ConfigError, OptimerError


@click.command(epilog="Example: optimer validate study.yaml train-*.yaml")
@click.option("--strict", is_flag=True, help="Fail when a local file is missing.")
@click.argument("files", type=PATH, nargs=-1, required=True)
def validate(files: tuple[Path, ...], strict: bool) -> None:
    """Check fields and values of YAML files, and name local files that are missing.

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
