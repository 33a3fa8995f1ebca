"""Whose step is next, what that means for admission, and how a checkpoint comes and goes."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from app.engine.engine import Engine
from app.engine.pending import Pending
from app.engine.served import WARM_UPS, Served
from app.engine.turns import Turns
from app.errors import DeadlineExceeded, LoadFailed, NotReady, OutOfMemory, ServiceError
from model.checkpoint import Checkpoint
from tests.app.engine.conftest import CHUNK, HeldRunner, Metrics, until
from tests.app.engine.test_engine import Ask, run

PORTIONS = CHUNK + WARM_UPS  # the whole chunk, and every smaller number of rows; then full batches


@pytest.fixture
def others(checkpoint: Checkpoint) -> list[Served]:
    return [Served(checkpoint, HeldRunner(checkpoint), max_rows=4) for _ in range(3)]


def device_time(turns: Turns, cost: dict[Served, float], seconds: float) -> dict[Served, float]:
    """Steps for that long; what each had."""
    had = dict.fromkeys(cost, 0.0)
    while sum(had.values()) < seconds:
        served = turns.schedule()[0].request.served
        turns.spend(cost[served])
        had[served] += cost[served]
    return had


def test_the_devices_time_is_shared_and_not_its_steps_or_the_number_of_requests(
    others: list[Served], ask: Ask, loop: asyncio.AbstractEventLoop
) -> None:
    turns = Turns()
    for served, requests in zip(others, (9, 1, 1), strict=True):
        turns.served.append(served)
        for _ in range(requests):
            turns.add(ask(loop, served=served))
    had = device_time(turns, dict(zip(others, (0.01, 0.2, 0.03), strict=True)), 30)
    assert all(abs(seconds - 10) < 0.3 for seconds in had.values()), had


def test_who_was_away_has_no_time_in_hand_and_owes_none(
    others: list[Served], ask: Ask, loop: asyncio.AbstractEventLoop
) -> None:
    turns, cost = Turns(), dict.fromkeys(others, 0.1)
    turns.served += others
    first, second, third = others
    turns.add(ask(loop, served=first))
    device_time(turns, cost, 10)
    turns.add(ask(loop, served=second))  # new
    assert device_time(turns, cost, 2)[second] == pytest.approx(1, abs=0.15)
    for request in turns:
        request.served.scheduler.remove(request)
    turns.add(ask(loop, served=third))  # nobody is there
    turns.add(ask(loop, served=first))
    had = device_time(turns, cost, 2)
    assert had[third] == pytest.approx(had[first], abs=0.15)


def test_another_models_queue_delays_by_no_more_than_the_own_work_takes(
    others: list[Served], metrics: Metrics, ask: Ask, loop: asyncio.AbstractEventLoop
) -> None:
    pending = Pending(metrics, max_work=1_000_000)
    slow, fast, _ = others
    slow.rate.rows_per_second, fast.rate.rows_per_second = 10.0, 100.0
    for _ in range(5):
        pending.admit(ask(loop, served=slow, n=1, steps=100, timeout_s=900))  # 10 s each
    assert pending.rows_per_second == 10
    admit: Callable[..., None] = lambda **how: pending.admit(ask(loop, served=fast, n=1, **how))  # noqa: E731
    with pytest.raises(DeadlineExceeded, match="about 2 s"):
        admit(steps=100, timeout_s=1.9)  # 1 s of its own, 1 s of the other's
    admit(steps=100, timeout_s=2.5)
    with pytest.raises(DeadlineExceeded, match="about 4 s"):
        admit(steps=100, timeout_s=3.9)  # its steps have two rows each now, and the other takes as long again
    assert pending.rows_per_second == pytest.approx(600 / 51)


def test_the_expected_rate_is_of_the_work_that_is_there(engine: Engine, served: Served, others: list[Served]) -> None:
    for other in others[:1]:
        engine.add(other).result(20)
    served.rate.rows_per_second, others[0].rate.rows_per_second = 30.0, 10.0
    assert engine.rows_per_second == pytest.approx(15), "of a row for each"


@pytest.mark.slow
def test_one_batch_is_one_checkpoints_and_both_move(
    engine: Engine, runner: HeldRunner, others: list[Served], ask: Ask
) -> None:
    engine.add(others[0]).result(20)

    async def main(loop: asyncio.AbstractEventLoop) -> None:
        runner.hold()
        requests = [ask(loop, seed=1, n=2, steps=20), ask(loop, served=others[0], seed=2, n=2, steps=20)]
        for request in requests:
            engine.submit(request)
        runner.free()
        for request in requests:
            await request.mailbox.answer()

    run(main)
    second = others[0].runner
    assert isinstance(second, HeldRunner)
    assert {seed for batch in runner.batches for seed, *_ in batch} == {1}
    assert {seed for batch in second.batches for seed, *_ in batch} == {2}


@pytest.mark.slow
def test_a_newcomer_warms_up_one_network_call_between_two_steps(
    engine: Engine, runner: HeldRunner, others: list[Served], ask: Ask
) -> None:
    newcomer, portions = others[0], 0
    sound = newcomer.portions

    def counted() -> Iterator[None]:
        nonlocal portions
        for _ in sound:
            portions += 1
            yield

    newcomer.portions = counted()

    async def main(loop: asyncio.AbstractEventLoop) -> None:
        runner.hold()
        engine.submit(request := ask(loop, steps=60))
        runner.arrived.acquire()
        warm = engine.add(newcomer)
        for steps in range(1, PORTIONS):
            runner.release()
            runner.arrived.acquire()
            assert portions == steps
            assert not warm.done()
        runner.free()
        await asyncio.wrap_future(warm)
        await request.mailbox.answer()

    run(main)
    assert portions == PORTIONS - 1, "after the last yield it is done at once"


@pytest.mark.slow
def test_the_old_one_ends_its_requests_and_leaves_with_the_last(
    engine: Engine, served: Served, runner: HeldRunner, others: list[Served], ask: Ask
) -> None:
    engine.add(others[0]).result(20)
    weights = weakref.ref(runner._network)

    async def main(loop: asyncio.AbstractEventLoop) -> None:
        engine.submit(before := ask(loop, seed=7, steps=90))
        alone = await before.mailbox.answer()
        runner.hold()
        engine.submit(request := ask(loop, seed=7, steps=90))
        engine.retire(served)
        engine.submit(later := ask(loop, served=others[0], seed=7, steps=9))
        runner.release(80)
        await later.mailbox.answer()
        assert weights() is not None
        runner.free()
        assert np.array_equal(await request.mailbox.answer(), alone)

    run(main)
    until(lambda: served not in engine._turns.served)
    gc.collect()
    assert weights() is None


@pytest.mark.parametrize(
    ("error", "kind"),
    [(RuntimeError("no kernel image"), LoadFailed), (torch.OutOfMemoryError("CUDA out of memory"), OutOfMemory)],
)
def test_a_newcomer_that_does_not_run_changes_nothing(
    engine: Engine, others: list[Served], ask: Ask, error: Exception, kind: type[ServiceError]
) -> None:
    def breaks(rows: int) -> Any:
        raise error

    others[0].runner.warm_up = breaks  # type: ignore[method-assign]
    bad, good = engine.add(others[0]), engine.add(others[1])
    with pytest.raises(kind):
        bad.result(20)
    good.result(20)
    assert engine.ready
    assert not hasattr(others[0].runner, "_network")


def test_a_newcomer_is_told_when_the_engine_ends(engine: Engine, others: list[Served]) -> None:
    engine.drain(0)
    assert engine.join(10)
    with pytest.raises(NotReady):
        engine.add(others[0]).result(20)


@pytest.mark.slow
def test_a_drain_finishes_requests_and_no_newcomer(
    engine: Engine, runner: HeldRunner, others: list[Served], ask: Ask
) -> None:
    async def main(loop: asyncio.AbstractEventLoop) -> None:
        runner.hold()
        engine.submit(request := ask(loop, steps=60))
        runner.arrived.acquire()
        newcomer = engine.add(others[0])
        engine.drain(30)
        runner.release()
        with pytest.raises(NotReady):
            await asyncio.wait_for(asyncio.wrap_future(newcomer), 20)
        assert not request.answered
        runner.free()
        await request.mailbox.answer()

    run(main)


def test_a_requests_own_steps_last_as_long_as_the_batches_that_it_shares(
    others: list[Served], metrics: Metrics, ask: Ask, loop: asyncio.AbstractEventLoop
) -> None:
    pending, served = Pending(metrics, max_work=1_000_000), others[0]  # four rows in a full batch
    served.rate.rows_per_second = 40.0
    admit: Callable[[float], None] = lambda timeout_s: pending.admit(  # noqa: E731
        ask(loop, served=served, n=1, steps=20, timeout_s=timeout_s)
    )
    for present, seconds in enumerate((0.5, 1.0, 1.5, 2.0, 4.0, 4.0)):  # four places, and whoever comes later waits
        with pytest.raises(DeadlineExceeded):
            admit(seconds / 0.85 - 0.05)
        admit(seconds / 0.85 + 0.05)
        assert len(pending) == present + 1


def test_a_request_waits_for_the_first_place_and_not_for_all_that_goes_before(
    others: list[Served], metrics: Metrics, ask: Ask, loop: asyncio.AbstractEventLoop
) -> None:
    pending, served = Pending(metrics, max_work=1_000_000), others[0]  # four rows in a full batch
    served.rate.rows_per_second = 40.0
    there = [ask(loop, served=served, n=1, steps=20, timeout_s=900) for _ in range(4)]
    for request, left in zip(there, (3, 8, 20, 20), strict=True):
        pending.admit(request)
        request.work_left = left
    pending.admit(ask(loop, served=served, n=4, steps=100, timeout_s=900))  # more to do: it goes after the new one
    with pytest.raises(DeadlineExceeded):
        pending.admit(ask(loop, served=served, n=1, steps=20, timeout_s=2.3 / 0.85 - 0.05))
    pending.admit(ask(loop, served=served, n=1, steps=20, timeout_s=2.3 / 0.85 + 0.05))  # 3 steps, and its own 20
    with pytest.raises(DeadlineExceeded):
        pending.admit(ask(loop, served=served, n=1, steps=20, timeout_s=2.8 / 0.85 - 0.05))
    pending.admit(ask(loop, served=served, n=1, steps=20, timeout_s=2.8 / 0.85 + 0.05))  # 8, and 20
