"""Takes a batch one step further, and pictures of it. Who is at fault where that fails is answered, and nobody else."""

from __future__ import annotations

import logging
import time

from app.engine.heartbeat import Heartbeat
from app.engine.memory import is_out_of_memory
from app.engine.pending import Pending
from app.engine.request import Sample, View
from app.engine.served import Served
from app.errors import OutOfMemory, StepFailed
from app.metrics import EngineMetrics
from model.images import Image

log = logging.getLogger("ddpm.engine")


class DeviceLost(Exception):
    """Not even zeros can be run any more."""


class Steps:
    """Used on the engine's thread. If a method raises it can be called again: all samples are as they were."""

    def __init__(self, metrics: EngineMetrics, pending: Pending, heartbeat: Heartbeat) -> None:
        self._metrics, self._pending, self._heartbeat = metrics, pending, heartbeat
        self._due: list[Sample] = []  # took a step, and their pictures were not looked at yet
        self._since: float | None = None  # when the step before ended, where nobody rested since
        self.failures = 0  # outside of steps, since a picture was made

    def rest(self) -> None:
        """There was nothing to do."""
        self._since = None

    def start(self, batch: list[Sample]) -> None:
        """Draws the noise of those that have none."""
        fresh = [sample for sample in batch if not sample.has_noise]
        if not fresh:
            return
        fresh[0].request.served.runner.start(fresh)
        self._due += fresh
        now = time.monotonic()
        for sample in fresh:
            if sample.request.started is None:
                sample.request.started = now
                self._metrics.queue_seconds.labels(sample.request.model).observe(now - sample.request.submitted)

    def step(self, batch: list[Sample]) -> None:
        """One step of samples of one checkpoint. Raises DeviceLost where no step will ever succeed."""
        served = batch[0].request.served
        rows = sum(sample.rows for sample in batch)
        self._heartbeat.begin(served.rate.step_seconds)
        started = time.monotonic()
        costs = [sample.rows for sample in batch]
        try:
            broken = served.runner.step(batch)
        except Exception as error:
            log.error("a step failed", exc_info=error, extra={"samples": len(batch)})
            no_memory, broken = is_out_of_memory(error, len(batch)), None
        if broken is None:  # and the traceback is gone, with the memory that it held
            self._metrics.failed_steps.labels(served.name).inc()
            if no_memory:
                self._without_memory(batch, rows)
            else:
                self._replay(batch)
            return
        self._due += batch
        for sample, cost in zip(batch, costs, strict=True):
            sample.request.work_left -= cost
            sample.request.steps_done += 1
        for request in {sample.request for sample in broken}:
            self._pending.answer(request, StepFailed("the network returned numbers that are not finite"))
        ended = time.monotonic()
        self._measure(served, ended - started, len(batch), rows)
        # What comes between two steps delays everybody as the steps do.
        served.rate.observe(rows, ended - (self._since or started), served.scheduler.room)
        self._since = ended

    def _replay(self, batch: list[Sample]) -> None:
        """A failed step changed nothing, so each sample is tried again alone: only the culprit's request fails."""
        if len(batch) > 1:
            for sample in batch:
                if not sample.request.answered:
                    self.step([sample])
            return
        try:
            batch[0].request.served.runner.warm_up(1)
        except Exception as error:
            if not is_out_of_memory(error):
                log.critical("nor does the network run on zeros", exc_info=error)
                raise DeviceLost from error
        self._pending.answer(batch[0].request, StepFailed("a denoising step failed"))

    def _without_memory(self, batch: list[Sample], rows: int) -> None:
        """The samples are as they were, and the next batches smaller. One that does not fit alone never will."""
        served = batch[0].request.served
        if len(batch) > 1:
            served.make_room(rows)
        else:
            served.runner.free_memory()
            message = "the device has not enough memory for this image"
            self._pending.answer(batch[0].request, OutOfMemory(message))

    def _measure(self, served: Served, seconds: float, samples: int, rows: int) -> None:
        full = served.scheduler.room
        self._metrics.step_seconds.labels(served.name).observe(seconds)
        self._metrics.batch_rows.labels(served.name).observe(rows)
        self._metrics.batch_fill.labels(served.name).observe(rows / full)
        self._metrics.image_steps.labels(served.name).inc(samples)

    def look(self) -> None:
        """Takes the pictures that are due: together, or one by one after it failed twice, so that one culprit fails."""
        while self._due:
            some = self._due[:1] if self.failures > 1 else self._due
            try:
                self._advance([sample for sample in some if not sample.request.answered])
            except Exception as error:
                max_rows = some[0].request.served.scheduler.max_rows
                if self.failures < 2 or (is_out_of_memory(error) and max_rows > 1):
                    raise
                log.error("a picture could not be taken", exc_info=error)
                self._pending.answer(some[0].request, StepFailed("a picture could not be taken"))
            self._due = self._due[len(some) :]

    def _advance(self, samples: list[Sample]) -> None:
        """Finished samples leave with their pictures; those that a frame is due for are shown.

        All pictures are read before the first is given away, so if it raises it can be done again.
        """
        frames = []
        for view in ("xt", "x0"):
            frames += self._read(
                [s for s in samples if s.step in s.request.frame_steps and s.request.view == view], view
            )
        finished = self._read([sample for sample in samples if sample.finished], "xt")
        for sample, picture in frames:
            frame = sample.request.place_in_frame(sample.step, sample.i, picture)
            if frame is not None:
                self._pending.show(sample.request, frame)
        for sample, picture in finished:
            images = sample.request.place(sample.i, picture)
            if images is not None:
                self._pending.answer(sample.request, images)
        if frames or finished:
            self.failures = 0

    def _read(self, samples: list[Sample], view: View) -> list[tuple[Sample, Image]]:
        if not samples:
            return []
        runner = samples[0].request.served.runner
        return list(zip(samples, runner.read(samples, view), strict=True))
