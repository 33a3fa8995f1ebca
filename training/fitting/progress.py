"""What a fit says while it runs, on stderr."""

from __future__ import annotations

import sys
import time

SAY_S = 10.0  # seconds between two lines of progress where there is no terminal


def left(seconds: float) -> str:
    """A time as 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


_last_said = [0.0]


def say(text: str, end: str = "\r") -> None:
    """Progress, on stderr: over the line before on a terminal, now and then elsewhere."""
    if end == "\r" and not sys.stderr.isatty():
        if time.monotonic() - _last_said[0] < SAY_S:
            return
        end = "\n"
    _last_said[0] = time.monotonic()
    print(f"{text:<80}" if end == "\r" else text, end=end, file=sys.stderr, flush=True)
