"""Which failures are the fault of the machine, not of the weights that were tried.

After such a failure the same weights may well score on another try: memory ran out, a disk is full,
a file or a connection is gone. PyTorch reports most of these as plain RuntimeErrors, so their
messages count, too. `study.recorded_faults` does the same for errors that trials recorded.
"""

import contextlib
from collections.abc import Iterator

import torch
from safetensors import SafetensorError

from optimer_hf.errors import EvaluationError, OptimerError
from optimer_hf.files.text import first_line
from optimer_hf.study.recorded_faults import BUILTINS, MESSAGES

CLASSES: tuple[type[BaseException], ...] = (
    *BUILTINS,
    SafetensorError,
    torch.OutOfMemoryError,
    torch.AcceleratorError,
)
LIBRARIES = (
    *("distributed", "dask", "httpx", "httpcore", "httpx2", "httpcore2"),
    *("requests", "urllib3", "huggingface_hub"),
)


def is_environmental(error: BaseException) -> bool:
    """Whether a failure, or the failure that caused it, is the machine's fault.

    Of our own errors, only an EvaluationError can be the weights' fault. An error raised while
    another one was handled counts as caused by it only if memory had run out: libraries often try
    imports and files that need not be there.
    """
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        if _is_fault(cause):
            return True
        context = None if cause.__suppress_context__ else cause.__context__
        lacked_memory = isinstance(context, MemoryError | torch.OutOfMemoryError)
        cause = cause.__cause__ or (context if lacked_memory else None)
    return False


def _is_fault(error: BaseException) -> bool:
    """Whether this failure alone, without its causes, is the machine's fault."""
    if isinstance(error, OptimerError):
        return not isinstance(error, EvaluationError)
    if isinstance(error, BaseExceptionGroup):
        return any(map(is_environmental, error.exceptions))
    if isinstance(error, CLASSES) or type(error).__module__.partition(".")[0] in LIBRARIES:
        return True
    return isinstance(error, RuntimeError | SystemError) and bool(MESSAGES.search(str(error)))


@contextlib.contextmanager
def naming_faults(what: str) -> Iterator[None]:
    """Turn a fault of the machine during `what` into an EvaluationError of one line."""
    try:
        yield
    except OptimerError:
        raise
    except Exception as error:
        if not is_environmental(error):
            raise
        raise EvaluationError(
            f"{what}: {type(error).__name__}: {first_line(error)}. Free memory, disk or device and "
            "run the same command again."
        ) from error
