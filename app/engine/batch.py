"""What the host says of the samples of one step: a few numbers for each. Their states stay where they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.engine.request import Sample
from model.sampling.schedule import COEFFICIENTS, THRESHOLDING, SamplingSchedule

Ints = NDArray[np.int64]
G, LIMIT, S = (COEFFICIENTS.index(name) for name in ("g", "limit", "s"))
UINT32_MASK = 0xFFFFFFFF


@dataclass(frozen=True, eq=False)
class Batch:
    """One row for each of N samples; thrown away after the step.

    `t` float64 [N] and `y` [N] are what the network sees (y None where it has no classes), `coefficients` float64
    [N, 10] a row of each sample's schedule, `words` [N, 4] what the noise is drawn from (see
    `model.sampling.noise.normals_of`).
    """

    t: NDArray[np.float64]
    y: Ints | None
    coefficients: NDArray[np.float64]
    words: Ints

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Batch:
        """For the next step of each."""
        places: dict[tuple[SamplingSchedule, int], int] = {}  # most samples share theirs with others
        which = [places.setdefault((s.request.schedule, s.step), len(places)) for s in samples]
        t = np.array([schedule.timesteps[step] for schedule, step in places], np.float64)
        rows = np.array([schedule.table[step] for schedule, step in places])
        draws = [schedule.draw(step) for schedule, step in places]
        y = None
        if samples[0].request.classes is not None:
            y = np.array([s.request.classes[s.i] for s in samples], np.int64)  # type: ignore[index]
        return cls(t[which], y, rows[which], rng_counters(samples, [draws[place] for place in which]))

    def of_those(self, which: NDArray[np.bool_]) -> Batch:
        """The rows where `which` [N] is true."""
        if which.all():
            return self
        y = None if self.y is None else self.y[which]
        return Batch(self.t[which], y, self.coefficients[which], self.words[which])

    def uses(self, name: str) -> bool:
        """Whether that coefficient is not zero in all rows."""
        return bool(self.coefficients[:, COEFFICIENTS.index(name)].any())

    @property
    def all_clamped(self) -> bool:
        """Whether the limit of every x_0 is clamp."""
        return bool((self.coefficients[:, LIMIT] == THRESHOLDING.index("clamp")).all())

    @property
    def noisy(self) -> NDArray[np.bool_]:
        """Whose step adds noise [N]."""
        return np.not_equal(self.coefficients[:, S], 0)

    @property
    def guided(self) -> NDArray[np.bool_]:
        """Whose step takes two rows of the network, one of them for the null class [N]."""
        return np.not_equal(self.coefficients[:, G], 1)

    @property
    def dynamic(self) -> NDArray[np.bool_]:
        """Whose x_0 has a dynamic limit [N]."""
        return np.equal(self.coefficients[:, LIMIT], THRESHOLDING.index("dynamic"))


def rng_counters(samples: Sequence[Sample], steps: Sequence[int]) -> Ints:
    """What each one's noise of such a step (0: x_T) is drawn from, int64 [N, 4]: seed, low word first, index, step."""
    seeds = [(s.request.seed, s.request.index + s.i, step) for s, step in zip(samples, steps, strict=True)]
    return np.array([(seed & UINT32_MASK, seed >> 32, i, step) for seed, i, step in seeds], np.int64).reshape(-1, 4)


def finite_rows(x: Tensor) -> list[bool]:
    """Which rows of x [N, C, H, W] are finite in all places. One sum tells of all where it is."""
    if math.isfinite(x.sum().item()):
        return [True] * len(x)
    found: list[bool] = torch.isfinite(x).flatten(1).all(1).tolist()
    return found
