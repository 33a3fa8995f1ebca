"""What the C library does with freed memory, where it is glibc."""

from __future__ import annotations

import ctypes
import os

LIBC = ctypes.CDLL(None) if os.name == "posix" else None  # Windows has none to ask
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def tune_malloc() -> None:
    """Keeps what tensors leave behind for the next ones. glibc would give large pieces back to the system at once and
    get them anew page by page at every step: a sixth of the time of a small network's."""
    if LIBC and hasattr(LIBC, "mallopt"):
        LIBC.mallopt(M_TRIM_THRESHOLD, 2**30)
        LIBC.mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that it takes


def trim_malloc() -> None:
    """Gives the system what is kept for later now."""
    if LIBC and hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)
