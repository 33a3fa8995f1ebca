"""The engine thread. Every admitted request gets exactly one answer: images, cancelled, expired or failed."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from concurrent.futures import Future

from app.engine.heartbeat import Heartbeat
from app.engine.memory import device_memory, is_out_of_memory
from app.engine.newcomers import Newcomers
from app.engine.pending import Pending
from app.engine.request import Request, Sample
from app.engine.served import Served
from app.engine.steps import DeviceLost, Steps
from app.engine.turns import Turns
from app.errors import Cancelled, DeadlineExceeded, NotReady, ServiceError
from app.metrics import EngineMetrics

log = logging.getLogger("ddpm.engine")

MEMORY_EVERY_S = 1.0  # at most, while there is work
MOST_FAILURES = 3  # outside of steps, with no picture made in between


class Engine:
    """Owns the runners. All of its methods that are not private may be called from any thread.

    `max_work` bounds the queue in U-Net rows (images × steps, twice that under guidance). A step that takes longer than
    `step_timeout_s` (and twice what makes it stalled) is given up, and the engine with it: see `watch`.
    """

    def __init__(self, metrics: EngineMetrics, *, max_work: int, step_timeout_s: float = 60.0) -> None:
        self._metrics = metrics
        self._turns, self._newcomers = Turns(), Newcomers()
        self._pending, self._heartbeat = Pending(metrics, max_work), Heartbeat(step_timeout_s)
        self._inbox: deque[Request] = deque()  # new ones, and running ones that were cancelled
        self._leaving: list[Served] = []
        self._wake = self._pending.changed  # guards the inbox and the state, too
        self._steps = Steps(metrics, self._pending, self._heartbeat)
        self._ready = False
        self._draining: float | None = None  # until when
        self._failure: str | None = None
        self._memory_seen = -math.inf
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # From other threads

    def start(self) -> None:
        """Starts the thread; `ready` becomes true when what was added before is warm."""
        self._thread.start()

    def add(self, served: Served) -> Future[None]:
        """Warms it up between the steps. When the future is done it takes requests; or it has a ServiceError."""
        with self._wake:
            answer = self._newcomers.add(served)
            if self._failure is not None or self._draining is not None:
                self._newcomers.refuse()
            self._wake.notify()
        return answer

    def retire(self, served: Served) -> None:
        """No more requests come for it: its memory is given back when the last one is answered."""
        with self._wake:
            self._leaving.append(served)
            self._wake.notify()

    def submit(self, request: Request) -> None:
        """Admits a request for what was added and not retired. Raises NotReady, Overloaded, or DeadlineExceeded where
        it could not be done in time."""
        with self._wake:
            if trouble := self.trouble:
                raise NotReady(trouble, retry_after=5)
            self._pending.admit(request)
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
    def rows_per_second(self) -> float:
        """What admission expects of full batches, for the work that is there, or for all checkpoints alike; 0 until
        they are warm."""
        if not self._ready:
            return 0.0
        return self._pending.rows_per_second or self._turns.rows_per_second

    # The thread

    def _run(self) -> None:
        while not self._comes_to_its_end():
            self._heartbeat.rest()
        self._newcomers.refuse()

    def _comes_to_its_end(self) -> bool:
        """Runs the loop. False where it failed and is to be entered again: it finds all samples as they were."""
        try:
            self._loop()
            self._pending.publish()
            return True
        except DeviceLost:
            self._give_up("the device does not work any more")
            return True
        except Exception as error:
            log.exception("engine failed outside a step; it goes on from where it was")
            no_memory = is_out_of_memory(error)
        # From here on the traceback, and whatever memory it held, is gone.
        self._metrics.restarts.inc()
        present = self._turns.present
        if no_memory and present is not None and present.scheduler.max_rows > 1:
            present.make_room(present.scheduler.max_rows)
            return False
        self._steps.failures += 1
        if self._steps.failures == MOST_FAILURES:
            self._give_up(f"it failed {MOST_FAILURES} times without making a picture")
        return self._steps.failures == MOST_FAILURES

    def _loop(self) -> None:
        self._steps.look()  # and publish what was left when it failed
        self._pending.publish()
        while self._drain_inbox():
            self._warm_up()
            batch = self._turns.schedule()
            self._count(batch)
            if batch:
                started = time.monotonic()
                self._heartbeat.begin(batch[0].request.served.rate.step_seconds)
                self._steps.start(batch)
                self._steps.look()
                self._pending.publish()  # the noise that a client wants to see is not to wait for the step
                self._steps.step(batch)
                self._steps.look()
                self._turns.spend(time.monotonic() - started)
            self._heartbeat.rest()
            self._pending.publish()
            self._let_go()
            self._watch_memory()
        self._count([])

    def _warm_up(self) -> None:
        """A portion for those that are to be served; others wait no longer than for another's step."""
        if self._ending:
            self._newcomers.refuse()
        if not len(self._newcomers):
            return
        if self._ready:
            self._heartbeat.begin(1.0)  # seconds: nothing is known of it
        try:
            served = self._newcomers.portion(logging.ERROR if self._ready else logging.CRITICAL)
        except ServiceError:
            if not self._ready:
                self._give_up("the warm-up failed")
            return
        if served is not None:
            self._turns.served.append(served)
            self._newcomers.answer()
            self._ready = self._ready or not len(self._newcomers)

    def _let_go(self) -> None:
        """Those that were retired, and whose requests all have their answers."""
        for served in [served for served in self._leaving if not self._pending.holds(served)]:
            self._leaving.remove(served)
            self._turns.served.remove(served)
            served.runner.close()
            if served.name not in {other.name for other in self._turns.served}:
                self._metrics.forget(served.name)
            log.info("gone", extra={"model": served.name, "sha256": served.sha256})

    def _count(self, batch: list[Sample]) -> None:
        running = Counter(sample.request.model for sample in batch)
        present: Counter[str] = Counter()
        for request in self._turns:
            present[request.model] += len(request.samples)
        for served in self._turns.served:
            name = served.name
            self._metrics.rows_running.labels(name).set(running[name])
            self._metrics.rows_waiting.labels(name).set(present[name] - running[name])

    def _watch_memory(self) -> None:
        if time.monotonic() - self._memory_seen < MEMORY_EVERY_S:
            return
        if self._turns.served:
            self._memory_seen = time.monotonic()
            device = self._turns.served[0].runner.device
            used, total = device_memory(device)
            self._metrics.memory_bytes.labels(device.type, "used").set(used)
            self._metrics.memory_bytes.labels(device.type, "total").set(total)

    def _drain_inbox(self) -> bool:
        """Lets new requests in, cancelled and expired ones out; waits while there is nothing to do. False: all done."""
        with self._wake:
            if not self._turns.busy() and not self._inbox:
                self._count([])
                while not (self._inbox or len(self._newcomers) or self._leaving) and not self._ending:
                    self._wake.wait()
                self._steps.rest()
        while self._inbox:
            request = self._inbox[0]
            if request.cancelled_at is not None:
                self._pending.answer(request, Cancelled("the client went away"))
            elif not request.answered:
                self._turns.add(request)
            self._inbox.popleft()
        now = time.monotonic()
        for request in self._turns:
            if now > request.deadline:
                self._pending.answer(request, DeadlineExceeded("the time-out passed before all images were done"))
            elif self._draining is not None and now > self._draining:
                self._pending.answer(request, NotReady("the server is shutting down", retry_after=5))
        if self._failure is not None:
            return False
        return self._draining is None or bool(self._turns.busy() or self._inbox)

    @property
    def _ending(self) -> bool:
        return self._draining is not None or self._failure is not None

    def _give_up(self, why: str) -> None:
        """Answers everyone, on any thread. The engine's ends, if it ever comes back from where it is."""
        with self._wake:
            self._failure = why
            self._wake.notify()
        answered = self._pending.settle_all(NotReady("the engine has failed; the server restarts", retry_after=5))
        log.critical("the engine gives up: %s", why, extra={"answered": answered})
        self._newcomers.refuse()
        self._pending.publish()
