"""The `optimer` command: click functions that read files, call one stage and print its result.

Results go to stdout, progress and logs to stderr. An OptimerError becomes `error: ...` and exit
status 1. Heavy imports happen inside the commands, so that `optimer --help` answers at once.
"""

import contextlib
import json
import logging
import os
import shlex
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from optimer_hf.errors import ConfigError, OptimerError, StudyError
from optimer_hf.printable import VisibleFormatter, visible

if TYPE_CHECKING:
    from optimer_hf.files.model import VersionedFile
    from optimer_hf.hub import Pull, Push
    from optimer_hf.scoring.objective import Objective


class _Given(click.Path):
    """An input: a name that leads nowhere is told before the libraries load, which takes
    seconds.
    """

    def __init__(self, expected: str) -> None:
        super().__init__(path_type=Path)
        self._expected = expected

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from optimer_hf.files.reference import is_there

        if not is_there(Path(value)):
            raise ConfigError(f"{value}: {self._expected}.")
        return super().convert(value, param, ctx)


class _Recipe(_Given):
    """A recipe file, or the directory of a study, a run or a model that has one."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = super().convert(value, param, ctx)
        if not path.is_dir():
            return path
        if not (path / "recipe.yaml").is_file():
            raise ConfigError(
                f"{path}: a directory without recipe.yaml. Give a recipe file, or a directory that "
                "`optimer search`, `run` or `build` wrote."
            )
        return path / "recipe.yaml"


MOST_TOKENS, LARGEST_FILE = 10**13, 2**50  # as in a train file; bytes
OF_MERGEKIT = {  # least and most of the numbers among mergekit's flags
    "num_threads": (1, 1024),
    "random_seed": (0, 2**32 - 1),
    "verbosity": (0, 10),
    "write_threads": (1, 256),
}
PATH = click.Path(path_type=Path)
INPUT = _Given("no such file")
DIRECTORY = _Given("no such directory")
RECIPE = _Recipe("no such file")
STUDY = _Given("no such directory. `optimer search STUDY.yaml STUDY_DIR` makes a study")
SEEDS = click.IntRange(min=1, max=1000)
FORMAT = click.option(
    "--format", "output", type=click.Choice(["text", "json"]), default="text", help="What to print."
)
WORKERS = click.option(
    "--workers",
    type=click.IntRange(min=1, max=1000),
    help="Processes of this machine that run trials side by side, a model each.",
)
SCHEDULER = click.option(
    "--scheduler", help="Address of a Dask scheduler whose workers run the trials."
)


def _echo(message: object, *, err: bool = False, nl: bool = True) -> None:
    """Print a text on stdout or stderr, see `visible`."""
    click.echo(visible(str(message)), err=err, nl=nl)


N_SHOWN = 12  # points of a front
RESUMABLE = {"run", "train", "search", "compare", "retarget", "push", "pull"}


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM or SIGHUP; as after Ctrl-C, everything tidies up on the way out."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Group(click.Group):
    """Turns an OptimerError into one line and exit status 1 (with -v after its traceback), Ctrl-C
    into one line and 130, SIGTERM into 143, SIGHUP into 129; lets bugs show their traceback.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _raising_signals():
                return super().invoke(ctx)
        except OptimerError as error:
            if ctx.params.get("verbose"):
                _echo("".join(traceback.format_exception(error)), err=True, nl=False)
            _echo(f"error: {error}", err=True)
            ctx.exit(1)
        except OSError as error:
            from optimer_hf.files.disk import DISK_ERRORS

            if error.errno not in DISK_ERRORS or error.filename is None:
                raise
            if ctx.params.get("verbose"):
                _echo("".join(traceback.format_exception(error)), err=True, nl=False)
            _echo(
                f"error: {error.filename}: {error.strerror}. Free space there, allow access, or "
                "give another place.",
                err=True,
            )
            ctx.exit(1)
        except KeyboardInterrupt as error:
            told = f"\ninterrupted. {_what_is_kept(ctx.invoked_subcommand, sys.argv[1:])}"
            with contextlib.suppress(OSError):  # after SIGHUP the terminal is gone
                _echo(told, err=True)
            number = error.number if isinstance(error, _TerminatedError) else signal.SIGINT
            ctx.exit(128 + number)


@contextlib.contextmanager
def _raising_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise in the main thread, unless they are ignored (nohup) or somebody
    else's; further ones do not disturb the tidying up.
    """

    process = os.getpid()

    def end(number: int, _: object) -> None:
        if os.getpid() != process:  # one forked from it, which has nothing to tidy up
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        for each in taken:
            signal.signal(each, signal.SIG_IGN)
        raise _TerminatedError(number)

    taken = [
        number
        for number in (signal.SIGTERM, signal.SIGHUP)
        if threading.current_thread() is threading.main_thread()
        and signal.getsignal(number) is signal.SIG_DFL
    ]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _what_is_kept(command: str | None, arguments: Sequence[str]) -> str:
    """Return what an interrupted command left, and the command that goes on, without secrets."""
    if command not in RESUMABLE:
        return "Nothing half-written was left behind."
    kept = "Finished stages and trials and the last checkpoint are kept"
    shown = _without_secrets(arguments)
    hint = "" if len(shown) == len(arguments) else ", with your --token"
    return f"{kept}; to go on: optimer {shlex.join(shown)}{hint}"


def _without_secrets(arguments: Sequence[str]) -> list[str]:
    """Return a command line without --token and its value, and with `...` for whatever holds a
    token, or the value of an environment variable that is one.
    """
    from optimer_hf.files.secret import TOKEN, own_secrets

    secrets = own_secrets().values()
    shown, follows = [], False
    for argument in arguments:
        is_secret = TOKEN.search(argument) or any(secret in argument for secret in secrets)
        if not (follows or argument == "--token" or argument.startswith("--token=")):
            shown.append("..." if is_secret else argument)
        follows = argument == "--token" and not follows
    return shown


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks, and logs of libraries.")
@click.version_option(package_name="optimer-hf")
def main(verbose: bool) -> None:
    """Train one vector per dataset, search the merge weights, ship a recipe anyone can re-run."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(VisibleFormatter("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.INFO if verbose else logging.ERROR)
    logging.getLogger("optimer_hf").setLevel(logging.DEBUG if verbose else logging.INFO)
    if not verbose:
        warnings.simplefilter("ignore")  # of the libraries below: nothing a person can act on
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@main.command()
@click.argument("recipe_dir", type=PATH)
@click.argument("out", type=PATH, required=False)
@click.option(
    "--short", is_flag=True, help="A smaller budget of the same run (short.yaml of the folder)."
)
@click.option(
    "--tokens", help="Tokens every vector is trained on, e.g. 1_000_000 (default: the folder's)."
)
@click.option(
    "--seeds",
    "n_seeds",
    type=SEEDS,
    help="Run it under this many seeds and say how far the results move with them.",
)
def run(
    recipe_dir: Path, out: Path | None, short: bool, tokens: str | None, n_seeds: int | None
) -> None:
    """Run a recipe folder from corpora to the compared merge; goes on where it was.

    RECIPE_DIR holds a study.yaml and the train files of its vectors. Writes to OUT (default:
    runs/NAME, with -short, -TOKENS or -seeds appended). With --seeds, OUT has a whole run in every
    seed-K, whose trainings and searches have K added to their seeds.
    """
    from optimer_hf.experiment import run as pipeline

    job = _job(recipe_dir, out, short, tokens, n_seeds)
    if n_seeds is not None:
        from optimer_hf.experiment.seeds import run_seeds

        _echo(run_seeds(job, n_seeds))
        told = "every seed-K there has its results.md, report.html and merged/"
        _echo(f"{job.out / 'results.md'}; {told}", err=True)
        return
    done = pipeline.finished_summary(job)
    if done is not None:
        _echo("finished already, nothing to do", err=True)
    _echo(done if done is not None else pipeline.run_recipe(job))


