"""A tiny teacher, and the words that distil it in some milliseconds."""

import json
from pathlib import Path
from typing import Any

import pytest

from model import checkpoint
from model.checkpoint import CheckpointConfig
from model.diffusion import DiffusionConfig
from model.nn.unet import UNet
from model.sampling.schedule import SamplingParams
from training.distillation import trainer
from training.run import run_dir

G = 2.0  # the teacher's guidance


@pytest.fixture
def teacher(tiny: UNet, tmp_path: Path) -> str:
    path = tmp_path / "teacher.safetensors"
    config = CheckpointConfig(
        tiny.config,
        DiffusionConfig(schedule="cosine", prediction="v"),
        ("cat", "dog", "emu"),
        SamplingParams("dpmpp_2m", 20, 0.0, G),
    )
    checkpoint.save(path, tiny.state_dict(), config)
    return str(path)


@pytest.fixture
def words(teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words of a distillation of some milliseconds."""
    monkeypatch.setattr(trainer, "HELD_OUT", 32)
    monkeypatch.setattr(run_dir, "save_plot", lambda path, log: None)
    monkeypatch.setattr(trainer, "git_revision", lambda: "0123")
    options = {"teacher": teacher, "steps": 2, "teacher_steps": 4, "trajectories": 64, "batch_size": 16}
    options |= {"iterations": 8, "log_rate": 2, "checkpoint_rate": 4, "log_dir": tmp_path / "runs", "run_name": "run"}
    options |= {"device": "cpu", "learning_rate": 1e-3, "warmup": 0}
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def log(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", "images_per_second")} for line in lines]
