"""Whose step is next, where several checkpoints are served."""

from __future__ import annotations

import math
from collections.abc import Iterator

from app.engine.request import Request, Sample
from app.engine.served import Served


class Turns:
    """Those with work share the device's time equally: the next step is that of the one that has had the least.

    Time without work is not saved up: who comes (back) begins where the present one stands, or after its own last step
    (start-time fair queueing: Goyal, Vin & Cheng 1996).
    """

    def __init__(self) -> None:
        self.served: list[Served] = []  # oldest first
        self.present: Served | None = None  # whose step is or was the last
        self._clock = 0.0  # what the present one had been given when its turn came

    def __iter__(self) -> Iterator[Request]:
        """All of their requests."""
        return (request for served in self.served for request in served.scheduler)

    def busy(self) -> list[Served]:
        """Those that have requests."""
        return [served for served in self.served if len(served.scheduler)]

    @property
    def rows_per_second(self) -> float:
        """What a row takes with one checkpoint or another, inverted; infinite where there is none."""
        times = [1 / served.rate.rows_per_second for served in self.served]
        return len(times) / sum(times) if sum(times) else math.inf

    def add(self, request: Request) -> None:
        """A new request, for the scheduler of its checkpoint."""
        served = request.served
        if not len(served.scheduler):
            served.spent = max(served.spent, self._clock)
        served.scheduler.add(request)

    def schedule(self) -> list[Sample]:
        """The samples of the next step, all of one checkpoint; none where there is no work."""
        busy = self.busy()
        if not busy:
            return []
        self.present = min(busy, key=lambda served: served.spent)
        self._clock = self.present.spent
        return self.present.scheduler.schedule()

    def spend(self, seconds: float) -> None:
        """The present one had the device for so long."""
        if self.present is not None:
            self.present.spent += seconds