@main.command("plan")
@click.argument("source", type=INPUT)
@click.argument("out", type=PATH, required=False)
@click.option("--short", is_flag=True, help="Of `optimer run --short`.")
@click.option("--tokens", help="Of `optimer run --tokens`.")
@click.option("--seeds", "n_seeds", type=SEEDS, help="Of `optimer run --seeds`.")
@click.option("--fetch", is_flag=True, help="Fetch the base for the probe if it is not here.")
@FORMAT
def plan_command(
    source: Path,
    out: Path | None,
    short: bool,
    tokens: str | None,
    n_seeds: int | None,
    fetch: bool,
    output: str,
) -> None:
    """Say what a recipe folder or a study.yaml (SOURCE) will take: time, memory, disk, downloads.

    Runs a few real training steps and items. The plan of a recipe folder is kept in OUT, and
    `optimer run` compares it with what it took; with --seeds, that of the first seed.
    """
    from optimer_hf.experiment import plan
    from optimer_hf.experiment.folder import load
    from optimer_hf.experiment.run import plan_run
    from optimer_hf.experiment.seeds import claimed_runs
    from optimer_hf.study.config import StudyConfig

    job = None
    if source.is_dir():
        job = _job(source, out, short, tokens, n_seeds)
        config = load(job)[0]
    elif out is not None or short or tokens or n_seeds:
        raise ConfigError(f"{source}: OUT, --short, --tokens and --seeds go with a recipe folder.")
    else:
        config = StudyConfig.read(source)
    missing = plan.downloads(config)
    for each in missing:
        _echo(plan.said(each), err=True)
    if not fetch and any(each.reference == config.base_model for each in missing):
        raise ConfigError(
            f"{config.base_model}: is not on this disk, and the probe needs it. Add --fetch."
        )
    if job is not None:
        found = plan_run(claimed_runs(job, n_seeds)[0] if n_seeds else job)
    else:
        found = plan.plan(config, {}, Path.cwd(), is_run=False)
    if output == "json":
        _echo(json.dumps(plan.to_json(found), indent=2))
    else:
        _echo(plan.to_markdown(found, n_seeds or 1))


def _job(
    recipe_dir: Path, out: Path | None, short: bool, tokens: str | None, n_seeds: int | None
) -> Any:
    """Return the run of a recipe folder, with results in OUT or under runs/."""
    from optimer_hf.experiment import folder as pipeline

    if not recipe_dir.is_dir():
        raise ConfigError(f"{recipe_dir}: no such recipe folder.")
    folder = recipe_dir.resolve()
    n_tokens = _n_tokens(tokens)
    suffix = ("-short" if short else "") + (f"-{n_tokens}" if n_tokens else "")
    suffix += "-seeds" if n_seeds else ""
    target = out or Path("runs") / (folder.name + suffix)
    return pipeline.Run(folder, target.resolve(), short, n_tokens)


def _n_tokens(text: str | None) -> int | None:
    if text is None:
        return None
    plain = text.replace("_", "").replace(",", "")
    if not _is_count_of_tokens(plain):
        raise ConfigError(
            f"--tokens {text!r}: expected a number of tokens, e.g. 1_000_000, up to "
            f"{MOST_TOKENS:,}."
        )
    return int(plain)


def _is_count_of_tokens(text: str) -> bool:
    is_number = text.isdecimal() and len(text) <= len(str(MOST_TOKENS))
    return is_number and 0 < int(text) <= MOST_TOKENS


@main.command()
@click.argument("train_yaml", type=INPUT)
@click.argument("out", type=PATH)
def train(train_yaml: Path, out: Path) -> None:
    """Continually pre-train one model and write it as a vector.

    TRAIN_YAML names the base and the corpus. OUT gets an adapter or a full model, and a killed run
    goes on there when the same command is given again. `accelerate launch -m optimer_hf train`
    uses many GPUs.
    """
    from optimer_hf.files.model import refuse_absent
    from optimer_hf.models.resolve import resolve_base
    from optimer_hf.training.config import TrainConfig
    from optimer_hf.training.run import train as train_model
    from optimer_hf.vectors.delta import describe

    config = TrainConfig.read(train_yaml)
    if not (out / "training.json").exists():  # a trained vector needs its corpus no more
        refuse_absent({train_yaml: config.model_dump()})
    directory = train_model(config, out)
    if int(os.environ.get("RANK", "0")) == 0:
        record = describe(
            directory, resolve_base(config.base_model), name=config.name, kind=config.kind
        )
        _echo(
            f"{out}: {record.kind}, norm {record.norm:.4g}, {100 * record.relative_norm:.2f} % of "
            "the tensors it moves"
        )


