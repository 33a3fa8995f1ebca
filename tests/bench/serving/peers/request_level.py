"""Our own server with one thing changed: it batches requests and not steps.

A batch is formed when the one before has finished: the request that came first, and others of the same schedule as they
came, while their images fit into the batch cap. A request of more images than that runs alone, a batch of the cap after
the other. Nobody joins a batch that runs. Everything else is `python -m app`.
"""

from __future__ import annotations

import sys

import numpy as np

from app.__main__ import read_settings, serve
from app.engine.request import Request, Sample
from app.engine.scheduler import Scheduler
from tests.bench.serving.peers.ours import hold

_batches: dict[int, list[Sample]] = {}  # by scheduler


def schedule(self: Scheduler) -> list[Sample]:
    """The batch of the step before, while any of it is left; else a new one."""
    there = set(self)
    batch = [s for s in _batches.get(id(self), []) if s.request in there and not s.finished]
    if not batch and there:
        requests = sorted(there, key=lambda request: request.number)
        first = requests[0]
        for request in requests:
            if not _same(first, request):
                continue
            samples = [sample for sample in request.samples if sample.step == 0]
            if batch and len(batch) + len(samples) > self.limits.max:
                break
            batch += samples[: self.limits.max]
    _batches[id(self)], self.budget = batch, self.limits.max
    return batch


def _same(a: Request, b: Request) -> bool:
    return len(a.schedule) == len(b.schedule) and np.array_equal(a.schedule.table, b.schedule.table)


if __name__ == "__main__":
    hold()
    Scheduler.schedule = schedule  # type: ignore[method-assign]
    serve(read_settings(sys.argv[1:]))
