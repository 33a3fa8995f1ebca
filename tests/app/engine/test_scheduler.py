from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from app.engine.admission import estimate_makespan
from app.engine.instance import BatchLimits, Demand
from app.engine.request import Request
from app.engine.scheduler import Scheduler


def run_step(scheduler: Scheduler) -> Counter[int]:
    """One step of everything that was scheduled: images per seed."""
    batch = scheduler.schedule()
    for sample in batch:
        sample.request.remaining_nfe -= sample.nfe
        sample.step += 1
        if sample.finished:
            sample.request.samples.remove(sample)
            if not sample.request.samples:
                scheduler.remove(sample.request)
    return Counter(sample.request.seed for sample in batch)


def test_a_single_image_joins_the_next_step_of_a_large_request(
    ask: Callable[..., Request], loop: asyncio.AbstractEventLoop
) -> None:
    scheduler = Scheduler(BatchLimits(8))
    scheduler.add(ask(loop, seed=1, n=64))
    run_step(scheduler)
    scheduler.add(ask(loop, seed=2, n=1, steps=4))
    for _ in range(4):
        assert run_step(scheduler) == {1: 7, 2: 1}
    assert run_step(scheduler) == {1: 8}, "and its place is taken again"


def test_requests_take_turns_in_every_eighth_step(ask: Callable[..., Request], loop: asyncio.AbstractEventLoop) -> None:
    scheduler = Scheduler(BatchLimits(4))
    for seed in range(6):
        scheduler.add(ask(loop, seed=seed, n=2, steps=100))
    total: Counter[int] = Counter()
    for _ in range(3):
        for _ in range(7):
            assert run_step(scheduler) == {0: 2, 1: 2}, "those with the least left"
        total += run_step(scheduler)
    assert set(total.values()) == {2}, "nobody is starved"


def test_equal_requests_finish_one_after_another(ask: Callable[..., Request], loop: asyncio.AbstractEventLoop) -> None:
    scheduler = Scheduler(BatchLimits(4))
    requests = [ask(loop, seed=seed, n=4, steps=10) for seed in range(8)]
    for request in requests:
        scheduler.add(request)
    finished: list[int] = []
    for _ in range(80):
        run_step(scheduler)
        finished.append(sum(not request.samples for request in requests))
    assert finished[79] == 8
    assert finished[49] >= 3, "round robin alone would have finished none"


def test_a_small_request_passes_a_crowd(ask: Callable[..., Request], loop: asyncio.AbstractEventLoop) -> None:
    scheduler = Scheduler(BatchLimits(4))
    for seed in range(40):
        scheduler.add(ask(loop, seed=seed, n=50, steps=10))
    small = ask(loop, seed=99, n=1, steps=5)
    scheduler.add(small)
    for _ in range(10):
        run_step(scheduler)
    assert not small.samples


def test_a_crowd_has_a_place_each_up_to_the_most(ask: Callable[..., Request], loop: asyncio.AbstractEventLoop) -> None:
    scheduler = Scheduler(BatchLimits(4))
    scheduler.limits.set(4, 8)
    for seed in range(2):
        scheduler.add(ask(loop, seed=seed, n=3, steps=50))
    for present in range(2, 12):
        assert sum(run_step(scheduler).values()) == scheduler.budget == min(max(4, present), 8)
        scheduler.add(ask(loop, seed=present, n=3, steps=50))
    for request in list(scheduler)[3:]:
        scheduler.remove(request)
    run_step(scheduler)
    assert scheduler.budget == 4, "steps are short again when the crowd has gone"


def test_large_requests_use_max_batch_size(ask: Callable[..., Request], loop: asyncio.AbstractEventLoop) -> None:
    scheduler = Scheduler(BatchLimits(4))
    scheduler.limits.set(4, 8)
    scheduler.add(ask(loop, seed=0, n=6, steps=50))
    assert run_step(scheduler) == {0: 6}
    scheduler.add(ask(loop, seed=1, n=4, steps=50))
    assert sum(run_step(scheduler).values()) == 8
    scheduler.add(ask(loop, seed=2, n=2, steps=2, guidance_scale=2.0))  # four rows
    assert run_step(scheduler) == {2: 2, 1: 4}
    assert run_step(scheduler) == {2: 2, 1: 4}
    scheduler.add(ask(loop, seed=3, n=3, steps=1))
    assert sum(run_step(scheduler).values()) == 4
    assert sum(run_step(scheduler).values()) == 8, "it has gone"


def test_a_guided_crowd_counts_twice(ask: Callable[..., Request], loop: asyncio.AbstractEventLoop) -> None:
    scheduler = Scheduler(BatchLimits(4))
    scheduler.limits.set(4, 8)
    for seed in range(3):
        scheduler.add(ask(loop, seed=seed, n=1, guidance_scale=2.0))
    assert len(scheduler.schedule()) == 3
    scheduler.limits.shrink(8)
    assert len(scheduler.schedule()) == 2, "no room for them in memory"


def test_a_batch_stays_within_its_rows_and_guidance_takes_two(
    ask: Callable[..., Request], loop: asyncio.AbstractEventLoop
) -> None:
    scheduler = Scheduler(BatchLimits(5))
    scheduler.add(ask(loop, seed=1, n=9, guidance_scale=2.0))
    scheduler.add(ask(loop, seed=2, n=9))
    for _ in range(5):
        assert sum(sample.nfe for sample in scheduler.schedule()) <= 5


def test_a_guided_image_runs_even_where_one_row_is_the_limit(
    ask: Callable[..., Request], loop: asyncio.AbstractEventLoop
) -> None:
    scheduler = Scheduler(BatchLimits(1))
    scheduler.add(ask(loop, guidance_scale=2.0))
    assert len(scheduler.schedule()) == 1


def test_images_of_a_request_stay_within_one_step_of_each_other(
    ask: Callable[..., Request], loop: asyncio.AbstractEventLoop
) -> None:
    scheduler = Scheduler(BatchLimits(4))
    request = ask(loop, n=10, steps=20)
    scheduler.add(request)
    while len(scheduler):
        run_step(scheduler)
        steps = [sample.step for sample in request.samples]
        assert not steps or max(steps) - min(steps) <= 1


@pytest.mark.parametrize("seed", range(5))
def test_what_is_promised_is_what_the_schedule_gives(
    ask: Callable[..., Request], loop: asyncio.AbstractEventLoop, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    scheduler = Scheduler(BatchLimits(8))
    asked = sorted(
        (int(steps), int(n)) for steps, n in zip(rng.integers(5, 60, 12), rng.integers(1, 12, 12), strict=True)
    )
    for steps, n in asked:
        scheduler.add(ask(loop, n=n, steps=steps))
    requests = sorted(scheduler, key=lambda request: (request.remaining_nfe, request.number))
    promised = [estimate_makespan([(r.n, len(r.schedule)) for r in requests[: i + 1]], 8) for i in range(len(requests))]
    ended: dict[Request, int] = {}
    for step in range(1, 5000):
        run_step(scheduler)
        ended |= {request: step for request in requests if not request.samples and request not in ended}
    for request, steps in zip(requests, promised, strict=True):
        assert ended[request] <= 8 / 7 * steps + 9, "an eighth of the steps goes round robin"
    assert ended[requests[-1]] >= 0.8 * promised[-1], "its images go in turn, which wastes fewer places"


def test_before_the_warm_up_there_is_a_place() -> None:
    assert BatchLimits(0).budget(Demand()) == 1


def test_nothing_to_do_is_an_empty_batch() -> None:
    assert Scheduler(BatchLimits(4)).schedule() == []
