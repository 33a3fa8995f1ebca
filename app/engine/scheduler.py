"""The policy that picks the samples of the next step."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from app.engine.request import Request, Sample


class Scheduler:
    """Round robin over requests: each in turn gives one image to the batch, those furthest behind first, until
    `max_rows` U-Net rows are full. A request of 64 images so never keeps a request of one waiting, and equal requests
    progress equally.
    """

    def __init__(self, max_rows: int) -> None:
        self.max_rows = max_rows
        self._turns: deque[Request] = deque()

    def __len__(self) -> int:
        return len(self._turns)

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._turns))

    def __contains__(self, request: Request) -> bool:
        return request in self._turns

    def add(self, request: Request) -> None:
        self._turns.append(request)

    def remove(self, request: Request) -> None:
        self._turns.remove(request)

    def schedule(self) -> list[Sample]:
        """The samples of the next step; whose turn comes next is remembered for the step after."""
        batch: list[Sample] = []
        rows = 0
        queues: dict[Request, Iterator[Sample]] = {}
        spent: set[Request] = set()
        while len(spent) < len(self._turns):
            request = self._turns[0]
            if request not in queues:
                queues[request] = iter(sorted(request.samples, key=lambda sample: sample.step))
            sample = next(queues[request], None)
            if sample is None:
                spent.add(request)
            elif rows + sample.rows > self.max_rows and batch:
                break
            else:
                batch.append(sample)
                rows += sample.rows
            self._turns.rotate(-1)
        return batch
