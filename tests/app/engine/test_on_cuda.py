"""All that a server does on a GPU, on one that is not there: see `tests.fake_cuda`."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from app.engine.instance import ModelInstance
from app.engine.request import OutputStream, Request, Sample
from app.engine.runner import ModelRunner
from app.main import log_device
from app.settings import Settings
from model.checkpoint import Checkpoint, CheckpointConfig
from model.diffusion import DiffusionConfig
from model.nn.config import UNetConfig
from model.sampling.schedule import make_schedule
from tests.fake_cuda import CUDA, Event, FakeCuda, fake_cuda
from tests.networks import randomised

CHUNK = 2
GRID: dict[str, dict[str, Any]] = {
    "as it is": {},
    "unconditional": {"num_classes": None, "null_class": False},
    "learned variance, time by a table": {"learned_variance": True, "time_table": 1000},
}


@pytest.fixture
def gpu() -> Iterator[FakeCuda]:
    with fake_cuda() as device:
        yield device


def checkpoint_of(config: UNetConfig) -> Checkpoint:
    variance = "learned_range" if config.learned_variance else "fixed_small"
    diffusion = DiffusionConfig(num_timesteps=100, prediction="v", variance=variance)
    names = ("a", "b", "c")[: config.num_classes or 0]
    return Checkpoint("tiny", "0" * 64, CheckpointConfig(config, diffusion, names), randomised(config))


class Asked:
    """Makes samples of requests for one checkpoint."""

    def __init__(self, checkpoint: Checkpoint, runner: ModelRunner) -> None:
        self.loop, self.checkpoint = asyncio.new_event_loop(), checkpoint
        self.served = ModelInstance(checkpoint, runner, 0)
        self.guided = {"guidance_scale": 2.5} if checkpoint.config.unet.null_class else {}

    def __call__(self, n: int, sampler: str, **how: Any) -> list[Sample]:
        schedule = make_schedule(self.checkpoint.diffusion, sampler, 12, **how)
        classes = None if self.checkpoint.config.unet.num_classes is None else (1,) * n
        return Request(schedule, 5, 0, n, classes, math.inf, OutputStream(self.loop), self.served.name).samples


def served(
    gpu: FakeCuda, config: UNetConfig, precision: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[ModelRunner, Asked]:
    """Warmed up, with eight slots; a recording that fails is a failure of the test."""
    monkeypatch.setattr("app.engine.runner.pool_size", lambda shape, micro_batch_size: 8)
    gpu.nonzero = None if config.null_class else 0
    checkpoint = checkpoint_of(config)
    runner = ModelRunner(checkpoint, CUDA, CHUNK, precision=precision)
    runner._record = gpu.record
    runner.warm_up(CHUNK)
    return runner, Asked(checkpoint, runner)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "precision"), [*zip(GRID, ("bf16", "fp32", "bf16"), strict=True)])
def test_a_server_runs_on_a_gpu_and_waits_for_its_event_only(
    gpu: FakeCuda,
    tiny_config: UNetConfig,
    name: str,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(
        "model.backends.cuda.CHANNELS_LAST_NORM", name.startswith("learned")
    )  # either way, it can be recorded
    with caplog.at_level(logging.WARNING):
        runner, asked = served(gpu, replace(tiny_config, **GRID[name]), precision, monkeypatch)
    assert [record.exc_info and record.exc_info[1] for record in caplog.records] == []  # "no CUDA graphs", and why
    assert runner._graphs is not None
    assert runner._graphs.rows == runner.sizes == [1, 2]
    assert len(gpu.recordings) == 6
    assert not Event.spins, "a step that is waited for keeps a core busy"
    assert not torch.backends.cudnn.allow_tf32, "torch's default for convolutions, with 10 bits of mantissa"
    runner.warm_up(3 * CHUNK + 1)
    some = [*asked(3, "ddpm"), *asked(2, "ddim", eta=0.7, **asked.guided)]
    gpu.waits.clear()
    runner.init_latents(some)
    assert runner.step(some) == []
    assert not gpu.waits
    dynamic, many = asked(2, "ddim", limit="dynamic", **asked.guided), asked(7, "dpmpp_2m")
    runner.init_latents(dynamic)
    assert runner.step(dynamic + some) == []
    runner.init_latents(many)  # there are eight slots, so others have to leave theirs
    for batch in (many, some, many):
        assert runner.step(batch) == []
    assert [sample.step for sample in some + dynamic + many] == [3] * 5 + [1] * 2 + [2] * 7
    for view in ("xt", "x0"):
        pictures = runner.to_images(some + many, view)
        assert (pictures.shape, pictures.dtype) == ((12, *tiny_config.image_shape), np.uint8)
    runner.close()
    asked.loop.close()


@pytest.mark.parametrize("name", ["auto", "cuda"])
def test_the_servers_gpu_has_an_index(gpu: FakeCuda, name: str) -> None:
    assert Settings(device=name).torch_device() == CUDA


def test_the_log_names_what_the_network_runs_on(
    gpu: FakeCuda, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.INFO):
        log_device("auto", CUDA, "torch", 2)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        for asked in ("auto", "cpu"):
            log_device(asked, torch.device("cpu"), "torch", 2)
        monkeypatch.setattr(torch.version, "cuda", None)
        log_device("auto", torch.device("cpu"), "torch", 2)
    assert [(r.levelname, r.message) for r in caplog.records] == [
        ("INFO", "the network runs on a fake GPU"),
        ("WARNING", "the network runs on the CPU"),  # by a torch that is built for GPUs
        ("INFO", "the network runs on the CPU"),
        ("INFO", "the network runs on the CPU"),
    ]
    assert vars(caplog.records[0])["device"] == "cuda:0"
