"""The folder of a run: config.json, log.jsonl, loss.png, pictures, the last checkpoints with their states, the best."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch

from model import checkpoint
from model.atomic_write import atomic_write, warn_once
from model.checkpoint import CheckpointConfig
from model.images import Image
from training.data_record import DataRecord
from training.run.config import TrainConfig
from training.run.image_io import Frames, save_gif, save_png, save_strip
from training.run.plot import save_plot

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

GRIDS = 100  # the last so many stay
UNREADABLE = (RuntimeError, OSError, EOFError, pickle.UnpicklingError, TypeError, LookupError)  # of torch.load


class RunConfig(Protocol):
    """The options of a run: those of `training.train` or of `training.distill`."""

    keep: int
    run_dir: Path

    def to_json(self) -> str:
        """All of them, for config.json."""


class RunDir:
    """Every file appears whole or not at all, and only one process at a time has the folder: `with` frees it.

    Raises OSError where the folder cannot be had, is in use, or has a run already.
    """

    def __init__(self, config: RunConfig, resume: bool) -> None:
        self.path, self.keep = config.run_dir, config.keep
        self._can_plot = find_spec("matplotlib") is not None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise OSError(f"cannot make {self.path}: {error.strerror}; choose another --log_dir") from error
        try:
            self._take_lock()
        except BlockingIOError as error:
            os.close(self._lock)
            raise OSError(f"{self.path} is in use: another process is training in it") from error
        if not resume and (self.path / "config.json").exists():
            os.close(self._lock)
            raise FileExistsError(
                f"{self.path} holds a run already: go on with it by --resume, or choose another --run_name"
            )

    def __enter__(self) -> RunDir:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def start(self, config: RunConfig, iteration: int, data: DataRecord | None = None) -> None:
        """Makes the folder that of `config` at `iteration`: what a crash left of later iterations goes from the log.

        `data` is kept in config.json, too.
        """
        for part in self.path.glob("*.part"):
            part.unlink()
        log = self.path / "log.jsonl"
        if log.exists():
            lines = [line for line in log.read_text().splitlines(keepends=True) if _logged_by(line, iteration)]
            self._write("log.jsonl", "".join(lines).encode())
        self._write("config.json", config_text(config, data).encode())
        if not self._can_plot:
            print('No loss.png will be drawn: pip install "ddpm-serve[train]" has matplotlib for it', file=sys.stderr)

    def log(self, **values: Any) -> None:
        """Appends one line to log.jsonl."""
        with open(self.path / "log.jsonl", "a") as file:
            file.write(json.dumps(values) + "\n")

    def save_pictures(self, iteration: int, grid: Image, frames: Frames) -> None:
        """samples-ITERATION.png, sequence-ITERATION.png and .gif, and loss.png; the oldest go."""
        save_png(self.path / f"samples-{iteration:07d}.png", grid)
        save_strip(self.path / f"sequence-{iteration:07d}.png", frames)
        save_gif(self.path / f"sequence-{iteration:07d}.gif", frames)
        if self._can_plot:
            save_plot(self.path / "loss.png", self.path / "log.jsonl")
        self._keep("samples", ".png", GRIDS)
        self._keep("sequence", ".png", self.keep)
        self._keep("sequence", ".gif", self.keep)

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
                with atomic_write(self.path / "best.safetensors") as part:
                    shutil.copyfile(path, part)
            # Last: from here on a resume takes the above as done
            with atomic_write(self.path / f"state-{iteration:07d}.pt") as part:
                torch.save(state, part)
        except (OSError, RuntimeError) as error:  # torch has its own for a full disk
            raise OSError(f"cannot save iteration {iteration} in {self.path} (is the disk full?): {error}") from error
        self._keep("state", ".pt", self.keep)
        self._keep("checkpoint", ".safetensors", self.keep)

    def load_state(self) -> dict[str, Any] | None:
        """The newest state that can be read; None where the run has saved none. Raises OSError if none can be."""
        states = saved_states(self.path)
        for state in reversed(states.values()):
            try:
                loaded: dict[str, Any] = torch.load(state, weights_only=True, map_location="cpu")
                if "images_seen" not in loaded:  # from before they were counted
                    loaded["images_seen"] = loaded["iteration"] * read_config(self.path)[0].batch_size
                return loaded
            except UNREADABLE as error:
                print(f"{state} cannot be read, so an older one is tried: {error}", file=sys.stderr)
        if states:
            raise OSError(f"none of the states in {self.path} can be read")
        return None

    def _keep(self, kind: str, suffix: str, count: int) -> None:
        for old in list(_numbered(self.path, kind, suffix).values())[:-count]:
            old.unlink()

    def _write(self, name: str, data: bytes) -> None:
        with atomic_write(self.path / name) as part:
            part.write_bytes(data)

    def _take_lock(self) -> None:
        """Raises BlockingIOError where another process has it. The system frees it when a process dies."""
        try:
            if fcntl is None:
                raise OSError("this system has none")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:
            warn_once(self.path, "locks no files", error, "see to it that no other process trains in it")


def config_text(config: RunConfig, data: DataRecord | None) -> str:
    """What config.json holds; `read_config` reads it."""
    return json.dumps(json.loads(config.to_json()) | ({"data": data.to_dict()} if data else {}), indent=2)


def read_config(folder: Path) -> tuple[TrainConfig, DataRecord | None]:
    """The options of the run in a folder, and what it was trained on if it tells.

    Raises OSError where there is no run, ValueError, TypeError or KeyError where its config.json cannot be used.
    """
    options = json.loads((folder / "config.json").read_text("utf-8"))
    data = options.pop("data", None)
    return TrainConfig(**options), DataRecord.from_dict(data) if data else None


def saved_states(folder: Path) -> dict[int, Path]:
    """The run's states by iteration, the oldest first. Copies under other names are yours."""
    return _numbered(folder, "state", ".pt")


def _numbered(folder: Path, kind: str, suffix: str) -> dict[int, Path]:
    """The files KIND-N.SUFFIX by N, the lowest first."""
    names = re.compile(rf"{kind}-([0-9]+){re.escape(suffix)}")
    found = {int(named[1]): path for path in folder.iterdir() if (named := names.fullmatch(path.name))}
    return dict(sorted(found.items()))


def _logged_by(line: str, iteration: int) -> bool:
    """Whether a line of the log is whole and of `iteration` or before."""
    try:
        return bool(json.loads(line)["iteration"] <= iteration)
    except ValueError:
        return False
