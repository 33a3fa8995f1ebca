from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Iterable
from heapq import heapreplace

import pytest

from app.engine.admission import AdmissionController, Backlog, estimate_makespan, rounded
from app.engine.instance import ModelInstance
from app.engine.request import Request
from app.errors import DeadlineExceeded
from model.checkpoint import Checkpoint
from tests.app.engine.conftest import HeldRunner
from tests.app.engine.test_engine import Ask


@pytest.fixture
def others(checkpoint: Checkpoint) -> list[ModelInstance]:
    return [ModelInstance(checkpoint, HeldRunner(checkpoint), max_batch_size=4) for _ in range(3)]


def test_other_model_delays_at_most_by_own_work(
    others: list[ModelInstance], ask: Ask, loop: asyncio.AbstractEventLoop
) -> None:
    admission = AdmissionController(1_000_000)
    slow, fast, _ = others
    slow.throughput.nfe_per_second, fast.throughput.nfe_per_second = 10.0, 100.0
    for _ in range(5):
        admission.admit(slow, ask(loop, served=slow, n=1, steps=100, timeout_s=900))  # 10 s each
    assert admission.nfe_per_second == 10
    admit: Callable[..., None] = lambda **how: admission.admit(fast, ask(loop, served=fast, n=1, **how))  # noqa: E731
    with pytest.raises(DeadlineExceeded, match="about 2 s"):
        admit(steps=100, timeout_s=1.9)  # 1 s of its own, 1 s of the other's
    admit(steps=100, timeout_s=2.5)
    with pytest.raises(DeadlineExceeded, match="about 4 s"):
        admit(steps=100, timeout_s=3.9)  # its steps have two rows each now, and the other takes as long again
    assert admission.nfe_per_second == pytest.approx(600 / 51)


def test_own_steps_last_as_long_as_shared_batches(
    others: list[ModelInstance], ask: Ask, loop: asyncio.AbstractEventLoop
) -> None:
    admission, served = AdmissionController(1_000_000), others[0]  # four rows in a full batch
    served.throughput.nfe_per_second = 40.0
    admit: Callable[[float], None] = lambda timeout_s: admission.admit(  # noqa: E731
        served, ask(loop, served=served, n=1, steps=20, timeout_s=timeout_s)
    )
    for present, seconds in enumerate((0.5, 1.0, 1.5, 2.0, 4.0, 4.0)):  # four places, and whoever comes later waits
        with pytest.raises(DeadlineExceeded):
            admit(seconds / 0.85 - 0.05)
        admit(seconds / 0.85 + 0.05)
        assert len(admission) == present + 1


def test_request_waits_for_the_first_free_place(
    others: list[ModelInstance], ask: Ask, loop: asyncio.AbstractEventLoop
) -> None:
    admission, served = AdmissionController(1_000_000), others[0]  # four rows in a full batch
    served.throughput.nfe_per_second = 40.0
    there = [ask(loop, served=served, n=1, steps=20, timeout_s=900) for _ in range(4)]
    for request, left in zip(there, (3, 8, 20, 20), strict=True):
        admission.admit(served, request)
        request.remaining_nfe = left
        admission.progress([request])
    admission.admit(
        served, ask(loop, served=served, n=4, steps=100, timeout_s=900)
    )  # more to do: it goes after the new one
    with pytest.raises(DeadlineExceeded):
        admission.admit(served, ask(loop, served=served, n=1, steps=20, timeout_s=2.3 / 0.85 - 0.05))
    admission.admit(
        served, ask(loop, served=served, n=1, steps=20, timeout_s=2.3 / 0.85 + 0.05)
    )  # 3 steps, and its own 20
    with pytest.raises(DeadlineExceeded):
        admission.admit(served, ask(loop, served=served, n=1, steps=20, timeout_s=2.8 / 0.85 - 0.05))
    admission.admit(served, ask(loop, served=served, n=1, steps=20, timeout_s=2.8 / 0.85 + 0.05))  # 8, and 20


def makespan_of_single_rows(jobs: Iterable[tuple[int, float]], places: int) -> float:
    """Each row of each job by itself: what `estimate_makespan` abridges."""
    free = [(0.0, i) for i in range(places)]
    end = 0.0
    for rows, steps in jobs:
        end = 0.0
        for _ in range(rows):
            since, i = free[0]
            heapreplace(free, (since + steps, i))
            end = max(end, since + steps)
    return end


@pytest.mark.parametrize("seed", range(20))
def test_makespan_is_list_scheduling_of_single_rows(seed: int) -> None:
    rng = random.Random(seed)
    places = rng.choice((4, 16, 32))
    jobs = sorted(
        ((rng.randint(1, 20), rng.randint(1, 50)) for _ in range(rng.randint(1, 30))), key=lambda j: j[0] * j[1]
    )
    exact = makespan_of_single_rows(jobs, places)
    longest = max(steps for _, steps in jobs)
    assert abs(estimate_makespan(jobs, places) - exact) <= (longest if any(n >= places for n, _ in jobs) else 1e-9)


def test_rows_take_the_places_that_are_free_first() -> None:
    assert estimate_makespan([(1, 20)], 4) == 20
    assert estimate_makespan([(1, 3), (1, 8), (2, 20), (1, 20)], 4) == 23
    assert estimate_makespan([(1, 3), (1, 8), (2, 20), (1, 20), (1, 20)], 4) == 28
    assert estimate_makespan([(1, 3), (1, 8), (2, 20), (2, 20)], 4) == 28, "the last of its rows"
    assert estimate_makespan([(10, 5)], 4) == 15
    assert estimate_makespan([(1, 50), (10, 6)], 16) == 6, "that of the last job, not of all"


def test_backlog_sums_stay_those_of_its_requests(ask: Ask, loop: asyncio.AbstractEventLoop) -> None:
    rng, backlog, there = random.Random(0), Backlog(), list[Request]()
    for _ in range(300):
        if there and rng.random() < 0.4:
            backlog.remove(there.pop(rng.randrange(len(there))))
        elif there and rng.random() < 0.5:
            request = rng.choice(there)
            request.remaining_nfe = max(0, request.remaining_nfe - rng.randint(0, 9))
            backlog.update(request)
        else:
            there.append(
                ask(loop, n=rng.randint(1, 9), steps=rng.randint(1, 60), guidance_scale=rng.choice((1.0, 2.0)))
            )
            backlog.add(there[-1])
        assert len(backlog) == len(there)
        assert backlog.nfe == sum(request.remaining_nfe for request in there)
        assert backlog.nfe_per_step == sum(request.nfe_per_step for request in there)
        assert backlog.num_samples == sum(len(request.samples) for request in there)
        assert backlog.demand.smallest == min((request.nfe_per_step for request in there), default=math.inf)
        assert sum(rows for rows, _ in backlog.jobs_up_to(10**9)) == backlog.nfe_per_step


@pytest.mark.parametrize("amount", [0, 1, 31, 32, 33, 1000, 65535])
def test_work_is_rounded_by_a_few_percent(amount: int) -> None:
    assert amount * (1 - 1 / 16) <= rounded(amount) <= amount
    assert amount >= 32 or rounded(amount) == amount
