"""Which model's step is next, and how models come and go."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from app.engine.engine import Engine
from app.engine.instance import WARMUP_STEPS, ModelInstance
from app.engine.scheduler import ModelScheduler
from app.errors import LoadFailed, NotReady, OutOfMemory, ServiceError
from model.checkpoint import Checkpoint
from tests.app.engine.conftest import CHUNK, HeldRunner, until
from tests.app.engine.test_engine import Ask, run

WARMUP_PIECES = 2 * CHUNK + WARMUP_STEPS  # every number of rows up to a micro-batch, twice; then full batches


@pytest.fixture
def others(checkpoint: Checkpoint) -> list[ModelInstance]:
    return [ModelInstance(checkpoint, HeldRunner(checkpoint), max_batch_size=4) for _ in range(3)]


def device_time(
    scheduler: ModelScheduler, cost: dict[ModelInstance, float], seconds: float
) -> dict[ModelInstance, float]:
    """Steps for that long; what each had."""
    had = dict.fromkeys(cost, 0.0)
    while sum(had.values()) < seconds:
        batch = scheduler.schedule()
        assert batch is not None
        scheduler.charge(cost[batch.model])
        had[batch.model] += cost[batch.model]
    return had


def test_models_share_device_time_not_steps_or_requests(
    others: list[ModelInstance], ask: Ask, loop: asyncio.AbstractEventLoop
) -> None:
    scheduler = ModelScheduler()
    for model, requests in zip(others, (9, 1, 1), strict=True):
        scheduler.add_model(model)
        for _ in range(requests):
            scheduler.add(model, ask(loop, served=model))
    had = device_time(scheduler, dict(zip(others, (0.01, 0.2, 0.03), strict=True)), 30)
    assert all(abs(seconds - 10) < 0.3 for seconds in had.values()), had


def test_idle_model_accrues_no_credit_and_no_debt(
    others: list[ModelInstance], ask: Ask, loop: asyncio.AbstractEventLoop
) -> None:
    scheduler, cost = ModelScheduler(), dict.fromkeys(others, 0.1)
    for model in others:
        scheduler.add_model(model)
    first, second, third = others
    scheduler.add(first, ask(loop, served=first))
    device_time(scheduler, cost, 10)
    scheduler.add(second, ask(loop, served=second))  # new
    assert device_time(scheduler, cost, 2)[second] == pytest.approx(1, abs=0.15)
    for request in scheduler:
        scheduler.remove(request)
    assert scheduler.schedule() is None
    scheduler.add(third, ask(loop, served=third))  # the only one
    scheduler.add(first, ask(loop, served=first))
    had = device_time(scheduler, cost, 2)
    assert had[third] == pytest.approx(had[first], abs=0.15)


def test_the_expected_rate_is_of_the_work_that_is_there(
    engine: Engine, served: ModelInstance, others: list[ModelInstance]
) -> None:
    for other in others[:1]:
        engine.load_model(other).result(20)
    served.throughput.nfe_per_second, others[0].throughput.nfe_per_second = 30.0, 10.0
    assert engine.status().estimated_nfe_per_second == pytest.approx(15), "of a row for each"


def test_one_batch_is_one_checkpoints_and_both_move(
    engine: Engine, runner: HeldRunner, others: list[ModelInstance], ask: Ask
) -> None:
    engine.load_model(others[0]).result(20)

    async def main(loop: asyncio.AbstractEventLoop) -> None:
        runner.hold()
        requests = [ask(loop, seed=1, n=2, steps=20), ask(loop, served=others[0], seed=2, n=2, steps=20)]
        for request in requests:
            engine.submit(request)
        runner.free()
        for request in requests:
            await request.output.images()

    run(main)
    second = others[0].runner
    assert isinstance(second, HeldRunner)
    assert {seed for batch in runner.batches for seed, *_ in batch} == {1}
    assert {seed for batch in second.batches for seed, *_ in batch} == {2}


@pytest.mark.slow
def test_a_newcomer_warms_up_one_network_call_between_two_steps(
    engine: Engine, runner: HeldRunner, others: list[ModelInstance], ask: Ask
) -> None:
    newcomer, pieces = others[0], 0
    sound = newcomer.warmup_steps

    def counted() -> Iterator[None]:
        nonlocal pieces
        for _ in sound:
            pieces += 1
            yield

    newcomer.warmup_steps = counted()

    async def main(loop: asyncio.AbstractEventLoop) -> None:
        runner.hold()
        engine.submit(request := ask(loop, steps=60))
        runner.arrived.acquire()
        warm = engine.load_model(newcomer)
        for steps in range(1, WARMUP_PIECES):
            runner.release()
            runner.arrived.acquire()
            assert pieces == steps
            assert not warm.done()
        runner.free()
        await asyncio.wrap_future(warm)
        await request.output.images()

    run(main)
    assert pieces == WARMUP_PIECES - 1, "after the last yield it is done at once"


@pytest.mark.slow
def test_the_old_one_ends_its_requests_and_leaves_with_the_last(
    engine: Engine, served: ModelInstance, runner: HeldRunner, others: list[ModelInstance], ask: Ask
) -> None:
    engine.load_model(others[0]).result(20)
    weights = weakref.ref(runner._network)

    async def main(loop: asyncio.AbstractEventLoop) -> None:
        engine.submit(before := ask(loop, seed=7, steps=90))
        alone = await before.output.images()
        runner.hold()
        engine.submit(request := ask(loop, seed=7, steps=90))
        engine.unload_model(served)
        engine.submit(later := ask(loop, served=others[0], seed=7, steps=9))
        runner.release(80)
        await later.output.images()
        assert weights() is not None
        runner.free()
        assert np.array_equal(await request.output.images(), alone)

    run(main)
    until(lambda: served not in engine._models.models)
    gc.collect()
    assert weights() is None


@pytest.mark.parametrize(
    ("error", "kind"),
    [(RuntimeError("no kernel image"), LoadFailed), (torch.OutOfMemoryError("CUDA out of memory"), OutOfMemory)],
)
def test_a_newcomer_that_does_not_run_changes_nothing(
    engine: Engine, others: list[ModelInstance], ask: Ask, error: Exception, kind: type[ServiceError]
) -> None:
    def breaks(rows: int) -> Any:
        raise error

    others[0].runner.warm_up = breaks  # type: ignore[method-assign]
    bad, good = engine.load_model(others[0]), engine.load_model(others[1])
    with pytest.raises(kind):
        bad.result(20)
    good.result(20)
    assert engine.ready
    assert not hasattr(others[0].runner, "_network")


def test_a_newcomer_is_told_when_the_engine_ends(engine: Engine, others: list[ModelInstance]) -> None:
    engine.drain(0)
    assert engine.join(10)
    with pytest.raises(NotReady):
        engine.load_model(others[0]).result(20)


@pytest.mark.slow
def test_a_drain_finishes_requests_and_no_newcomer(
    engine: Engine, runner: HeldRunner, others: list[ModelInstance], ask: Ask
) -> None:
    async def main(loop: asyncio.AbstractEventLoop) -> None:
        runner.hold()
        engine.submit(request := ask(loop, steps=60))
        runner.arrived.acquire()
        newcomer = engine.load_model(others[0])
        engine.drain(30)
        runner.release()
        with pytest.raises(NotReady):
            await asyncio.wait_for(asyncio.wrap_future(newcomer), 20)
        assert not request.status.is_final
        runner.free()
        await request.output.images()

    run(main)
