"""Choose how a run computes its loss, by measuring the candidates on its own shapes."""

import importlib.util
import logging
import math
import statistics
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import torch

from optimer_hf.files.text import first_line
from optimer_hf.models.fused_loss import fuse_loss, fuse_sharded_loss, restore_stock_loss
from optimer_hf.models.head_loss import Loss, blocked_loss
from optimer_hf.models.memory import lacks_memory
from optimer_hf.models.plain_head import is_plain_head, plain_weight, softcap_of
from optimer_hf.models.token_loss import liger_loss, stock_loss
from optimer_hf.vectors.training_record import Head, Speed

logger = logging.getLogger(__name__)

REPEATS = 5
WORTH_COMPILING = 10.0  # seconds of the run for the loss; compiling it takes a few
STOCK_SHARE = 0.5  # of the free memory: more of it would leave too little for the layers
WORTH_CHANGING = 0.9  # of the time of the blocked loss; a smaller gain is not worth the memory


def install_head(
    model: Any,
    wanted: str,
    n_tokens: int,
    dtype: torch.dtype,
    speed: Speed,
    *,
    n_batches: int = 0,
) -> None:
    """Make a model compute its loss as wanted: `stock`, `blocked`, `liger`, or `auto`, the fastest
    for batches of `n_tokens` in `dtype`. Notes the choice, and the times, in `speed`.

    On a CPU, `auto` is the blocked loss. A head that is more than one product keeps its stock loss.
    `n_batches` decides whether compiling the blocked loss can pay.
    """
    restore_stock_loss(model)
    if not is_plain_head(model):
        fuse_loss(model)  # says that it does not apply
        speed.head = "stock"
        return
    speed.compiled_head = speed.compiled_head or bool(speed.compiled)
    if wanted == "auto":
        wanted = speed.head or _choose(model, n_tokens, dtype, speed, n_batches)
    blocked = blocked_loss(model.device.type, is_compiled=speed.compiled_head)
    loss = {"blocked": blocked, "liger": liger_loss}.get(wanted)
    if loss is not None:
        fuse_loss(model, loss)
    speed.head = wanted  # type: ignore[assignment]


def install_sharded_head(
    model: Any, root: torch.nn.Module, wanted: str, device: str, speed: Speed
) -> None:
    """Do as `install_head` for a model whose parameters are spread over processes; collective.

    `root` is the module that was sharded. `auto` is the blocked loss, which needs least memory.
    """
    wanted = "blocked" if wanted == "auto" else wanted
    loss = {"blocked": blocked_loss(device), "liger": liger_loss}.get(wanted)
    is_installed = loss is not None and fuse_sharded_loss(model, root, loss)
    speed.head = wanted if is_installed else "stock"  # type: ignore[assignment]


def _choose(model: Any, n_tokens: int, dtype: torch.dtype, speed: Speed, n_batches: int) -> Head:
    """Return the fastest loss that fits the memory, and note the times."""
    if model.device.type == "cpu":
        return "blocked"
    weight = plain_weight(model)
    assert weight is not None

    def measure(loss: Loss) -> float | None:
        devices = [weight.device] if weight.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):  # dropout must not depend on this
            return measure_loss(loss, weight, n_tokens, dtype, softcap_of(model))

    plain = blocked_loss("cuda", is_compiled=speed.compiled_head)
    candidates: dict[Head, Loss] = {"stock": stock_loss, "blocked": plain}
    if importlib.util.find_spec("liger_kernel") is not None:
        candidates["liger"] = liger_loss
    for name, loss in candidates.items():
        milliseconds = _try_to_measure(measure, loss, name)
        if milliseconds is not None:
            speed.head_ms[name] = milliseconds
    chosen = choose_fastest(speed.head_ms)
    spent = n_batches * speed.head_ms.get(chosen, 0.0) / 1e3
    if spent > WORTH_COMPILING and speed.compiled is None:
        compiled = blocked_loss("cuda", is_compiled=True)
        speed.compiled_head_ms = _try_to_measure(measure, compiled, "compiled")
        others = speed.head_ms | {"blocked": speed.compiled_head_ms or math.inf}
        speed.compiled_head = choose_fastest(others) == "blocked"
        chosen = "blocked" if speed.compiled_head else chosen
    logger.info("train: %s loss; ms a batch: %s", chosen, speed.head_ms)
    return chosen


def _try_to_measure(measure: Callable[[Loss], float | None], loss: Loss, name: str) -> float | None:
    """Return the milliseconds of a loss; None where it fails, for instance without a compiler."""
    try:
        return measure(loss)
    except Exception as error:
        logger.info("train: the %s loss is no candidate: %s", name, first_line(error))
        return None


def choose_fastest(milliseconds: Mapping[Head, float]) -> Head:
    """Return the fastest loss; of two about as fast the blocked one, which needs less memory."""
    times = dict(milliseconds)
    if "blocked" in times:
        times["blocked"] *= WORTH_CHANGING
    return min(times, key=lambda name: times[name], default="blocked")


def measure_loss(
    loss: Loss, weight: torch.Tensor, n_tokens: int, dtype: torch.dtype, softcap: float | None
) -> float | None:
    """Return the milliseconds of a loss and its gradients for random hidden states [n, d] in a
    dtype, or None if they do not fit in the memory or in STOCK_SHARE of what is free.
    """
    device = weight.device
    head = weight.detach().requires_grad_(weight.requires_grad)
    hidden = torch.randn(n_tokens, weight.shape[1], device=device).to(dtype).requires_grad_()
    labels = torch.randint(len(weight), (n_tokens,), device=device)
    free = _reset_memory(device)
    seconds = []
    try:
        for _ in range(1 + REPEATS):
            hidden.grad = head.grad = None
            started = perf_counter()
            loss(hidden, head, labels, softcap).backward()  # type: ignore[no-untyped-call]
            _wait(device)
            seconds.append(perf_counter() - started)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    except Exception as error:
        if lacks_memory(error):
            return None
        raise
    finally:
        hidden.grad = head.grad = None
        _reset_memory(device)
    if peak > _in_use(device) + STOCK_SHARE * free:
        return None
    return round(1e3 * statistics.median(seconds[1:]), 2)


def _reset_memory(device: torch.device) -> int:
    """Give unused memory of a GPU back, start to measure the peak, and return what is free."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.mem_get_info(device)[0]


def _in_use(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
