"""An HF Trainer whose steps hardly cost the host anything on a GPU.

A step of a small model launches thousands of kernels, and the GPU waits for the host between them.
Blocks of tokens are all of one shape, so the forward pass, the loss and the backward pass of a step
can be captured once as a CUDA graph; each further step copies its batch in and replays it. The same
operations run, so results agree up to the order of sums. The layers of a run that is long enough
are compiled first, and stay so if that makes steps faster.
"""

import logging
import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from time import perf_counter
from typing import Any

import torch
from transformers import Trainer

from optimer_hf.files.text import first_line
from optimer_hf.models.fused_loss import fuse_loss, is_fused
from optimer_hf.models.head_loss import blocked_loss
from optimer_hf.models.memory import lacks_memory
from optimer_hf.vectors.training_record import Speed

logger = logging.getLogger(__name__)

WARM_UP = 3  # steps before a capture: libraries allocate and choose kernels in the first ones
TIMED = 5  # steps
WORTH_COMPILING = 60.0  # seconds of steps left; compiling takes 10 to 30

Inputs = dict[str, Any]
Step = Callable[[Inputs, Any], torch.Tensor]


class CapturedTrainer(Trainer):
    """The HF Trainer, with captured and compiled steps where a run allows them.

    `speed` says what to do, and is changed to what was done: `cuda_graph` and `compiled` are True,
    False, or None while that is not decided.
    """

    speed: Speed
    flops_per_token: float | None = None
    _captured: "CapturedStep | None" = None
    _clock: "StepClock | None" = None
    _is_first_compiled = False

    def training_step(
        self, model: Any, inputs: Inputs, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Do the forward and the backward pass of a batch and return its loss."""
        if self._clock is None:
            self._begin(model)
        self._decide(model)

        def step(batch: Inputs, n_items: Any) -> torch.Tensor:
            loss: torch.Tensor = super(CapturedTrainer, self).training_step(model, batch, n_items)
            return loss

        if self._is_first_compiled:
            self._is_first_compiled = False
            return self._try_compiled(model, step, inputs, num_items_in_batch)
        return self._do(step, inputs, num_items_in_batch)

    def _do(self, step: "Step", inputs: Inputs, n_items: Any) -> torch.Tensor:
        if self._captured is None:
            return step(inputs, n_items)
        n_batches = self.current_gradient_accumulation_steps
        return self._captured(step, self._prepare_inputs(inputs), n_items, n_batches)

    def _try_compiled(self, model: Any, step: "Step", inputs: Inputs, n_items: Any) -> torch.Tensor:
        """Do the first batch after the layers were compiled without having been asked to. If the
        compiler fails, undo it and do the batch without.
        """
        trained = [each for each in model.parameters() if each.requires_grad]
        before = [None if each.grad is None else each.grad.clone() for each in trained]
        try:
            return self._do(step, dict(inputs), n_items)
        except Exception as error:
            if lacks_memory(error):
                raise
            logger.info("train: the layers are not compiled: %s", first_line(error))
        _undo_compilation(model, self.speed)
        self.speed.compiled = False
        for parameter, gradient in zip(trained, before, strict=True):
            parameter.grad = gradient
        self._restart(model)
        return self._do(step, inputs, n_items)

    def floating_point_ops(self, inputs: Inputs) -> int:
        """Return the FLOPs of a batch. Counting the parameters, as the Trainer does, takes
        milliseconds in every step.
        """
        if self.flops_per_token is None:
            return 0
        return int(self.flops_per_token * inputs["input_ids"].numel())

    def _begin(self, model: Any) -> None:
        """Compile what an earlier part of the run had compiled, and prepare the capture."""
        if self.speed.compiled:
            _compile(model, self.speed)
        elif self.speed.compiled is None:
            self.speed.seconds_before = None  # an earlier part was interrupted while it decided
        if self.speed.cuda_graph is not False and (reason := self._why_not_captured()):
            if self.args.device.type == "cuda":  # on a CPU nobody expects a graph
                logger.info("train: steps are not captured as a CUDA graph: %s", reason)
            self.speed.cuda_graph = False
        self._restart(model)

    def _restart(self, model: Any) -> None:
        """Forget the captured step and the times so far."""
        self._captured = None
        if self.speed.cuda_graph is not False:
            trained = [each for each in model.parameters() if each.requires_grad]
            self._captured = CapturedStep(trained, self.args.gradient_accumulation_steps > 1)
        n_warm_up = WARM_UP + 2 if self._captured is not None else WARM_UP
        self._clock = StepClock(n_warm_up, self.args.device.type)

    def _why_not_captured(self) -> str:
        """Return why the steps of this run cannot be captured, or an empty string."""
        args = self.args
        reasons = {
            "there is no CUDA device": args.device.type != "cuda",
            "several processes": args.world_size > 1,
            "the model is sharded": self.is_fsdp_enabled or self.is_deepspeed_enabled,
            "float16 scales its losses": self.accelerator.scaler is not None,
            "activation checkpointing": _checkpoints_activations(args),
            "the optimizer steps in the backward pass": _steps_in_backward(args.optim),
            "torch_empty_cache_steps": args.torch_empty_cache_steps is not None,
            "the loss of Liger waits for the device": self.speed.head == "liger",
        }
        return next((reason for reason, holds in reasons.items() if holds), "")

    def _decide(self, model: Any) -> None:
        """Once some steps were timed, compile the layers if that may pay; once some compiled steps
        were timed, undo it if it does not.
        """
        assert self._clock is not None
        if self._captured is not None and self._captured.failure:
            logger.info("train: steps are not captured: %s", self._captured.failure)
            self.speed.cuda_graph = False
            self._restart(model)
        seconds = self._clock.tick()
        if seconds is None:
            return
        self.speed.cuda_graph = self._captured is not None
        if self.speed.compiled is None and self.speed.seconds_before is None:
            n_left = (self.state.max_steps - self.state.global_step) * max(
                1, self.args.gradient_accumulation_steps
            )
            if not can_pay(self.args.device.type) or seconds * n_left < WORTH_COMPILING:
                self.speed.compiled = False
                return
            self.speed.seconds_before = seconds
            if _compile(model, self.speed):
                self._is_first_compiled = True
                self._restart(model)
            else:
                self.speed.compiled = False
        elif self.speed.compiled is None:
            self.speed.compiled = seconds < (self.speed.seconds_before or 0)
            logger.info(
                "train: a compiled step takes %.1f ms, %.1f without",
                1e3 * seconds,
                1e3 * (self.speed.seconds_before or 0),
            )
            if not self.speed.compiled:
                _undo_compilation(model, self.speed)
                self._restart(model)


def _steps_in_backward(optimizer: Any) -> bool:
    """Whether an optimizer updates parameters while gradients are computed."""
    name = str(getattr(optimizer, "value", optimizer))
    return "lomo" in name or name.endswith("layerwise")


def _checkpoints_activations(args: Any) -> bool:
    """Whether activations are computed again in the backward pass; the field has had two names."""
    names = ("activation_checkpointing", "gradient_checkpointing")
    return any(vars(args).get(name) for name in names)


class StepClock:
    """The seconds of a batch: `tick` is called before each one. A batch during which the run saved
    a checkpoint or measured a norm does not move the median.
    """

    def __init__(self, n_warm_up: int, device: str) -> None:
        self.n_warm_up, self.device, self.n = n_warm_up, device, 0
        self._ticks: list[float] = []

    def tick(self) -> float | None:
        """Return the median of TIMED batches once, after them, else None."""
        self.n += 1
        if not self.n_warm_up < self.n <= self.n_warm_up + TIMED + 1:
            return None
        if self.device == "cuda":
            torch.cuda.synchronize()
        self._ticks.append(perf_counter())
        return self.seconds() if len(self._ticks) == TIMED + 1 else None

    def seconds(self) -> float:
        """Return the median seconds of the batches so far."""
        return statistics.median(end - start for start, end in pairwise(self._ticks))


class CapturedStep:
    """The forward and backward pass of a batch, captured as a CUDA graph at the first batch after
    the warm-up. Batches of other shapes are not replayed.

    The graph writes gradients into the same memory at every replay. Where they accumulate over
    several batches, it adds to them, and they are set to zero before the first.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], accumulates: bool) -> None:
        self.parameters, self.accumulates = list(parameters), accumulates
        self.failure = ""
        self._n_seen = 0
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: Inputs = {}
        self._n_items: Any = None
        self._n_batches = 1
        self._touched = [True] * len(self.parameters)
        self._loss = torch.empty(0)
        self._gradients: list[torch.Tensor | None] = []

    def __call__(self, step: Step, inputs: Inputs, n_items: Any, n_batches: int) -> torch.Tensor:
        """Return the loss of a batch and add its gradients to those of the parameters. It is one of
        `n_batches` of a step, which some models divide their loss by.
        """
        if self._graph is None:
            self._n_seen += 1
            if self._n_seen <= WARM_UP:
                return self._run_aside(step, inputs, n_items)
            if self.failure or not self._capture(step, inputs, n_items):
                return step(inputs, n_items)
            self._n_batches = n_batches
        # the last batch of an epoch may be smaller, and its last step have fewer batches
        if n_batches != self._n_batches or not self._fits(inputs, n_items):
            return self._run_plainly(step, inputs, n_items)
        return self._replay(inputs, n_items)

    def _run_aside(self, step: Step, inputs: Inputs, n_items: Any) -> torch.Tensor:
        """Run a batch on the stream of the capture."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            loss = step(inputs, n_items)
        torch.cuda.current_stream().wait_stream(self._stream)
        self._touched = [each.grad is not None for each in self.parameters]
        return loss

    def _run_plainly(self, step: Step, inputs: Inputs, n_items: Any) -> torch.Tensor:
        """Run a batch without the graph, whose gradients must not be added to by accident."""
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            if parameter.grad is not None and parameter.grad is gradient:
                parameter.grad = gradient.clone()
        return step(inputs, n_items)

    def _capture(self, step: Step, inputs: Inputs, n_items: Any) -> bool:
        """Capture the step; notes why if that fails. Gradients so far are kept."""
        self._inputs = {key: value.clone() for key, value in inputs.items()}
        self._n_items = n_items.clone() if isinstance(n_items, torch.Tensor) else n_items
        before = [each.grad for each in self.parameters]
        for parameter, is_touched in zip(self.parameters, self._touched, strict=True):
            adds = self.accumulates and is_touched
            parameter.grad = torch.zeros_like(parameter) if adds else None
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        try:
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._loss = step(dict(self._inputs), self._n_items)
        except Exception as error:  # a model that waits for the device, or too little memory
            self.failure = first_line(error)
            return False
        finally:
            captured = [each.grad for each in self.parameters]
            for parameter, gradient in zip(self.parameters, before, strict=True):
                parameter.grad = gradient
        self._graph, self._gradients = graph, captured
        return True

    def _fits(self, inputs: Inputs, n_items: Any) -> bool:
        same_counts = isinstance(n_items, torch.Tensor) or n_items == self._n_items
        return same_counts and {key: value.shape for key, value in inputs.items()} == {
            key: value.shape for key, value in self._inputs.items()
        }

    def _replay(self, inputs: Inputs, n_items: Any) -> torch.Tensor:
        """Copy a batch in and replay the graph."""
        for key, value in inputs.items():
            self._inputs[key].copy_(value, non_blocking=True)
        if isinstance(n_items, torch.Tensor):
            self._n_items.copy_(n_items, non_blocking=True)
        pairs = list(zip(self.parameters, self._gradients, strict=True))
        if self.accumulates:
            for parameter, gradient in pairs:
                if gradient is not None and parameter.grad is not gradient:
                    gradient.zero_() if parameter.grad is None else gradient.copy_(parameter.grad)
        self._graph.replay()  # type: ignore[union-attr]
        for parameter, gradient in pairs:
            parameter.grad = gradient
        return self._loss


# -- compilation -----------------------------------------------------------------------------------


def can_pay(device: str) -> bool:
    """Whether compiled layers may be faster on a device: on a CPU, products take all the time."""
    return device != "cpu"


def repeated_layers(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield the layers of a model: what stands in its outermost lists of modules."""
    for child in model.children():
        if isinstance(child, torch.nn.ModuleList) and len(child) > 1:
            yield from child
        else:
            yield from repeated_layers(child)


def _compile(model: Any, speed: Speed) -> bool:
    """Compile the layers and the loss of a model, at their first use. Returns whether it can be.

    Layers of one class share their code, so this takes no longer for a deep model.
    """
    layers = list(repeated_layers(model))
    for layer in layers:
        layer.compile(dynamic=False)
    _fuse_again(model, speed, is_compiled=True)
    return bool(layers)


def _undo_compilation(model: Any, speed: Speed) -> None:
    for layer in repeated_layers(model):
        layer._compiled_call_impl = None
    _fuse_again(model, speed, is_compiled=speed.compiled_head)


def _fuse_again(model: Any, speed: Speed, *, is_compiled: bool) -> None:
    """Give models inside `model` whose loss is the blocked one the same loss, compiled or not."""
    for module in model.modules() if speed.head == "blocked" else ():
        if is_fused(module):
            fuse_loss(module, blocked_loss(module.device.type, is_compiled=is_compiled))
