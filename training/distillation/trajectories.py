"""What a student learns from: the teacher's way from noise to image, made once by its inference network and kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model.backends.compile import compile_for_inference
from model.checkpoint import Checkpoint
from model.sampling.noise import normals
from model.sampling.schedule import SamplingParams
from model.sampling.step import sample
from training.evaluation.feature_files import FeatureFile

OWN_SEEDS = 2**63  # added to a run's seed: its x_T are none of those that requests and evaluations draw
AT_ONCE = 32  # trajectories that are made together, and end up in the file together


class Trajectories:
    """The guided teacher's states at the ends of its M steps, for x_T of Philox indices 0, 1, …

    Of K classes index i has class i mod K. The first `count` are made once, by `make`, and kept in a file in `folder`
    that all runs there share: it is of this teacher, these sampling settings, seed and precision. With `count` 0
    nothing is kept, and every batch is made when it is asked for.
    """

    def __init__(
        self,
        teacher: Checkpoint,
        params: SamplingParams,
        device: torch.device,
        seed: int,
        count: int,
        folder: Path,
        precision: str,
    ) -> None:
        self.params, self.device, self.count = params, device, -(-count // AT_ONCE) * AT_ONCE
        self.schedule = teacher.config.schedule(params)
        self.shape = teacher.config.unet.image_shape
        self._unet, self.own_seed = teacher.config.unet, OWN_SEEDS + seed
        self._network = compile_for_inference(teacher.network, device, precision)
        self._file: FeatureFile | None = None
        if self.count:
            plan = hashlib.sha256(self.schedule.timesteps.tobytes() + self.schedule.table.tobytes()).hexdigest()
            key = {"teacher": teacher.sha256, "plan": plan, "seed": seed, "precision": precision}
            columns = len(self.schedule) * int(np.prod(self.shape))
            self._file = FeatureFile(folder / "trajectories", key, columns, AT_ONCE)

    def make(self, stop: Callable[[], bool] = lambda: False) -> bool:
        """Makes what the file lacks of the first `count`; a killed run goes on. Says whether all are there."""
        if self._file is None or self._file.count >= self.count:
            return True
        bar = tqdm(total=self.count, initial=self._file.count, desc="trajectories", dynamic_ncols=True, mininterval=1)
        with bar:
            while self._file.count < self.count and not stop():
                first = self._file.count
                self._file.append(self._run(torch.arange(first, first + AT_ONCE)).flatten(1))
                bar.update(AT_ONCE)
        return self._file.count >= self.count

    def x_T(self, indices: Tensor) -> Tensor:
        """The noise that trajectories begin with, float32 [n, C, H, W] on the device."""
        return normals([self.own_seed] * len(indices), indices.tolist(), [0] * len(indices), self.shape, self.device)

    def classes(self, indices: Tensor) -> Tensor | None:
        """Their classes, int64 [n] on the device; None for an unconditional teacher."""
        return None if self._unet.num_classes is None else (indices % self._unet.num_classes).to(self.device)

    def states(self, indices: Tensor) -> Tensor:
        """The states after each of the M steps, float32 [n, M, C, H, W] on the device; the last are the images."""
        if self._file is None:
            return self._run(indices)
        rows = np.memmap(self._file.path, "<f4", "r", self._file.begin, (self._file.count, self._file.columns))
        kept = torch.from_numpy(rows[indices.numpy()].astype(np.float32, copy=False))
        return kept.reshape(len(indices), len(self.schedule), *self.shape).to(self.device)

    def _run(self, indices: Tensor) -> Tensor:
        """[n, M, C, H, W]."""
        states: list[Tensor] = []
        classes = self.classes(indices)
        sample(
            self._network,
            self.schedule,
            self.shape,
            seeds=[self.own_seed] * len(indices),
            indices=indices.tolist(),
            classes=None if classes is None else classes.tolist(),
            null_class=self._unet.num_classes if self._unet.null_class else None,
            device=self.device,
            on_step=lambda _, x, __: states.append(x),
        )
        return torch.stack(states, dim=1)
