"""The folder of a run: config.json, log.jsonl, sample grids, the last few checkpoints with their states, and the best."""

from __future__ import annotations

import json
import os
import shutil
from typing import Any

import numpy as np
import torch
from PIL import Image

from model import checkpoint
from model.checkpoint import CheckpointConfig
from training.config import TrainConfig


class RunDir:
    """Every file appears whole or not at all. Raises FileExistsError for a new run where one already is."""

    def __init__(self, config: TrainConfig, resume: bool) -> None:
        self.path, self.keep = config.run_dir, config.keep
        if not resume and (self.path / "config.json").exists():
            raise FileExistsError(f"{self.path} holds a run already: go on with it by --resume, or choose another --run_name")
        self.path.mkdir(parents=True, exist_ok=True)
        self._write("config.json", config.to_json().encode())

    def log(self, **values: Any) -> None:
        """Appends one line to log.jsonl."""
        with open(self.path / "log.jsonl", "a") as file:
            file.write(json.dumps(values) + "\n")

    def save_grid(self, iteration: int, picture: np.ndarray) -> None:
        """samples-ITERATION.png from uint8 [H, W, C]."""
        part = self.path / "samples.part"
        Image.fromarray(picture.squeeze()).save(part, format="png")
        os.replace(part, self.path / f"samples-{iteration:07d}.png")

    def save(self, iteration: int, weights: dict[str, torch.Tensor], config: CheckpointConfig, state: dict[str, Any], best: bool) -> None:
        """checkpoint-ITERATION.safetensors and state-ITERATION.pt; the oldest beyond `keep` go."""
        part = self.path / "state.part"
        torch.save(state, part)
        os.replace(part, self.path / f"state-{iteration:07d}.pt")
        path = self.path / f"checkpoint-{iteration:07d}.safetensors"
        checkpoint.save(path, weights, config)
        if best:
            shutil.copyfile(path, self.path / "best.part")
            os.replace(self.path / "best.part", self.path / "best.safetensors")
        for pattern in ("state-*.pt", "checkpoint-*.safetensors"):
            for old in sorted(self.path.glob(pattern))[: -self.keep]:
                old.unlink()

    def load_state(self) -> dict[str, Any]:
        """The newest state. Raises FileNotFoundError where the run has saved none."""
        states = sorted(self.path.glob("state-*.pt"))
        if not states:
            raise FileNotFoundError(f"{self.path} has no state-*.pt to go on from")
        state: dict[str, Any] = torch.load(states[-1], weights_only=True, map_location="cpu")
        return state

    def _write(self, name: str, data: bytes) -> None:
        (self.path / f"{name}.part").write_bytes(data)
        os.replace(self.path / f"{name}.part", self.path / name)
