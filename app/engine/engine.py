"""The engine thread. Every admitted request gets exactly one answer: images, cancelled, expired or failed."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import Counter, deque
from concurrent.futures import Future
from heapq import heappop, heappush

from app.engine.admission import AdmissionController
from app.engine.executor import DeviceLost, StepExecutor, StepResult
from app.engine.instance import ModelInstance
from app.engine.memory import device_memory, is_out_of_memory
from app.engine.outputs import OutputDispatcher, OutputProcessor
from app.engine.request import Request, RequestOutput
from app.engine.scheduler import Batch, ModelScheduler
from app.engine.warmup import WarmupQueue
from app.engine.watchdog import StepWatchdog
from app.errors import Cancelled, DeadlineExceeded, NotReady, ServiceError
from app.metrics import EngineMetrics, EngineStatus, ModelStatus

log = logging.getLogger("ddpm.engine")

MEMORY_EVERY_S = 1.0  # at most, while there is work
MAX_FAILURES = 3  # outside of steps, with no image made in between


class Engine:
    """Owns the runners. All of its public methods may be called from any thread.

    `max_pending_nfe` bounds the queue in network rows (images × steps, twice that with guidance). A step that takes
    longer than `step_timeout_s` (and twice what makes it stalled) is given up, and the engine with it: see `watch`.
    """

    def __init__(self, metrics: EngineMetrics, *, max_pending_nfe: int, step_timeout_s: float = 60.0) -> None:
        self._metrics = metrics
        self._lock = threading.Condition()  # of all that other threads see: the inbox, admission, outbox, state
        self._inbox: deque[tuple[ModelInstance, Request]] = deque()
        self._cancelled: dict[Request, float] = {}  # when
        self._retiring: list[ModelInstance] = []
        self._ready = False
        self._drain_ends: float | None = None
        self._failure: str | None = None
        self._admission = AdmissionController(max_pending_nfe)
        self._dispatcher = OutputDispatcher(self._lock, self._admission, metrics)
        # From here on the thread's own.
        self._models, self._warmup = ModelScheduler(), WarmupQueue(self._lock)
        self._watchdog, self._outputs = StepWatchdog(step_timeout_s), OutputProcessor(self._dispatcher, self._finish)
        self._executor = StepExecutor(metrics, self._watchdog, self._outputs)
        self._deadlines: list[tuple[float, int, Request]] = []  # a heap
        self._running: Counter[str] = Counter()  # images in the current step's batch, by model
        self._last_step_end: float | None = None  # where there was no pause since
        self._memory_measured = -math.inf
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # From other threads

    def start(self) -> None:
        """Starts the thread; `ready` becomes true when the models that were added before are warm."""
        self._thread.start()

    def load_model(self, model: ModelInstance) -> Future[None]:
        """Warms it up between steps. When the future is done it takes requests; or the future has a ServiceError."""
        with self._lock:
            answer = self._warmup.add(model)
            if self._failure is not None or self._drain_ends is not None:
                self._warmup.reject_all()
            self._lock.notify()
        return answer

    def unload_model(self, model: ModelInstance) -> None:
        """No more requests come for it: its memory is given back when the last one has its answer."""
        with self._lock:
            self._retiring.append(model)
            self._lock.notify()

    def submit(self, model: ModelInstance, request: Request) -> None:
        """Admits a request for a model that is warm and not unloaded.

        Raises NotReady, Overloaded, or DeadlineExceeded where it could not be done in time.
        """
        with self._lock:
            if reason := self.unready_reason:
                raise NotReady(reason, retry_after=5)
            self._admission.admit(model, request)
            self._inbox.append((model, request))
        if asyncio._get_running_loop() is request.output.loop:
            # Others may submit in this turn of the loop: woken by each, the engine would contend with it for Python's
            # lock, and its steps would have fewer images.
            request.output.loop.call_soon(self._wake)
        else:
            self._wake()

    def _wake(self) -> None:
        with self._lock:
            self._lock.notify()

    def cancel(self, request: Request) -> bool:
        """The client went away: the request leaves at the next step. False if it has its answer already."""
        with self._lock:
            if request not in self._admission:
                return False
            self._cancelled.setdefault(request, time.monotonic())
            self._lock.notify()
        return True

    def drain(self, seconds: float) -> None:
        """Takes no more work; what is not done after `seconds` is answered with NotReady. The thread then ends."""
        with self._lock:
            if self._drain_ends is None:
                self._drain_ends = time.monotonic() + seconds
            self._lock.notify()

    def watch(self) -> None:
        """Gives up where a step does not return. Call it several times a second, not from the engine's thread."""
        if self._failure is None and (why := self._watchdog.check(self._drain_ends)):
            self._fail(why)

    def join(self, seconds: float) -> bool:
        """Waits for the thread to end; returns whether it did."""
        if self._thread.ident is not None:
            self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def ready(self) -> bool:
        """Weights warm, thread alive, no step overdue, not draining."""
        return self.unready_reason is None

    @property
    def failure(self) -> str | None:
        """Why it can never go on, if so: every request was answered, and the process has to be restarted."""
        return self._failure

    @property
    def unready_reason(self) -> str | None:
        """What keeps it from taking requests, as a sentence for clients."""
        if self._failure is not None:
            return "the engine has failed; the server has to restart"
        if self._drain_ends is not None:
            return "the server is shutting down"
        if not self._thread.is_alive():
            return "the engine is not running"
        if not self._ready:
            return "the checkpoint is still being warmed up"
        if self._watchdog.stalled:
            return "a denoising step has been running for much too long"
        return None

    def status(self) -> EngineStatus:
        """What a scrape and an autoscaler ask."""
        with self._lock:
            pending, rate = self._admission.pending_nfe, self._admission.nfe_per_second
            models = []
            for name in dict.fromkeys(model.name for model in self._models.models):
                running, there = self._running[name], self._admission.num_samples(name)
                limit = max(model.batch_limits.max for model in self._models.models if model.name == name)
                models.append(ModelStatus(name, min(running, there), max(0, there - running), limit))
            return EngineStatus(
                ready=self.ready,
                stalled=self._watchdog.stalled,
                current_step_age=self._watchdog.age,
                oldest_queued_request_age=self._admission.oldest_queued_age,
                pending_nfe=pending,
                estimated_nfe_per_second=(rate or self._models.nfe_per_second()) if self._ready else 0.0,
                models=models,
            )

    # The thread

    def _run(self) -> None:
        while not self._run_until_shutdown():
            self._watchdog.stop()
        self._warmup.reject_all()

    def _run_until_shutdown(self) -> bool:
        """Runs the loop. False where it failed and is to be entered again: it finds all samples as they were."""
        try:
            self._loop()
            return True
        except DeviceLost:
            self._fail("the device does not work any more")
            return True
        except Exception as error:
            log.exception("engine failed outside a step, going on from where it was")
            no_memory = is_out_of_memory(error)
        # From here on the traceback, and whatever memory it held, is gone.
        self._metrics.restarts.inc()
        current = self._models.current
        if no_memory and current is not None and current.batch_limits.max > 1:
            current.shrink_after_oom(current.batch_limits.max)
            return False
        self._outputs.failures += 1
        if self._outputs.failures == MAX_FAILURES:
            self._fail(f"it failed {MAX_FAILURES} times without finishing an image")
        return self._outputs.failures == MAX_FAILURES

    def _loop(self) -> None:
        self._outputs.process()  # what was left when the loop failed
        while self._take_requests():
            self._warm_up_some()
            self._step()
            self._unload_retired()
            self._measure_memory()
        self._running.clear()
        for model in self._models.models:
            model.runner.stop_workers()
        self._dispatcher.publish()

    def _step(self) -> None:
        """schedule → execute → update → publish. A new request waits for one step at most."""
        started = time.monotonic()
        batch = self._models.schedule()
        if batch is not None:
            self._watchdog.start(batch.model.throughput.step_seconds)
            self._running = Counter({batch.model.name: len(batch.samples)})
            self._begin(self._executor.init_latents(batch))
            self._outputs.process()  # a client may want to see the noise: that does not wait for the step
            result = self._executor.execute(batch)
            self._update(batch, result)
            self._outputs.process()
            self._models.charge(time.monotonic() - started)
        self._watchdog.stop()
        self._dispatcher.publish()

    def _begin(self, requests: list[Request]) -> None:
        """Their first step is about to run."""
        with self._lock:
            for request in requests:
                self._admission.start(request)
        for request in requests:
            waited = (request.first_step_time or 0.0) - request.arrival_time
            self._metrics.queue_seconds.labels(request.model).observe(waited)

    def _update(self, batch: Batch, result: StepResult) -> None:
        """Counts what the step has done, and answers the requests that it failed."""
        model, budget = batch.model, self._models.budget(batch.model)
        with self._lock:
            self._admission.progress({sample.request for samples, *_ in result.calls for sample in samples})
        for request, error in result.failures.items():
            self._finish(request, error)
        for samples, batch_size, started, ended in result.calls:
            # What comes between two steps delays requests as the steps do.
            model.throughput.observe(batch_size, ended - (self._last_step_end or started), budget)
            self._last_step_end = ended
            self._metrics.count_step(model.name, len(samples), batch_size, budget, ended - started)

    def _finish(self, request: Request, output: RequestOutput) -> None:
        """The request leaves with its answer, unless it has one."""
        self._models.remove(request)
        self._dispatcher.finish(request, output)

    def _take_requests(self) -> bool:
        """Lets new requests in, cancelled and expired ones out; waits while there is no work. False: all is done."""
        with self._lock:
            if not len(self._models) and not self._inbox:
                self._running.clear()
                while not (self._inbox or self._cancelled or len(self._warmup) or self._retiring or self._ending):
                    self._lock.wait()
                self._last_step_end = None
            cancelled = list(self._cancelled.items())
        while self._inbox:  # a request leaves it when nothing can fail any more
            model, request = self._inbox[0]
            if not request.status.is_final and request not in self._models:
                heappush(self._deadlines, (request.deadline, request.number, request))
                self._models.add(model, request)
            self._inbox.popleft()
        for request, since in cancelled:
            self._finish(request, Cancelled("the client went away"))
            self._metrics.cancellation_latency.labels(request.model).observe(time.monotonic() - since)
            del self._cancelled[request]
        now = time.monotonic()
        while self._deadlines and (self._deadlines[0][0] < now or self._deadlines[0][2].status.is_final):
            expired = DeadlineExceeded("the time-out passed before all images were done")
            self._finish(self._deadlines[0][2], expired)
            heappop(self._deadlines)
        if self._drain_ends is not None and now > self._drain_ends:
            for request in self._models:
                self._finish(request, NotReady("the server is shutting down", retry_after=5))
        if self._failure is not None:
            return False
        return self._drain_ends is None or bool(len(self._models) or self._inbox)

    def _warm_up_some(self) -> None:
        """A piece of warm-up for the next model; requests wait no longer for it than for another model's step."""
        if self._ending:
            self._warmup.reject_all()
        if not len(self._warmup):
            return
        if self._ready:
            self._watchdog.start(1.0)  # seconds: its speed is not known
        try:
            model = self._warmup.run_one(logging.ERROR if self._ready else logging.CRITICAL)
        except ServiceError:
            if not self._ready:
                self._fail("the warm-up failed")
            return
        if model is not None:
            with self._lock:
                self._models.add_model(model)
            self._warmup.complete()
            self._ready = self._ready or not len(self._warmup)

    def _unload_retired(self) -> None:
        """Those whose requests all have their answers."""
        with self._lock:
            done = [model for model in self._retiring if not self._admission.has_requests_for(model)]
            for model in done:
                self._retiring.remove(model)
                self._models.remove_model(model)
        for model in done:
            model.runner.close()
            log.info("model unloaded", extra={"model": model.name, "sha256": model.sha256})

    def _measure_memory(self) -> None:
        if time.monotonic() - self._memory_measured < MEMORY_EVERY_S:
            return
        if models := self._models.models:
            self._memory_measured = time.monotonic()
            device = models[0].runner.device
            used, total = device_memory(device)
            self._metrics.memory_bytes.labels(device.type, "used").set(used)
            self._metrics.memory_bytes.labels(device.type, "total").set(total)

    @property
    def _ending(self) -> bool:
        return self._drain_ends is not None or self._failure is not None

    def _fail(self, why: str) -> None:
        """Answers every request, on any thread. The engine's ends, if it ever comes back from where it is."""
        with self._lock:
            self._failure = why
            self._lock.notify()
        aborted = self._dispatcher.abort_all(NotReady("the engine has failed; the server restarts", retry_after=5))
        log.critical("engine failed: %s", why, extra={"aborted": aborted})
        self._warmup.reject_all()
        self._dispatcher.publish()
