"""Tiny checkpoints, applications inside this process, and real servers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient

from app.engine.request import Sample
from app.engine.runner import ModelRunner
from app.main import create_app
from app.settings import Settings
from model import checkpoint
from model.checkpoint import CheckpointConfig
from model.diffusion import DiffusionConfig
from model.nn.config import UNetConfig
from model.sampling.fitted import FittedTable, weights_digest
from model.sampling.schedule import FITTED, SamplingParams, make_schedule
from tests.app.processes import ServerProcess, wait_for
from tests.networks import randomised

BEETLE = "Käfer → 虫"
CLASSES = ("plain", BEETLE, "0")  # the third is named like the first one's number
GREY = UNetConfig(
    image_channels=1,
    image_size=(8, 12),
    base_channels=6,  # 2 groups of 3 in GroupNorm: with one channel a group it would undo the bias of time and class
    channel_mults=(1,),
    num_res_blocks=1,
    attention_levels=(),
    time_emb_dim=8,
    num_classes=3,
    null_class=True,
    dropout=0.0,
)
COLOUR = replace(GREY, image_channels=3, image_size=(8, 8), num_classes=None, null_class=False)


def write_checkpoint(path: Path, unet: UNetConfig, class_names: tuple[str, ...], seed: int = 0) -> Path:
    """A checkpoint with random weights everywhere."""
    network = randomised(unet, 0.3, seed)
    defaults = SamplingParams(sampler="ddim", steps=6)
    config = CheckpointConfig(unet, DiffusionConfig(prediction="v"), class_names, defaults, {"data": "none"})
    checkpoint.save(path, network.state_dict(), config)
    return path


@pytest.fixture(scope="session")
def grey_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Grey images of 8 × 12, three classes, a null class."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "grey.safetensors", GREY, CLASSES)


@pytest.fixture(scope="session")
def colour_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Colour images of 8 × 8, unconditional."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "colour.safetensors", COLOUR, ())


@pytest.fixture(scope="session")
def fitted_checkpoint(grey_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The grey one with two tables, and the first of them by default: 3 steps, 5 network rows an image."""
    source = checkpoint.load(grey_checkpoint)
    weights = source.network.state_dict()
    tables = []
    for steps, guided in {3: (0, 1), 5: ()}.items():
        schedule = make_schedule(source.diffusion, "dpmpp_2m", steps)
        rows = schedule.table + 0.0
        rows[list(guided), 0] = 1.5
        rows[1:, -1] = 0.2
        times = tuple((schedule.timesteps - 0.4).tolist())
        settings = (steps, 1.5, (0.0, 1.0), "clamp", times, rows.tolist(), [0] * steps)
        tables.append(FittedTable(*settings, weights_digest(weights)))
    config = replace(source.config, fitted=tuple(tables), sampling=SamplingParams(FITTED, 3, 0.0, 1.5))
    path = tmp_path_factory.mktemp("fitted") / "grey.safetensors"
    checkpoint.save(path, weights, config)
    return path


@contextmanager
def serving(path: Path, runner: ModelRunner | None = None, cold: bool = False, **limits: float) -> Iterator[TestClient]:
    """An application in this process, ready unless `cold`."""
    settings = Settings(checkpoint=str(path), device="cpu", threads=1, **limits)
    with TestClient(create_app(settings, ModelRunner if runner is None else lambda *how: runner)) as client:
        if not cold:
            wait_for(lambda: client.get("/readyz").status_code == 200, "readiness")
        yield client


@pytest.fixture(scope="session")
def client(grey_checkpoint: Path) -> Iterator[TestClient]:
    with serving(grey_checkpoint) as client:
        yield client


@pytest.fixture(scope="session")
def colour_client(colour_checkpoint: Path) -> Iterator[TestClient]:
    with serving(colour_checkpoint) as client:
        yield client


class SlowRunner(ModelRunner):
    """Takes 20 ms a step until `released`, and is cold until `warm`: a test decides how long things last.

    Its warm-up takes no time, so that no estimate of a busy machine refuses a request.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(checkpoint.load(path), torch.device("cpu"), micro_batch_size=4)
        self.released, self.warm = threading.Event(), threading.Event()
        self.warm.set()

    def warm_up(self, rows: int) -> None:
        assert self.warm.wait(30)

    def step(self, samples: list[Sample]) -> list[Sample]:
        self.released.wait(0.02)
        return super().step(samples)


@pytest.fixture
def held(grey_checkpoint: Path) -> Iterator[SlowRunner]:
    runner = SlowRunner(grey_checkpoint)
    yield runner
    runner.released.set()


@pytest.fixture(scope="session")
def server(grey_checkpoint: Path) -> Iterator[ServerProcess]:
    """`python -m app` on a port of its own, started by Python from nothing."""
    with ServerProcess("app", "--checkpoint", str(grey_checkpoint), fresh=True) as server:
        yield server


@pytest.fixture(scope="session")
def faulty(grey_checkpoint: Path) -> Iterator[ServerProcess]:
    """The same with a runner that fails as the seed says (see faulty_server.py), and a short queue."""
    argv = ["--max-pending-nfe", "40000", "--max-batch-size", "16"]
    with ServerProcess("tests.app.faulty_server", "--checkpoint", str(grey_checkpoint), *argv) as server:
        yield server
