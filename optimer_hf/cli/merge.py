"""The command merge, with every flag of `mergekit-yaml`.

Importing mergekit takes seconds, so the flags are listed here; a test compares them with
mergekit's.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from optimer_hf.cli.options import MERGE_FILE, PATH, CommandT, LoadingCommand, echo

LARGEST_SHARD = 2**50
UNITS = {"k": 10**3, "m": 10**6, "b": 10**9}


def parse_size(text: str) -> int:
    """Return a number of parameters, which may be written as 500000, 500k, 200M or 5B."""
    unit = UNITS.get(text[-1:].lower(), 1)
    digits = text if unit == 1 else text[:-1]
    size = int(digits) * unit if digits.isdecimal() and len(digits) < 20 else 0
    if not 0 < size <= LARGEST_SHARD:
        raise click.BadParameter(f"found {text!r}, expected a number such as 200M or 5B.")
    return size


SWITCHES = {
    "allow_crimes": "Allow models of different architectures to be mixed.",
    "unsafe_truncate_embeddings": "Cut embeddings to the smallest vocabulary, whatever the tokens.",
    "cuda": "Do the arithmetic on a CUDA device.",
    "low_cpu_memory": "Keep intermediate tensors on the accelerator.",
    "copy_tokenizer": "Write a tokenizer beside the model (on by default).",
    "clone_tensors": "Copy tensors before saving, for layers that occur twice.",
    "trust_remote_code": "Run code from the repositories of the models (dangerous).",
    "lazy_unpickle": "Read pickled weights piece by piece.",
    "write_model_card": "Write a README.md about the merge (on by default).",
    "safe_serialization": "Save as safetensors (on by default, and required).",
    "quiet": "Hide progress bars.",
    "read_to_gpu": "Read weights straight onto the accelerator.",
    "multi_gpu": "Run the merge on several GPUs.",
    "async_write": "Write shards in the background; uses more memory.",
}
VALUES: dict[str, tuple[Any, str]] = {
    "transformers_cache": (str, "Directory for downloaded models."),
    "lora_merge_cache": (str, "Directory for adapters merged into their models."),
    "lora_merge_dtype": (str, "Dtype in which adapters are merged into their models."),
    "device": (str, "Device for the arithmetic: cpu, cuda, xpu or auto."),
    "out_shard_size": (parse_size, "Parameters in a shard, e.g. 200M (default: 5B)."),
    "random_seed": (click.IntRange(0, 2**32 - 1), "Seed of merge methods that draw at random."),
    "write_threads": (click.IntRange(1, 256), "Threads that write in the background (default: 1)."),
}


def mergekit_flags(command: CommandT) -> CommandT:
    """Add the flags of mergekit. A flag that is not given is None."""
    options: list[Callable[[CommandT], CommandT]] = [
        *(
            click.option(f"{_flag(name)}/--no-{_flag(name)[2:]}", name, default=None, help=text)
            for name, text in SWITCHES.items()
        ),
        *(
            click.option(_flag(name), name, type=kind, help=text)
            for name, (kind, text) in VALUES.items()
        ),
        click.option(
            "--num-threads", "-j", type=click.IntRange(1, 1024), help="Threads for the arithmetic."
        ),
        click.option(
            "--gpu-rich",
            is_flag=True,
            default=None,
            help="Set --cuda --low-cpu-memory --read-to-gpu --multi-gpu.",
        ),
        click.option(
            "-v", "verbosity", count=True, help="Show mergekit's logs (-vv: all of them)."
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@click.command(cls=LoadingCommand, epilog="Example: optimer merge my-merge.yml merged --cuda")
@click.argument("config", type=MERGE_FILE)
@click.argument("out", type=PATH)
@click.option(
    "--engine",
    type=click.Choice(["native", "mergekit"]),
    help="Engine to use: the streaming writer or mergekit (default: chosen by the config).",
)
@mergekit_flags
def merge(config: Path, out: Path, engine: str | None, **flags: Any) -> None:
    """Run any mergekit YAML, with the `optimer` method and all of mergekit's flags.

    CONFIG is the YAML file. OUT has to be new or empty. It gets the merged model with its
    tokenizer, whole or not at all.
    """
    from optimer_hf.merging.engines import merge_with_flags

    used = merge_with_flags(config, out, flags, engine=engine)
    echo(f"{out}: written by {'the streaming writer' if used == 'native' else 'mergekit'}")
