"""Commands for the Hugging Face Hub: push, pull, recipes list."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from optimer_hf.cli.options import DIRECTORY, FORMAT, PATH, TOKEN, LoadingCommand, echo
from optimer_hf.errors import ConfigError
from optimer_hf.files.reference import Reference

if TYPE_CHECKING:
    from optimer_hf.hub import Pull, Push


def _pairs(ctx: click.Context, param: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    """Return NAME=REPO texts as a mapping."""
    pairs = [text.partition("=") for text in given]
    for name, _, repo in pairs:
        if not (name and repo):
            raise ConfigError(f"--at {name}: expected NAME=REPO, e.g. --at math=you/my-math.")
    return {name: repo for name, _, repo in pairs}


@click.command(cls=LoadingCommand, epilog="Example: optimer push runs/demo you/my-merge --dry-run")
@click.argument("directory", type=DIRECTORY)
@click.argument("repo")
@click.option(
    "--private/--public",
    default=None,
    help="Visibility of a new repository (default: the account's choice).",
)
@click.option("--revision", help="Branch to push to, created if it is missing (default: main).")
@click.option("--create-pr", is_flag=True, help="Propose the change as a pull request.")
@click.option("--commit-message", help="First line of the commit.")
@click.option("--tag", help="Tag the commit, after everything has arrived.")
@click.option(
    "--license", "licence", help="Licence in the card (default: the licence of the inputs)."
)
@click.option(
    "--vectors",
    is_flag=True,
    help="Push the local base and vectors of a recipe first, as they are, to REPO-<name>.",
)
@click.option(
    "--at",
    multiple=True,
    metavar="NAME=REPO",
    callback=_pairs,
    help="Repository with the same weights as a local vector, or as the base (--at base=REPO).",
)
@click.option("--dry-run", is_flag=True, help="Show files, sizes and the card; send nothing.")
@TOKEN
@FORMAT
def push(directory: Path, repo: str, output: str, **options: Any) -> None:
    """Push a study, a run, a recipe, a merged model or a vector to the Hub, in one commit.

    DIRECTORY contains what to push. Of a study or a run, that is the recipe with its trials,
    figures and report. REPO is org/name, and is created if it is missing.
    """
    from optimer_hf import hub

    done = hub.push(directory, repo, **options)
    if output == "json":
        echo(hub.to_json(done))
        return
    for each in (*done.vectors, done):
        _print_push(each, options["dry_run"])


def _print_push(done: "Push", dry_run: bool) -> None:
    for name, n_bytes in done.sent.items():
        echo(f"{name}: {n_bytes:,} bytes")
    for name in done.deleted:
        echo(f"{name}: deleted")
    size = f"{len(done.sent)} files, {sum(done.sent.values()):,} bytes"
    if dry_run:
        echo(f"{done.card}\nwould send {size} to {done.repo_id}; nothing was sent")
        for line in done.unchecked:
            echo(f"not checked: {line}")
    elif done.pull_request:
        echo(f"{'proposed' if done.sent else 'already proposed'}: {done.pull_request}")
    elif not done.sent and not done.deleted:
        echo(f"{done.repo_id}@{done.commit}: already has everything")
    else:
        unchanged = f", {len(done.unchanged)} unchanged" if done.unchanged else ""
        echo(f"{done.repo_id}@{done.commit}: {size} sent{unchanged}")
    echo(f"{done.url}: readers")
    for line in done.readers:
        echo(f"  {line}")


@click.command(cls=LoadingCommand, epilog="Example: optimer pull you/my-merge")
@click.argument("repo")
@click.argument("out", type=PATH, required=False)
@click.option("--revision", help="Branch, tag or commit; REPO@REVISION works, too.")
@click.option(
    "--update", is_flag=True, help="Update to the current state of REPO, and show what changed."
)
@TOKEN
@FORMAT
def pull(repo: str, out: Path | None, output: str, **options: Any) -> None:
    """Pull a vector, a recipe (only its small files) or a merged model.

    REPO is org/name or org/name@REVISION. Writes to OUT (default: the name of the repository).
    """
    from optimer_hf import hub

    done = hub.pull(repo, out, **options)
    if output == "json":
        echo(hub.to_json(done))
    else:
        _print_pull(done)


def _print_pull(done: "Pull") -> None:
    for line in done.moved:
        echo(f"changed: {line}")
    for each in done.inputs:
        if Reference(each.reference).package is not None:
            echo(f"to install: {each.reference} (a package, whose code is run)")
            continue
        size = f"{each.n_bytes:,} bytes" if each.n_bytes is not None else "size unknown"
        gated = ", gated: ask for access first" if each.gated else ""
        echo(f"to download: {each.reference} ({size}, licence {each.licence or '?'}{gated})")
    echo(f"{done.path}: {done.kind} {done.repo_id}@{done.commit}")
    if done.kind == "recipe":
        echo(f"build it: optimer build {done.path / 'recipe.yaml'} OUT")


@click.group()
def recipes() -> None:
    """Browse published recipes."""


@recipes.command("list", cls=LoadingCommand, epilog="Example: optimer recipes list")
@TOKEN
def list_recipes(token: str | None) -> None:
    """List the recipe folders in ./recipes, and the recipes on the Hub."""
    from optimer_hf import hub

    for each in hub.list_recipes(token=token):
        if each.changed is None:
            echo(f"{each.name}: run it with `{each.command}`")
        else:
            echo(f"{each.name} ({each.changed}): get it with `{each.command}`")
