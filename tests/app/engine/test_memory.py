"""The C library keeps what tensors leave behind, until it is told to give it back."""

import platform
import statistics
import subprocess
import sys

import pytest

PAGES = """
import resource, torch
from app.engine.memory import keep_freed_memory, resident_bytes, return_freed_memory
if {kept}:
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def churn():
    for _ in range(10):
        held = [torch.ones(200_000) for _ in range(40)]
def taken():
    before = faults()
    churn()
    return faults() - before
counts = [taken() for _ in range(6)]
full = resident_bytes()
return_freed_memory()
print(*counts, full - resident_bytes())
"""


def pages(kept: bool) -> tuple[float, int]:
    """Page faults of 400 tensors of 0.8 MB, the median of five times, and bytes that go back to the system at last.

    The first time finds no memory yet, and a later one or two may lay it out anew.
    """
    ran = subprocess.run([sys.executable, "-c", PAGES.format(kept=kept)], capture_output=True, text=True, check=True)
    *taken, returned = map(int, ran.stdout.split())
    return statistics.median(taken[1:]), returned


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has its own ways")
def test_freed_memory_is_kept_for_the_next_step_and_given_back_when_told() -> None:
    usual, (kept, returned) = pages(False)[0], pages(True)
    assert usual > 100
    assert kept < usual / 10
    assert returned > 16e6
