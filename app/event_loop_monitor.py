"""The event loop's pauses: while it is busy with one thing, everybody who comes waits."""

from __future__ import annotations

import asyncio
from collections import deque

from app.metrics import Metrics

TICK_S = 0.025  # each waking takes a core from the network
MINUTE_S = 60.0


class Pulse:
    """Sleeps for a known time, again and again, and sees how much later than that it wakes: that is what a client
    waits for who comes at the same moment. Of a long pause the part before the next waking, TICK_S at most, is not
    seen.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._pauses = metrics.event_loop_pauses
        self._latest = deque([0.0], maxlen=round(MINUTE_S / TICK_S))
        # Of a copy, because a scrape may come from another thread.
        metrics.event_loop_longest_pause.set_function(lambda: max(list(self._latest)))

    async def beat(self) -> None:
        """For as long as the event loop runs."""
        now = asyncio.get_running_loop().time
        while True:
            due = now() + TICK_S
            await asyncio.sleep(TICK_S)
            late = max(0.0, now() - due)
            self._pauses.observe(late)
            self._latest.append(late)
