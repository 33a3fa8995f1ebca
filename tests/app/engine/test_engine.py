from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
import torch

from app.engine.engine import Engine
from app.engine.instance import ModelInstance
from app.engine.request import Frame, Request
from app.errors import Cancelled, DeadlineExceeded, NotReady, Overloaded, ServiceError, StepFailed
from model.checkpoint import Checkpoint
from model.images import Image, to_uint8
from model.sampling.step import sample
from tests.app.engine.conftest import AskedRequest, HeldRunner, Metrics, until

Ask = Callable[..., Request]


def run(main: Callable[[asyncio.AbstractEventLoop], Awaitable[Any]]) -> Any:
    """Runs an async test body with its loop."""

    async def body() -> Any:
        return await asyncio.wait_for(main(asyncio.get_running_loop()), 60)

    return asyncio.run(body())


async def outcome(request: Request) -> Image | ServiceError:
    try:
        return await request.output.images()
    except ServiceError as error:
        return error


def naive(checkpoint: Checkpoint, runner: HeldRunner, request: Request, **kwargs: Any) -> Image:
    """What the request's images must be: the naive loop over the same network in the same chunks."""
    indices = range(request.index, request.index + request.n)
    seeds = [request.seed] * request.n
    shape = checkpoint.config.unet.image_shape
    x = sample(runner.forward, request.schedule, shape, seeds, indices, request.classes, null_class=3, **kwargs)
    return to_uint8(x).numpy()


@pytest.mark.slow
def test_joining_and_leaving_requests_get_the_bytes_of_sample(
    engine: Engine, runner: HeldRunner, checkpoint: Checkpoint, ask: Ask
) -> None:
    async def main(loop: asyncio.AbstractEventLoop) -> list[tuple[Request, Image]]:
        requests = []
        runner.hold()
        for i in range(12):
            request = ask(
                loop,
                seed=i,
                n=1 + i % 4,
                label=i % 3,
                sampler=["ddpm", "ddim", "dpmpp_2m"][i % 3],
                steps=3 + i,
                eta=0.5 if i % 3 == 1 else 0.0,
                guidance_scale=[1.0, 2.0][i % 2],
            )
            engine.submit(request)
            requests.append(request)
            runner.release(2)  # the next one joins two steps later
            await asyncio.sleep(0)
        leaver = ask(loop, seed=99, n=5, steps=50)
        engine.submit(leaver)
        runner.release(3)
        engine.cancel(leaver)
        runner.free()
        return [(request, await request.output.images()) for request in requests]

    for request, images in run(main):
        assert np.array_equal(images, naive(checkpoint, runner, request)), f"seed {request.seed}"


@pytest.mark.slow
def test_a_seed_gives_the_same_bytes_alone_and_in_a_batch(engine: Engine, ask: Ask) -> None:
    async def main(loop: asyncio.AbstractEventLoop) -> None:
        first = ask(loop, seed=5, n=3, sampler="ddpm", steps=9, guidance_scale=3.0)
        engine.submit(first)
        alone = await first.output.images()
        strangers = [ask(loop, seed=s, n=2, steps=7 + s) for s in range(6)]
        again = ask(loop, seed=5, n=3, sampler="ddpm", steps=9, guidance_scale=3.0)
        one = ask(loop, seed=5, index=2, n=1, sampler="ddpm", steps=9, guidance_scale=3.0)
        for request in (*strangers[:3], again, one, *strangers[3:]):
            engine.submit(request)
        assert np.array_equal(alone, await again.output.images())
        assert np.array_equal(alone[2:], await one.output.images()), "one image of a grid can be had again alone"

    run(main)


