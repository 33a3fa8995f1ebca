"""Threads on which calls of a network run side by side, each call on one core."""

from __future__ import annotations

import itertools
import math
import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")  # microseconds in each period that a container may have, in cgroup v2


def usable_cores() -> int:
    """The container's limit, rounded up, or else the cores that torch counts: those of the process's affinity."""
    cores = torch.get_num_threads()
    try:
        limit, _, period = CPU_LIMIT.read_text().partition(" ")
    except OSError:
        return cores
    return min(cores, math.ceil(int(limit) / int(period))) if limit.isdigit() else cores


class WorkerPool:
    """`size` threads, the caller's among them, that take calls one after another until none is left.

    A call has one thread of OpenMP's, so it waits at no barrier: a core that others use holds up the call on it and no
    other, and its worker takes fewer calls. torch computes without Python's lock. The threads start with the first
    batch of calls and sleep between batches; `close` ends them.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._queue: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []

    def map(self, call: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """What `call` makes of each item, in order. Raises what a call raises, when no call runs any more."""
        helpers = min(self.size, len(items)) - 1
        if helpers < 1:
            return [call(item) for item in items]
        while len(self._threads) < self.size - 1:
            thread = threading.Thread(target=_work, args=(self._queue,), name="network", daemon=True)
            thread.start()
            self._threads.append(thread)
        batch = _Batch(call, items)
        for _ in range(helpers):
            self._queue.put(batch)
        batch.run()
        batch.done.wait()
        error, batch.error = batch.error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # or the traceback would keep itself, and the memory of its frames
        return batch.results

    def close(self) -> None:
        """Ends the threads, and returns when they have ended. Another `map` would start them again."""
        for _ in self._threads:
            self._queue.put(None)
        while self._threads:
            self._threads.pop().join()


class _Batch:
    """Calls that are shared out: whoever is free takes the next."""

    def __init__(self, call: Callable[[Any], Any], items: Sequence[Any]) -> None:
        self._call, self._items, self._turns = call, items, itertools.count()
        self._left, self._lock = len(items), threading.Lock()
        self.results: list[Any] = [None] * len(items)
        self.error: Exception | None = None
        self.done = threading.Event()

    def run(self) -> None:
        """Takes calls until none is left. After a failure the rest are not made."""
        while (i := next(self._turns)) < len(self._items):
            try:
                if self.error is None:
                    self.results[i] = self._call(self._items[i])
            except Exception as error:
                self.error = error
            with self._lock:
                self._left -= 1
                if not self._left:
                    self.done.set()


def _work(batches: queue.SimpleQueue[_Batch | None]) -> None:
    torch.set_num_threads(1)  # of this thread
    with torch.inference_mode():
        while (batch := batches.get()) is not None:
            batch.run()
            del batch  # with its tensors
