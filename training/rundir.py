"""The folder of a run: config.json, log.jsonl, sample grids, the last checkpoints with their states, and the best."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError

from model import checkpoint
from model.checkpoint import CheckpointConfig
from training.config import TrainConfig


class RunDir:
    """Every file appears whole or not at all. Raises OSError where the folder cannot be had, or has a run already."""

    def __init__(self, config: TrainConfig, resume: bool) -> None:
        self.path, self.keep = config.run_dir, config.keep
        if not resume and (self.path / "config.json").exists():
            raise FileExistsError(
                f"{self.path} holds a run already: go on with it by --resume, or choose another --run_name"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot make {self.path}: {error.strerror}; choose another --log_dir") from error

    def start(self, config: TrainConfig, iteration: int) -> None:
        """Makes the folder that of `config` at `iteration`: what a crash left of later iterations goes from the log."""
        for part in self.path.glob("*.part"):
            part.unlink()
        log = self.path / "log.jsonl"
        if log.exists():
            lines = [line for line in log.read_text().splitlines(keepends=True) if _logged_by(line, iteration)]
            self._write("log.jsonl", "".join(lines).encode())
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

    def save(
        self,
        iteration: int,
        weights: dict[str, torch.Tensor],
        config: CheckpointConfig,
        state: dict[str, Any],
        best: bool,
    ) -> None:
        """checkpoint-ITERATION.safetensors, best.safetensors if it is, state-ITERATION.pt; the oldest beyond `keep` go.

        Raises OSError where there is no room.
        """
        path = self.path / f"checkpoint-{iteration:07d}.safetensors"
        try:
            checkpoint.save(path, weights, config)
            if best:
                shutil.copyfile(path, self.path / "best.part")
                os.replace(self.path / "best.part", self.path / "best.safetensors")
            torch.save(state, self.path / "state.part")  # last: from here on a resume takes the above as done
            os.replace(self.path / "state.part", self.path / f"state-{iteration:07d}.pt")
        except (OSError, RuntimeError, SafetensorError) as error:  # each library has its own for a full disk
            for part in self.path.glob("*.part"):
                part.unlink()
            raise OSError(f"cannot save iteration {iteration} in {self.path} (is the disk full?): {error}") from error
        for pattern in ("state-*.pt", "checkpoint-*.safetensors"):
            for old in sorted(self.path.glob(pattern), key=_iteration)[: -self.keep]:
                old.unlink()

    def load_state(self) -> dict[str, Any] | None:
        """The newest state; None where the run has saved none."""
        newest = max(self.path.glob("state-*.pt"), key=_iteration, default=None)
        return torch.load(newest, weights_only=True, map_location="cpu") if newest else None

    def _write(self, name: str, data: bytes) -> None:
        (self.path / f"{name}.part").write_bytes(data)
        os.replace(self.path / f"{name}.part", self.path / name)


def _iteration(path: Path) -> int:
    """N of state-N.pt and checkpoint-N.safetensors."""
    return int(path.stem.split("-")[1])


def _logged_by(line: str, iteration: int) -> bool:
    """Whether a line of the log is whole and of `iteration` or before."""
    try:
        return bool(json.loads(line)["iteration"] <= iteration)
    except ValueError:
        return False