@pytest.mark.slow
@pytest.mark.parametrize("script", range(12))
def test_every_admitted_request_gets_exactly_one_answer(
    engine: Engine, runner: HeldRunner, metrics: Metrics, ask: Ask, script: int
) -> None:
    """Random arrivals, cancels (twice, too late), time-outs, failing steps, NaN, drains: in `script`'s order."""
    rng = random.Random(script)
    runner.fail = lambda samples: any(s.request.seed % 7 == 3 and s.step == 2 for s in samples) or rng.random() < 0.05
    runner.poison = lambda s: s.request.seed % 11 == 5 and s.step == 1

    async def main(loop: asyncio.AbstractEventLoop) -> list[Request]:
        admitted: list[Request] = []
        for i in range(40):
            request = ask(
                loop,
                seed=rng.randrange(100),
                n=rng.randint(1, 6),
                steps=rng.randint(1, 12),
                sampler=rng.choice(["ddpm", "ddim", "dpmpp_2m"]),
                guidance_scale=rng.choice([1.0, 2.0]),
                timeout_s=rng.choice([0.02, 60.0, 60.0]),
                frame_steps=frozenset(rng.sample(range(3), 2)) if rng.random() < 0.3 else frozenset(),
            )
            try:
                engine.submit(request)
            except (Overloaded, DeadlineExceeded, NotReady):
                continue
            admitted.append(request)
            for _ in range(rng.randrange(3)):
                engine.cancel(rng.choice(admitted))
            if rng.random() < 0.5:
                await asyncio.sleep(rng.random() * 0.005)
            if i == 30 and script % 3 == 0:
                engine.drain(rng.choice([0.05, 30]))
        for request in admitted:
            await outcome(request)
        await asyncio.sleep(0.01)  # were there a second answer, it would come now
        return admitted

    admitted = run(main)
    assert admitted
    for request in admitted:
        assert request.output.answers == 1  # type: ignore[attr-defined]
        assert request.status.is_final
    until(lambda: metrics["ddpm_num_samples_running"] == metrics["ddpm_num_samples_waiting"] == 0)
    assert not len(engine._admission)


def test_a_cancelled_request_leaves_at_the_next_step(
    engine: Engine, runner: HeldRunner, metrics: Metrics, ask: Ask
) -> None:
    async def main(loop: asyncio.AbstractEventLoop) -> None:
        runner.hold()
        leaver, stayer = ask(loop, seed=1, n=2, steps=50), ask(loop, seed=2, n=1, steps=3)
        engine.submit(leaver)
        engine.submit(stayer)
        runner.arrived.acquire()
        engine.cancel(leaver)  # while a step of it is running
        runner.free()
        assert isinstance(await outcome(leaver), Cancelled)
        assert not isinstance(await outcome(stayer), ServiceError)

    run(main)
    steps_after = [step for batch in runner.batches for seed, _, step in batch if seed == 1]
    assert max(steps_after, default=0) == 0, "no further step after the one that was running"
    assert metrics["ddpm_wasted_image_steps_total"] == len(steps_after)
    assert metrics["ddpm_cancellation_latency_seconds_count"] == 1


def test_a_request_past_its_deadline_is_answered_and_leaves(
    engine: Engine, runner: HeldRunner, served: ModelInstance, ask: Ask
) -> None:
    async def main(loop: asyncio.AbstractEventLoop) -> None:
        runner.hold()
        served.throughput.nfe_per_second = 1e9  # so that it is admitted
        request = ask(loop, steps=90, timeout_s=0.2)
        engine.submit(request)
        await asyncio.sleep(0.25)
        runner.free()
        assert isinstance(await outcome(request), DeadlineExceeded)

    run(main)
    assert len(runner.batches) <= 2


def test_a_deadline_that_cannot_be_met_is_refused_at_once(engine: Engine, runner: HeldRunner, ask: Ask) -> None:
    async def main(loop: asyncio.AbstractEventLoop) -> None:
        with pytest.raises(DeadlineExceeded, match="longer than its time-out"):
            engine.submit(ask(loop, n=8, steps=100, timeout_s=1e-4))

    run(main)
    assert runner.batches == []


@pytest.mark.slow
def test_a_full_queue_sets_retry_after_and_admits_again_later(engine: Engine, runner: HeldRunner, ask: Ask) -> None:
    async def main(loop: asyncio.AbstractEventLoop) -> None:
        runner.hold()
        large = ask(loop, n=10, steps=90)
        engine.submit(large)  # 900 rows of 1000
        with pytest.raises(Overloaded) as full:
            engine.submit(ask(loop, n=2, steps=90))
        assert full.value.retry_after is not None
        assert full.value.retry_after >= 1
        small = ask(loop, n=1, steps=90)
        engine.submit(small)
        runner.free()
        assert not isinstance(await outcome(large), ServiceError)
        engine.submit(after := ask(loop, n=10, steps=100))
        assert not isinstance(await outcome(after), ServiceError)

    run(main)


