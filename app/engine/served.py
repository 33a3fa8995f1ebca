"""A checkpoint that is served: what it is, the runner of its weights, and the requests that were admitted for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from functools import lru_cache

from app.engine.knee import knee
from app.engine.rate import Rate
from app.engine.runner import Runner
from app.engine.scheduler import Scheduler
from model.checkpoint import Checkpoint
from model.sampling.schedule import Plan, SamplingDefaults, make_plan

log = logging.getLogger("ddpm.engine")

PLANS = 64  # that are kept: up to 90 KB each
WARM_UPS = 4  # the first pays for kernel selection and memory; the fastest was least disturbed by others


class Served:
    """Requests hold the one that they were admitted for and end on its weights, whatever has its name by then.

    What a checkpoint says of itself never changes; `runner`, `scheduler`, `rate` and `spent` are the engine's. It does
    not keep the checkpoint, which has the weights: those are the runner's to give back. `max_rows` is the most of a
    step; 0 is as many as the warm-up finds good: see `app.engine.knee`.
    """

    def __init__(self, checkpoint: Checkpoint, runner: Runner, max_rows: int) -> None:
        self.name, self.sha256, self.config = checkpoint.name, checkpoint.sha256, checkpoint.config
        self.diffusion = checkpoint.diffusion
        self.runs_on = {"device": runner.device.type, "runtime": runner.runtime, "precision": runner.precision}
        self.runner = runner
        self.scheduler, self.rate = Scheduler(max_rows), Rate()
        # Made anew for every request they would keep the event loop busy for much of its time.
        self.plan = lru_cache(PLANS)(self._plan)  # of settings, and of ddpm's variance
        self.spent = 0.0  # seconds of the device, as `Turns` counts them
        self.warm = False
        self.portions = self._warm_up()  # what has to be run before it serves, each about as long as a step

    def _plan(self, sampling: SamplingDefaults, variance: str | None) -> Plan:
        return make_plan(self.diffusion, variance=variance, **vars(sampling))

    def _warm_up(self) -> Iterator[None]:
        yield from self.runner.probe()
        if not self.scheduler.max_rows:
            self.scheduler.allow(*(yield from knee(self.runner.warm_up, self.runner.chunk, self.runner.device.type)))
        rows, seconds = self.scheduler.usual_rows, []
        for _ in range(WARM_UPS):
            started = time.monotonic()
            self.runner.warm_up(rows)
            seconds.append(time.monotonic() - started)
            yield
        self.rate.begin(rows, min(seconds))
        self.warm = True

    def make_room(self, rows: int) -> None:
        """A batch of `rows` did not fit into the memory: the next ones are smaller for a while."""
        self.runner.free_memory()
        self.scheduler.shrink(rows)
        log.warning(
            "out of memory; batches are smaller for a while",
            extra={"model": self.name, "rows": self.scheduler.max_rows},
        )
