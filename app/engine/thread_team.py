"""A lone row's call on several threads. All other calls have one thread each: see `app.engine.workers`.

The threads meet hundreds of times in a call, and each time the early one waits. On a quiet machine the row is done in
three quarters of the time or less. Beside a busy neighbour, or on cores that share no cache, it can take much longer,
so the times choose at every call.
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
SHORTEST_REST, LONGEST_REST = 8, 64  # times what a slow call has lost: tries cost an eighth at first, then 2 %
PROBE_AFTER = 100  # calls of the team, one has one thread: it may be faster than it was


class ThreadTeam:
    """`network` on `threads` threads, or `alone` on one where that is faster at present.

    They have the same weights, each packed for its number of threads: oneDNN takes several times as long on another.
    """

    def __init__(self, network: Network, alone: Network, threads: int) -> None:
        self.threads = min(threads, MOST_THREADS)
        self._network, self._alone = network, alone
        self.alone_s = 0.0  # of a call, about
        self.lost_s = 0.0  # by the team's last call
        self.patience = LONGEST_REST  # of the next rest; doubled by a slow call after a slow one, halved by a fast one
        self.in_a_row = 0  # calls of the team
        self.rest_s = 0.0  # so long calls have one thread; time without calls does not count

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
        if self.rest_s > 0 or self.in_a_row == PROBE_AFTER:
            out = self._alone(x, t, y)
            took = time.monotonic() - began
            longer = took - self.alone_s  # of which a call that was held up counts as twice as long at most
            self.alone_s += longer if longer < 0 else SMOOTHING * min(longer, self.alone_s)
            self.rest_s -= took
            self.in_a_row = 0
            return out
        self.in_a_row += 1
        out = self._on_all(x, t, y)
        before, self.lost_s = self.lost_s, max(0.0, time.monotonic() - began - self.alone_s)
        if not self.lost_s:
            self.patience = max(self.patience // 2, SHORTEST_REST)
        elif before:  # once it is a hiccup, which one thread has too
            self.rest_s = self.patience * min(self.lost_s, before)
            self.patience = min(2 * self.patience, LONGEST_REST)
        return out

    def _on_all(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        torch.set_num_threads(self.threads)
        try:
            return self._network(x, t, y)
        finally:
            torch.set_num_threads(1)
