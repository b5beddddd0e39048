"""Commands that make and inspect vectors: train, extract, vectors, convert."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from optimer_hf.cli.options import (
    FLOATS,
    FORMAT,
    INPUT,
    PATH,
    SCORED_FILE,
    STUDY_FILE,
    TRAIN_FILE,
    LoadingCommand,
    dtype,
    echo,
)
from optimer_hf.cli.tables import echo_markdown
from optimer_hf.errors import ConfigError

if TYPE_CHECKING:
    from optimer_hf.merging.geometry import Geometry
    from optimer_hf.vectors.record import VectorFile

BASE = click.option("--base", required=True, help="Model that the vectors were trained from.")


@click.command(cls=LoadingCommand, epilog="Example: optimer train train-math.yaml vectors/math")
@click.argument("train_yaml", type=TRAIN_FILE)
@click.argument("out", type=PATH)
def train(train_yaml: Path, out: Path) -> None:
    """Continually pre-train one model and write it as a vector.

    TRAIN_YAML names the base and the corpus. OUT gets an adapter or a full model. The same command
    resumes an interrupted run. `accelerate launch -m optimer_hf train` uses many GPUs.
    """
    from optimer_hf.training.run import train_vector

    record = train_vector(train_yaml, out)
    if record is not None:
        echo(f"{out}: {_size_of(record)}")


def _size_of(record: "VectorFile") -> str:
    share = f"{100 * record.relative_norm:.2f} % of the norm of the tensors it changes"
    return f"{record.kind}, norm {record.norm:.4g}, {share}"


@click.command(
    cls=LoadingCommand,
    epilog="Example: optimer extract you/my-finetune --base google/gemma-3-270m my-delta",
)
@click.argument("tuned")
@BASE
@click.argument("out", type=PATH)
@click.option("--name", help="Name of the vector (default: the name of OUT).")
@dtype(
    "Stored dtype; int8 has one scale for every --block-size numbers.",
    *("bfloat16", "float16", "float32", "int8"),
)
@click.option(
    "--block-size",
    type=click.IntRange(min=1, max=2**20),
    default=64,
    show_default=True,
    help="Numbers that share one scale in int8.",
)
@click.option(
    "--from-adapter",
    is_flag=True,
    help="Allow TUNED to be any adapter that PEFT can merge (DoRA, IA3, ...).",
)
def extract(tuned: str, base: str, out: Path, **options: Any) -> None:
    """Write the vector TUNED minus BASE as a delta directory.

    TUNED is a checkpoint or an adapter: a directory or a Hub id. OUT has to be new or empty.
    """
    from optimer_hf.vectors.extraction import extract_vector

    record = extract_vector(tuned, base, out, **options)
    error = 100 * (record.relative_error or 0)
    stored = f"stored in {record.dtype} with a relative error of {error:.3f} %"
    echo(f"{out}: {_size_of(record)}; {stored}")
    if record.relative_errors:
        worst, error = max(record.relative_errors.items(), key=lambda pair: pair[1])
        echo(f"largest error of a tensor: {100 * error:.3f} % ({worst})")


@click.command(
    cls=LoadingCommand, epilog="Example: optimer vectors ./math ./code --base google/gemma-3-270m"
)
@click.argument("vectors", nargs=-1, required=True)
@click.option("--base", help="Model that the vectors were trained from (default: the study's).")
@click.option(
    "--dtype",
    type=click.Choice(FLOATS),
    help="Dtype of the merge, for the check of what survives rounding (default: the study's, or "
    "bfloat16).",
)
@click.option(
    "--sensitivity",
    is_flag=True,
    help="Show what more of each vector does to every term, at the base and at the average.",
)
@click.option(
    "--objective",
    type=SCORED_FILE,
    help="Objective file; needed for --sensitivity of a mergekit YAML.",
)
@FORMAT
def vectors(
    vectors: tuple[str, ...],
    base: str | None,
    dtype: str | None,
    sensitivity: bool,
    objective: Path | None,
    output: str,
) -> None:
    """Show norms, cosines and ranks of vectors, and whether they can be merged.

    VECTORS are adapters, deltas and checkpoints: directories or Hub ids. Or VECTORS is one file, a
    study.yaml or a mergekit YAML, with base and pool. The exit status is 1 if one of them cannot be
    merged into the base. With --sensitivity, which takes a file, two trials with gradients measure
    what all of them do.
    """
    if sensitivity:
        _print_sensitivity(vectors, base, objective, output)
        return
    if objective is not None:
        raise ConfigError("--objective is for --sensitivity. Add that, or leave --objective out.")
    measured, refusals = _measure(vectors, base, dtype)
    from optimer_hf.merging import geometry

    if output == "json":
        echo(json.dumps(geometry.to_json(measured, refusals), indent=2))
    else:
        echo_markdown(geometry.to_markdown(measured, refusals))
    if refusals:
        raise SystemExit(1)


def _measure(
    vectors: tuple[str, ...], base: str | None, dtype: str | None
) -> tuple["Geometry", dict[str, str]]:
    """Return the geometry of vectors, or of the pool in the one file that is given."""
    if base is not None:
        from optimer_hf.merging.geometry import measure_sources

        return measure_sources(vectors, base, dtype or "bfloat16")
    if len(vectors) != 1 or not vectors[0].endswith((".yaml", ".yml")):
        raise click.UsageError("Missing option '--base'.")
    (path,) = (STUDY_FILE.convert(file, None, None) for file in vectors)
    from optimer_hf.searching.pool_geometry import measure_file

    return measure_file(path, dtype)


def _print_sensitivity(
    files: tuple[str, ...], base: str | None, objective: Path | None, output: str
) -> None:
    if len(files) != 1 or base is not None:
        raise ConfigError(
            "--sensitivity takes one file, a study.yaml or a mergekit YAML, which names its base. "
            f"Found {len(files)} argument(s){' and --base' * (base is not None)}."
        )
    (path,) = (STUDY_FILE.convert(file, None, None) for file in files)
    from optimer_hf.searching import sensitivity as measuring

    measured = measuring.measure_sensitivity(path, objective=objective)
    if output == "json":
        echo(json.dumps(measuring.to_json(measured), indent=2, ensure_ascii=False))
    else:
        echo_markdown(measuring.to_markdown(measured))


@click.command(
    cls=LoadingCommand, epilog="Example: optimer convert gemma-3-270m-Q4_K_M.gguf gemma-3-270m"
)
@click.argument("gguf", type=INPUT)
@click.argument("out", type=PATH)
@dtype("Stored dtype.")
def convert(gguf: Path, out: Path, dtype: str) -> None:
    """Convert a GGUF file that transformers can read to a directory with safetensors weights.

    GGUF is the file; quantised weights are de-quantised. OUT has to be new or empty, and gets
    weights, config and tokenizer.
    """
    from optimer_hf.models.gguf_conversion import convert_gguf

    convert_gguf(gguf, out, dtype=dtype)
    echo(out)
