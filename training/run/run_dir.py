"""The folder of a run: config.json, log.jsonl, loss.png, pictures, the last checkpoints with their states, the best."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from model import checkpoint
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
NO_ROOM = (errno.EIO, errno.ENOSPC, errno.EDQUOT)  # what of fsync must not be passed over


class RunDir:
    """Every file appears whole or not at all, and only one process at a time has the folder: `with` frees it.

    Raises OSError where the folder cannot be had, is in use, or has a run already.
    """

    def __init__(self, config: TrainConfig, resume: bool) -> None:
        self.path, self.keep = config.run_dir, config.keep
        self._can_plot = find_spec("matplotlib") is not None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise OSError(f"cannot make {self.path}: {error.strerror}; choose another --log_dir") from error
        self._warned = False
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

    def start(self, config: TrainConfig, iteration: int, data: DataRecord | None = None) -> None:
        """Makes the folder that of `config` at `iteration`: what a crash left of later iterations goes from the log.

        `data` is kept in config.json, too.
        """
        for part in self.path.glob("*.part"):
            part.unlink()
        log = self.path / "log.jsonl"
        if log.exists():
            lines = [line for line in log.read_text().splitlines(keepends=True) if _logged_by(line, iteration)]
            self._write("log.jsonl", "".join(lines).encode())
        options = json.loads(config.to_json()) | ({"data": data.to_dict()} if data else {})
        self._write("config.json", json.dumps(options, indent=2).encode())
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
        self._keep("samples-*.png", GRIDS)
        self._keep("sequence-*.png", self.keep)
        self._keep("sequence-*.gif", self.keep)

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
            self._flush(path)
            if best:
                shutil.copyfile(path, self.path / "best.part")
                self._move("best.part", "best.safetensors")
            torch.save(state, self.path / "state.part")  # last: from here on a resume takes the above as done
            self._move("state.part", f"state-{iteration:07d}.pt")
            self._flush(self.path)  # the names too, before older files go
        except (OSError, RuntimeError) as error:  # torch has its own for a full disk
            for part in self.path.glob("*.part"):
                part.unlink()
            raise OSError(f"cannot save iteration {iteration} in {self.path} (is the disk full?): {error}") from error
        self._keep("state-*.pt", self.keep)
        self._keep("checkpoint-*.safetensors", self.keep)

    def load_state(self) -> dict[str, Any] | None:
        """The newest state that can be read; None where the run has saved none. Raises OSError if none can be."""
        states = sorted(self.path.glob("state-*.pt"), key=_iteration, reverse=True)
        for state in states:
            try:
                loaded: dict[str, Any] = torch.load(state, weights_only=True, map_location="cpu")
                if "images_seen" not in loaded:  # from before they were counted
                    loaded["images_seen"] = loaded["iteration"] * read_config(self.path)[0].batch_size
                return loaded
            except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
                print(f"{state} cannot be read, so an older one is tried: {error}", file=sys.stderr)
        if states:
            raise OSError(f"none of the states in {self.path} can be read")
        return None

    def _keep(self, pattern: str, count: int) -> None:
        for old in sorted(self.path.glob(pattern), key=_iteration)[:-count]:
            old.unlink()

    def _write(self, name: str, data: bytes) -> None:
        (self.path / f"{name}.part").write_bytes(data)
        self._move(f"{name}.part", name)

    def _move(self, part: str, name: str) -> None:
        """Gives a whole file its name, after it is on the disk: not even a power failure leaves half of it."""
        self._flush(self.path / part)
        os.replace(self.path / part, self.path / name)

    def _take_lock(self) -> None:
        """Raises BlockingIOError where another process has it. The system frees it when a process dies."""
        try:
            if fcntl is None:
                raise OSError("this system has none")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:
            self._warn("locks no files", error, "see to it that no other process trains in it")

    def _flush(self, path: Path) -> None:
        """Waits until a file, or the names in a folder, are on the disk, where the file system can tell."""
        try:
            file = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
            try:
                os.fsync(file)
            finally:
                os.close(file)
        except OSError as error:
            if error.errno in NO_ROOM:
                raise
            self._warn("does not tell when a file is on the disk", error, "a power failure may lose checkpoints")

    def _warn(self, lack: str, error: OSError, consequence: str) -> None:
        """Once: of a file system that lacks one thing, little else is to be expected."""
        if not self._warned:
            self._warned = True
            print(f"{self.path}: its file system {lack} ({error.strerror or error}): {consequence}", file=sys.stderr)


def read_config(folder: Path) -> tuple[TrainConfig, DataRecord | None]:
    """The options of the run in a folder, and what it was trained on if it tells.

    Raises OSError where there is no run, ValueError, TypeError or KeyError where its config.json cannot be used.
    """
    options = json.loads((folder / "config.json").read_text("utf-8"))
    data = options.pop("data", None)
    return TrainConfig(**options), DataRecord.from_dict(data) if data else None


def _iteration(path: Path) -> int:
    """N of state-N.pt and checkpoint-N.safetensors."""
    return int(path.stem.split("-")[1])


def _logged_by(line: str, iteration: int) -> bool:
    """Whether a line of the log is whole and of `iteration` or before."""
    try:
        return bool(json.loads(line)["iteration"] <= iteration)
    except ValueError:
        return False
