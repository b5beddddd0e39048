"""Which failures are the machine's and not those of the weights that were tried.

An exception comes in, or the text under which a trial recorded one; what goes out is whether the
same weights may well score on another try: memory ran out, a disk is full, a file or a connection
is gone. PyTorch reports most of them as plain RuntimeErrors, so
their messages are looked at, too.
"""

import contextlib
import gc
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
    """Whether a failure, or the one that caused it, is the machine's.

    Of our own errors only an EvaluationError speaks of the weights. An error that was raised while
    another was handled counts as caused by it only when memory had run out: libraries try imports
    and files that need not be there.
    """
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        if _is_one(found):
            return True
        context = None if found.__suppress_context__ else found.__context__
        lacked_memory = isinstance(context, MemoryError | torch.OutOfMemoryError)
        found = found.__cause__ or (context if lacked_memory else None)
    return False


def _is_one(error: BaseException) -> bool:
    if isinstance(error, OptimerError):
        return not isinstance(error, EvaluationError)
    if isinstance(error, BaseExceptionGroup):
        return any(map(is_environmental, error.exceptions))
    if isinstance(error, CLASSES) or type(error).__module__.partition(".")[0] in LIBRARIES:
        return True
    return isinstance(error, RuntimeError | SystemError) and bool(MESSAGES.search(str(error)))


@contextlib.contextmanager
def naming_faults(what: str) -> Iterator[None]:
    """Turn a failure of the machine while `what` happens into an EvaluationError of one line."""
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


def collect_memory() -> None:
    """Give back what nothing refers to any longer, on the devices, too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()
