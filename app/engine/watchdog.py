"""How long the current step has been running: kept by the engine's thread, asked by others."""

from __future__ import annotations

import time

DRAIN_GRACE_S = 2.0  # that a step may end after the drain did


class StepWatchdog:
    """An idle engine is never late. A step is stalled after max(1 s, 5 × expected). One that takes `step_timeout_s`,
    and twice as long as that, does not return any more."""

    def __init__(self, step_timeout_s: float) -> None:
        self._step_timeout_s = step_timeout_s
        self._stalled_after_s = 1.0
        self._started: float | None = None
        self._checked = self._awake_since = 0.0  # when `check` ran last, and since when without a gap

    def start(self, expected_s: float) -> None:
        """A step begins, or what comes before or after it."""
        self._stalled_after_s = max(1.0, 5 * expected_s)
        self._started = time.monotonic()

    def stop(self) -> None:
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
        return self.age > self._stalled_after_s

    def check(self, drain_ends: float | None) -> str | None:
        """Why the current step is not worth waiting for, if so.

        To be called several times a second: after a longer gap the process or the machine stood still, and the step
        with it.
        """
        now = time.monotonic()
        if now - self._checked > 1:
            self._awake_since = now
        self._checked = now
        started = self._started
        if started is None:
            return None
        age = now - max(started, self._awake_since)
        if age > max(self._step_timeout_s, 2 * self._stalled_after_s):
            return f"a denoising step did not return within {age:.1f} s"
        if drain_ends is not None and min(age, now - drain_ends) > DRAIN_GRACE_S:
            return "a denoising step did not return before the drain ended"
        return None
