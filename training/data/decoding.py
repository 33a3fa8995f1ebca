"""Many pictures at once: threads, which Pillow lets run while it decodes, and a bar if it takes long."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

CHUNK = 16  # pictures that a thread takes at once
SILENT_S = 2.0  # what is done by then has no bar


def in_parallel(work: Callable[[range], None], count: int, title: str, quiet: bool) -> None:
    """Calls `work` for ranges that make up 0 … `count` - 1, on all cores. What it raises ends it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    size = max(1, min(CHUNK, count // (4 * cores)))
    parts = [range(start, min(start + size, count)) for start in range(0, count, size)]
    pool = ThreadPoolExecutor(cores)
    looks = {"unit": "image", "dynamic_ncols": True, "delay": SILENT_S, "mininterval": 1.0, "leave": False}
    bar = tqdm(total=count, desc=title, disable=quiet, **looks)
    try:
        with bar:
            for part, _ in zip(parts, pool.map(work, parts), strict=True):
                bar.update(len(part))
    finally:
        pool.shutdown(cancel_futures=True)