@main.command()
@click.argument("tuned")
@click.option("--base", required=True, help="The model TUNED was trained from.")
@click.argument("out", type=PATH)
@click.option("--name", help="Name of the vector (default: that of OUT).")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32", "int8"]),
    default="bfloat16",
    help="Stored dtype; int8 has a scale for every --block-size numbers.",
)
@click.option("--block-size", type=click.IntRange(min=1, max=2**20), default=64, show_default=True)
@click.option(
    "--from-adapter",
    is_flag=True,
    help="TUNED is an adapter of any type that PEFT can merge (DoRA, IA3, ...).",
)
def extract(
    tuned: str,
    base: str,
    out: Path,
    name: str | None,
    dtype: str,
    block_size: int,
    from_adapter: bool,
) -> None:
    """Write the vector TUNED minus BASE as a delta directory.

    TUNED is a checkpoint or an adapter: a directory or a Hub id. OUT has to be new or empty.
    """
    from optimer_hf.files.reference import absolute_reference
    from optimer_hf.files.staging import require_empty
    from optimer_hf.models.resolve import resolve_base, resolve_model
    from optimer_hf.vectors.delta import extract as extract_vector
    from optimer_hf.vectors.delta import extract_any_adapter
    from optimer_hf.vectors.opening import open_vector

    require_empty(out)
    resolved = resolve_base(absolute_reference(base, Path.cwd()))
    source = absolute_reference(tuned, Path.cwd())
    if from_adapter:
        record = extract_any_adapter(
            name or out.name,
            resolve_model(source),
            resolved,
            out,
            dtype=dtype,
            block_size=block_size,
        )
    else:
        vector = open_vector(name or out.name, source, resolved)
        record = extract_vector(vector, resolved, out, dtype=dtype, block_size=block_size)
    _echo(
        f"{out}: {record.kind}, norm {record.norm:.4g}, {100 * record.relative_norm:.2f} % of the "
        f"tensors it moves; stored in {record.dtype} with a relative error of "
        f"{100 * (record.relative_error or 0):.3f} %"
    )
    errors = record.relative_errors or {}
    if errors:
        worst, error = max(errors.items(), key=lambda pair: pair[1])
        _echo(f"largest of a tensor: {100 * error:.3f} % ({worst})")


@main.command()
@click.argument("vectors", nargs=-1, required=True)
@click.option("--base", required=True, help="The model the vectors were trained from.")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    help="Of the merge.",
)
@FORMAT
def vectors(vectors: tuple[str, ...], base: str, dtype: str, output: str) -> None:
    """Show norms, cosines and ranks of vectors, and whether they can be merged.

    VECTORS are adapters, deltas and checkpoints: directories or Hub ids.
    """
    from optimer_hf.files.reference import absolute_reference
    from optimer_hf.merging import geometry
    from optimer_hf.merging.mergekit_pool import named_sources
    from optimer_hf.models.resolve import resolve_base

    resolved = resolve_base(absolute_reference(base, Path.cwd()))
    sources = named_sources([absolute_reference(text, Path.cwd()) for text in vectors])
    pool, refusals = geometry.open_pool(sources, resolved)
    found = geometry.measure(pool, resolved, dtype)
    if output == "json":
        _echo(json.dumps(geometry.to_json(found, refusals), indent=2))
    else:
        _echo(geometry.to_markdown(found, refusals))
    if refusals:
        raise SystemExit(1)


@main.command()
@click.argument("gguf", type=INPUT)
@click.argument("out", type=PATH)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    help="Stored dtype.",
)
def convert(gguf: Path, out: Path, dtype: str) -> None:
    """De-quantise a GGUF file that transformers reads into a safetensors directory.

    GGUF is the file; OUT gets weights, config and tokenizer, and has to be new or empty.
    """
    from optimer_hf.models.gguf import convert_gguf

    if not gguf.is_file():
        raise ConfigError(f"{gguf}: no such file. Expected a GGUF file.")
    convert_gguf(gguf, out, dtype=dtype)
    _echo(str(out))


class _Merge(click.Command):
    """`optimer merge`: mergekit's own flags are added when its command line is read, since their
    import takes seconds.
    """

    _is_complete = False

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the parameters with those of mergekit, and let the callback take them."""
        if not self._is_complete:
            from mergekit.options import add_merge_options

            callback: Any = add_merge_options(self.callback)
            for flag in callback.__click_params__:
                if flag.name in OF_MERGEKIT and not flag.count:
                    flag.type = click.IntRange(*OF_MERGEKIT[flag.name])
            self.params += reversed(callback.__click_params__)
            self.callback, self._is_complete = callback, True
        return super().get_params(ctx)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the flags; a value that mergekit cannot read is a usage error."""
        try:
            return super().parse_args(ctx, args)
        except (ValueError, LookupError) as error:  # of its sizes: --out-shard-size x
            raise click.UsageError(f"mergekit cannot read a flag's value ({error}).", ctx) from None


@main.command(cls=_Merge)
@click.argument("config", type=INPUT)
@click.argument("out", type=PATH)
@click.option(
    "--engine",
    type=click.Choice(["native", "mergekit"]),
    help="Force the streaming writer or mergekit.",
)
def merge(config: Path, out: Path, engine: str | None, merge_options: Any) -> None:
    """Run any mergekit YAML, with the `optimer` method and all of mergekit's flags.

    CONFIG is the YAML file. OUT gets the merged model with its tokenizer, whole or not at all, and
    has to be new or empty.
    """
    from optimer_hf.files.staging import require_empty
    from optimer_hf.merging.mergekit import merge as run_merge

    require_empty(out)
    if not 0 < merge_options.out_shard_size <= LARGEST_FILE:
        found = f"{merge_options.out_shard_size:,} bytes"
        raise ConfigError(f"--out-shard-size: found {found}, expected e.g. 5B.")
    merge_options.apply_global_options()
    if merge_options.verbosity:  # which mergekit sets only where nobody set up logging before
        level = logging.INFO if merge_options.verbosity == 1 else logging.DEBUG
        logging.getLogger().setLevel(level)
    used = run_merge(config, out, options=merge_options, engine=engine)
    _echo(f"{out}: written by {'the streaming writer' if used == 'native' else 'mergekit'}")


@main.command()
@click.argument("model")
@click.argument("objective", type=INPUT)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    help="Of the model.",
)
@FORMAT
def evaluate(model: str, objective: Path, dtype: str, output: str) -> None:
    """Score a model on every term of an objective file.

    MODEL is a directory or a Hub id, OBJECTIVE a YAML file with `terms`.
    """
    from optimer_hf.files.reference import absolute_reference
    from optimer_hf.merging.resident import ResidentModel
    from optimer_hf.merging.tokenizer import scoring_tokenizer
    from optimer_hf.models.live import default_device
    from optimer_hf.models.resolve import resolve_base
    from optimer_hf.scoring.evaluator import Evaluator
    from optimer_hf.scoring.objective import ObjectiveFile

    target = ObjectiveFile.read(objective)
    resolved = resolve_base(absolute_reference(model, Path.cwd()))
    tokenizer = scoring_tokenizer(resolved, None, apply_chat_template=target.apply_chat_template)
    resident = ResidentModel(resolved, [], dtype=dtype, device=default_device())
    evaluator = Evaluator(resident.model, tokenizer, [target])
    terms = target.at("rescore")
    scores = evaluator.evaluate(terms, limits={term.label: target.limit_of(term) for term in terms})
    result = {
        label: {"score": term.score, "n_items": len(term.items)} for label, term in scores.items()
    }
    if output == "json":
        _echo(json.dumps(result, indent=2))
        return
    for term in terms:
        limited = " (limited)" if target.limit_of(term) is not None else ""
        _echo(
            f"{term.label}: {term.metric} {result[term.label]['score']:.4f} on "
            f"{result[term.label]['n_items']} items{limited}"
        )


