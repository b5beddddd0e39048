"""Training speed next to a bare HF Trainer loop, on the demo's data, in one process: tokens/s,
ratio, losses.

    python benchmarks/demo.py [--steps 10]

Both arms train the same LoRA on the same packed blocks of the demo's Japanese corpus, in the same
order and dtype (bfloat16 mixed precision where the machine can, see benchmarks/precision.py). The
stock arm is transformers' own Trainer and loss; ours differs in `head: blocked` alone. Rounds
alternate; medians. Losses are compared once more in float32: in
bfloat16 two runs drift apart, because each rounds its gradients and the optimizer amplifies that.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from time import perf_counter

import torch
from transformers import AutoTokenizer, Trainer, TrainerCallback

from optimer_hf.models.resolve import resolve_model
from optimer_hf.training.config import TrainConfig
from optimer_hf.training.packing import pack
from optimer_hf.training.trainer import build_trainer

RECIPE = Path(__file__).parent.parent / "recipes" / "gemma-3-270m-demo"


class StepTimes(TrainerCallback):
    """Seconds of every optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: object, state: object, control: object, **_: object) -> None:
        """Start the clock."""
        self._started = perf_counter()

    def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:
        """Stop the clock."""
        self.seconds.append(perf_counter() - self._started)


def one_arm(
    config: TrainConfig, *, fused: bool, steps: int, scratch: Path, float32: bool = False
) -> tuple[list[float], list[float]]:
    """Return seconds per step and losses of one short run, as configured or all in float32."""
    if float32:
        config = config.model_copy(update={"trainer": {**config.trainer, "bf16": False}})
    base = resolve_model(config.base_model)
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    batch = config.trainer["per_device_train_batch_size"]
    tokens = steps * batch * config.block_size
    assert config.corpus is not None  # the demo has no mixtures
    blocks = pack(
        config.corpus,
        tokenizer,
        block_size=config.block_size,
        max_tokens=tokens,
        seed=0,
        out=scratch / "blocks.npy",
    )
    config = config.model_copy(update={"head": "blocked" if fused else "stock"})
    trainer: Trainer = build_trainer(config, base, blocks, scratch)
    times = StepTimes()
    trainer.add_callback(times)
    trainer.args.save_strategy = "no"
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return times.seconds, [float(loss) for loss in losses]


def main() -> None:
    """Run both arms in turn and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--float32-steps", type=int, default=4)
    options = parser.parse_args()
    config = TrainConfig.read(RECIPE / "train-ja.yaml")
    tokens = config.trainer["per_device_train_batch_size"] * config.block_size
    seconds: dict[bool, list[float]] = {True: [], False: []}
    losses: dict[bool, list[float]] = {}
    for _ in range(options.rounds):
        for fused in (False, True):
            with tempfile.TemporaryDirectory() as scratch:
                measured, losses[fused] = one_arm(
                    config, fused=fused, steps=options.steps, scratch=Path(scratch)
                )
            seconds[fused] += measured[1:]
    stock, ours = statistics.median(seconds[False]), statistics.median(seconds[True])
    differences = _differences(losses)
    exact: dict[bool, list[float]] = {}
    for fused in (False, True):
        with tempfile.TemporaryDirectory() as scratch:
            _, exact[fused] = one_arm(
                config,
                fused=fused,
                steps=options.float32_steps,
                scratch=Path(scratch),
                float32=True,
            )
    print(
        f"threads {torch.get_num_threads()}, {tokens} tokens a step, {options.rounds} rounds of "
        f"{options.steps} steps, medians"
    )
    print(f"stock HF Trainer   {tokens / stock:7.1f} tokens/s")
    print(f"optimer train      {tokens / ours:7.1f} tokens/s")
    print(f"ratio              {stock / ours:7.2f}")
    print(f"loss, float32, largest difference of {options.float32_steps} steps")
    print(f"                   {max(_differences(exact)):.1e}")
    print(f"loss, as configured, same weights (first step), largest of {options.steps} steps")
    print(f"                   {differences[0]:.1e}, {max(differences):.1e}")
    print(
        json.dumps(
            {
                "stock": tokens / stock,
                "ours": tokens / ours,
                "ratio": stock / ours,
                "loss_difference_float32": _differences(exact),
                "loss_difference": differences,
            }
        )
    )


def _differences(losses: dict[bool, list[float]]) -> list[float]:
    return [abs(a - b) for a, b in zip(losses[True], losses[False], strict=True)]


if __name__ == "__main__":
    main()
