"""The `optimer` command: click functions that read arguments, call the library and print.

Results go to stdout, progress and logs to stderr. An OptimerError is printed as `error: ...`, and
the exit status is 1. A command is imported when it is used, and imports libraries when it runs, so
every `--help` answers at once.
"""

import contextlib
import logging
import os
import signal
import sys
import warnings
from typing import Any, NoReturn

import click

from optimer_hf.cli.ending import (
    TerminatedError,
    explain_disk_error,
    leave,
    raising_signals,
    what_is_kept,
)
from optimer_hf.cli.lazy import Entry, LazyGroup
from optimer_hf.cli.options import echo
from optimer_hf.cli.stdout import separate_from_descriptor
from optimer_hf.errors import OptimerError
from optimer_hf.models.spinning import choose_spins
from optimer_hf.printable import VisibleFormatter

COMMANDS = {
    "Make a vector": {
        "train": Entry("optimer_hf.cli.train", "Train a model on a corpus and write its vector."),
        "extract": Entry("optimer_hf.cli.train", "Write a fine-tune minus its base as a vector."),
        "vectors": Entry("optimer_hf.cli.train", "Show norms, cosines and ranks of vectors."),
        "convert": Entry("optimer_hf.cli.train", "Convert a GGUF file to safetensors."),
    },
    "Find weights": {
        "search": Entry("optimer_hf.cli.search", "Search the weights of a merge."),
        "retarget": Entry(
            "optimer_hf.cli.search", "Predict the best weights for another objective."
        ),
        "trials": Entry("optimer_hf.cli.show", "List the trials of a study."),
        "ratios": Entry("optimer_hf.cli.recipe", "Turn weights into data mixture ratios."),
        "run": Entry("optimer_hf.cli.run", "Run a recipe folder from corpora to compared merge."),
        "plan": Entry("optimer_hf.cli.run", "Estimate time, memory and disk of a run."),
    },
    "Evidence": {
        "evaluate": Entry("optimer_hf.cli.evidence", "Score a model on an objective."),
        "compare": Entry("optimer_hf.cli.evidence", "Score merge and baselines on a sealed test."),
        "report": Entry("optimer_hf.cli.evidence", "Write an HTML page about a study."),
        "check-overlap": Entry(
            "optimer_hf.cli.evidence", "Look for test items in training corpora."
        ),
    },
    "Ship": {
        "recipe": Entry("optimer_hf.cli.recipe", "Write the best merge of a study as a recipe."),
        "build": Entry("optimer_hf.cli.recipe", "Build the merged model of a recipe."),
        "verify": Entry("optimer_hf.cli.recipe", "Check a built model against its recipe."),
        "merge": Entry("optimer_hf.cli.merge", "Run any mergekit YAML."),
        "push": Entry("optimer_hf.cli.hub", "Push a vector, a recipe or a model to the Hub."),
        "pull": Entry("optimer_hf.cli.hub", "Pull a vector, a recipe or a model from the Hub."),
        "recipes": Entry("optimer_hf.cli.hub", "Browse published recipes."),
    },
    "Files": {
        "init": Entry("optimer_hf.cli.check", "Write a first study or recipe folder."),
        "status": Entry("optimer_hf.cli.show", "Show how far a run, search or training is."),
        "validate": Entry("optimer_hf.cli.check", "Check YAML files and name missing files."),
        "cache": Entry("optimer_hf.cli.cache", "List or remove converted and copied models."),
        "schema": Entry("optimer_hf.cli.check", "Print the JSON Schema of a kind of file."),
    },
}


class Program(LazyGroup):
    """Prints an OptimerError as one line (with -v after its traceback) and exits with status 1. The
    status is 130 after Ctrl-C, 143 after SIGTERM and 129 after SIGHUP. Bugs show their traceback.
    """

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Run `arguments`, or the command line of this process, and then end the process."""
        if arguments or "args" in options:
            return self.main(*arguments, **options)
        separate_from_descriptor()
        try:
            self.main(**options)
        except SystemExit as end:
            if isinstance(end.code, int | None):
                leave(end.code or 0)
            raise
        except OSError as error:  # of --help and --version, which print before any command runs
            if (text := explain_disk_error(error)) is None:
                raise
            echo(f"error: {text}", err=True)
            leave(1)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with raising_signals():
                return super().invoke(ctx)
        except OptimerError as error:
            self.fail(ctx, error, str(error))
        except OSError as error:
            if (text := explain_disk_error(error)) is None:
                raise
            self.fail(ctx, error, text)
        except KeyboardInterrupt as error:
            text = f"\ninterrupted. {what_is_kept(ctx.invoked_subcommand, sys.argv[1:])}"
            with contextlib.suppress(OSError):  # after SIGHUP there is no terminal
                echo(text, err=True)
            number = error.number if isinstance(error, TerminatedError) else signal.SIGINT
            ctx.exit(128 + number)

    def fail(self, ctx: click.Context, error: Exception, text: str) -> NoReturn:
        """Print an error (with -v after its traceback and causes) and exit with status 1."""
        if ctx.params.get("verbose"):
            import traceback

            echo("".join(traceback.format_exception(error)), err=True, nl=False)
        echo(f"error: {text}", err=True)
        ctx.exit(1)


@click.command(
    cls=Program, sections=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]}
)
@click.option(
    "-v", "--verbose", is_flag=True, help="Show tracebacks with their causes, and library logs."
)
@click.version_option(package_name="optimer-hf")
def main(verbose: bool) -> None:
    """Train one vector per dataset, search the merge weights, ship a recipe anyone can re-run."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(VisibleFormatter("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO if verbose else logging.ERROR)
    logging.getLogger("optimer_hf").setLevel(logging.DEBUG if verbose else logging.INFO)
    if not verbose:
        warnings.simplefilter("ignore")  # from libraries; users cannot act on them
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # retries; our own lines say so
        os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.update(choose_spins(os.environ))
