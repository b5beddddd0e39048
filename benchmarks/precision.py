"""bfloat16 against float32 on this machine: matrix products, and a LoRA training step of the demo.

    python benchmarks/precision.py [--tokens 64]

Shows what `live.compute_dtype` decides: where the processor has no 16-bit kernels, PyTorch
falls back to loops, and a run in bfloat16 would take days. Medians of three.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from demo import RECIPE, one_arm

from optimer_hf.models.live import compute_dtype, default_device
from optimer_hf.training import config as train

ROUNDS = 3
ROWS, INPUTS, OUTPUTS = 512, 640, 2048  # tokens and a linear layer of Gemma 3 270M


def seconds_of(call: Callable[[], object]) -> float:
    """Return the median time of a call, after one that warms up."""
    call()
    taken = []
    for _ in range(ROUNDS):
        started = perf_counter()
        call()
        taken.append(perf_counter() - started)
    return statistics.median(taken)


def products(dtype: torch.dtype, device: str) -> dict[str, float]:
    """Return GFLOP/s of the three products of a linear layer: output, input and weight gradient."""
    x = torch.randn(ROWS, INPUTS, device=device, dtype=dtype)
    weight = torch.randn(OUTPUTS, INPUTS, device=device, dtype=dtype)
    gradient = torch.randn(ROWS, OUTPUTS, device=device, dtype=dtype)
    calls = {
        "x @ w.T": lambda: x @ weight.T,
        "g @ w": lambda: gradient @ weight,
        "g.T @ x": lambda: gradient.T @ x,
    }
    flop = 2 * ROWS * INPUTS * OUTPUTS
    return {name: flop / seconds_of(call) / 1e9 for name, call in calls.items()}


def training(is_mixed: bool, n_tokens: int) -> float:
    """Return tokens/s of LoRA training, bfloat16 mixed precision or float32."""
    config = train.TrainConfig.read(RECIPE / "train-ja.yaml")
    trainer = {**config.trainer, "bf16": is_mixed, "per_device_train_batch_size": 1}
    config = config.model_copy(update={"trainer": trainer, "block_size": n_tokens})
    with tempfile.TemporaryDirectory() as scratch:
        seconds, _ = one_arm(config, fused=True, steps=1 + ROUNDS, scratch=Path(scratch))
    return n_tokens / statistics.median(seconds[1:])


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=64, help="of a training step")
    options = parser.parse_args()
    device = default_device()
    chosen = str(compute_dtype(torch.bfloat16, device)).removeprefix("torch.")
    rates = {dtype: products(dtype, device) for dtype in (torch.bfloat16, torch.float32)}
    steps = {is_mixed: training(is_mixed, options.tokens) for is_mixed in (True, False)}
    print(f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads, {device}")
    print("                         bfloat16    float32")
    for name, rate in rates[torch.float32].items():
        print(f"{name:<10} GFLOP/s      {rates[torch.bfloat16][name]:10.1f} {rate:10.1f}")
    print(f"LoRA step  tokens/s     {steps[True]:10.1f} {steps[False]:10.1f}")
    print(f"bfloat16 is computed in {chosen} here")
    print(
        json.dumps(
            {
                "gflops": {str(dtype)[6:]: rate for dtype, rate in rates.items()},
                "tokens_per_second": {"bfloat16": steps[True], "float32": steps[False]},
                "chosen": chosen,
            }
        )
    )


if __name__ == "__main__":
    main()
