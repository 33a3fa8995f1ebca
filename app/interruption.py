"""Ctrl-C while a command starts ends it with one line. This imports next to nothing: torch takes seconds to import."""

from __future__ import annotations

import os
import signal
from types import FrameType


def end_in_one_line(command: str) -> None:
    """From here on, until the command handles SIGINT itself. Where SIGINT is ignored, it stays so."""

    def end(sig: int, frame: FrameType | None) -> None:
        os.write(2, f"\n{command}: interrupted\n".encode())
        os._exit(128 + sig)

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end)
