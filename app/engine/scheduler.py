"""Which samples take the next step: between the requests for one model (Scheduler), and between models."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

from app.engine.instance import BatchLimits, Demand, ModelInstance
from app.engine.request import Request, Sample

ROUND_ROBIN_EVERY = 8  # steps; with fewer of them the median and p95 of latency were better: see docs/benchmarks.md


@dataclass(frozen=True)
class Batch:
    """The samples of one step, all of one model."""

    model: ModelInstance
    samples: list[Sample]


class Scheduler:
    """Every eighth step goes round robin over the requests; the others take the shortest remaining work first (SRPT).

    Round robin keeps every request moving: each in turn gives one image to the batch, those furthest behind first,
    until the batch is full. SRPT lets a single image pass a long queue, and equal requests finish one after another
    instead of all at the end. A request of 64 images never keeps a request of one waiting.

    How many network rows a batch may have is said by `BatchLimits`. A step costs as much with 5,000 requests waiting as
    with 50: the waiting ones are in a heap by remaining work, and only those in the batch move in it.
    """

    def __init__(self, limits: BatchLimits) -> None:
        self.limits, self.demand = limits, Demand()
        self.budget = 0  # network rows that the last batch could have
        self._requests: OrderedDict[Request, int | None] = OrderedDict()  # in turn → its entry in the heap, if valid
        self._heap: list[tuple[int, int, Request]] = []  # remaining work, number; entries that moved stay behind
        self._moved: list[Request] = []  # that may have done work since they were put into the heap
        self._steps = 0

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._requests))

    def __contains__(self, request: Request) -> bool:
        return request in self._requests

    def add(self, request: Request) -> None:
        """Its samples are scheduled from now on."""
        self._requests[request] = None
        self._moved.append(request)
        self.demand.add(request)

    def remove(self, request: Request) -> None:
        """It has its answer: none of its samples runs again."""
        del self._requests[request]
        self.demand.remove(request)

    def schedule(self) -> list[Sample]:
        """The samples of the next step, of at most `budget` network rows, or one sample."""
        self._steps += 1
        self.limits.count_step()
        self.budget = self.limits.budget(self.demand)
        return self._shortest_first() if self._steps % ROUND_ROBIN_EVERY else self._round_robin()

    def _shortest_first(self) -> list[Sample]:
        self._update_heap()
        batch: list[Sample] = []
        size = 0
        while self._heap:
            remaining, _, request = heappop(self._heap)
            if self._requests.get(request) != remaining:
                continue  # it moved, or has its answer
            self._requests[request] = None
            self._moved.append(request)
            for sample in furthest_behind_first(request):
                if size + sample.nfe > self.budget and batch:
                    return batch
                batch.append(sample)
                size += sample.nfe
        return batch

    def _round_robin(self) -> list[Sample]:
        """Whose turn comes next is remembered for the round-robin step after this."""
        batch: list[Sample] = []
        size = 0
        queues: dict[Request, Iterator[Sample]] = {}
        exhausted: set[Request] = set()
        while len(exhausted) < len(self._requests):
            request = next(iter(self._requests))
            if request not in queues:
                queues[request] = iter(furthest_behind_first(request))
                self._moved.append(request)
            sample = next(queues[request], None)
            if sample is None:
                exhausted.add(request)
            elif size + sample.nfe > self.budget and batch:
                break
            else:
                batch.append(sample)
                size += sample.nfe
            self._requests.move_to_end(request)
        return batch

    def _update_heap(self) -> None:
        """Gives every request that moved an entry with the work that it has left now."""
        moved, self._moved = self._moved, []
        for request in moved:
            if self._requests.get(request, request.remaining_nfe) != request.remaining_nfe:
                self._requests[request] = request.remaining_nfe
                heappush(self._heap, (request.remaining_nfe, request.number, request))
        if len(self._heap) > 2 * len(self._requests) + 64:
            self._heap = [entry for entry in self._heap if self._requests.get(entry[2]) == entry[0]]
            heapify(self._heap)


class ModelScheduler:
    """Models with work share the device's time equally: the next step is that of the one that has had the least.

    Time without work is not saved up: a model that comes (back) begins where the current one stands, or after its own
    last step (start-time fair queueing: Goyal, Vin & Cheng 1996).
    """

    def __init__(self) -> None:
        self.current: ModelInstance | None = None  # whose step is or was the last
        self._schedulers: dict[ModelInstance, Scheduler] = {}  # oldest first
        self._virtual_time: dict[ModelInstance, float] = {}  # seconds of the device that each has had
        self._virtual_clock = 0.0  # that of the current one when its step began
        self._model_of: dict[Request, ModelInstance] = {}

    def __iter__(self) -> Iterator[Request]:
        """All of their requests."""
        return iter(list(self._model_of))

    def __len__(self) -> int:
        return len(self._model_of)

    def __contains__(self, request: Request) -> bool:
        return request in self._model_of

    @property
    def models(self) -> list[ModelInstance]:
        """Oldest first."""
        return list(self._schedulers)

    def active_models(self) -> list[ModelInstance]:
        """Those that have requests."""
        return [model for model, scheduler in self._schedulers.items() if len(scheduler)]

    def nfe_per_second(self) -> float:
        """Network rows a second where each model has as many; infinite where there is no model."""
        times = [1 / model.throughput.nfe_per_second for model in self._schedulers]
        return len(times) / sum(times) if sum(times) else math.inf

    def add_model(self, model: ModelInstance) -> None:
        """It is warm: requests for it may come."""
        self._schedulers[model] = Scheduler(model.batch_limits)
        self._virtual_time[model] = 0.0

    def remove_model(self, model: ModelInstance) -> None:
        """None of its requests is left."""
        del self._schedulers[model], self._virtual_time[model]
        if self.current is model:
            self.current = None

    def add(self, model: ModelInstance, request: Request) -> None:
        """A new request."""
        scheduler = self._schedulers[model]
        if not len(scheduler):
            self._virtual_time[model] = max(self._virtual_time[model], self._virtual_clock)
        scheduler.add(request)
        self._model_of[request] = model

    def remove(self, request: Request) -> None:
        """It has its answer. Harmless if it was never added, or is gone."""
        model = self._model_of.pop(request, None)
        if model is not None:
            self._schedulers[model].remove(request)

    def schedule(self) -> Batch | None:
        """The next step, if there is work."""
        active = self.active_models()
        if not active:
            return None
        self.current = min(active, key=self._virtual_time.__getitem__)
        self._virtual_clock = self._virtual_time[self.current]
        return Batch(self.current, self._schedulers[self.current].schedule())

    def budget(self, model: ModelInstance) -> int:
        """Network rows that its last batch could have."""
        return self._schedulers[model].budget

    def charge(self, seconds: float) -> None:
        """The current one had the device for that long."""
        if self.current is not None:
            self._virtual_time[self.current] += seconds


def furthest_behind_first(request: Request) -> list[Sample]:
    """Its samples by the steps that they have taken, fewest first."""
    return sorted(request.samples, key=lambda sample: sample.step)
