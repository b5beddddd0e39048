"""Which recorded failures were the machine's and not those of the weights that were tried."""

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

NAMES = frozenset(  # under which trials have recorded them
    {
        *(
            name
            for name, found in vars(builtins).items()
            if isinstance(found, type) and issubclass(found, BUILTINS)
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
    """Whether the first line of a recorded error, `Class: message`, is of such a failure."""
    name, _, message = recorded.partition("\n")[0].partition(":")
    is_general = name.strip() in ("RuntimeError", "SystemError")
    return name.strip() in NAMES or (is_general and MESSAGES.search(message) is not None)