@main.command()
@click.argument("study", type=INPUT)
@click.argument("study_dir", type=PATH)
@click.option(
    "--objective", type=INPUT, help="Objective file; needed when STUDY is a mergekit YAML."
)
@click.option(
    "--n-trials",
    type=click.IntRange(min=1, max=10_000),
    help="Trials in all; raise it to go on (default: that of the study, or 30).",
)
@WORKERS
@SCHEDULER
@FORMAT
def search(
    study: Path,
    study_dir: Path,
    objective: Path | None,
    n_trials: int | None,
    workers: int | None,
    scheduler: str | None,
    output: str,
) -> None:
    """Search the weights of a study.yaml, or of a mergekit YAML whose models are the pool.

    STUDY is that file. STUDY_DIR gets the trials and the recipe of the best; given again, the same
    command goes on there. Prints the best merge as a mergekit YAML.
    """
    from optimer_hf.comparison.ledger import ledger
    from optimer_hf.files.reading import read_yaml, yaml_text
    from optimer_hf.merging.mergekit_pool import optimer_config, with_tokenizer, with_weights
    from optimer_hf.merging.mergekit_yaml import is_for_mergekit, read_merge_config
    from optimer_hf.recipes import write as recipes
    from optimer_hf.scoring.units import Unit
    from optimer_hf.searching.loop import search as run_search
    from optimer_hf.study.trials import ITEMS_OF

    config = _study_config(study, objective, n_trials)
    _one_of(workers, scheduler)
    result = run_search(config, study_dir, n_workers=workers, scheduler=scheduler)
    recipe_file = study_dir / "recipe.yaml"
    recipes.write_recipe(result, recipe_file, name=study.stem, ledger=ledger(result))
    best = result.incumbent
    if output == "json":
        _echo(json.dumps(_study_json(result), indent=2))
        return
    gain = Unit.of(config.objective).show(result.over_base(best).difference)
    _echo(  # a comment: stdout is a YAML file
        f"# best of {len(result.log.of('search'))} trials: number {best.number} ({best.origin}), "
        f"{gain} over {result.baseline} on {ITEMS_OF[best.fidelity]}"
    )
    if is_for_mergekit(read_yaml(study)):
        found = with_weights(read_merge_config(study, warns=False), study, best.weights)
    else:
        sources = {name: str(vector.source) for name, vector in config.vectors.items()}
        found = optimer_config(config.base_model, sources, best.weights, config.dtype)
        found = with_tokenizer(found, config.tokenizer_reference)
    _echo(yaml_text(found))
    _say_intervals(result)
    _say_front(result)
    _say_ledger(ledger(result))
    if config.test is not None:
        _echo(f"compare it: optimer compare {study_dir}", err=True)
    _echo(f"build it: optimer build {recipe_file} OUT", err=True)


def _one_of(workers: int | None, scheduler: str | None) -> None:
    if workers is not None and scheduler is not None:
        raise ConfigError("--workers starts a cluster and --scheduler uses one; give one of them.")


def _study_json(study: Any) -> dict[str, Any]:
    from optimer_hf.comparison.ledger import ledger
    from optimer_hf.study.prediction import front

    best = study.incumbent
    choices = [
        {"trial": choice.trial.number, "weights": choice.trial.weights, "gains": choice.gains}
        for choice in front(study)
    ]
    found = {
        "weights": best.weights,
        "value": study.value(best),
        "trial": best.number,
        "over_base": study.over_base(best).to_json(),
    }
    if (other := study.over_next()) is not None:
        found["over_next"] = {"trial": other[0].number} | other[1].to_json()
    return found | {"front": choices, "ledger": ledger(study)}


def _say_intervals(study: Any) -> None:
    """Print the differences that matter with their paired 95 % intervals."""
    from optimer_hf.scoring.units import Unit, said_of

    best, unit = study.incumbent, Unit.of(study.config.objective)
    said = said_of(study.over_base(best), unit, is_gain=True)
    _echo(f"minus {study.baseline}: {said}", err=True)
    if (other := study.over_next()) is not None:
        said = said_of(other[1], unit, is_gain=False)
        _echo(f"minus the next best, trial {other[0].number}: {said}", err=True)


def _say_ledger(found: Mapping[str, Any]) -> None:
    _echo("\nwhere the time went (seconds):", err=True)
    for stage, entry in found.items():
        _echo(f"{stage}: {', '.join(f'{k} {v:,}' for k, v in entry.items())}", err=True)


