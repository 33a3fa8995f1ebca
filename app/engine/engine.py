"""The engine thread. Every admitted request gets exactly one answer: images, cancelled, expired or failed."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator

from app.engine.heartbeat import Heartbeat
from app.engine.knee import knee
from app.engine.memory import device_memory, is_out_of_memory
from app.engine.pending import Pending
from app.engine.rate import Rate
from app.engine.request import Answer, Request, Sample, View
from app.engine.runner import Runner
from app.engine.scheduler import Scheduler
from app.errors import Cancelled, DeadlineExceeded, NotReady, OutOfMemory, StepFailed
from app.metrics import EngineMetrics
from model.images import Image

log = logging.getLogger("ddpm.engine")

MEMORY_EVERY_S = 1.0  # at most, while there is work
MOST_FAILURES = 3  # outside of steps, with no picture made in between


class Engine:
    """Owns the runner. `submit`, `cancel`, `drain` and the properties may be called from any thread.

    `max_rows` is the most of a step; 0 is as many as the warm-up finds good. `max_work` bounds the queue in U-Net rows
    (images × steps, twice that under guidance). A step that takes longer than `step_timeout_s` (and twice what makes it
    stalled) is given up, and the engine with it: see `watch`.
    """

    def __init__(
        self,
        runner: Runner,
        metrics: EngineMetrics,
        *,
        max_rows: int,
        max_work: int,
        step_timeout_s: float = 60.0,
    ) -> None:
        self._runner, self._metrics = runner, metrics
        self._scheduler, self._rate = Scheduler(max_rows), Rate()
        self._pending, self._heartbeat = Pending(metrics, max_work), Heartbeat(step_timeout_s)
        self._inbox: deque[Request] = deque()  # new ones, and running ones that were cancelled
        self._wake = self._pending.changed  # guards the inbox and the state, too
        self._due: list[Sample] = []  # took a step, and their pictures were not looked at yet
        self._failures = 0  # outside of steps, since a picture was made
        self._ready = False
        self._draining: float | None = None  # until when
        self._failure: str | None = None
        self._memory_seen = -math.inf
        self._models: set[str] = set()  # that had a request
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # From other threads

    def start(self) -> None:
        """Starts the thread; `ready` becomes true when the runner is warm."""
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Admits a request. Raises NotReady, Overloaded, or DeadlineExceeded where it could not be done in time."""
        with self._wake:
            if trouble := self.trouble:
                raise NotReady(trouble, retry_after=5)
            self._pending.admit(request, self._rate)
            self._inbox.append(request)
            self._wake.notify()

    def cancel(self, request: Request) -> None:
        """The client went away: the request leaves at the next step. Harmless if it was answered already."""
        with self._wake:
            if request in self._pending and request.cancelled_at is None:
                request.cancelled_at = time.monotonic()
                self._inbox.append(request)
                self._wake.notify()

    def drain(self, seconds: float) -> None:
        """Takes no more work; what is not done after `seconds` is answered with NotReady. The thread then ends."""
        with self._wake:
            if self._draining is None:
                self._draining = time.monotonic() + seconds
            self._wake.notify()

    def watch(self) -> None:
        """Gives up where a step does not return. To be called several times a second, not from the engine's thread."""
        if self._failure is None and (why := self._heartbeat.overdue(self._draining)):
            self._give_up(why)

    def join(self, seconds: float) -> bool:
        """Waits for the thread to end; whether it did."""
        if self._thread.ident is not None:
            self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def ready(self) -> bool:
        """Weights warm, thread alive, no step overdue, not draining."""
        return self.trouble is None

    @property
    def failure(self) -> str | None:
        """Why it can never go on, if so: everyone was answered, and the process has to be started anew."""
        return self._failure

    @property
    def trouble(self) -> str | None:
        """What keeps it from taking requests, as a sentence for clients."""
        if self._failure is not None:
            return "the engine has failed; the server has to restart"
        if self._draining is not None:
            return "the server is shutting down"
        if not self._thread.is_alive():
            return "the engine is not running"
        if not self._ready:
            return "the checkpoint is still being warmed up"
        if self.stalled:
            return "a denoising step has been running for much too long"
        return None

    @property
    def stalled(self) -> bool:
        """A step has been running for longer than max(1 s, 5 × expected). An idle engine is not stalled."""
        return self._heartbeat.stalled

    @property
    def step_age(self) -> float:
        """Seconds that the present step, with what comes before and after it, has been running; 0 between steps."""
        return self._heartbeat.age

    @property
    def oldest_wait(self) -> float:
        """Seconds that the oldest request without a step has waited; 0 where there is none."""
        return self._pending.oldest_wait

    @property
    def pending_rows(self) -> int:
        """Work admitted and not done, in U-Net rows."""
        return self._pending.rows

    @property
    def max_rows(self) -> int:
        """Most U-Net rows in a step; 0 until it is measured."""
        return self._scheduler.max_rows

    @property
    def rows_per_second(self) -> float:
        """What admission expects of full batches; 0 until the runner is warm."""
        return self._rate.rows_per_second if self._ready else 0.0

    # The thread

    def _run(self) -> None:
        try:
            self._warm_up()
        except Exception as error:
            log.critical("the checkpoint cannot be run on %s", self._runner.device, exc_info=error)
            self._give_up("the warm-up failed")
            return
        while not self._comes_to_its_end():
            self._heartbeat.rest()

    def _comes_to_its_end(self) -> bool:
        """Runs the loop. False where it failed and is to be entered again: it finds all samples as they were."""
        try:
            self._loop()
            self._pending.publish()
            return True
        except Exception as error:
            log.exception("engine failed outside a step; it goes on from where it was")
            no_memory = is_out_of_memory(error)
        # From here on the traceback, and whatever memory it held, is gone.
        self._metrics.restarts.inc()
        if no_memory and self._scheduler.max_rows > 1:
            self._make_room(self._scheduler.max_rows)
            return False
        self._failures += 1
        if self._failures == MOST_FAILURES:
            self._give_up(f"it failed {MOST_FAILURES} times without making a picture")
        return self._failures == MOST_FAILURES

    def _warm_up(self) -> None:
        for _ in self._find_limit():
            pass
        seconds = []
        for _ in range(4):  # the first pays for kernel selection and memory; the fastest was least disturbed by others
            started = time.monotonic()
            self._runner.warm_up(self._scheduler.max_rows)
            seconds.append(time.monotonic() - started)
        self._rate.begin(self._scheduler.max_rows, min(seconds))
        self._watch_memory()
        self._ready = True
        log.info("ready", extra={"rows_per_second": round(self._rate.rows_per_second, 1)})

    def _find_limit(self) -> Iterator[None]:
        """How large batches may be, where nobody has said it."""
        if not self._scheduler.max_rows:
            self._scheduler.allow((yield from knee(self._runner.warm_up, self._runner.chunk, self._runner.device.type)))

    def _loop(self) -> None:
        self._look()  # and publish what was left when it failed
        self._pending.publish()
        while self._drain_inbox():
            batch = self._scheduler.schedule()
            self._count(batch)
            if batch:
                self._heartbeat.begin(self._rate.step_seconds)
                self._start(batch)
                self._look()
                self._pending.publish()  # the noise that a client wants to see is not to wait for the step
                self._step(batch)
                self._look()
            self._heartbeat.rest()
            self._pending.publish()
            self._watch_memory()
        self._count([])

    def _count(self, batch: list[Sample]) -> None:
        running = Counter(sample.request.model for sample in batch)
        present: Counter[str] = Counter()
        for request in self._scheduler:
            present[request.model] += len(request.samples)
        self._models |= set(present)
        for model in self._models:
            self._metrics.rows_running.labels(model).set(running[model])
            self._metrics.rows_waiting.labels(model).set(present[model] - running[model])

    def _watch_memory(self) -> None:
        if time.monotonic() - self._memory_seen < MEMORY_EVERY_S:
            return
        self._memory_seen = time.monotonic()
        used, total = device_memory(self._runner.device)
        self._metrics.memory_bytes.labels(self._runner.device.type, "used").set(used)
        self._metrics.memory_bytes.labels(self._runner.device.type, "total").set(total)

    def _drain_inbox(self) -> bool:
        """Lets new requests in, cancelled and expired ones out; waits while there is nothing to do. False: all done."""
        with self._wake:
            if not len(self._scheduler) and not self._inbox:
                self._count([])
                while not self._inbox and self._draining is None and self._failure is None:
                    self._wake.wait()
        while self._inbox:
            request = self._inbox[0]
            if request.cancelled_at is not None:
                self._answer(request, Cancelled("the client went away"))
            elif not request.answered:
                self._scheduler.add(request)
            self._inbox.popleft()
        now = time.monotonic()
        for request in self._scheduler:
            if now > request.deadline:
                self._answer(request, DeadlineExceeded("the time-out passed before all images were done"))
            elif self._draining is not None and now > self._draining:
                self._answer(request, NotReady("the server is shutting down", retry_after=5))
        if self._failure is not None:
            return False
        return self._draining is None or len(self._scheduler) > 0 or bool(self._inbox)

    def _start(self, batch: list[Sample]) -> None:
        fresh = [sample for sample in batch if sample.x is None]
        if not fresh:
            return
        self._runner.start(fresh)
        self._due += fresh
        now = time.monotonic()
        for sample in fresh:
            if sample.request.started is None:
                sample.request.started = now
                self._metrics.queue_seconds.labels(sample.request.model).observe(now - sample.request.submitted)

    def _step(self, batch: list[Sample]) -> None:
        rows = sum(sample.rows for sample in batch)
        self._heartbeat.begin(self._rate.step_seconds)
        started = time.monotonic()
        costs = [sample.rows for sample in batch]
        try:
            broken = self._runner.step(batch)
        except Exception as error:
            log.error("a step failed", exc_info=error, extra={"samples": len(batch)})
            no_memory, broken = is_out_of_memory(error), None
        if broken is None:  # and the traceback is gone, with the memory that it held
            self._metrics.failed_steps.labels(batch[0].request.model).inc()
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
            self._answer(request, StepFailed("the network returned numbers that are not finite"))
        self._measure(batch[0].request.model, time.monotonic() - started, len(batch), rows)

    def _replay(self, batch: list[Sample]) -> None:
        """A failed step changed nothing, so each sample is tried again alone: only the culprit's request fails."""
        if len(batch) > 1:
            for sample in batch:
                if not sample.request.answered:
                    self._step([sample])
            return
        try:
            self._runner.warm_up(1)
        except Exception as error:
            if not is_out_of_memory(error):
                log.critical("nor does the network run on zeros", exc_info=error)
                self._give_up("the device does not work any more")
        self._answer(batch[0].request, StepFailed("a denoising step failed"))

    def _without_memory(self, batch: list[Sample], rows: int) -> None:
        """The samples are as they were, and the next batches smaller. One that does not fit alone never will."""
        if len(batch) > 1:
            self._make_room(rows)
        else:
            self._runner.free_memory()
            message = "the device has not enough memory for this image"
            self._answer(batch[0].request, OutOfMemory(message))

    def _make_room(self, rows: int) -> None:
        self._runner.free_memory()
        self._scheduler.shrink(rows)
        log.warning("out of memory; batches are smaller for a while", extra={"rows": self._scheduler.max_rows})

    def _measure(self, model: str, seconds: float, samples: int, rows: int) -> None:
        self._metrics.step_seconds.labels(model).observe(seconds)
        self._metrics.batch_rows.labels(model).observe(rows)
        self._metrics.batch_fill.labels(model).observe(rows / self._scheduler.max_rows)
        self._metrics.image_steps.labels(model).inc(samples)
        self._rate.observe(rows, seconds, self._scheduler.max_rows)

    def _look(self) -> None:
        """Takes the pictures that are due: together, or one by one after it failed twice, so that one culprit fails."""
        while self._due:
            some = self._due[:1] if self._failures > 1 else self._due
            try:
                self._advance([sample for sample in some if not sample.request.answered])
            except Exception as error:
                if self._failures < 2 or (is_out_of_memory(error) and self._scheduler.max_rows > 1):
                    raise
                log.error("a picture could not be taken", exc_info=error)
                self._answer(some[0].request, StepFailed("a picture could not be taken"))
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
                self._answer(sample.request, images)
        if frames or finished:
            self._failures = 0

    def _read(self, samples: list[Sample], view: View) -> list[tuple[Sample, Image]]:
        return list(zip(samples, self._runner.read(samples, view), strict=True)) if samples else []

    def _answer(self, request: Request, answer: Answer) -> None:
        """On the engine's thread: the request leaves with its answer, unless it was given up."""
        self._pending.settle(request, answer)
        if request in self._scheduler:
            self._scheduler.remove(request)

    def _give_up(self, why: str) -> None:
        """Answers everyone, on any thread. The engine's ends, if it ever comes back from where it is."""
        with self._wake:
            self._failure = why
            self._wake.notify()
        answered = self._pending.settle_all(NotReady("the engine has failed; the server restarts", retry_after=5))
        log.critical("the engine gives up: %s", why, extra={"answered": answered})
        self._pending.publish()
