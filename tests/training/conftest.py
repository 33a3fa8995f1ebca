"""Small data sets and tiny networks on disk. Nothing here reaches the network or leaves a cache behind."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from model import checkpoint
from model.checkpoint import CheckpointConfig
from model.diffusion import DiffusionConfig
from model.nn.config import UNetConfig
from model.nn.unet import UNet
from model.sampling.schedule import SamplingParams
from tests.forked import Forked
from training import evaluate
from training.classifier.network import Classifier, ClassifierConfig
from training.evaluation import feature_extractor


@pytest.fixture(autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """For processes through the environment; in this one `datasets` has read it already if anyone imported it."""
    import datasets
    import huggingface_hub

    cache = tmp_path_factory.mktemp("huggingface")
    for name, value in {"HF_HOME": cache, "HF_DATASETS_CACHE": cache, "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


ImageFolder = Callable[..., Path]


@pytest.fixture
def image_folder(tmp_path: Path) -> ImageFolder:
    """Writes PNGs 000.png … into `folder`/`class`/ for every class; class k is of one shade, plus a little noise."""

    def make(
        folder: str = "pictures",
        classes: Sequence[str] = ("cat", "dog"),
        count: int = 15,
        size: tuple[int, int] = (8, 12),
        mode: str = "L",
    ) -> Path:
        rng = np.random.default_rng(0)
        for k, name in enumerate(classes):
            (tmp_path / folder / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = rng.integers(0, 9, (*size, 3) if mode == "RGB" else size) + 200 * k // max(1, len(classes) - 1)
                Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / folder / name / f"{i:03d}.png")
        return tmp_path / folder

    return make


@pytest.fixture
def tiny_options(image_folder: ImageFolder, tmp_path: Path) -> dict[str, Any]:
    """Keywords of a TrainConfig: 29 images of two classes to train on, some milliseconds a step."""
    return {
        "dataset": str(image_folder()),
        "use_labels": True,
        "base_channels": 12,
        "channel_mults": (1,),
        "num_res_blocks": 1,
        "attention_resolutions": (),
        "time_emb_dim": 16,
        "batch_size": 8,
        "iterations": 8,
        "learning_rate": 1e-3,
        "log_rate": 2,
        "checkpoint_rate": 4,
        "sample_steps": 2,
        "device": "cpu",
        "log_dir": str(tmp_path / "runs"),
        "run_name": "run",
    }


@pytest.fixture
def command_line(tiny_options: dict[str, Any]) -> list[str]:
    """The same as words of a command line."""
    words = []
    for name, value in tiny_options.items():
        words += [f"--{name}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return words


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few validation images, and no loss.png, which takes longer than the rest of a tiny run (test_plot.py has it); one
    git revision, though someone may commit in the middle of a test."""
    from training import train
    from training.loop import validation
    from training.run import run_dir

    monkeypatch.setattr(run_dir, "save_plot", lambda path, log: None)
    monkeypatch.setattr(validation, "VALIDATION_IMAGES", 64)
    monkeypatch.setattr(train, "git_revision", lambda: "0123")


@pytest.fixture
def read_log() -> Callable[[Path], list[dict[str, Any]]]:
    """Reads the lines of a run's log.jsonl, but for what depends on the clock."""

    def read(folder: Path) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k not in ("time", "images_per_second")} for line in lines]

    return read


@pytest.fixture
def start() -> Iterator[Callable[..., Forked]]:
    """Starts `python -m module words…` in the repository's root; it does not outlive the test."""
    with ExitStack() as stack:
        yield lambda module, *words: stack.enter_context(Forked(module, words, os.environ))


@pytest.fixture
def save_checkpoint(tiny: UNet, tmp_path: Path) -> Callable[..., str]:
    """Writes a checkpoint of the tiny network (of three classes), or of a fresh one of another configuration."""

    def save(config: UNetConfig | None = None) -> str:
        network = tiny if config is None else UNet(config)
        names = ("cat", "dog", "emu")[: network.config.num_classes or 0]
        path = tmp_path / "tiny.safetensors"
        settings = CheckpointConfig(network.config, DiffusionConfig(), names, SamplingParams("ddim", 2, 0.5, 1.0))
        checkpoint.save(path, network.state_dict(), settings)
        return str(path)

    return save


@pytest.fixture
def pictures(image_folder: ImageFolder, tmp_path: Path) -> Path:
    """60 images to train on and 12 held out, of three shades: cats black, dogs grey, emus bright."""
    classes = ("cat", "dog", "emu")
    image_folder("pictures/train", classes=classes, count=20, size=(8, 8))
    image_folder("pictures/test", classes=classes, count=4, size=(8, 8))
    return tmp_path / "pictures"


@pytest.fixture
def save_extractor(tmp_path: Path) -> Callable[..., str]:
    """Writes a classifier of 8 × 8 images that knows nothing."""

    def save(names: tuple[str, ...] = ("cat", "dog", "emu"), channels: int = 1, seed: int = 0) -> str:
        torch.manual_seed(seed)
        network = Classifier(ClassifierConfig(channels, (8, 8), len(names), width=3)).eval()
        feature_extractor.save(
            tmp_path / "extractor.safetensors", network, names, {"accuracy": 0.625, "dataset": "pictures"}
        )
        return str(tmp_path / "extractor.safetensors")

    return save


@pytest.fixture
def evaluation(
    pictures: Path, tmp_path: Path, save_checkpoint: Callable[..., str], save_extractor: Callable[..., str]
) -> list[str]:
    """The words of an evaluation of some milliseconds: 12 images, two steps each, by fives."""
    words = ["--checkpoint", save_checkpoint(), "--features", save_extractor(), "--dataset", str(pictures)]
    return [*words, "--out", str(tmp_path / "result.json"), "--num_images", "12", "--batch_size", "5"]


@pytest.fixture
def evaluated() -> Callable[..., dict[str, Any]]:
    """Runs an evaluation, the last value of an option counting, and returns what depends on neither time nor words."""

    def run(words: list[str], everything: bool = False) -> dict[str, Any]:
        assert evaluate.main(words) == 0
        out = words[len(words) - words[::-1].index("--out")]
        result: dict[str, Any] = json.loads(Path(out).read_text())
        return result if everything else {k: v for k, v in result.items() if k not in ("time", "command")}

    return run