def _say_front(study: Any) -> None:
    """Print the Pareto front of several terms, numbered for `optimer recipe --pick`."""
    from optimer_hf.files.text import markdown_table
    from optimer_hf.scoring.units import OF_TERMS
    from optimer_hf.study.prediction import front

    choices = front(study)
    if not choices or len(choices[0].gains) < 2:
        return
    said = f"gains over {study.baseline}, losses relative, accuracies in points"
    _echo(f"Pareto front: no trial beats one of these in every term ({said})", err=True)
    numbers = [n * (len(choices) - 1) // (N_SHOWN - 1) for n in range(N_SHOWN)]
    shown = [(n, choices[n]) for n in numbers] if len(choices) > N_SHOWN else enumerate(choices)
    if len(choices) > N_SHOWN:
        _echo(f"{N_SHOWN} of its {len(choices)} points; --format json has all", err=True)
    rows = [
        [str(n + 1), str(choice.trial.number), *map(OF_TERMS.show, choice.gains.values())]
        for n, choice in shown
    ]
    _echo(markdown_table(["pick", "trial", *choices[0].gains], rows), err=True)


@main.command()
@click.argument("study_dir", type=STUDY)
@click.argument("objective", type=INPUT)
@click.argument("out", type=PATH, required=False)
@click.option(
    "--n-trials",
    type=click.IntRange(min=1, max=10_000),
    help="Real trials that verify the prediction, in a study of their own at OUT.",
)
@WORKERS
@SCHEDULER
@FORMAT
def retarget(
    study_dir: Path,
    objective: Path,
    out: Path | None,
    n_trials: int | None,
    workers: int | None,
    scheduler: str | None,
    output: str,
) -> None:
    """Predict the best weights for another OBJECTIVE over the terms a study recorded.

    STUDY_DIR holds the study. With --n-trials, OUT gets the study that verifies the prediction.
    """
    from optimer_hf.scoring.objective import ObjectiveFile
    from optimer_hf.scoring.units import Unit
    from optimer_hf.searching.loop import search_on
    from optimer_hf.study.directory import load_study
    from optimer_hf.study.prediction import over_record, predict

    if (out is None) != (n_trials is None):
        raise ConfigError("OUT and --n-trials go together: the study that verifies, and its size.")
    _one_of(workers, scheduler)
    study = load_study(study_dir)
    target = over_record(study, ObjectiveFile.read(objective))
    prediction = predict(study, target)
    found: dict[str, Any] = {"prediction": asdict(prediction)}
    if output == "text":
        _say_prediction(prediction, target)
        if out is None:
            again = f"optimer retarget {study_dir} {objective} OUT --n-trials 3"
            _echo(f"verify it with three trials: {again}", err=True)
    if out is not None and n_trials is not None:
        verified = search_on(study, target, out, n_trials, n_workers=workers, scheduler=scheduler)
        found["verified"] = _study_json(verified)
        if output == "text":
            best = verified.incumbent
            shown = Unit.of(target).show(verified.over_base(best).difference)
            _echo(f"verified: value {shown} (trial {best.number})")
            _echo(f"  weights: {_weights_text(best.weights)}")
            _echo(f"build it: optimer recipe {out} recipe.yaml", err=True)
            _echo("          optimer build recipe.yaml OUT", err=True)
    if output == "json":
        _echo(json.dumps(found, indent=2))


def _say_prediction(prediction: Any, target: "Objective") -> None:
    from optimer_hf.scoring.units import Unit

    unit = Unit.of(target)

    def shown(found: Any) -> str:
        deviation = f"{unit.factor * found.deviation:.{unit.digits}f}"
        return f"{unit.show(found.value)} +- {deviation}"

    _echo(f"predicted: value {shown(prediction)} (posterior mean and standard deviation)")
    _echo(f"  weights: {_weights_text(prediction.weights)}")
    for label, term in prediction.terms.items():
        _echo(f"  {label}: gain {shown(term)}")
    if target.constraints:
        _echo(f"  constraints kept with probability {prediction.feasible:.2f}")


def _weights_text(weights: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {weight:.4g}" for name, weight in weights.items())


def _study_config(path: Path, objective: Path | None, n_trials: int | None) -> Any:
    from optimer_hf.files.model import refuse_absent
    from optimer_hf.files.reading import read_yaml
    from optimer_hf.merging.mergekit_yaml import is_for_mergekit
    from optimer_hf.study.config import SearchConfig, StudyConfig

    if is_for_mergekit(read_yaml(path)):
        if objective is None:
            raise ConfigError(
                f"{path}: a merge config says what to merge, not what for. Add --objective "
                "OBJECTIVE.yaml."
            )
        config = _study_of_merge_config(path, objective)
    elif objective is not None:
        raise ConfigError(f"{path}: has its own objective; --objective goes with a mergekit YAML.")
    else:
        config = StudyConfig.read(path)
        refuse_absent({path: config.model_dump(exclude={"baselines"})})  # `compare` reads those
    if n_trials is not None:
        changed = SearchConfig.model_validate(config.search.model_dump() | {"n_trials": n_trials})
        config = config.model_copy(update={"search": changed})
    return config


def _study_of_merge_config(path: Path, objective: Path) -> Any:
    """Return the study whose pool are the models of a mergekit YAML."""
    from optimer_hf.files.model import parse, refuse_absent
    from optimer_hf.merging.mergekit_pool import (
        not_searched,
        searched_pool,
        tokenizer_of,
        with_absolute_references,
    )
    from optimer_hf.merging.mergekit_yaml import read_merge_config
    from optimer_hf.scoring.objective import ObjectiveFile
    from optimer_hf.study.config import StudyConfig

    data = read_merge_config(path)
    target = ObjectiveFile.read(objective).model_dump(exclude={"format_version"})
    refuse_absent({path: with_absolute_references(data, path), objective: target})
    base, sources = searched_pool(data, path)
    if dropped := not_searched(data):
        logging.getLogger("optimer_hf").warning(
            "%s: one plain weight per model is searched, scored and built; left out: %s",
            path,
            ", ".join(dropped),
        )
    fields = {
        "base_model": base,
        "dtype": data.get("out_dtype") or data.get("dtype") or "bfloat16",
        "vectors": {name: {"source": source} for name, source in sources.items()},
        "objective": target,
    }
    if (reference := tokenizer_of(data, path)) is not None:
        by_source = {source: name for name, source in sources.items()}
        fields["tokenizer_source"] = by_source.get(reference, reference)
    return parse(StudyConfig, fields, path)


@main.command()
@click.argument("study_dir", type=STUDY)
@click.option(
    "--all",
    "everything",
    is_flag=True,
    help="Also TIES, DARE-TIES, Model Stock, and random vectors of equal norm.",
)
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="NAME=MODEL",
    help="Also a model trained from the base, for instance on a data mixture.",
)
@click.option("--figure", type=PATH, help="Also write a figure (.png, .svg, .pdf).")
@FORMAT
def compare(
    study_dir: Path, everything: bool, models: tuple[str, ...], figure: Path | None, output: str
) -> None:
    """Score the baselines and the merge of a finished study on its sealed test.

    STUDY_DIR holds the study, and keeps the scores.
    """
    from dataclasses import replace

    from optimer_hf.comparison.sealed import compare
    from optimer_hf.comparison.tables import to_json, to_markdown
    from optimer_hf.files.reference import absolute_reference
    from optimer_hf.files.staging import make_directory
    from optimer_hf.report.drawing import FIGURE_METADATA
    from optimer_hf.report.page import write_sealed_figure
    from optimer_hf.study.config import MergeMethod
    from optimer_hf.study.directory import load_study

    study = load_study(study_dir)
    known = study.config.baselines
    for text in models:
        if not all(text.partition("=")[::2]):
            raise ConfigError(f"--model {text!r}: expected NAME=MODEL.")
    named = dict(text.partition("=")[::2] for text in models)
    if figure is not None:
        if figure.suffix not in FIGURE_METADATA:
            suffixes = ", ".join(FIGURE_METADATA)
            raise ConfigError(f"--figure {figure}: expected a name that ends in one of {suffixes}.")
        make_directory(figure.parent)
    sources = {name: absolute_reference(source, Path.cwd()) for name, source in named.items()}
    changes: dict[str, Any] = {"models": known.models | sources}
    if everything:
        changes |= {
            "merge_methods": [*get_args(MergeMethod)],
            "random_vectors": True,
        }
    baselines = known.model_copy(update=changes)
    config = study.config.model_copy(update={"baselines": baselines})
    comparison = compare(replace(study, config=config))
    if figure is not None:
        write_sealed_figure(study, comparison, figure)
    _echo(
        json.dumps(to_json(comparison), indent=2) if output == "json" else to_markdown(comparison)
    )


@main.command()
@click.argument("study_dir", type=STUDY)
@click.argument("out", type=PATH, required=False)
@click.option("--figures", type=PATH, help="Also write every figure as PNG into this directory.")
@click.option(
    "--no-vectors", is_flag=True, help="Leave out the cosines, which read every vector once."
)
def report(study_dir: Path, out: Path | None, figures: Path | None, no_vectors: bool) -> None:
    """Write one HTML page about a study, finished or not: what it found, how sure, at what cost.

    Writes to OUT (default: report.html in STUDY_DIR).
    """
    from optimer_hf.report.page import write_report
    from optimer_hf.study.directory import load_study

    study = load_study(study_dir, unfinished=True)
    page = out or study_dir / "report.html"
    if page.is_dir():
        raise ConfigError(f"{page}: is a directory. Give the name of a file, e.g. report.html.")
    for panel in write_report(study, page, figures=figures, vectors=not no_vectors):
        _echo(f"{panel.title}: {panel.conclusion}")
    _echo(str(page), err=True)


@main.command()
@click.argument("study_dir", type=STUDY)
@click.argument("recipe_yaml", type=PATH)
@click.option(
    "--vanilla", is_flag=True, help="Also write mergekit_config.yml for unmodified mergekit-yaml."
)
@click.option(
    "--pick",
    type=click.IntRange(min=1, max=10_000),
    help="A point of the Pareto front, as `optimer search` numbers them, not the incumbent.",
)
@click.option("--derived-from", metavar="REPO@COMMIT", help="The recipe on the Hub it continues.")
def recipe(
    study_dir: Path, recipe_yaml: Path, vanilla: bool, pick: int | None, derived_from: str | None
) -> None:
    """Write the incumbent of a study as recipe.yaml with its lock, merge config and figures.

    STUDY_DIR holds the study. RECIPE_YAML is the file to write; the others go beside it.
    """
    from optimer_hf.comparison.ledger import ledger
    from optimer_hf.comparison.sealed import recorded
    from optimer_hf.comparison.tables import to_json
    from optimer_hf.recipes.record import MERGE_CONFIG
    from optimer_hf.recipes.write import write_recipe, write_vanilla
    from optimer_hf.report.captions import FIGURES
    from optimer_hf.report.page import write_figures
    from optimer_hf.study.directory import load_study
    from optimer_hf.study.prediction import front

    study = load_study(study_dir)
    choices = front(study) if pick is not None else []
    if pick is not None and pick > len(choices):
        raise StudyError(f"--pick {pick}: the front of {study_dir} has {len(choices)} points.")
    trial = choices[pick - 1].trial if pick is not None else None
    sealed = recorded(study) if trial is None else None  # the sealed merge is the incumbent
    write_recipe(
        study,
        recipe_yaml,
        name=study_dir.resolve().name,
        sealed=None if sealed is None else to_json(sealed),
        ledger=ledger(study),
        pick=trial,
        derived_from=derived_from,
    )
    folder = recipe_yaml.resolve().parent
    if trial is None:  # the figures of a study are of its incumbent
        write_figures(study, folder / FIGURES)
    beside = [f"{recipe_yaml.stem}.lock.json", MERGE_CONFIG]
    if vanilla:
        write_vanilla(study, folder / "mergekit_config.yml", pick=trial)
        beside += ["mergekit_config.yml, with deltas/ where it needs them"]
    _echo(str(recipe_yaml))
    _echo(f"beside it: {', '.join(beside)}", err=True)


@main.command()
@click.argument("source", type=INPUT)
@click.argument("train_yaml", type=INPUT, nargs=-1)
@click.option("--out", type=PATH, help="Write the mixture of the TRAIN_YAMLs here.")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1, max=MOST_TOKENS),
    help="Of the mixture (default: those of all its vectors together).",
)
@click.option("--tokens", multiple=True, metavar="NAME=N", help="Tokens a vector was trained on.")
@click.option(
    "--without",
    multiple=True,
    metavar="NAME",
    help="A vector that no corpus stands behind, such as an instruction vector.",
)
@FORMAT
def ratios(
    source: Path,
    train_yaml: tuple[Path, ...],
    out: Path | None,
    max_tokens: int | None,
    tokens: tuple[str, ...],
    without: tuple[str, ...],
    output: str,
) -> None:
    """Turn the weights of a study directory or a recipe.yaml (SOURCE) into mixture ratios.

    With the train files of its vectors (TRAIN_YAML ...) and --out, also writes the run that
    retrains with them.
    """
    from optimer_hf.training import mixture as ratio
    from optimer_hf.training.config import TrainConfig

    weights, sources = _weights_of(source, without)
    given = _numbers(tokens, sources)
    known = given | ratio.training_tokens({n: s for n, s in sources.items() if n not in given})
    found = ratio.ratios(weights, known)
    found.left_out.extend(without)
    if (out is None) != (not train_yaml):
        raise ConfigError("TRAIN_YAML and --out go together: what to mix, and where to write it.")
    if out is not None:
        trainings = {training.name: training for training in map(TrainConfig.read, train_yaml)}
        n_tokens = max_tokens or sum(known.values())
        mixed = ratio.mixture(trainings, found.shares, name="mixture", max_tokens=n_tokens)
        ratio.write_mixture(mixed, out)
    if output == "json":
        _echo(json.dumps(asdict(found), indent=2))
        return
    for name, share in found.shares.items():
        _echo(f"{name}: {100 * share:.2f} %  (weight {weights[name]:g})")
    for name in found.left_out:
        why = "--without" if name in without else f"weight {weights[name]:g} is not above 0"
        _echo(f"{name}: left out ({why})")
    if out is not None:
        _echo(f"train it: optimer train {out} OUT", err=True)