def test_a_failing_sample_fails_its_own_request_and_no_other(
    engine: Engine, runner: HeldRunner, checkpoint: Checkpoint, metrics: Metrics, ask: Ask
) -> None:
    runner.fail = lambda samples: any(s.request.seed == 13 and s.step == 2 for s in samples)

    async def main(loop: asyncio.AbstractEventLoop) -> None:
        requests = [ask(loop, seed=seed, n=2, steps=6, sampler="ddpm") for seed in (11, 12, 13, 14)]
        for request in requests:
            engine.submit(request)
        for request in requests:
            answer = await outcome(request)
            if request.seed == 13:
                assert isinstance(answer, StepFailed)
            else:
                assert np.array_equal(answer, naive(checkpoint, runner, request))  # type: ignore[arg-type]
        runner.fail = lambda samples: False
        engine.submit(later := ask(loop, seed=13, n=2))
        assert not isinstance(await outcome(later), ServiceError), "the engine goes on"

    run(main)
    assert metrics["ddpm_failed_steps_total"] >= 1


def test_nan_fails_its_own_request_and_no_other(engine: Engine, runner: HeldRunner, ask: Ask) -> None:
    runner.poison = lambda sample: sample.request.seed == 13

    async def main(loop: asyncio.AbstractEventLoop) -> None:
        sick, well = ask(loop, seed=13, n=3), ask(loop, seed=14, n=3)
        engine.submit(sick)
        engine.submit(well)
        assert isinstance(await outcome(sick), StepFailed)
        assert not isinstance(await outcome(well), ServiceError)

    run(main)


