"""Find how many blocks a device trains on at once (`per_device_train_batch_size: auto`)."""

import logging
import statistics
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from optimer_hf.models.memory import free_memory, lacks_memory
from optimer_hf.training.packing import PackedCorpus

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.getLogger(__name__)

LEAST_STEPS = 200  # of a run: larger batches leave too few for the schedule of the learning rate
LEAST_GAIN = 1.05  # in speed, for twice the blocks
LARGEST_SHARE = 0.9  # of the memory that other processes leave
MOMENTS = 8  # bytes that AdamW keeps for a trained number
REPEATS = 3


def find_batch_size(trainer: "Trainer", packed: PackedCorpus) -> int:
    """Return the batch size of a run: doubled from one block while a batch fits the memory, the
    speed grows and the run keeps LEAST_STEPS steps. Processes agree on the smallest.

    On a CPU that is one block, since more of them save nothing there.
    """
    from accelerate.utils import gather_object

    args = trainer.args
    if args.device.type == "cpu":
        return 1
    most = len(packed)
    if args.max_steps <= 0:  # otherwise the number of steps does not depend on the batch
        n_batches = LEAST_STEPS * args.gradient_accumulation_steps * args.world_size
        most = max(1, int(len(packed) * args.num_train_epochs) // n_batches)
    with torch.random.fork_rng(devices=[args.device]):
        found = double_while_faster(lambda size: _time_batch(trainer, packed, size), most)
    sizes: list[int] = gather_object([found])
    logger.info("train: batches of %d blocks on each device", min(sizes))
    return min(sizes)


def double_while_faster(time: Callable[[int], float | None], most: int) -> int:
    """Return the largest of 1, 2, 4, ... up to `most` that still gains speed. `time` returns the
    seconds of a batch, or None where it does not fit.
    """
    best, rate, size = 1, 0.0, 1
    while size <= most:
        seconds = time(size)
        if seconds is None or size / seconds < LEAST_GAIN * rate:
            break
        best, rate, size = size, size / seconds, 2 * size
    return best


def _time_batch(trainer: "Trainer", packed: PackedCorpus, size: int) -> float | None:
    """Return the seconds of the forward and backward pass of a batch; None if it does not fit."""
    from transformers import default_data_collator

    model: Any = trainer.model
    device = trainer.args.device
    batch = default_data_collator([packed[index % len(packed)] for index in range(size)])
    batch = {key: value.to(device) for key, value in batch.items()}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    limit = LARGEST_SHARE * (free_memory(str(device)) + torch.cuda.memory_allocated(device))
    model.train()
    seconds = []
    try:
        for _ in range(REPEATS):
            torch.cuda.synchronize(device)
            started = perf_counter()
            with trainer.accelerator.autocast():
                loss = model(**batch).loss
            loss.backward()
            torch.cuda.synchronize(device)
            seconds.append(perf_counter() - started)
            model.zero_grad()
    except Exception as error:
        if lacks_memory(error):
            return None
        raise
    finally:
        model.zero_grad()
        loss = None
    moments = sum(MOMENTS * each.numel() for each in model.parameters() if each.requires_grad)
    fits = torch.cuda.max_memory_allocated(device) + moments <= limit
    return statistics.median(seconds) if fits else None
