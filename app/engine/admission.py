"""Which requests are admitted: the queue has a limit, and a time-out that cannot be met is refused at once."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from heapq import heappush, heapreplace

from app.engine.instance import Demand, ModelInstance
from app.engine.request import Request
from app.errors import DeadlineExceeded, Overloaded

DEADLINE_SAFETY = 0.85  # of the time-out that a request may need, as estimated; see docs/benchmarks.md
DEFAULT_TIMEOUT_SLACK = 2.0  # the same for a client that named no time-out
EXACT_BELOW = 32  # amounts of work are told apart exactly below, and to 3 to 6 % above


class AdmissionController:
    """Knows all requests that were admitted and have no answer yet. Call it with the engine's lock held.

    It admits `max_pending_nfe` network rows (images × steps, twice that with guidance). It keeps sums, so that an
    arrival costs the same however many requests wait.
    """

    def __init__(self, max_pending_nfe: int) -> None:
        self._max_pending_nfe = max_pending_nfe
        self._model_of: dict[Request, ModelInstance] = {}
        self._backlogs: dict[ModelInstance, Backlog] = {}
        self._waiting: dict[Request, None] = {}  # for their first step, oldest first

    def __contains__(self, request: Request) -> bool:
        return request in self._model_of

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._model_of))

    def __len__(self) -> int:
        return len(self._model_of)

    def admit(self, model: ModelInstance, request: Request) -> None:
        """Raises Overloaded, or DeadlineExceeded where it could not be done in time."""
        pending, work = self.pending_nfe, request.remaining_nfe
        if pending and pending + work > self._max_pending_nfe:  # an empty queue takes anything within the limits
            surplus = min(pending, pending + work - self._max_pending_nfe) / pending
            retry = max(1, math.ceil(surplus * self._pending_seconds()))
            raise Overloaded(f"the queue is full; try again in {retry} s", retry_after=retry)
        seconds = self._estimate_latency(model, request)
        # The rate is an estimate, and others will come. A client that named no time-out is refused only where the
        # estimate is far too long.
        if seconds / (DEFAULT_TIMEOUT_SLACK if request.has_default_timeout else DEADLINE_SAFETY) > (
            request.deadline - time.monotonic()
        ):
            raise DeadlineExceeded(f"this would take about {math.ceil(seconds)} s, longer than its time-out")
        self._model_of[request] = model
        self._backlogs.setdefault(model, Backlog()).add(request)
        self._waiting[request] = None

    def start(self, request: Request) -> None:
        """Its first step begins."""
        self._waiting.pop(request, None)

    def progress(self, requests: Iterable[Request]) -> None:
        """They have less work left than before."""
        for request in requests:
            if request in self._model_of:
                self._backlogs[self._model_of[request]].update(request)

    def release(self, request: Request) -> None:
        """It has its answer."""
        model = self._model_of.pop(request)
        self._waiting.pop(request, None)
        self._backlogs[model].remove(request)
        if not len(self._backlogs[model]):
            del self._backlogs[model]

    def has_requests_for(self, model: ModelInstance) -> bool:
        """Whether a request for it has no answer yet."""
        return model in self._backlogs

    def num_samples(self, name: str) -> int:
        """Images that are not finished, of all models of that name."""
        return sum(backlog.num_samples for model, backlog in self._backlogs.items() if model.name == name)

    @property
    def pending_nfe(self) -> int:
        """Work admitted and not done, in network rows."""
        return sum(backlog.nfe for backlog in self._backlogs.values())

    @property
    def nfe_per_second(self) -> float | None:
        """Pending work over the time that it takes, whatever mixture of models it is for; None where there is none."""
        seconds = self._pending_seconds()
        return self.pending_nfe / seconds if seconds else None

    @property
    def oldest_queued_age(self) -> float:
        """Seconds that the oldest request without a step has waited; 0 where there is none."""
        oldest = next(iter(self._waiting), None)
        return 0.0 if oldest is None else time.monotonic() - oldest.arrival_time

    def _pending_seconds(self) -> float:
        return sum(backlog.nfe / model.throughput.nfe_per_second for model, backlog in self._backlogs.items())

    def _estimate_latency(self, model: ModelInstance, request: Request) -> float:
        """Seconds. Requests with less work left go first, then its own rows take the places that are free; a step lasts
        as long as the batch that it shares. Models share the device, so each other one delays this request by at most
        as much as it takes alone."""
        backlog, rate = self._backlogs.get(model, Backlog()), model.throughput.nfe_per_second
        backlog.demand.add(request)
        budget = model.batch_limits.budget(backlog.demand)
        backlog.demand.remove(request)
        jobs = [*backlog.jobs_up_to(request.remaining_nfe), (request.nfe_per_step, len(request.schedule))]
        step_seconds = min(backlog.nfe_per_step + request.nfe_per_step, budget) / rate
        own = max(request.remaining_nfe / rate, estimate_makespan(jobs, budget) * step_seconds)
        others = (b.nfe / m.throughput.nfe_per_second for m, b in self._backlogs.items() if m is not model)
        return own + sum(min(seconds, own) for seconds in others)


class Backlog:
    """The requests for one model that have no answer yet, as sums over those with about the same work left."""

    def __init__(self) -> None:
        self.demand = Demand()
        self.nfe = self.nfe_per_step = self.num_samples = 0
        self._entries: dict[Request, tuple[int, int, int]] = {}  # what it counts for: work, samples, rows of a step
        self._sums: dict[tuple[int, int], list[int]] = {}  # of requests alike: rows of a step, work

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, request: Request) -> None:
        """A new one."""
        self.demand.add(request)
        self._count(request)

    def update(self, request: Request) -> None:
        """It has less left than before."""
        self._discount(request)
        self._count(request)

    def remove(self, request: Request) -> None:
        """It has its answer."""
        self._discount(request)
        self.demand.remove(request)

    def jobs_up_to(self, nfe: int) -> list[tuple[int, float]]:
        """What goes before a request with so much work: (network rows of a step, steps left), least work first."""
        most = rounded(nfe)
        return [(rows, work / rows) for key, (rows, work) in sorted(self._sums.items()) if key[0] <= most]

    def _count(self, request: Request) -> None:
        entry = request.remaining_nfe, len(request.samples), request.nfe_per_step
        self._entries[request] = entry
        self._add(entry, 1)

    def _discount(self, request: Request) -> None:
        self._add(self._entries.pop(request), -1)

    def _add(self, entry: tuple[int, int, int], sign: int) -> None:
        nfe, samples, rows = entry
        self.nfe += sign * nfe
        self.num_samples += sign * samples
        self.nfe_per_step += sign * rows
        key = rounded(nfe), rounded(rows)
        sums = self._sums.setdefault(key, [0, 0])
        sums[0] += sign * rows
        sums[1] += sign * nfe
        if not sums[0]:
            del self._sums[key]


def rounded(amount: int) -> int:
    """Down to five binary digits."""
    shift = max(0, amount.bit_length() - EXACT_BELOW.bit_length() + 1)
    return amount >> shift << shift


def estimate_makespan(jobs: Iterable[tuple[int, float]], places: int) -> float:
    """Steps until the last of `jobs` (network rows, steps each) has ended in batches of `places` rows.

    Each row in turn takes the place that is free first: list scheduling (Graham 1966), which is what the shortest
    remaining work first comes to where no other request arrives. Where a job has more rows than there are places, each
    place takes as many of them.
    """
    free, end = [(0.0, places)], 0.0  # since which step, how many
    for rows, steps in jobs:
        end = 0.0
        if rows >= places:
            rounds = rows // places * steps
            free = [(since + rounds, there) for since, there in free]  # still a heap
            end = max(free)[0]
            rows %= places
        while rows:
            since, there = free[0]
            taken, end = min(rows, there), max(end, since + steps)
            if taken == there:
                heapreplace(free, (since + steps, taken))
            else:
                free[0] = since, there - taken
                heappush(free, (since + steps, taken))
            rows -= taken
    return end
