"""How fast a network runs in full batches."""

from __future__ import annotations

import math

SMOOTHING = 0.1  # of the newest step in the running estimates
MOST = 4.0  # times as long as expected that a step counts for: one that hung tells little of those after it,
STALL_S = 0.1  # where it is more than this: a busy machine holds up short steps for longer, again and again


class Rate:
    """Running estimates: seconds of a step, U-Net rows in a second. Until the first of them any speed is possible."""

    def __init__(self) -> None:
        self.step_seconds = 1.0
        self.rows_per_second = math.inf

    def begin(self, rows: int, seconds: float) -> None:
        """The first estimate: `rows` took `seconds`."""
        self.step_seconds = max(seconds, 1e-6)
        self.rows_per_second = rows / self.step_seconds

    def observe(self, rows: int, seconds: float, full: int) -> None:
        """A step of `rows`, where `full` would have had place: a small batch tells of no slowness."""
        if 2 * rows > full or rows / seconds > self.rows_per_second:
            seconds = min(seconds, max(MOST * self.step_seconds, STALL_S))
            self.step_seconds += SMOOTHING * (seconds - self.step_seconds)
            # A mean of times: one of rates would hardly notice the steps that take long.
            row_seconds = 1 / self.rows_per_second
            row_seconds += SMOOTHING * (seconds / rows - row_seconds)
            self.rows_per_second = 1 / row_seconds
