"""A lone row's call on several threads. All other calls have one thread each: see `app.engine.workers`.

The threads meet hundreds of times in a call, and each time the early one waits. On a quiet machine the row is done in
three quarters of the time or less. Beside a busy neighbour, or on cores that share no cache, it can take much longer,
so the times choose at every call.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from model.diffusion import Network

MOST_THREADS = 4  # a row's operations are too short for more
TRIES = 3  # the fastest was least disturbed by others
SMOOTHING = 0.1  # of the newest call on one thread in the running estimate
CREDIT = 4  # calls on one thread, in whose time the team may lose what it has gained before: a hiccup ends nothing
PATIENCE = 100  # times what the team has lost, until it is tried again: it loses 1 % at most


class ThreadTeam:
    """`network` on `threads` threads, or `alone` on one where that is faster at present.

    They have the same weights, each packed for its number of threads: oneDNN takes several times as long on another.
    """

    def __init__(self, network: Network, alone: Network, threads: int) -> None:
        self.threads = min(threads, MOST_THREADS)
        self._network, self._alone = network, alone
        self.alone_s = 0.0  # of a call, about
        self.gained_s = 0.0  # by the team
        self.resumes = 0.0  # on the monotonic clock: until then calls have one thread

    def agrees(self, x: Tensor, t: Tensor, y: Tensor | None) -> bool:
        """Whether both give the same bits; where not, it may not be called. Packs, records and times them."""
        seconds, outs = [], []
        for _ in range(TRIES):
            began = time.monotonic()
            outs.append(self._alone(x, t, y))
            seconds.append(time.monotonic() - began)
            outs.append(self._on_all(x, t, y))
        self.alone_s = min(seconds)
        return all(torch.equal(out, outs[0]) for out in outs)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """As the network. From one thread only."""
        began = time.monotonic()
        if began < self.resumes:
            out = self._alone(x, t, y)
            self.alone_s += SMOOTHING * (time.monotonic() - began - self.alone_s)
            return out
        out = self._on_all(x, t, y)
        now = time.monotonic()
        self.gained_s = min(self.gained_s + self.alone_s - (now - began), CREDIT * self.alone_s)
        if self.gained_s < 0:
            self.resumes = now - PATIENCE * self.gained_s
            self.gained_s = 0.0
        return out

    def _on_all(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        torch.set_num_threads(self.threads)
        try:
            return self._network(x, t, y)
        finally:
            torch.set_num_threads(1)
