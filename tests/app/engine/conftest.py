"""A tiny served checkpoint, an engine around a runner that tests can hold, break and count."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from prometheus_client import CollectorRegistry
from torch import Tensor

from app.engine.engine import Engine
from app.engine.instance import ModelInstance
from app.engine.request import OutputStream, Request, Sample
from app.engine.runner import ModelRunner
from app.metrics import EngineCollector, EngineMetrics
from model.checkpoint import Checkpoint, CheckpointConfig
from model.diffusion import DiffusionConfig
from model.nn.unet import UNet
from model.sampling.schedule import make_schedule

CHUNK = 4


@pytest.fixture
def checkpoint(tiny: UNet) -> Checkpoint:
    config = CheckpointConfig(tiny.config, DiffusionConfig(num_timesteps=100, prediction="v"), ("a", "b", "c"))
    return Checkpoint("tiny", "0" * 64, config, tiny)


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


class HeldRunner(ModelRunner):
    """The real runner. `hold()` stops it before its next step until `release(k)` lets k steps pass (or `free()` all);
    `fail` decides, from the samples of a step, whether it raises; `poison` which samples turn to NaN."""

    def __init__(self, checkpoint: Checkpoint, micro_batch_size: int = CHUNK) -> None:
        super().__init__(checkpoint, torch.device("cpu"), micro_batch_size)
        self.batches: list[list[tuple[int, int, int]]] = []  # (seed, place, step) of every step tried
        self.fail: Callable[[list[Sample]], bool] = lambda samples: False
        self.poison: Callable[[Sample], bool] = lambda sample: False
        self._permits: threading.Semaphore | None = None
        self.arrived = threading.Semaphore(0)  # one permit per step that has begun

    def hold(self) -> None:
        self._permits = threading.Semaphore(0)

    def release(self, steps: int = 1) -> None:
        assert self._permits is not None
        self._permits.release(steps)

    def free(self) -> None:
        permits, self._permits = self._permits, None
        if permits is not None:
            permits.release(1_000_000)

    def step(self, samples: list[Sample]) -> list[Sample]:
        self.arrived.release()
        if self._permits is not None:
            assert self._permits.acquire(timeout=20)
        self.batches.append([(s.request.seed, s.i, s.step) for s in samples])
        if self.fail(samples):
            raise RuntimeError("injected")
        for sample in samples:
            if self.poison(sample):
                assert sample.x is not None
                sample.x = sample.x * float("nan")
        return super().step(samples)


@pytest.fixture
def runner(checkpoint: Checkpoint) -> HeldRunner:
    return HeldRunner(checkpoint)


@pytest.fixture
def served(checkpoint: Checkpoint, runner: HeldRunner) -> ModelInstance:
    return ModelInstance(checkpoint, runner, max_batch_size=8)


class AskedRequest(Request):
    """Knows the model that it is for, so that tests need not say it again."""

    instance: ModelInstance


class TestedEngine(Engine):
    """Takes requests as `ask` makes them, and wakes for each at once: tests hold up the event loop meanwhile."""

    __test__ = False

    def submit(self, request: AskedRequest) -> None:  # type: ignore[override]
        super().submit(request.instance, request)
        self._wake()


class Metrics(EngineMetrics):
    """With a way to read them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        super().__init__(self.registry)

    def __getitem__(self, name: str) -> float:
        families = self.registry.collect()
        return sum(sample.value for family in families for sample in family.samples if sample.name == name)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def engine(runner: HeldRunner, served: ModelInstance, metrics: Metrics) -> Iterator[Engine]:
    engine = TestedEngine(metrics, max_pending_nfe=1000)
    metrics.registry.register(EngineCollector(engine.status))
    engine.load_model(served)
    engine.start()
    until(lambda: engine.ready)
    yield engine
    runner.free()
    engine.drain(0)
    assert engine.join(10), "the engine thread did not end"


class CountingStream(OutputStream):
    """Counts terminal answers."""

    answers = 0

    def put(self, item: Any) -> None:
        if type(item).__name__ != "Frame":
            self.answers += 1
        super().put(item)


@pytest.fixture
def ask(checkpoint: Checkpoint, served: ModelInstance) -> Callable[..., AskedRequest]:
    """ask(loop, n=…, seed=…, sampler=…, …) → a Request as the HTTP side makes it."""

    def ask(
        loop: asyncio.AbstractEventLoop,
        *,
        n: int = 1,
        seed: int = 0,
        index: int = 0,
        label: int = 1,
        sampler: str = "ddim",
        steps: int = 4,
        eta: float = 0.0,
        guidance_scale: float = 1.0,
        limit: str = "clamp",
        strength: float = 1.0,
        timeout_s: float = 60,
        keep: int = 1,
        served: ModelInstance = served,
        **fields: Any,
    ) -> AskedRequest:
        settings = {"eta": eta, "guidance_scale": guidance_scale, "limit": limit}
        schedule = make_schedule(checkpoint.diffusion, sampler, steps, strength=strength, **settings)
        deadline = time.monotonic() + timeout_s
        stream = CountingStream(loop, keep)
        request = AskedRequest(schedule, seed, index, n, (label,) * n, deadline, stream, served.name, **fields)
        request.instance = served
        return request

    return ask


def record_by_repeating(run: Callable[[], None]) -> Callable[[], None]:
    """As a graph does: it works on the same memory each time."""
    run()
    return run


def graphed(checkpoint: Checkpoint, micro_batch_size: int) -> ModelRunner:
    """On the CPU, as on a GPU."""
    runner = ModelRunner(checkpoint, torch.device("cpu"), micro_batch_size)
    runner._record = record_by_repeating
    return runner


@pytest.fixture
def samples(ask: Callable[..., Request]) -> Iterator[Callable[[], list[Sample]]]:
    """The same 14 each time, of four requests."""
    loop = asyncio.new_event_loop()
    wanted = [
        {"seed": 1, "n": 3, "sampler": "ddpm", "steps": 12, "label": 0},
        {"seed": 2**63 + 5, "n": 2, "sampler": "ddim", "steps": 5, "eta": 0.7, "label": 2, "guidance_scale": 2.5},
        {"seed": 3, "n": 1, "index": 7, "sampler": "dpmpp_2m", "steps": 6, "guidance_scale": 0.0},
        {"seed": 4, "n": 8, "sampler": "dpmpp_3m", "steps": 7},
    ]
    yield lambda: [sample for fields in wanted for sample in ask(loop, **fields).samples]
    loop.close()


def state(runner: ModelRunner, sample: Sample) -> Tensor:
    """A copy of its x, wherever that is."""
    x = sample.x if runner._graphs is None else runner._graphs.slots.x_of(sample)
    assert x is not None
    return x.clone()


def finish(runner: ModelRunner, samples: list[Sample]) -> list[Tensor]:
    """Steps them together, each until it is done."""
    runner.init_latents(samples)
    while left := [s for s in samples if not s.finished]:
        assert runner.step(left) == []
    return [state(runner, sample) for sample in samples]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Waits for a condition that another thread makes true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.001)
