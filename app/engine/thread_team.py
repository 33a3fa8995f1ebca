"""A lone row's call on several threads. All other calls have one thread each: see `app.engine.workers`.

The threads meet hundreds of times in a call, and each time the early one waits. On a quiet machine the row is done in
three quarters of the time or less. Beside a busy neighbour, or on cores that share no cache, it can take much longer,
so the times choose at every call: what the team saves is its credit, and without credit a call has one thread.
"""

from __future__ import annotations

import time
from collections.abc import Generator

import torch
from torch import Tensor

from model.diffusion import Network

MOST_THREADS = 4  # a row's operations are too short for more
TRIES = 2  # the faster was less disturbed by others
SMOOTHING = 0.1  # of the newest call on one thread in the running estimate, where it took longer
PATIENCE = 32  # times what the team has lost is spent on one thread before the next try: tries cost 3 %
MOST_CREDIT, MOST_LOST = 8, 16  # calls on one thread: what a team can have saved, and what one call of it can lose
PROBE_AFTER = 100  # calls of the team, one has one thread: it may be faster than it was


class ThreadTeam:
    """`network` on `threads` threads, or `alone` on one where that is faster at present.

    They have the same weights, each packed for its number of threads: oneDNN takes several times as long on another.
    """

    def __init__(self, network: Network, alone: Network, threads: int) -> None:
        self.threads = min(threads, MOST_THREADS)
        self._network, self._alone = network, alone
        self.alone_s = 0.0  # of a call, about
        self.credit_s = 0.0  # below 0 a call has one thread; a hiccup of the machine costs some, and no more
        self.in_a_row = 0  # calls of the team

    def agrees(self, x: Tensor, t: Tensor, y: Tensor | None) -> Generator[None, None, bool]:
        """Whether both give the same bits; where not, it may not be called. Packs, records and times them, and yields
        after each call."""
        seconds, outs = [], []
        for _ in range(TRIES):
            began = time.monotonic()
            outs.append(self._alone(x, t, y))
            seconds.append(time.monotonic() - began)
            yield
            outs.append(self._on_all(x, t, y))
            yield
        self.alone_s = min(seconds)
        return all(torch.equal(out, outs[0]) for out in outs)

    def __call__(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """As the network. From one thread only."""
        began = time.monotonic()
        if self.credit_s < 0 or self.in_a_row == PROBE_AFTER:
            out = self._alone(x, t, y)
            took = min(time.monotonic() - began, 2 * self.alone_s)  # it may have been held up
            longer = took - self.alone_s
            self.alone_s += longer if longer < 0 else SMOOTHING * longer
            self.credit_s += took / PATIENCE
            self.in_a_row = 0
            return out
        self.in_a_row += 1
        out = self._on_all(x, t, y)
        saved = max(self.alone_s - (time.monotonic() - began), -MOST_LOST * self.alone_s)
        self.credit_s = min(self.credit_s + saved, MOST_CREDIT * self.alone_s)
        return out

    def _on_all(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        torch.set_num_threads(self.threads)
        try:
            return self._network(x, t, y)
        finally:
            torch.set_num_threads(1)
