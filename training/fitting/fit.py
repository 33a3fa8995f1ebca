"""One fit: a `LearnedSolver` brought near to its teacher's images, end to end. It resumes; a seed fixes the result."""

from __future__ import annotations

import math
import pickle
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.atomic_write import atomic_write
from model.diffusion import Network
from training.fitting.distance import Distance
from training.fitting.progress import say
from training.fitting.solver import LearnedSolver

SAVE_S = 20.0  # seconds between two saved states
CLIP = 1.0  # of the gradient's norm
DECAY = 0.999  # of the average of the parameters
ONE_STEP_BYTES = 2**30  # beyond which each step is computed anew for its gradient
FLOATS_PER_PIXEL = 60  # that a U-Net keeps for its gradient, for each of its base channels: a rough guess


@dataclass(frozen=True)
class Pairs:
    """x_T and what the teacher makes of it, float32 [N, C, H, W] each, and classes y int64 [N] or None."""

    noise: Tensor
    images: Tensor
    y: Tensor | None

    def __len__(self) -> int:
        return len(self.images)

    def select(self, which: Tensor) -> Pairs:
        """Those rows."""
        return Pairs(self.noise[which], self.images[which], None if self.y is None else self.y[which])


@dataclass(frozen=True)
class FitOptions:
    """How it is optimised."""

    iterations: int
    learning_rate: float
    batch_size: int
    seed: int


class Fit:
    """Adam on a solver's parameters, at a rate that falls as a cosine, and their moving average."""

    def __init__(
        self,
        solver: LearnedSolver,
        network: Network,
        null_class: int | None,
        distance: Distance,
        options: FitOptions,
        recompute: bool,
    ) -> None:
        self.solver, self.average = solver, deepcopy(solver)
        self._network, self._null_class, self._distance = network, null_class, distance
        self._options, self._recompute = options, recompute
        self._optimizer = torch.optim.Adam(solver.parameters(), options.learning_rate)
        self.iteration, self.seconds = 0, 0.0  # done, and how long they took

    def step(self, pairs: Pairs) -> float:
        """One iteration on the next batch of `pairs`; the loss. Raises ValueError where it is not finite."""
        started, options = time.perf_counter(), self._options
        batch = pairs.select(batch_of(len(pairs), options.batch_size, options.seed, self.iteration))
        for group in self._optimizer.param_groups:
            group["lr"] = options.learning_rate * 0.5 * (1 + math.cos(math.pi * self.iteration / options.iterations))
        images = self.solver(self._network, batch.noise, batch.y, self._null_class, self._recompute)
        loss = self._distance(images, batch.images).mean()
        if not torch.isfinite(loss):
            raise ValueError(f"the loss is {loss.item()} at iteration {self.iteration}: give a smaller --learning_rate")
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.solver.parameters(), CLIP)
        self._optimizer.step()
        self.iteration += 1
        decay = min(DECAY, self.iteration / (10 + self.iteration))
        with torch.no_grad():
            for mean, now in zip(self.average.parameters(), self.solver.parameters(), strict=True):
                mean.lerp_(now, 1 - decay)
        self.seconds += time.perf_counter() - started
        return loss.item()

    def run(self, pairs: Pairs, path: Path, key: str, tell: Callable[[int, float, float], None]) -> None:
        """All iterations that are left, from the state in `path` if it is of this `key`; a line says where it is not.
        `tell` hears of each: how many are done, the loss, and the seconds left."""
        self._load(path, key)
        saved = time.monotonic()
        while self.iteration < self._options.iterations:
            loss = self.step(pairs)
            left = self._options.iterations - self.iteration
            tell(self.iteration, loss, left * self.seconds / self.iteration)
            if not left or time.monotonic() - saved > SAVE_S:
                self._save(path, key)
                saved = time.monotonic()

    def _save(self, path: Path, key: str) -> None:
        state = {"solver": self.solver.state_dict(), "average": self.average.state_dict()}
        state |= {"optimizer": self._optimizer.state_dict(), "done": (self.iteration, self.seconds), "key": key}
        with atomic_write(path) as part:
            try:
                torch.save(state, part)
            except RuntimeError as error:  # torch's for a full disk
                raise OSError(f"cannot save {path} (is the disk full?): {error}") from error

    def _load(self, path: Path, key: str) -> None:
        if not path.exists():
            return
        try:
            state = read_state(path, self.solver)
        except ValueError as error:
            say(f"{error}: this fit begins anew", end="\n")
            return
        if state.get("key") != key:
            say(f"{path} is of other options: this fit begins anew", end="\n")
            return
        self.solver.load_state_dict(state["solver"])
        self.average.load_state_dict(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.iteration, self.seconds = state["done"]


def read_state(path: Path, solver: LearnedSolver) -> dict[str, Any]:
    """What a fit keeps while it runs. Raises ValueError where there is none of a solver like this one."""
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        for part in ("solver", "average"):
            deepcopy(solver).load_state_dict(state[part])
    except OSError as error:
        raise ValueError(f"{path} is not the state of a fit: {error.strerror or error}") from error
    except (RuntimeError, EOFError, pickle.UnpicklingError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not the state of a fit of {solver.steps} steps") from error
    return state


def batch_of(count: int, size: int, seed: int, iteration: int) -> Tensor:
    """Which pairs an iteration sees: every pair once before any twice, in an order of this seed."""
    size = min(size, count)
    per_pass = count // size
    generator = torch.Generator().manual_seed(seed * 1_000_003 + iteration // per_pass)
    return torch.randperm(count, generator=generator)[iteration % per_pass * size :][:size]


@torch.no_grad()
def mean_distance(make: Callable[[Pairs], Tensor], pairs: Pairs, distance: Distance, batch_size: int) -> float:
    """Of what `make` makes of the pairs' noise."""
    parts = [pairs.select(which) for which in torch.arange(len(pairs)).split(batch_size)]
    return float(torch.cat([distance(make(part), part.images) for part in parts]).mean())


def has_to_recompute(steps: int, batch_size: int, pixels: int, base_channels: int) -> bool:
    """Whether the gradient of all steps at once would take too much memory."""
    return 4 * steps * batch_size * pixels * base_channels * FLOATS_PER_PIXEL > ONE_STEP_BYTES
