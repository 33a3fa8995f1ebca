"""The policy that picks the samples of the next step."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from heapq import heappush, heapreplace
from itertools import islice

from app.engine.request import Request, Sample

ROUND_ROBIN_EVERY = 8  # steps; with fewer of them the median and p95 of latency were better: see docs/benchmarks.md
RECOVERY = 100  # steps after which a batch may be twice as large again


class Scheduler:
    """Every eighth step goes round robin over the requests, the others to those with the least left to do.

    Round robin keeps every request moving: each in turn gives one image to the batch, those furthest behind first,
    until the batch is full. Least work first lets a single image pass a crowd, and equal requests finish one after
    another instead of all at the end. A request of 64 images never keeps a request of one waiting.

    A batch has room for `usual_rows` U-Net rows, or for an image of each request if those are more, but never for more
    than `max_rows`: a crowd waits less where all of it moves in larger steps, and nobody else has to bear them. Where
    each request fills the usual batch by itself, there is nobody for whom short steps would be good: it has all rows.
    """

    def __init__(self, max_rows: int) -> None:
        self.allow(max_rows, max_rows)
        self._shrunk = 0  # at which step
        self._turns: deque[Request] = deque()
        self._steps = 0

    def __len__(self) -> int:
        return len(self._turns)

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._turns))

    def __contains__(self, request: Request) -> bool:
        return request in self._turns

    def add(self, request: Request) -> None:
        """Its samples are among those to choose from."""
        self._turns.append(request)

    def remove(self, request: Request) -> None:
        """It has its answer: none of its samples runs again."""
        self._turns.remove(request)

    def allow(self, usual: int, most: int) -> None:
        """From now on a batch has so many rows, and for a crowd up to `most`."""
        self.usual_rows = self.room = usual
        self.max_rows = self._most_rows = most

    def shrink(self, rows: int) -> None:
        """A batch of `rows` was too large: half of it will do, until enough steps went well to try more again."""
        self.max_rows = max(1, min(rows, self.max_rows) // 2)
        self._shrunk = self._steps

    def room_for(self, requests: Collection[Request]) -> int:
        """The rows of a batch where these are there; before the warm-up, one."""
        if all(request.rows >= self.usual_rows for request in requests):
            return max(1, self.max_rows)
        crowd = sum(request.rows // request.n for request in islice(requests, self.max_rows))
        return max(1, min(max(self.usual_rows, crowd), self.max_rows))

    def schedule(self) -> list[Sample]:
        """The samples of the next step, of at most `room` rows."""
        self._steps += 1
        if self.max_rows < self._most_rows and self._steps - self._shrunk > RECOVERY:
            self.max_rows = min(2 * self.max_rows, self._most_rows)
            self._shrunk = self._steps
        self.room = self.room_for(self._turns)
        return self._least_work_first() if self._steps % ROUND_ROBIN_EVERY else self._round_robin()

    def _least_work_first(self) -> list[Sample]:
        batch: list[Sample] = []
        rows = 0
        for request in sorted(self._turns, key=lambda request: (request.work_left, request.number)):
            for sample in furthest_behind_first(request):
                if rows + sample.rows > self.room and batch:
                    return batch
                batch.append(sample)
                rows += sample.rows
        return batch

    def _round_robin(self) -> list[Sample]:
        """Whose turn comes next is remembered for the round-robin step after this."""
        batch: list[Sample] = []
        rows = 0
        queues: dict[Request, Iterator[Sample]] = {}
        spent: set[Request] = set()
        while len(spent) < len(self._turns):
            request = self._turns[0]
            if request not in queues:
                queues[request] = iter(furthest_behind_first(request))
            sample = next(queues[request], None)
            if sample is None:
                spent.add(request)
            elif rows + sample.rows > self.room and batch:
                break
            else:
                batch.append(sample)
                rows += sample.rows
            self._turns.rotate(-1)
        return batch


def steps_until_done(jobs: Iterable[tuple[int, float]], places: int) -> float:
    """Steps until the last of `jobs`, (rows, steps each), has ended in batches of `places` rows.

    Each row in turn takes the place that is free first: list scheduling (Graham 1966), which is what least work first
    comes to where nobody else arrives.
    """
    free, end = [(0.0, places)], 0.0  # since which step, how many
    for rows, steps in jobs:
        while rows:
            since, there = free[0]
            taken, end = min(rows, there), since + steps
            if taken == there:
                heapreplace(free, (end, taken))
            else:
                free[0] = since, there - taken
                heappush(free, (end, taken))
            rows -= taken
    return end


def furthest_behind_first(request: Request) -> list[Sample]:
    """Its samples by the steps that they have taken, fewest first."""
    return sorted(request.samples, key=lambda sample: sample.step)
