"""What happens between the steps of a run: progress, seals of checkpoints, norms of the vector."""

import logging
import math
from collections import deque
from pathlib import Path
from time import perf_counter
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from optimer_hf.errors import ModelError
from optimer_hf.models.devices import peak_flops
from optimer_hf.models.sharded import is_sharded
from optimer_hf.progress import Cost, Meter
from optimer_hf.training.checkpoints import SPENT_FILE, SpentRecord, seal
from optimer_hf.training.config import TrainConfig
from optimer_hf.training.growth import full_norm, is_due, lora_norm
from optimer_hf.vectors.training_record import Speed

logger = logging.getLogger(__name__)

WINDOW = 20  # steps whose speed is shown


class RunCallback(TrainerCallback):
    """Shows progress, saves the time spent with every checkpoint and records the norm of the
    vector.
    """

    meter: Meter
    flops_per_token: float | None = None

    def __init__(
        self, config: TrainConfig, base: Path, earlier: Cost, speed: Speed, *, n_blocks: int
    ) -> None:
        self.config, self.base, self.earlier, self.speed = config, base, earlier, speed
        self.n_blocks = n_blocks  # of an epoch
        self.loss, self.is_measured = "", True
        self.started = Cost.now()
        self._ends: deque[float] = deque(maxlen=WINDOW)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Seal a checkpoint, with the time spent so far."""
        args.distributed_state.wait_for_everyone()  # each process writes its own file
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            spent = self.earlier + self.started.since()
            SpentRecord.of(spent, self.speed).write(folder / SPENT_FILE)
            seal(folder)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start to show progress."""
        self.meter = Meter(
            f"train {self.config.name}",
            self._count_tokens(args, state.max_steps),
            "tokens",
            done=self._count_tokens(args, state.global_step),
        )
        if state.is_world_process_zero:
            self.meter.__enter__()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **_: Any
    ) -> None:
        """Record the norm of the vector, if one is due."""
        if "loss" not in (logs or {}):
            return
        self.loss = f"loss {logs['loss']:.3f}"
        if self.is_measured and (state.is_world_process_zero or is_sharded(model)):
            self.is_measured = self._note_norm(model, state)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Show what is done, and how fast."""
        if state.is_world_process_zero:
            self._ends.append(perf_counter())
            step, mfu = state.global_step, self._show_mfu(args)
            n_tokens = self._count_tokens(args, step) - self._count_tokens(args, step - 1)
            self.meter.advance(n_tokens, f"{self.loss}{mfu}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Leave the last state on the screen."""
        if state.is_world_process_zero:
            self.meter.__exit__(None, None, None)

    def _count_tokens(self, args: TrainingArguments, n_steps: int) -> int:
        return count_blocks(args, n_steps, self.n_blocks) * self.config.block_size

    def _show_mfu(self, args: TrainingArguments) -> str:
        """Return the share of the peak that the last steps used, if the peak is known."""
        n_steps = len(self._ends) - 1
        if n_steps < 1:
            return ""
        n_tokens = n_steps * tokens_per_step(self.config, args)
        speed = n_tokens / max(1e-9, self._ends[-1] - self._ends[0])
        mfu = utilisation(speed, self.flops_per_token, self.speed.device, args.world_size)
        return "" if mfu is None else f", {mfu:.0%} MFU"

    def _note_norm(self, model: Any, state: Any) -> bool:
        """Add the norm of the vector so far to the last entry of a run's log, if one is due.

        Returns False, and logs why, when it cannot be measured.
        """
        try:
            if is_due(state.log_history, state.max_steps):
                is_full = self.config.lora is None
                norm = full_norm(model, self.base) if is_full else lora_norm(model)
                state.log_history[-1]["norm"] = norm
        except ModelError as error:
            name = self.config.name
            logger.info("train %s: the norm of the vector is not recorded: %s", name, error)
            return False
        return True


def tokens_per_step(config: TrainConfig, args: TrainingArguments) -> int:
    """Return how many tokens one step of all processes together trains on."""
    return int(_blocks_per_batch(args) * args.gradient_accumulation_steps * config.block_size)


def count_blocks(args: TrainingArguments, n_steps: int, n_blocks: int) -> int:
    """Return on how many blocks all processes together have trained after so many steps of epochs
    of `n_blocks`.

    One process takes a smaller last batch. Several fill it from the start of the data, unless
    `even_batches` is false (`accelerate.data_loader.BatchSamplerShard`).
    """
    in_batch = _blocks_per_batch(args)
    in_step: int = in_batch * args.gradient_accumulation_steps
    if args.dataloader_drop_last:
        in_epoch = n_blocks - n_blocks % in_batch
    elif args.world_size > 1 and args.accelerator_config.even_batches:
        in_epoch = n_blocks + -n_blocks % in_batch
    else:
        in_epoch = n_blocks
    n_epochs, rest = divmod(n_steps, max(1, math.ceil(in_epoch / in_step)))
    return n_epochs * in_epoch + rest * in_step


def _blocks_per_batch(args: TrainingArguments) -> int:
    """Return how many blocks all processes together take at once."""
    size: int = args.train_batch_size
    is_split = args.world_size > 1 and args.accelerator_config.split_batches
    return size if is_split else int(size * args.world_size)


def utilisation(
    tokens_per_second: float, flops_per_token: float | None, device: str | None, n_devices: int
) -> float | None:
    """Return the share of the peak of `n_devices` devices (MFU, after PaLM) that a speed takes;
    None where the peak or the FLOPs are not known.
    """
    peak = None if device is None else peak_flops(device)
    if peak is None or flops_per_token is None:
        return None
    return tokens_per_second * flops_per_token / (peak * n_devices)
