"""The requests that were admitted and not answered: the only way into the engine, and the only way out."""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict

from app.engine.request import Answer, Frame, Mailbox, Request, post
from app.engine.scheduler import steps_until_done
from app.engine.served import Served
from app.errors import DeadlineExceeded, Overloaded, ServiceError
from app.metrics import EngineMetrics

MARGIN = 0.85  # of the time-out that a request may need, as estimated; see docs/benchmarks.md
PATIENCE = 2.0  # the same for a client that named no time


class Pending:
    """Used by all threads; `changed` guards it, and whatever else the engine shares with them.

    Admits `max_work` U-Net rows (images × steps, twice that under guidance).
    """

    def __init__(self, metrics: EngineMetrics, max_work: int) -> None:
        self.changed = threading.Condition()
        self._metrics, self._max_work = metrics, max_work
        self._requests: set[Request] = set()
        self._outbox: list[tuple[Mailbox, Frame | Answer]] = []

    def __contains__(self, request: Request) -> bool:
        return request in self._requests

    def __len__(self) -> int:
        return len(self._requests)

    def admit(self, request: Request) -> None:
        """Raises Overloaded, or DeadlineExceeded where it could not be done in time."""
        with self.changed:
            work, waiting = request.work_left, sum(other.work_left for other in self._requests)
            if waiting and waiting + work > self._max_work:  # an empty queue takes anything within the request limits
                surplus = min(waiting, waiting + work - self._max_work) / waiting
                retry = max(1, math.ceil(surplus * self._seconds()))
                raise Overloaded(f"the queue is full; try again in {retry} s", retry_after=retry)
            seconds = self._ends_after(request)
            # The rate is an estimate, and others will come; who named no time is refused only where it is far too long.
            if seconds / (PATIENCE if request.patient else MARGIN) > request.deadline - time.monotonic():
                raise DeadlineExceeded(f"this would take about {math.ceil(seconds)} s, longer than its time-out")
            self._requests.add(request)

    def _ends_after(self, request: Request) -> float:
        """Seconds. Those with less work left go first, then its own rows take the places that are free; a step lasts as
        long as the batch that it shares. Checkpoints share the device, so each request for another delays this one by
        at most as much as this takes alone."""
        same: list[Request] = []
        elsewhere: defaultdict[Served, float] = defaultdict(float)
        for other in self._requests:
            if other.served is request.served:
                same.append(other)
            else:
                elsewhere[other.served] += other.seconds_left
        scheduler = request.served.scheduler
        room = scheduler.room_for([*same, request])
        rows = sum(other.rows for other in same) + request.rows
        before = sorted((other.work_left, other.rows) for other in same if other.work_left <= request.work_left)
        jobs = [*((places, work / places) for work, places in before), (request.rows, len(request.plan))]
        step = min(rows, room) / request.served.rate.rows_per_second
        own = max(request.seconds_left, steps_until_done(jobs, room) * step)
        return own + sum(min(seconds, own) for seconds in elsewhere.values())

    def _seconds(self) -> float:
        return sum(request.seconds_left for request in self._requests)

    def holds(self, served: Served) -> bool:
        """Whether a request for it has no answer yet."""
        with self.changed:
            return any(request.served is served for request in self._requests)

    def show(self, request: Request, frame: Frame) -> None:
        """A frame on the way, to be published."""
        with self.changed:
            self._outbox.append((request.mailbox, frame))

    def settle(self, request: Request, answer: Answer) -> None:
        """An answer, to be published. The first counts."""
        with self.changed:
            if request.answered:
                return
            request.answered, request.answered_at = True, time.monotonic()
            self._requests.discard(request)
            self._outbox.append((request.mailbox, answer))
        if isinstance(answer, ServiceError):
            self._metrics.wasted_steps.labels(request.model, answer.code).inc(request.steps_done)
            if request.cancelled_at is not None:
                self._metrics.cancel_seconds.labels(request.model).observe(time.monotonic() - request.cancelled_at)
        else:
            self._metrics.images.labels(request.model).inc(request.n)

    def answer(self, request: Request, answer: Answer) -> None:
        """On the engine's thread: the request leaves with its answer, unless it was given up."""
        self.settle(request, answer)
        if request in request.served.scheduler:
            request.served.scheduler.remove(request)

    def settle_all(self, answer: ServiceError) -> int:
        """The same answer for everyone; how many there were."""
        with self.changed:
            requests = list(self._requests)
        for request in requests:
            self.settle(request, answer)
        return len(requests)

    def publish(self) -> None:
        """Wakes each event loop that has news, once."""
        with self.changed:
            outbox, self._outbox = self._outbox, []
        if outbox:
            post(outbox)

    @property
    def rows(self) -> int:
        """Work admitted and not done, in U-Net rows."""
        with self.changed:
            return sum(request.work_left for request in self._requests)

    @property
    def rows_per_second(self) -> float | None:
        """Work over the time that it takes, whatever mixture of checkpoints it is for; None where there is none."""
        with self.changed:
            rows, seconds = self.rows, self._seconds()
        return rows / seconds if seconds else None

    @property
    def oldest_wait(self) -> float:
        """Seconds that the oldest request without a step has waited; 0 where there is none."""
        with self.changed:
            waiting = [request.submitted for request in self._requests if request.started is None]
        return time.monotonic() - min(waiting) if waiting else 0.0
