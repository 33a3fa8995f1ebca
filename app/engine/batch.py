"""What the host says of the samples of one step: a few numbers for each. Their states stay where they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from app.engine.request import Sample
from model.sampling.schedule import COEFFICIENTS, THRESHOLDING, SamplingSchedule

Ints = NDArray[np.int64]
G, LIMIT, S = (COEFFICIENTS.index(name) for name in ("g", "limit", "s"))
DYNAMIC = THRESHOLDING.index("dynamic")
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

    @cached_property
    def _range(self) -> tuple[list[float], list[float]]:
        """The least and the most that each coefficient is."""
        return np.minimum.reduce(self.coefficients).tolist(), np.maximum.reduce(self.coefficients).tolist()

    def _is(self, column: int, value: float) -> bool:
        """Whether a coefficient is that in all rows."""
        least, most = self._range
        return least[column] == most[column] == value

    def uses(self, name: str) -> bool:
        """Whether that coefficient does something in any row: g where it is not 1, others where they are not 0."""
        return not self._is(COEFFICIENTS.index(name), float(name == "g"))

    @property
    def all_clamped(self) -> bool:
        """Whether the limit of every x_0 is clamp."""
        return self._is(LIMIT, THRESHOLDING.index("clamp"))

    @property
    def has_dynamic(self) -> bool:
        """Whether the limit of any x_0 is dynamic, the last of them."""
        return self._range[1][LIMIT] == DYNAMIC

    @property
    def noisy(self) -> NDArray[np.bool_]:
        """Whose step adds noise [N]."""
        return np.not_equal(self.coefficients[:, S], 0)

    @property
    def guided(self) -> NDArray[np.bool_]:
        """Whose step takes two rows of the network, one of them for the null class [N]."""
        return np.not_equal(self.coefficients[:, G], 1)


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
