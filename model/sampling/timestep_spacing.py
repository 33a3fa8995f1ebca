"""Which timesteps a sampler visits. Pure functions of numbers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Timesteps = NDArray[np.int64]
SPACINGS = ("leading", "trailing", "linspace", "quadratic", "logsnr")
LAMBDA_MIN_CLIPPED = -5.1  # log(alpha/sigma) below which there is nothing to tell from noise (Lu et al.'s clipping)


def make_timesteps(
    num_timesteps: int, steps: int, spacing: str, log_snr: NDArray[np.float64] | None = None
) -> Timesteps:
    """`steps` of the timesteps 0 … T - 1, int64 [steps], distinct and descending.

    leading ends at 0 and starts late; trailing starts at T - 1 and ends early; linspace spreads over both
    ends, as diffusers' DPM-Solver does (steps + 1 points, the last of them dropped) (Lin et al. 2023, table 2).
    quadratic has them denser towards 0, at (T - 1)·(i/steps)² (Song et al. 2021, §D.2, without its late start);
    logsnr has equal differences of `log_snr` [≥ T], log(alpha/sigma), and both ends (Lu et al. 2022a, §3.4).
    """
    if spacing == "leading":
        return np.arange(steps, dtype=np.int64)[::-1] * (num_timesteps // steps)
    if spacing == "trailing":
        return np.round(np.arange(num_timesteps, 0, -num_timesteps / steps)).astype(np.int64)[:steps] - 1
    if spacing == "linspace":
        if steps == num_timesteps:
            return np.arange(steps, dtype=np.int64)[::-1]
        return np.linspace(0, num_timesteps - 1, steps + 1).round().astype(np.int64)[:0:-1]
    if spacing == "quadratic":
        return _distinct((num_timesteps - 1) * (np.arange(1, steps + 1) / steps) ** 2, num_timesteps)
    if spacing == "logsnr":
        assert log_snr is not None, "spacing by log-SNR needs it"
        known = np.maximum(log_snr[:num_timesteps], LAMBDA_MIN_CLIPPED)[::-1]  # ascending, and T - 1 … 0
        targets = np.linspace(known[0], known[-1], steps)[::-1]
        points = np.interp(targets, known, np.arange(num_timesteps)[::-1].astype(np.float64))
        points[-1] = num_timesteps - 1
        return _distinct(points, num_timesteps)
    raise ValueError(f"spacing must be one of {', '.join(SPACINGS)}, not {spacing!r}")


def _distinct(points: NDArray[np.float64], num_timesteps: int) -> Timesteps:
    """Ascending points, rounded, moved apart where they meet, within 0 … T - 1; descending."""
    places = np.arange(len(points))
    timesteps = np.maximum.accumulate(points.round().astype(np.int64) - places) + places
    return np.minimum(timesteps, num_timesteps - len(points) + places)[::-1]
