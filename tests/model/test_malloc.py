"""The C library keeps what tensors leave behind, until it is told to give it back."""

import platform
import statistics
import subprocess
import sys

import pytest

PAGES = """
import resource, torch
from pathlib import Path
from model.malloc import tune_malloc, trim_malloc
{first}
def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def churn():
    for _ in range(10):
        held = [torch.ones(200_000) for _ in range(40)]
def taken():
    before = faults()
    churn()
    return faults() - before
counts = [taken() for _ in range(25)]
full = resident_bytes()
trim_malloc()
print(*counts, full - resident_bytes())
"""


def pages(first: str) -> tuple[float, int]:
    """Page faults of 400 tensors of 0.8 MB, the median of many times, and bytes that go back to the system at last.

    `first` is run before. The first time finds no memory yet, and a later one or two may lay it out anew.
    """
    ran = subprocess.run([sys.executable, "-c", PAGES.format(first=first)], capture_output=True, text=True, check=True)
    *taken, returned = map(int, ran.stdout.split())
    return statistics.median(taken[1:]), returned


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has its own ways")
@pytest.mark.parametrize("first", ["tune_malloc()", "import training"])
def test_freed_memory_is_kept_for_the_next_step_until_trimmed(first: str) -> None:
    usual, (kept, returned) = pages("pass")[0], pages(first)
    assert usual > 100
    assert kept < usual / 10
    assert returned > 16e6
