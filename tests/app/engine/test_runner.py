from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from app.engine.request import Request, Sample
from app.engine.runner import Runner
from model.checkpoint import Checkpoint
from model.images import to_uint8
from model.sampling import sample

CPU = torch.device("cpu")


def finish(runner: Runner, samples: list[Sample]) -> None:
    """Steps them together, each until it is done."""
    runner.start(samples)
    while left := [s for s in samples if not s.finished]:
        assert runner.step(left) == []


@pytest.fixture
def mixed(ask: Callable[..., Request]) -> list[Request]:
    loop = asyncio.new_event_loop()
    requests = [
        ask(loop, seed=1, n=3, sampler="ddpm", steps=12, label=0),
        ask(loop, seed=2**63 + 5, n=2, sampler="ddim", steps=5, eta=0.7, label=2, guidance_scale=2.5),
        ask(loop, seed=3, n=1, index=7, sampler="dpmpp_2m", steps=6, guidance_scale=0.0),
    ]
    loop.close()
    return requests


def test_mixed_samplers_in_one_batch_equal_the_naive_loop(checkpoint: Checkpoint, mixed: list[Request]) -> None:
    runner = Runner(checkpoint, CPU, chunk=4)
    finish(runner, [s for request in mixed for s in request.samples])
    for request in mixed:
        indices = range(request.index, request.index + request.n)
        expected = sample(
            checkpoint.network,
            request.plan,
            checkpoint.config.unet.image_shape,
            [request.seed] * request.n,
            indices,
            request.classes,
            null_class=3,
        )
        got = torch.stack([s.x for s in request.samples if s.x is not None])
        assert torch.allclose(got, expected, atol=2e-5)


@pytest.mark.parametrize("chunk", [1, 4, 8])
def test_an_image_does_not_depend_on_its_mates_to_the_last_bit(
    checkpoint: Checkpoint, mixed: list[Request], ask: Callable[..., Request], chunk: int
) -> None:
    runner = Runner(checkpoint, CPU, chunk)
    together = [s for request in mixed for s in request.samples]
    finish(runner, together[::-1])
    loop = asyncio.new_event_loop()
    loop.close()
    for s in together:
        r = s.request
        alone = Request(r.plan, r.seed, r.index + s.i, 1, r.classes[:1] if r.classes else None, 0.0, r.mailbox)
        finish(runner, alone.samples)
        assert torch.equal(alone.samples[0].x, s.x)  # type: ignore[arg-type]


def test_a_step_that_raises_changes_nothing(
    checkpoint: Checkpoint, mixed: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Runner(checkpoint, CPU, chunk=4)
    samples = mixed[0].samples
    runner.start(samples)
    before = [(s.step, s.x.clone()) for s in samples if s.x is not None]
    with monkeypatch.context() as patch:
        patch.setattr("app.engine.runner.apply_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runner.step(samples)
    assert all(s.step == step and torch.equal(s.x, x) for s, (step, x) in zip(samples, before, strict=True))  # type: ignore[arg-type]


def test_numbers_that_are_not_finite_are_reported_for_their_sample_alone(
    checkpoint: Checkpoint, mixed: list[Request]
) -> None:
    runner = Runner(checkpoint, CPU, chunk=4)
    samples = mixed[0].samples
    runner.start(samples)
    assert samples[1].x is not None
    samples[1].x = samples[1].x * float("inf")
    assert runner.step(samples) == [samples[1]]


def test_read_gives_the_state_or_the_prediction_as_pictures(checkpoint: Checkpoint, mixed: list[Request]) -> None:
    runner = Runner(checkpoint, CPU, chunk=4)
    samples = mixed[0].samples
    runner.start(samples)
    runner.step(samples)
    states = torch.stack([s.x for s in samples if s.x is not None])
    predictions = torch.stack([s.x0 for s in samples if s.x0 is not None])
    assert np.array_equal(runner.read(samples, "xt"), to_uint8(states).numpy())
    assert np.array_equal(runner.read(samples, "x0"), to_uint8(predictions).numpy())
    assert not np.array_equal(runner.read(samples, "xt"), runner.read(samples, "x0"))


def test_the_thread_that_warms_up_gets_the_threads_of_the_network(checkpoint: Checkpoint) -> None:
    seen: list[int] = []

    def warm_up() -> None:
        Runner(checkpoint, CPU, chunk=4, threads=3).warm_up(4)
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=warm_up)
    thread.start()
    thread.join()
    torch.set_num_threads(1)  # it is torch's default for threads to come, too
    assert seen == [3]