def _weights_of(source: Path, without: tuple[str, ...]) -> tuple[dict[str, float], dict[str, str]]:
    """Return weights and sources of the vectors of a study directory or of a recipe, but those of
    some names.
    """
    from optimer_hf.recipes.record import RecipeFile
    from optimer_hf.study.directory import load_study

    if source.is_dir():
        study = load_study(source)
        weights = study.incumbent.weights
        sources = {name: str(v.source) for name, v in study.config.vectors.items()}
    else:
        recipe = RecipeFile.read(source)
        weights = recipe.weights
        sources = {name: vector.source for name, vector in recipe.vectors.items()}
    for name in without:
        if name not in sources:
            raise ConfigError(f"--without {name}: no vector is called so; known: {[*sources]}.")
    kept = [name for name in sources if name not in without]
    return {name: weights[name] for name in kept}, {name: sources[name] for name in kept}


def _numbers(given: tuple[str, ...], names: dict[str, str]) -> dict[str, int]:
    found = {}
    for text in given:
        name, _, number = text.partition("=")
        if name not in names or not _is_count_of_tokens(number):
            raise ConfigError(
                f"--tokens {text!r}: expected NAME=N with one of {sorted(names)} and a number of "
                f"tokens up to {MOST_TOKENS:,}."
            )
        found[name] = int(number)
    return found


