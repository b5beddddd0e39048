"""Arguments and options that several commands share, and printing."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from optimer_hf.cli.stdout import keep_for_results, result_stream
from optimer_hf.errors import ConfigError
from optimer_hf.printable import make_visible

logger = logging.getLogger(__name__)

CommandT = TypeVar("CommandT", bound=Callable[..., Any])

MOST_TOKENS = 10**13  # as in a train file
MISSING = f"{__name__}.missing"  # in the context of a command: the missing files, as lines
FLOATS = ["bfloat16", "float16", "float32"]


def echo(message: object, *, err: bool = False, nl: bool = True) -> None:
    """Print a text on stdout or stderr, see `make_visible`."""
    file = None if err else result_stream()
    click.echo(make_visible(str(message)), file, err=err, nl=nl)


class LoadingCommand(click.Command):
    """A command whose libraries take seconds to import: it says so at once, on stderr. What they
    print goes there, too. Files that its arguments need and that are missing are an error before.
    """

    def invoke(self, ctx: click.Context) -> Any:
        if missing := ctx.meta.get(MISSING):
            raise ConfigError("\n".join(missing))
        program = ctx.find_root().command_path
        logger.info("%s: loading libraries", ctx.command_path.removeprefix(f"{program} "))
        with keep_for_results():
            return super().invoke(ctx)


class Existing(click.Path):
    """A path that has to exist. If it does not, that is an error before any library loads."""

    def __init__(self, expected: str) -> None:
        super().__init__(path_type=Path)
        self._expected = expected

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from optimer_hf.files.reference import is_there

        if not is_there(Path(value)):
            raise ConfigError(f"{value}: {self._expected}.")
        return super().convert(value, param, ctx)


class Directory(Existing):
    """A directory that has to exist. A file is refused, with what it should be."""

    def __init__(self, hint: str = "", *, what: str) -> None:
        super().__init__("no such directory" + hint)
        self._what = what

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = super().convert(value, param, ctx)
        if not path.is_dir():
            raise ConfigError(f"{path}: found a file, expected {self._what}.")
        return path


class InputFile(Existing):
    """A file of a kind that has to exist. Mistakes in its fields are errors before any library
    loads. If `needs_files`, so are the missing files that all arguments name, together.
    """

    def __init__(self, kind: str, *, or_folder: bool = False, needs_files: bool = False) -> None:
        super().__init__("no such file")
        self._kind = kind
        self._or_folder = or_folder
        self._needs_files = needs_files

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from optimer_hf.experiment.checking import check_fields

        path = super().convert(value, param, ctx)
        if path.is_file() or (path.is_dir() and not self._or_folder):  # a pipe is read only once
            missing = check_fields(path, self._kind)
            if missing and self._needs_files and ctx is not None:
                ctx.meta.setdefault(MISSING, []).append(missing)
        return path


class Recipe(InputFile):
    """A recipe file, or the directory of a study, a run or a model that has one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(value)
        if path.is_dir():
            if not (path / "recipe.yaml").is_file():
                raise ConfigError(
                    f"{path}: found a directory without recipe.yaml. Give a recipe file, or a "
                    "directory that `optimer search`, `run` or `build` wrote."
                )
            path = path / "recipe.yaml"
        return super().convert(path, param, ctx)


PATH = click.Path(path_type=Path)
INPUT = Existing("no such file")
STUDY_FILE = InputFile("study or merge config", needs_files=True)
STUDY_OR_FOLDER = InputFile("study", or_folder=True)
TRAIN_FILE = InputFile("train")
OBJECTIVE_FILE = InputFile("objective")
SCORED_FILE = InputFile("objective", needs_files=True)
MERGE_FILE = InputFile("merge config", needs_files=True)
DIRECTORY = Directory(what="a directory")
RECIPE = Recipe("recipe")
STUDY = Directory(
    ". `optimer search STUDY.yaml STUDY_DIR` makes a study", what="the directory of a study"
)

FORMAT = click.option(
    "--format",
    "output",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Format of the printed result.",
)
TOKEN = click.option(
    "--token", help="Access token for the Hub (default: the one from `hf auth login`)."
)
SHORT = click.option("--short", is_flag=True, help="Use the smaller budget in short.yaml.")
PROFILE = click.option(
    "--profile", metavar="NAME", help="Lay NAME.yaml of the folder over its files, e.g. gpu."
)
TOKENS = click.option(
    "--tokens", help="Tokens to train each vector on, e.g. 1_000_000 (default: the folder's)."
)
SEEDS = click.option(
    "--seeds",
    "n_seeds",
    type=click.IntRange(min=1, max=1000),
    help="Number of seeds to run with, to see how much the results vary.",
)

SEED = click.option(
    "--seed",
    type=click.IntRange(min=0, max=999),
    help="Run this one of the seeds alone, e.g. on a machine of its own; --seeds N joins them.",
)


def n_trials(help_text: str) -> Callable[[CommandT], CommandT]:
    """Return the option --n-trials."""
    return click.option("--n-trials", type=click.IntRange(min=1, max=10_000), help=help_text)


def dtype(help_text: str, *choices: str) -> Callable[[CommandT], CommandT]:
    """Return the option --dtype with these choices (default: those in FLOATS)."""
    return click.option(
        "--dtype",
        type=click.Choice([*(choices or FLOATS)]),
        default="bfloat16",
        show_default=True,
        help=help_text,
    )


def runners(command: CommandT) -> CommandT:
    """Add --workers and --scheduler; only one of them may be given."""
    workers = click.option(
        "--workers",
        type=click.IntRange(min=1, max=1000),
        callback=_refuse_both,
        help="Number of processes on this machine that run trials in parallel, each with a model.",
    )
    scheduler = click.option(
        "--scheduler",
        callback=_refuse_both,
        help="Address of a Dask scheduler whose workers run the trials.",
    )
    return workers(scheduler(command))


def runner_of(workers: int | None, scheduler: str | None) -> Any:
    """Return the runner that these options ask for; None: one trial at a time, in this process."""
    if workers is None and scheduler is None:
        return None
    from optimer_hf.searching.workers import Workers

    return Workers(n_workers=workers, scheduler=scheduler)


def _refuse_both(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    other = "scheduler" if param.name == "workers" else "workers"
    if value is not None and ctx.params.get(other) is not None:
        raise ConfigError(
            "--workers starts a cluster and --scheduler uses one. Give only one of them."
        )
    return value
