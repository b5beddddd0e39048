"""Measure how much memory this process may still take, on a GPU or on the host; free it; and tell
whether a failure is the lack of it.

A container or a batch job (Docker, Kubernetes, SLURM) often has less than the machine: its control
group or a parent has a limit, and a process that exceeds it is killed.
"""

import gc
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

CONTROL_GROUPS = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
NO_MEMORY = re.compile(  # PyTorch reports what the CPU and cuBLAS lack as plain RuntimeErrors
    r"DefaultCPUAllocator|out of memory|annot allocate memory|failed to allocate|_ALLOC_FAILED",
    re.IGNORECASE,
)
NAMES = {  # for each version: files with the limit and the use, and the part the system can reclaim
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def free_memory(device: str) -> int:
    """Return the free memory of a device in bytes; for the CPU, what this process may take."""
    if device != "cpu":  # what PyTorch keeps of tensors that are gone is free, too
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    left = [max(0, limit - taken) for limit, taken in _limits()]
    return min([int(psutil.virtual_memory().available), *left])


def total_memory() -> int:
    """Return the memory in bytes that this process may take if nothing else runs."""
    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _limits())])


def peak_memory() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak * (1 if sys.platform == "darwin" else 1024))


def lacks_memory(error: BaseException) -> bool:
    """Whether a failure means that memory ran out, on a device or on the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None


def collect_memory() -> None:
    """Free memory that nothing refers to any more, on the devices, too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def _limits() -> Iterator[tuple[int, int]]:
    """Yield (limit, taken) in bytes for each control group of this process that has a limit."""
    try:
        own = [line.split(":", 2) for line in OWN_GROUPS.read_text(encoding="utf-8").splitlines()]
    except OSError:  # not Linux
        return
    for _, controllers, path in own:
        version = 1 if controllers else 2
        if version == 1 and "memory" not in controllers.split(","):
            continue
        root = CONTROL_GROUPS / ("memory" if version == 1 else "")
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if (limit := _limit(folder, *NAMES[version])) is not None:
                yield limit
            if folder == root:
                break


def _limit(folder: Path, limit: str, taken: str, reclaimable: str) -> tuple[int, int] | None:
    """Return (limit, taken) of one control group; None without a limit or without access."""
    try:
        most = (folder / limit).read_text(encoding="utf-8").strip()
        if most == "max":
            return None
        statistics = dict(
            line.split()
            for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
        )
        used = int((folder / taken).read_text(encoding="utf-8"))
        return int(most), used - int(statistics.get(reclaimable, 0))
    except (OSError, ValueError):
        return None
