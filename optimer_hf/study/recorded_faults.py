"""Which recorded failures were the fault of the machine, not of the weights that were tried."""

import builtins
import re

MESSAGES = re.compile(
    r"out of memory|DefaultCPUAllocator|cannot allocate memory|failed to allocate|bad_alloc"
    r"|_ALLOC_FAILED|(CUBLAS|CUDNN|CUSOLVER|CUSPARSE)_STATUS_(NOT_INITIALIZED|INTERNAL_ERROR)"
    r"|CUDA driver|CUDA error|HIP error|NCCL|unable to mmap|unable to open (shared|file)"
    r"|No space left on device|Too many open files|Stale file handle|Input/output error"
    r"|can't start new thread|DataLoader worker|received \d+ items of ancdata",
    re.IGNORECASE,
)
BUILTINS = (MemoryError, OSError, EOFError, ImportError)  # OSError: files, disks, connections

NAMES = frozenset(  # of the classes, as trials have recorded them
    {
        *(
            name
            for name, value in vars(builtins).items()
            if isinstance(value, type) and issubclass(value, BUILTINS)
        ),
        "OutOfMemoryError",
        "_ArrayMemoryError",
        "AcceleratorError",
        "SafetensorError",
        *("KilledWorker", "CommClosedError", "HfHubHTTPError", "LocalEntryNotFoundError"),
        *("ConnectTimeout", "ReadTimeout", "ConnectError", "ReadError", "RemoteProtocolError"),
    }
)


def was_environmental(recorded: str) -> bool:
    """Whether a recorded error, whose first line is `Class: message`, was the machine's fault."""
    name, _, message = recorded.partition("\n")[0].partition(":")
    is_general = name.strip() in ("RuntimeError", "SystemError")
    return name.strip() in NAMES or (is_general and MESSAGES.search(message) is not None)
