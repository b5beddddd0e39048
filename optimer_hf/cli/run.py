"""Commands for a recipe folder: run, plan."""

from pathlib import Path
from typing import Any

import click

from optimer_hf.cli.options import (
    FORMAT,
    PATH,
    PROFILE,
    SEED,
    SEEDS,
    SHORT,
    STUDY_OR_FOLDER,
    TOKENS,
    LoadingCommand,
    echo,
)
from optimer_hf.cli.tables import echo_markdown
from optimer_hf.errors import ConfigError

MFU = 0.4  # well-tuned training on one H100 reaches 40 to 50 % (nanochat)


@click.command(cls=LoadingCommand, epilog="Example: optimer run recipes/gemma-3-270m-demo --short")
@click.argument("recipe_dir", type=PATH)
@click.argument("out", type=PATH, required=False)
@SHORT
@PROFILE
@TOKENS
@SEEDS
@SEED
def run(
    recipe_dir: Path, out: Path | None, n_seeds: int | None, seed: int | None, **budget: Any
) -> None:
    """Run a recipe folder from corpora to the compared merge; resumes where it stopped.

    RECIPE_DIR contains a study.yaml and the train files of its vectors. The results go to OUT
    (default: runs/NAME, with the profile, -TOKENS or -seeds appended). With --seeds, OUT gets a
    whole run in every seed-K, with K added to the seeds of all trainings and searches. --seed K
    does only that one, so that several machines can share them.
    """
    from optimer_hf.experiment.commands import run_folder

    job, summary = run_folder(recipe_dir, out, n_seeds=n_seeds, seed=seed, **budget)
    echo_markdown(summary)
    shown = job.out.relative_to(Path.cwd()) if job.out.is_relative_to(Path.cwd()) else job.out
    if n_seeds is not None:
        where = "every seed-K there has its results.md, report.html and merged/"
        echo(f"{shown / 'results.md'}; {where}", err=True)
        return
    for what, name in (("report", "report.html"), ("tables", "results.md"), ("model", "merged")):
        echo(f"{what}: {shown / name}", err=True)
    echo(f"share it: optimer push {shown} YOU/NAME --vectors --dry-run", err=True)


@click.command(cls=LoadingCommand, epilog="Example: optimer plan recipes/gemma-3-270m-demo")
@click.argument("source", type=STUDY_OR_FOLDER)
@click.argument("out", type=PATH, required=False)
@SHORT
@PROFILE
@TOKENS
@SEEDS
@click.option("--fetch", is_flag=True, help="Download the base for the probe if it is missing.")
@click.option(
    "--on", "devices", metavar="DEVICES", help="Plan for GPUs that are not here, e.g. 8xH100."
)
@click.option(
    "--mfu",
    type=click.FloatRange(0, 1, min_open=True),
    help="Share of the peak of these GPUs to reckon with (default: 0.4).",
)
@FORMAT
def plan(
    source: Path,
    out: Path | None,
    fetch: bool,
    devices: str | None,
    mfu: float | None,
    output: str,
    **budget: Any,
) -> None:
    """Estimate what a recipe folder or a study.yaml (SOURCE) will take: time, memory, disk.

    Runs a few real training steps and scores a few real items, and lists the downloads. The plan of
    a recipe folder is kept in OUT, and `optimer run` compares it with what the run took. With
    --seeds, it is the plan of the first seed.

    With --on, nothing runs, and the base need not be here: GPU-hours, memory of each GPU and disk
    follow from FLOPs and bytes.
    """
    if devices is not None:
        if out is not None or fetch or budget.pop("n_seeds") is not None:
            raise ConfigError("--on: OUT, --fetch and --seeds do not go with it. Leave them out.")
        _plan_elsewhere(source, devices, mfu, output, budget)
        return
    if mfu is not None:
        raise ConfigError("--mfu: goes with --on, which names the GPUs. Here the plan is measured.")
    from optimer_hf.experiment.commands import plan_source
    from optimer_hf.experiment.plan_file import to_markdown

    planned = plan_source(source, out, fetch=fetch, **budget)
    if output == "json":
        echo(planned.model_dump_json(indent=2))
    else:
        echo_markdown(to_markdown(planned, budget["n_seeds"] or 1))


def _plan_elsewhere(
    source: Path, devices: str, mfu: float | None, output: str, budget: dict[str, Any]
) -> None:
    from optimer_hf.experiment.commands import plan_elsewhere
    from optimer_hf.experiment.hardware_plan import hardware_to_markdown

    planned = plan_elsewhere(source, devices, utilisation=mfu or MFU, **budget)
    if output == "json":
        echo(planned.model_dump_json(indent=2))
    else:
        echo_markdown(hardware_to_markdown(planned))
