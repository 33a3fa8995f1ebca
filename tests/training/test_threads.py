"""No thread of a training run can end it in silence."""

import signal
import sys
from pathlib import Path

import pytest

import training  # noqa: F401


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc here")
def test_no_thread_blocks_the_signal_of_a_fault() -> None:
    import datasets  # noqa: F401

    fault = 1 << (signal.SIGSEGV - 1)
    blocked = {}
    for thread in Path("/proc/self/task").iterdir():
        lines = dict(line.split(":\t", 1) for line in (thread / "status").read_text().splitlines() if ":\t" in line)
        blocked[lines["Name"]] = bool(int(lines["SigBlk"], 16) & fault)
    assert not [name for name, is_blocked in blocked.items() if is_blocked]
