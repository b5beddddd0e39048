"""Run commands, in this process or in another, and compute the merges that they should write."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM

from optimer_hf.cli import main

ROOT = Path(__file__).parents[2]


def optimer(*arguments, ok: bool = True):
    """Run a command and check whether it succeeds."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert (result.exit_code == 0) == ok, result.output
    return result


def process(*arguments, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Run Python with these arguments and this package."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd)


def expected_weights(pool, weights) -> dict[str, torch.Tensor]:
    base, *tuned = (
        AutoModelForCausalLM.from_pretrained(p).state_dict() for p in (pool[0], *pool[1])
    )
    return {
        name: tensor + sum(w * (t[name] - tensor) for w, t in zip(weights, tuned, strict=True))
        for name, tensor in base.items()
    }


def assert_is_merge(directory: Path, pool, weights) -> None:
    tensors = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    for name, tensor in expected_weights(pool, weights).items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-5, atol=1e-6)


def search_merge(folder: Path, out: Path, n_trials: int) -> Result:
    """Search the weights of the mergekit YAML in `folder`, and return the result of the command."""
    objective, n = folder / "obj.yaml", str(n_trials)
    return optimer(
        "search", folder / "my-merge.yml", out, "--objective", objective, "--n-trials", n
    )
