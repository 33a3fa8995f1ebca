"""How long the event loop keeps new work waiting, because it is busy with something else."""

from __future__ import annotations

import asyncio
from collections import deque

from app.metrics import Metrics

TICK_S = 0.025  # each waking takes a core from the network
WINDOW_S = 60.0


class EventLoopMonitor:
    """Sleeps for a known time, again and again, and sees how much later it wakes: a request that comes at the same
    moment waits as long. The part of a lag before the next waking, TICK_S at most, is not seen.
    A clock measures it because a loop that is busy sends no event.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._lag = metrics.event_loop_lag
        self._latest = deque([0.0], maxlen=round(WINDOW_S / TICK_S))
        # Of a copy, because a scrape may come from another thread.
        metrics.event_loop_max_lag.set_function(lambda: max(list(self._latest)))

    async def run(self) -> None:
        """For as long as the event loop runs."""
        now = asyncio.get_running_loop().time
        while True:
            due = now() + TICK_S
            await asyncio.sleep(TICK_S)
            late = max(0.0, now() - due)
            self._lag.observe(late)
            self._latest.append(late)
