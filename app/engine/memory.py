"""How much memory the device has in use and in all. On a CPU: this process, and what it may have."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # what a container may have, in cgroup v2


def is_out_of_memory(error: BaseException, rows: int = 1) -> bool:
    """Whether device or host had no room: torch says so in several ways, by device and library.

    Where cuDNN has no room to work in, torch says that it found no engine, as it does where there is no kernel for the
    GPU at all. Fewer rows tell which, so it counts for a call of more than one.
    """
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    said = str(error).lower()
    phrases = ["out of memory", "not enough memory", "can't allocate memory", "alloc_failed"]
    phrases += ["unable to find an engine"] * (rows > 1)
    return isinstance(error, RuntimeError) and any(phrase in said for phrase in phrases)


def device_memory(device: torch.device) -> tuple[int, int]:
    """Bytes used and bytes in all. Of a GPU: by every process, torch's cache among it."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total - free, total
    return resident_bytes(), available_bytes()


def resident_bytes() -> int:
    """Of this process; the highest it has been where there is no /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_bytes() -> int:
    """The container's limit, or else the machine's memory."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = CGROUP_LIMIT.read_text().strip()
    except OSError:
        return machine
    return min(machine, int(limit)) if limit.isdigit() else machine