@main.command()
@click.argument("recipe_yaml", type=RECIPE)
@click.argument("out", type=PATH)
@click.option(
    "--out-dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    help="Instead of the recipe's dtype.",
)
@click.option("--max-shard-size", default="5GB", show_default=True, help="Largest weights file.")
@click.option(
    "--device", default="cpu", show_default=True, help="cpu or cuda: does the arithmetic."
)
def build(
    recipe_yaml: Path, out: Path, out_dtype: str | None, max_shard_size: str, device: str
) -> None:
    """Build the merged model of a recipe and write it to OUT.

    RECIPE_YAML is the file, or the directory it lies in. Base and vectors that are not on this disk
    are fetched, checked against the lock of the recipe, and added with its weights. OUT gets the
    weights as safetensors with config, tokenizer, recipe and lock, whole or not at all. A model of
    the same recipe that is there already stays; anything else there is refused.
    """
    from accelerate.utils import convert_file_size_to_int

    from optimer_hf.recipes import build as recipes

    try:
        n_bytes = int(convert_file_size_to_int(max_shard_size))
    except (ValueError, OverflowError):
        n_bytes = 0
    if not 0 < n_bytes <= LARGEST_FILE:
        raise ConfigError(f"--max-shard-size: found {max_shard_size!r}, expected e.g. 5GB.")
    recipes.build(recipe_yaml, out, out_dtype=out_dtype, max_shard_size=n_bytes, device=device)
    _echo(str(out))


@main.command()
@click.argument("recipe_yaml", type=RECIPE)
@click.argument("model", type=PATH)
def verify(recipe_yaml: Path, model: Path) -> None:
    """Check a built model against the lock of its recipe.

    RECIPE_YAML is the file, or the directory it lies in; MODEL is what `optimer build` wrote.
    """
    from optimer_hf.recipes import build as recipes

    recipes.verify(recipe_yaml, model)
    _echo(f"{model}: the weights are those of {recipe_yaml}")


@main.command("check-overlap")
@click.argument("files", type=INPUT, nargs=-1, required=True)
@click.option(
    "--n",
    type=click.IntRange(min=1, max=1000),
    default=13,
    show_default=True,
    help="Units in common: words, in scripts without spaces characters.",
)
@click.option("--text-field", default="text", show_default=True, help="Of the corpus files.")
@FORMAT
def check_overlap(files: tuple[Path, ...], n: int, text_field: str, output: str) -> None:
    """Look for the items of objectives in training corpora; exit status 1 when one is found.

    FILES are corpora (JSONL, text, train.yaml) and objectives (objective.yaml, study.yaml with its
    sealed test), in any order. An item shorter than N is looked for as a whole, from 8 units on.
    """
    from optimer_hf.files.text import markdown_table
    from optimer_hf.scoring import overlap

    corpora, objectives = _corpora_and_objectives(files, text_field)
    terms = overlap.check_overlap(corpora, objectives, n=n)
    if output == "json":
        found = [asdict(term) | {"share": term.share} for term in terms]
        _echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        header = ["term", "items", "overlapping", "share", "too short"]
        rows = [
            [
                term.term,
                f"{term.n_items:,}",
                f"{len(term.overlaps):,}",
                f"{100 * term.share:.2f} %",
                f"{term.n_too_short:,}",
            ]
            for term in terms
        ]
        _echo(markdown_table(header, rows))
        for term in terms:
            for each in term.overlaps[:5]:
                where = f"document {each.document} of {each.corpus}"
                _echo(f"{term.term}: item {each.item} and {where}: {each.ngram}", err=True)
    if any(term.overlaps for term in terms):
        raise SystemExit(1)


def _corpora_and_objectives(files: tuple[Path, ...], text_field: str) -> tuple[list[Any], Any]:
    from optimer_hf.corpus.config import CorpusConfig
    from optimer_hf.files.reading import read_yaml
    from optimer_hf.scoring.objective import Objective, ObjectiveFile
    from optimer_hf.study.config import StudyConfig
    from optimer_hf.training.config import TrainConfig

    corpora: list[CorpusConfig] = []
    objectives: dict[str, Objective] = {}
    for path in files:
        keys = set(read_yaml(path)) if path.suffix in (".yaml", ".yml") else None
        if keys is None:
            corpora.append(CorpusConfig(path=path.resolve(), text_field=text_field))
        elif "objective" in keys and "scores" not in keys:  # a recipe has both
            study = StudyConfig.read(path)
            objectives[f"{path} objective"] = study.objective
            if study.test is not None:
                objectives[f"{path} test"] = study.test
        elif "terms" in keys:
            objectives[str(path)] = ObjectiveFile.read(path)
        elif keys & {"corpus", "mixture"}:
            corpora.extend(TrainConfig.read(path).corpora)
        else:
            raise ConfigError(
                f"{path}: found the fields {', '.join(sorted(map(str, keys)))}, expected those of "
                "an objective, a study or a train config. Give one of these, or a corpus file."
            )
    if not corpora or not objectives:
        missing = "objective" if corpora else "corpus"
        kinds = (
            "an objective.yaml or a study.yaml"
            if corpora
            else "a JSONL or text file, or a train.yaml"
        )
        raise ConfigError(f"check-overlap: found no {missing} among the files. Add {kinds}.")
    return corpora, objectives


@main.command()
@click.argument("directory", type=DIRECTORY)
@click.argument("repo")
@click.option(
    "--private/--public", default=None, help="Of a new repository (default: the account's choice)."
)
@click.option("--revision", help="Branch to push to (default: main); made when it is missing.")
@click.option("--create-pr", is_flag=True, help="Propose the change as a pull request.")
@click.option("--commit-message", help="First line of the commit.")
@click.option("--tag", help="Tag the commit, after everything has arrived.")
@click.option("--license", "licence", help="Licence of the card (default: that of the inputs).")
@click.option(
    "--vectors", is_flag=True, help="Push the local vectors of a recipe first, to REPO-<name>."
)
@click.option("--dry-run", is_flag=True, help="Show files, sizes and the card; send nothing.")
@click.option("--token", help="Instead of that of `hf auth login`.")
@FORMAT
def push(directory: Path, repo: str, output: str, **options: Any) -> None:
    """Push a vector, a recipe or a merged model to the Hub, in one commit.

    DIRECTORY is what is pushed, REPO where to: org/name, made when it is missing.
    """
    from optimer_hf import hub

    done = hub.push(directory, repo, **options)
    if output == "json":
        _echo(hub.to_json(done))
        return
    for each in (*done.vectors, done):
        _say_push(each, options["dry_run"])


