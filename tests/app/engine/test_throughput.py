"""What admission believes of the device's speed: all of the time that goes by, and a mean of times."""

import asyncio
import time
from collections.abc import Callable

import pytest

from app.engine.engine import Engine
from app.engine.instance import ThroughputEstimator
from app.engine.request import Request, Sample, View
from model.images import Image
from tests.app.engine.conftest import HeldRunner


def test_steps_that_take_long_count_for_as_long_as_they_take() -> None:
    estimator = ThroughputEstimator()
    estimator.initialize(8, 1.0)
    for seconds in (0.1, 0.1, 0.1, 3.7) * 20:
        estimator.observe(8, seconds, 8)
    assert 4 < estimator.nfe_per_second < 16, "32 rows in 4 s; the mean of the four rates is 60"


def test_one_step_that_hangs_does_not_make_everybody_wait() -> None:
    estimator = ThroughputEstimator()
    estimator.initialize(8, 0.05)
    estimator.observe(8, 4.0, 8)
    assert estimator.nfe_per_second > 120, "160 before, 18 if it counted in full, and an idle server would refuse work"
    assert estimator.step_seconds < 0.066
    for _ in range(30):
        estimator.observe(8, 1.0, 8)
    assert estimator.nfe_per_second < 10, "but those that go on being slow are believed"


def test_stalls_of_short_steps_count_in_full() -> None:
    estimator = ThroughputEstimator()
    estimator.initialize(8, 0.004)
    for seconds in (0.004, 0.004, 0.004, 0.068) * 20:
        estimator.observe(8, seconds, 8)
    assert 200 < estimator.nfe_per_second < 800, "32 rows in 80 ms"


@pytest.mark.parametrize(("rows", "seconds", "known"), [(4, 1.0, 8), (4, 0.25, 8.42), (5, 1.0, 7.55)])
def test_a_small_batch_tells_of_no_slowness(rows: int, seconds: float, known: float) -> None:
    estimator = ThroughputEstimator()
    estimator.initialize(8, 1.0)
    estimator.observe(rows, seconds, 8)
    assert estimator.nfe_per_second == pytest.approx(known, rel=0.01)


@pytest.mark.slow
def test_what_comes_between_two_steps_slows_the_device_too(
    engine: Engine, runner: HeldRunner, ask: Callable[..., Request]
) -> None:
    read, rows = runner.to_images, 8

    def slow(samples: list[Sample], view: View) -> Image:
        time.sleep(0.05)
        return read(samples, view)

    runner.to_images = slow  # type: ignore[method-assign]

    async def main() -> Request:
        request = ask(asyncio.get_running_loop(), n=rows, steps=40, frame_steps=frozenset(range(41)), keep=99)
        engine.submit(request)
        await request.output.images()
        return request

    request = asyncio.run(main())
    assert request.instance.throughput.nfe_per_second < 1.05 * rows / 0.05
