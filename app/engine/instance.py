"""A served checkpoint: what it is, the runner of its weights, how fast it runs, and how large its batches may be."""

from __future__ import annotations

import logging
import math
import time
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache

from app.engine.request import Request
from app.engine.runner import ModelRunner
from model.checkpoint import Checkpoint
from model.sampling.schedule import SamplingParams, SamplingSchedule

log = logging.getLogger("ddpm.engine")

CACHED_SCHEDULES = 64  # up to 90 KB each
WARMUP_STEPS = 4  # the first pays for kernel selection and memory; the fastest was least disturbed by others
REGROW_AFTER_STEPS = 100  # after which a batch that was too large for the memory may be twice as large again
SMOOTHING = 0.1  # of the newest step in the running estimates
MAX_OUTLIER = 4.0  # times the expected step time that a step counts for at most: one that hung tells little,
STALL_S = 0.1  # where it is more than this: a busy machine holds up short steps for longer, again and again


class ModelInstance:
    """Requests are admitted for one instance and end on its weights, whatever has its name by then.

    It does not keep the checkpoint, which has the weights: those are the runner's to give back. `max_batch_size` is the
    most network rows of a step; 0 is what the warm-up measures: see `app.engine.autotune`.
    """

    def __init__(self, checkpoint: Checkpoint, runner: ModelRunner, max_batch_size: int) -> None:
        self.name, self.sha256, self.config = checkpoint.name, checkpoint.sha256, checkpoint.config
        self.diffusion = checkpoint.diffusion
        self.loaded_at = int(time.time())  # in seconds since 1970
        self.runs_on = {"device": runner.device.type, "runtime": runner.runtime, "precision": runner.precision}
        self.runner = runner
        self.batch_limits, self.throughput = BatchLimits(max_batch_size), ThroughputEstimator()
        # Making them for every request would keep the event loop busy for much of its time.
        self.sampling_params = lru_cache(CACHED_SCHEDULES, typed=True)(self.config.sampling_params)
        self.schedule = lru_cache(CACHED_SCHEDULES)(self._schedule)  # of settings, ddpm's variance, strength
        self.warm = False
        self.warmup_steps = self._warm_up()  # what has to run before it serves, each about as long as a step

    def _schedule(self, sampling: SamplingParams, variance: str | None, strength: float = 1.0) -> SamplingSchedule:
        return self.config.schedule(sampling, variance, self.diffusion, strength)

    def _warm_up(self) -> Iterator[None]:
        runner, limits = self.runner, self.batch_limits
        yield from runner.find_invariant_sizes()
        if not limits.max:
            limits.set(*(yield from runner.autotune()))
        seconds = []
        for _ in range(WARMUP_STEPS):
            started = time.monotonic()
            runner.warm_up(limits.target)
            seconds.append(time.monotonic() - started)
            yield
        self.throughput.initialize(limits.target, min(seconds))
        self.warm = True

    def shrink_after_oom(self, batch_size: int) -> None:
        """A batch of that size did not fit into the memory: the next ones are smaller for a while."""
        self.runner.free_memory()
        self.batch_limits.shrink(batch_size)
        log.warning(
            "out of memory, batches are smaller for a while",
            extra={"model": self.name, "max_batch_size": self.batch_limits.max},
        )


class Demand:
    """How many requests there are and how large, as far as the size of a batch depends on it."""

    def __init__(self) -> None:
        self.one_image_each = 0  # network rows of a step with one image of each request
        self._sizes: Counter[int] = Counter()  # network rows of a step of the whole request → how many there are

    @property
    def smallest(self) -> float:
        """Network rows of a step of the whole smallest request; infinite where there is none."""
        return min(self._sizes, default=math.inf)

    def add(self, request: Request) -> None:
        """One more."""
        self.one_image_each += request.nfe_per_step // request.n
        self._sizes[request.nfe_per_step] += 1

    def remove(self, request: Request) -> None:
        """One fewer."""
        self.one_image_each -= request.nfe_per_step // request.n
        self._sizes[request.nfe_per_step] -= 1
        if not self._sizes[request.nfe_per_step]:
            del self._sizes[request.nfe_per_step]


class BatchLimits:
    """How many network rows a step may have: usually `target`, never more than `max`.

    Short steps are good for latency. At high concurrency a batch grows until it has an image of each request, since all
    wait less where all move in larger steps. Where each request fills a usual batch by itself, short steps are good for
    none of them, and a batch is as large as can be.
    """

    def __init__(self, max_batch_size: int) -> None:
        self.set(max_batch_size, max_batch_size)
        self._steps = self._shrunk_at = 0

    def set(self, target: int, max_batch_size: int) -> None:
        """From now on."""
        self.target, self.max, self._configured_max = target, max_batch_size, max_batch_size

    def shrink(self, batch_size: int) -> None:
        """A batch of that size was too large: half of it will do, until enough steps went well to try more."""
        self.max = max(1, min(batch_size, self.max) // 2)
        self._shrunk_at = self._steps

    def count_step(self) -> None:
        """One more step; long after the last shrink the limit doubles."""
        self._steps += 1
        if self.max < self._configured_max and self._steps - self._shrunk_at > REGROW_AFTER_STEPS:
            self.max = min(2 * self.max, self._configured_max)
            self._shrunk_at = self._steps

    def budget(self, demand: Demand) -> int:
        """Network rows of a batch where this is asked for; before the warm-up, one."""
        if demand.smallest >= self.target:
            return max(1, self.max)
        return max(1, min(max(self.target, demand.one_image_each), self.max))


class ThroughputEstimator:
    """Moving averages (EWMA): seconds of a step, and network rows (NFE) a second in full batches.

    Until it is initialized any speed is possible.
    """

    def __init__(self) -> None:
        self.step_seconds = 1.0
        self.nfe_per_second = math.inf

    def initialize(self, batch_size: int, seconds: float) -> None:
        """The first estimate: a batch of that size took `seconds`."""
        self.step_seconds = max(seconds, 1e-6)
        self.nfe_per_second = batch_size / self.step_seconds

    def observe(self, batch_size: int, seconds: float, budget: int) -> None:
        """A step of a batch that could have had `budget` rows: a small one tells of no slowness."""
        if 2 * batch_size > budget or batch_size / seconds > self.nfe_per_second:
            seconds = min(seconds, max(MAX_OUTLIER * self.step_seconds, STALL_S))
            self.step_seconds += SMOOTHING * (seconds - self.step_seconds)
            # A mean of times: one of rates would hardly notice the steps that take long.
            row_seconds = 1 / self.nfe_per_second
            row_seconds += SMOOTHING * (seconds / batch_size - row_seconds)
            self.nfe_per_second = 1 / row_seconds
