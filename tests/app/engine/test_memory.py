"""The C library keeps what tensors leave behind, until it is told to give it back."""

import asyncio
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable

import pytest

from app.engine.engine import Engine
from app.engine.instance import ModelInstance
from app.engine.request import Request, Sample
from tests.app.engine.conftest import HeldRunner

PAGES = """
import resource, torch
from app.engine.memory import tune_malloc, resident_bytes, trim_malloc
if {kept}:
    tune_malloc()
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


def pages(kept: bool) -> tuple[float, int]:
    """Page faults of 400 tensors of 0.8 MB, the median of many times, and bytes that go back to the system at last.

    The first time finds no memory yet, and a later one or two may lay it out anew.
    """
    ran = subprocess.run([sys.executable, "-c", PAGES.format(kept=kept)], capture_output=True, text=True, check=True)
    *taken, returned = map(int, ran.stdout.split())
    return statistics.median(taken[1:]), returned


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has its own ways")
def test_freed_memory_is_kept_for_the_next_step_until_trimmed() -> None:
    usual, (kept, returned) = pages(False)[0], pages(True)
    assert usual > 100
    assert kept < usual / 10
    assert returned > 16e6


def test_cudnn_without_room_to_work_in_makes_batches_smaller(
    engine: Engine,
    runner: HeldRunner,
    served: ModelInstance,
    ask: Callable[..., Request],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It does not say so: it finds no engine. Nor are samples tried one by one, as after other failures."""
    real, tried = runner.step, list[int]()

    def step(samples: list[Sample]) -> list[Sample]:
        tried.append(len(samples))
        if len(samples) > 4:
            raise RuntimeError("GET was unable to find an engine to execute this computation")
        return real(samples)

    monkeypatch.setattr(runner, "step", step)

    async def main() -> int:
        engine.submit(request := ask(asyncio.get_running_loop(), n=8, steps=2))
        return len(await request.output.images())

    assert asyncio.run(main()) == 8
    assert tried[:2] == [8, 4]
    assert served.batch_limits.max < 8
