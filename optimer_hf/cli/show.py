"""Commands that show what a directory holds: trials, status."""

import csv
import io
import json
from pathlib import Path

import click

from optimer_hf.cli.options import DIRECTORY, FORMAT, STUDY, echo
from optimer_hf.cli.tables import echo_markdown


@click.command(epilog="Example: optimer trials my-study --format csv > trials.csv")
@click.argument("study_dir", type=STUDY)
@click.option(
    "--sort",
    default="objective",
    show_default=True,
    help="Column to sort by: objective, trial, or the name of a term.",
)
@click.option("--rescored", is_flag=True, help="List the trials that were scored again instead.")
@click.option(
    "--format",
    "output",
    type=click.Choice(["text", "csv", "json"]),
    default="text",
    show_default=True,
    help="Format of the list; csv and json have every column.",
)
def trials(study_dir: Path, sort: str, rescored: bool, output: str) -> None:
    """List the trials of a study with weights, gains over the base and time; * marks the best.

    STUDY_DIR contains the study, which may be unfinished.
    """
    from optimer_hf.study.directory import load_study
    from optimer_hf.study.tables import list_trials, trials_to_markdown

    study = load_study(study_dir, unfinished=True)
    rows = list_trials(study, "rescore" if rescored else "search", sort=sort)
    if output == "text":
        echo_markdown(trials_to_markdown(study, rows).rstrip())
        return
    plain = [row.to_json() for row in rows]
    if output == "json":
        echo(json.dumps(plain, indent=2, ensure_ascii=False))
        return
    columns = dict.fromkeys(name for row in plain for name in row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(plain)
    echo(text.getvalue(), nl=False)


@click.command(epilog="Example: optimer status runs/gemma-3-270m-demo")
@click.argument("directory", type=DIRECTORY)
@FORMAT
def status(directory: Path, output: str) -> None:
    """Show how far the work in a directory is, and whether a process is working there.

    DIRECTORY is what `optimer run`, `search` or `train` writes to.
    """
    from optimer_hf.experiment.status import status_of, status_to_text

    found = status_of(directory)
    if output == "json":
        echo(json.dumps(found.to_json(), indent=2))
    else:
        echo_markdown(status_to_text(found))