def _say_push(done: "Push", dry_run: bool) -> None:
    for name, n_bytes in done.sent.items():
        _echo(f"{name}: {n_bytes:,} bytes")
    for name in done.deleted:
        _echo(f"{name}: deleted")
    size = f"{len(done.sent)} files, {sum(done.sent.values()):,} bytes"
    if dry_run:
        _echo(f"{done.card}\nwould send {size} to {done.repo_id}; nothing was sent")
    elif done.pull_request:
        _echo(f"proposed{'' if done.sent else ' already'}: {done.pull_request}")
    elif not done.sent and not done.deleted:
        _echo(f"{done.repo_id}@{done.commit}: has everything already")
    else:
        unchanged = f", {len(done.unchanged)} unchanged" if done.unchanged else ""
        _echo(f"{done.repo_id}@{done.commit}: {size} sent{unchanged}")


@main.command()
@click.argument("repo")
@click.argument("out", type=PATH, required=False)
@click.option("--revision", help="Branch, tag or commit (also as REPO@REVISION).")
@click.option("--update", is_flag=True, help="Take what REPO is now, and say what moved.")
@click.option("--token", help="Instead of that of `hf auth login`.")
@FORMAT
def pull(repo: str, out: Path | None, output: str, **options: Any) -> None:
    """Pull a vector, a recipe or a merged model; of a recipe only its small files.

    REPO is org/name, org/name@REVISION too. Writes to OUT (default: the name of the repository).
    """
    from optimer_hf import hub

    done = hub.pull(repo, out, **options)
    if output == "json":
        _echo(hub.to_json(done))
        return
    for line in done.moved:
        _echo(f"moved: {line}")
    for each in done.inputs:
        if each.reference.startswith("pypi:"):
            _echo(f"to run: {each.reference} (code of a package that you have to install)")
            continue
        size = f"{each.n_bytes:,} bytes" if each.n_bytes is not None else "size unknown"
        gated = ", gated: ask for access first" if each.gated else ""
        _echo(f"to fetch: {each.reference} ({size}, licence {each.licence or '?'}{gated})")
    _echo(f"{done.path}: {done.kind} {done.repo_id}@{done.commit}")
    if done.kind == "recipe":
        _say_disk(done)


def _say_disk(done: "Pull") -> None:
    import shutil

    needed = sum(each.n_bytes or 0 for each in done.inputs)
    free = shutil.disk_usage(done.path).free
    if needed > free:
        _echo(f"warning: {needed:,} bytes to fetch, {free:,} free on this disk", err=True)
    _echo(f"build it: optimer build {done.path / 'recipe.yaml'} OUT")


@main.group("recipes")
def recipes_group() -> None:
    """Recipes of other people."""


@recipes_group.command("list")
@click.option("--token", help="Instead of that of `hf auth login`.")
def list_recipes(token: str | None) -> None:
    """List the recipe folders here, and on the Hub the repositories with our tag."""
    from optimer_hf import hub

    for study in sorted(Path("recipes").glob("*/study.yaml")):
        _echo(f"{study.parent}: run it with `optimer run {study.parent}`")
    for repo_id, changed in hub.recipes(token=token):
        _echo(f"{repo_id} ({changed}): take it with `optimer pull {repo_id}`")


@main.command()
@click.option("--strict", is_flag=True, help="A local file that is not there is an error.")
@click.argument("files", type=PATH, nargs=-1, required=True)
def validate(files: tuple[Path, ...], strict: bool) -> None:
    """Check fields and values of YAML files, and name local files that are not there.

    FILES are studies, train files, objectives, recipes and mergekit YAMLs. Models and tasks are not
    opened.
    """
    from optimer_hf.files.model import absent

    errors = []
    for path in files:
        try:
            what, config = _validated(path)
        except OptimerError as error:
            errors += [str(error)]
            errors += filter(None, [_absent_beside_mistakes(path)]) if strict else []
            continue
        gone = absent(path, config)
        if strict and gone:
            errors.append(gone)
        else:
            _echo("\n".join([f"{path}: a valid {what}", *gone.splitlines()]))
    if errors:
        raise ConfigError("\n".join(errors))


@main.command("schema")
@click.argument("kind", type=click.Choice(["study", "train", "objective", "recipe"]))
def print_schema(kind: str) -> None:
    """Print the JSON Schema of a KIND of file, for editors."""
    from optimer_hf.cli.schema import schema

    _echo(schema(kind))


def _validated(path: Path) -> tuple[str, Any]:
    """Return what a file is, and its fields with local paths absolute."""
    from optimer_hf.files.reading import read_yaml
    from optimer_hf.merging.mergekit_pool import linear_merge_of, with_absolute_references
    from optimer_hf.merging.mergekit_yaml import is_for_mergekit, read_merge_config
    from optimer_hf.training.checks import check_config
    from optimer_hf.training.config import TrainConfig

    keys = set(read_yaml(path))
    if keys and keys <= {"train", "study"}:
        return "short budget of a recipe", {}
    if is_for_mergekit(keys):
        config = read_merge_config(path)
        linear_merge_of(config, path)
        return "merge config", with_absolute_references(config, path)
    what, cls = _kind_of(keys)
    found = cls.read(path)
    if isinstance(found, TrainConfig):
        check_config(found, path)
    fields = found.model_dump()
    for vector in fields["vectors"].values() if what == "study" else ():
        if vector["train"] is not None:
            vector["train"] = str(path.resolve().parent / vector["train"])
    return what, fields


def _kind_of(keys: Collection[str]) -> tuple[str, type["VersionedFile"]]:
    """Return what a file of ours with these keys is."""
    from optimer_hf.recipes.record import RecipeFile
    from optimer_hf.scoring.objective import ObjectiveFile
    from optimer_hf.study.config import StudyConfig
    from optimer_hf.training.config import TrainConfig

    if "study" in keys and "scores" in keys:
        return "recipe", RecipeFile
    if "objective" in keys or "vectors" in keys:
        return "study", StudyConfig
    return ("objective", ObjectiveFile) if "terms" in keys else ("train config", TrainConfig)


def _absent_beside_mistakes(path: Path) -> str:
    """Return the local files that a file with mistakes names and that are not there, as `absent`
    does; nothing where it is no YAML.
    """
    from optimer_hf.files.model import absent_of_data
    from optimer_hf.files.reading import read_yaml
    from optimer_hf.merging.mergekit_yaml import absent_models, is_for_mergekit

    try:
        data = read_yaml(path)
    except ConfigError:
        return ""
    return (
        absent_models(data, path)
        if is_for_mergekit(data)
        else absent_of_data(_kind_of(data)[1], data, path)
    )
