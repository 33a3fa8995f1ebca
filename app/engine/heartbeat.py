"""How long the present step has been running: kept by the engine's thread, asked by others."""

from __future__ import annotations

import time

DRAIN_GRACE_S = 2.0  # that a step may end after the drain did


class Heartbeat:
    """An idle engine is never late. A step is stalled after max(1 s, 5 × expected); what takes `step_timeout_s` (and
    twice as long as that) does not return any more."""

    def __init__(self, step_timeout_s: float) -> None:
        self._step_timeout_s = step_timeout_s
        self._limit = 1.0
        self._started: float | None = None
        self._watched = self._awake_since = 0.0  # when `overdue` was last asked, and since when without a gap

    def begin(self, expected: float) -> None:
        """A step begins, or what comes before or after it; `expected` is in seconds."""
        self._limit = max(1.0, 5 * expected)
        self._started = time.monotonic()

    def rest(self) -> None:
        """It has ended."""
        self._started = None

    @property
    def age(self) -> float:
        """Seconds since it began; 0 between steps."""
        started = self._started
        return 0.0 if started is None else time.monotonic() - started

    @property
    def stalled(self) -> bool:
        """Whether it takes far longer than expected."""
        return self.age > self._limit

    def overdue(self, drained: float | None) -> str | None:
        """Why the present step is not worth waiting for, if so. `drained`: when the drain ends or ended.

        To be asked several times a second: after a longer gap the process or the machine stood still, and the step
        with it.
        """
        now = time.monotonic()
        if now - self._watched > 1:
            self._awake_since = now
        self._watched = now
        started = self._started
        if started is None:
            return None
        age = now - max(started, self._awake_since)
        if age > max(self._step_timeout_s, 2 * self._limit):
            return f"a denoising step did not return within {age:.1f} s"
        if drained is not None and min(age, now - drained) > DRAIN_GRACE_S:
            return "a denoising step did not return before the drain ended"
        return None