@pytest.mark.parametrize("part", ["init_latents", "to_images", "schedule", "queue_seconds"])
def test_a_failure_outside_a_step_only_delays_images_and_frames(
    engine: Engine,
    runner: HeldRunner,
    served: ModelInstance,
    checkpoint: Checkpoint,
    metrics: Metrics,
    ask: Ask,
    part: str,
) -> None:
    scheduler = engine._models._schedulers[served]
    owner = {"schedule": scheduler, "queue_seconds": metrics}.get(part, runner)
    sound, calls = getattr(owner, part), 0

    def now_and_then(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 3 == 2:
            raise RuntimeError("injected")
        return sound(*args)

    if part == "queue_seconds":
        now_and_then.labels = now_and_then  # type: ignore[attr-defined]
        sound = sound.labels

    async def main(loop: asyncio.AbstractEventLoop) -> None:
        setattr(owner, part, now_and_then)
        for seed in range(4):
            request = ask(loop, seed=seed, n=3, steps=3, keep=9, frame_steps=frozenset(range(3)))
            engine.submit(request)
            assert [frame.step async for frame in request.output.frames()] == [0, 1, 2]
            assert np.array_equal(await request.output.images(), naive(checkpoint, runner, request))
            assert request.output.answers == 1  # type: ignore[attr-defined]
            assert request.remaining_nfe == 0

    run(main)
    assert metrics["ddpm_engine_restarts_total"] >= 1
    assert engine.status().pending_nfe == 0


def test_draining_finishes_admitted_work_and_takes_no_more(engine: Engine, runner: HeldRunner, ask: Ask) -> None:
    async def main(loop: asyncio.AbstractEventLoop) -> None:
        runner.hold()
        engine.submit(admitted := ask(loop, n=3, steps=10))
        engine.drain(30)
        assert not engine.ready
        with pytest.raises(NotReady):
            engine.submit(ask(loop))
        runner.free()
        assert not isinstance(await outcome(admitted), ServiceError)

    run(main)
    assert engine.join(10)


def test_what_a_drain_does_not_finish_in_time_is_answered(engine: Engine, runner: HeldRunner, ask: Ask) -> None:
    async def main(loop: asyncio.AbstractEventLoop) -> None:
        runner.hold()
        engine.submit(slow := ask(loop, n=3, steps=90))
        engine.drain(0.05)
        await asyncio.sleep(0.1)
        runner.free()
        assert isinstance(await outcome(slow), NotReady)

    run(main)
    assert engine.join(10)


@pytest.mark.slow
def test_readiness_drops_while_a_step_is_overdue_and_returns(engine: Engine, runner: HeldRunner, ask: Ask) -> None:
    async def main(loop: asyncio.AbstractEventLoop) -> None:
        runner.hold()
        engine.submit(request := ask(loop))
        assert engine.ready
        until(lambda: engine.status().stalled)
        assert not engine.ready
        with pytest.raises(NotReady, match="a denoising step has been running for much too long"):
            engine.submit(ask(loop))
        runner.free()
        await request.output.images()
        assert engine.ready

    run(main)


@pytest.mark.slow
@pytest.mark.parametrize("view", ["xt", "x0"])
def test_frames_are_the_states_of_the_naive_loop(
    engine: Engine, runner: HeldRunner, checkpoint: Checkpoint, ask: Ask, view: str
) -> None:
    shown = frozenset({2, 5, 9})

    async def main(loop: asyncio.AbstractEventLoop) -> tuple[Request, list[Frame]]:
        request = ask(loop, seed=4, n=11, steps=9, sampler="ddpm", frame_steps=shown, view=view, keep=3)
        engine.submit(request)
        engine.submit(ask(loop, seed=5, n=6, steps=5))
        return request, [frame async for frame in request.output.frames()]

    request, frames = run(main)
    states: dict[int, Image] = {}

    def remember(step: int, x: torch.Tensor, x0: torch.Tensor) -> None:
        states[step] = to_uint8(x0 if view == "x0" else x).numpy()

    naive(checkpoint, runner, request, on_step=remember)
    assert [frame.step for frame in frames] == sorted(shown)
    for frame in frames:
        assert np.array_equal(frame.images, states[frame.step])


def test_step_zero_shows_the_noise(engine: Engine, ask: Ask) -> None:
    async def main(loop: asyncio.AbstractEventLoop) -> Frame:
        request = ask(loop, n=2, frame_steps=frozenset({0}))
        engine.submit(request)
        return await anext(aiter(request.output.frames()))

    frame = run(main)
    assert frame.step == 0
    assert frame.images.std() > 50


def test_a_slow_client_loses_frames_but_never_the_answer(engine: Engine, ask: Ask) -> None:
    async def main(loop: asyncio.AbstractEventLoop) -> None:
        request = ask(loop, steps=30, frame_steps=frozenset(range(31)))
        engine.submit(request)
        images = await request.output.images()  # nobody has looked at a frame yet
        frames = [frame async for frame in request.output.frames()]
        assert [frame.step for frame in frames] == [30], "the newest alone is kept"
        assert np.array_equal(frames[0].images, images)

    run(main)


def test_requests_of_one_turn_of_the_event_loop_begin_in_one_step(
    engine: Engine, runner: HeldRunner, ask: Callable[..., AskedRequest]
) -> None:
    async def main(loop: asyncio.AbstractEventLoop) -> None:
        requests = [ask(loop, seed=s, steps=1) for s in range(3)]
        until(lambda: bool(engine._lock._waiters))  # type: ignore[attr-defined] # it has no work
        for request in requests:
            Engine.submit(engine, request.instance, request)
            time.sleep(0.05)  # noqa: ASYNC251 - in which the engine would begin
        for request in requests:
            await request.output.images()

    run(main)
    assert runner.batches == [[(0, 0, 0), (1, 0, 0), (2, 0, 0)]]


def test_a_request_from_another_thread_than_the_loops_begins_at_once(
    engine: Engine, runner: HeldRunner, ask: Callable[..., AskedRequest]
) -> None:
    loop = asyncio.new_event_loop()
    request = ask(loop, steps=1)
    until(lambda: bool(engine._lock._waiters))  # type: ignore[attr-defined] # it has no work
    Engine.submit(engine, request.instance, request)
    until(lambda: len(runner.batches) == 1)
    loop.close()


def test_a_step_wakes_the_event_loop_once(
    engine: Engine, runner: HeldRunner, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main(loop: asyncio.AbstractEventLoop) -> int:
        calls = 0
        original = loop.call_soon_threadsafe

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return original(*args, **kwargs)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
        runner.hold()
        requests = [ask(loop, seed=s, steps=4, frame_steps=frozenset(range(5))) for s in range(8)]
        engine.submit(blocker := ask(loop, steps=1))
        runner.arrived.acquire()
        for request in requests:
            engine.submit(request)
        runner.free()
        for request in (blocker, *requests):
            await request.output.images()
        return calls

    assert run(main) <= 6  # the blocker's step, the noise, then four steps of eight requests with frames


def test_metrics_say_what_was_done(engine: Engine, runner: HeldRunner, metrics: Metrics, ask: Ask) -> None:
    async def main(loop: asyncio.AbstractEventLoop) -> None:
        runner.hold()
        engine.submit(a := ask(loop, seed=1, n=10, steps=5))
        runner.arrived.acquire()
        until(lambda: metrics["ddpm_num_samples_running"] == 8 and metrics["ddpm_num_samples_waiting"] == 2)
        runner.free()
        await a.output.images()

    run(main)
    until(lambda: metrics["ddpm_num_samples_running"] == metrics["ddpm_num_samples_waiting"] == 0)
    assert metrics["ddpm_images_total"] == 10
    assert metrics["ddpm_image_steps_total"] == 50
    assert metrics["ddpm_step_seconds_count"] == len(runner.batches)
    assert metrics["ddpm_request_queue_time_seconds_count"] == 1
    assert metrics["ddpm_wasted_image_steps_total"] == 0


def test_high_concurrency_gets_larger_batches(
    engine: Engine, runner: HeldRunner, served: ModelInstance, metrics: Metrics, ask: Ask
) -> None:
    served.batch_limits.set(5, 8)
    served.throughput.nfe_per_second = before = 1e9  # only a full step can tell that it is less

    async def main(loop: asyncio.AbstractEventLoop) -> None:
        alone = ask(loop, n=4, steps=2)
        engine.submit(alone)
        await alone.output.images()
        assert [len(batch) for batch in runner.batches] == [4] * 2
        assert served.throughput.nfe_per_second < before
        runner.hold()
        crowd = [ask(loop, seed=seed, n=2, steps=2) for seed in range(7)]
        for request in crowd:
            engine.submit(request)
        runner.free()
        await asyncio.gather(*(request.output.images() for request in crowd))

    run(main)
    assert max(len(batch) for batch in runner.batches) == 7
    assert metrics["ddpm_batch_utilization_sum"] > 0.7 * metrics["ddpm_batch_utilization_count"], "nearly all were full"


def test_a_step_is_counted_by_its_images_and_by_its_rows(metrics: Metrics) -> None:
    for _ in range(2):
        metrics.count_step("tiny", images=3, rows=6, budget=8, seconds=0.5)
    assert (metrics["ddpm_image_steps_total"], metrics["ddpm_nfe_total"]) == (6, 12)
    assert (metrics["ddpm_batch_size_sum"], metrics["ddpm_batch_utilization_sum"]) == (12, 1.5)
    assert (metrics["ddpm_step_seconds_sum"], metrics["ddpm_step_seconds_count"]) == (1.0, 2)


def test_default_timeouts_are_refused_only_beyond_their_slack(engine: Engine, served: ModelInstance, ask: Ask) -> None:
    async def main(loop: asyncio.AbstractEventLoop) -> None:
        served.throughput.nfe_per_second = 10.0
        with pytest.raises(DeadlineExceeded):
            engine.submit(ask(loop, n=1, steps=90, timeout_s=6))  # 9 s
        with pytest.raises(DeadlineExceeded):
            engine.submit(ask(loop, n=1, steps=90, timeout_s=4, has_default_timeout=True))
        engine.submit(admitted := ask(loop, n=1, steps=90, timeout_s=6, has_default_timeout=True))
        assert not isinstance(await outcome(admitted), ServiceError)

    run(main)


@pytest.mark.slow
def test_the_estimate_follows_the_work_ahead(
    engine: Engine, runner: HeldRunner, served: ModelInstance, ask: Ask
) -> None:
    """Requests share the device: one that is small waits for little, even behind one that is large."""

    async def main(loop: asyncio.AbstractEventLoop) -> None:
        runner.hold()
        engine.submit(large := ask(loop, n=9, steps=100, timeout_s=600))
        served.throughput.nfe_per_second = 10.0  # 90 s for the large one
        engine.submit(small := ask(loop, n=1, steps=10, timeout_s=12))  # 1 s behind it at most, and ten full batches
        with pytest.raises(DeadlineExceeded):
            engine.submit(ask(loop, n=1, steps=50, timeout_s=5))
        runner.free()
        for request in (large, small):
            await request.output.images()

    run(main)
