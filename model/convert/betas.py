"""Betas and their names: diffusers' schedules, in its units (nothing is scaled by 1000 / T), and back to ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from model.convert.layout import UnsupportedCheckpointError
from model.diffusion import TRAINED, DiffusionConfig, Table, cosine_betas, linear_betas, sigmoid_betas


def _of_alpha_bar(alpha_bar: Callable[[Table], Table]) -> Callable[[int, float, float], Table]:
    """Betas of ᾱ(u), u from 0 to 1, clipped at 0.999; they have no ends to choose."""

    def betas(num_timesteps: int, low: float, high: float) -> Table:
        values = alpha_bar(np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps)
        result: Table = np.minimum(1 - values[1:] / values[:-1], 0.999)
        return result

    return betas


def _laplace(u: Table) -> Table:
    """√(s / (1 + s)), where log s is a Laplace distribution's quantile at 1 - u (Hang et al. 2024)."""
    log_snr = -0.5 * np.where(u <= 0.5, 1.0, -1.0) * np.log(1 - 2 * np.abs(0.5 - u) + 1e-6)
    result: Table = np.sqrt(1 / (1 + np.exp(-log_snr)))
    return result


def _sigmoid(num_timesteps: int, low: float, high: float) -> Table:
    """From `low` to `high` along a sigmoid's course from -6 to 6 (Xu et al. 2022, GeoDiff)."""
    result: Table = low + (high - low) / (1 + np.exp(-np.linspace(-6, 6, num_timesteps, dtype=np.float64)))
    return result


SCHEDULES: dict[str, Callable[[int, float, float], Table]] = {
    "linear": lambda steps, low, high: np.linspace(low, high, steps, dtype=np.float64),
    "scaled_linear": lambda steps, low, high: np.linspace(low**0.5, high**0.5, steps, dtype=np.float64) ** 2,
    "squaredcos_cap_v2": lambda steps, low, high: cosine_betas(steps),
    "sigmoid": _sigmoid,
    "laplace": _of_alpha_bar(_laplace),
    "exp": _of_alpha_bar(lambda u: np.exp(-12 * u)),
}


def betas_of(schedule: str, num_timesteps: int, low: float, high: float) -> Table:
    """float64 [T], from `low` to `high` where the schedule has ends. Raises KeyError for other names."""
    return SCHEDULES[schedule](num_timesteps, low, high)


PRECISION = {torch.float16: (2e-3, 6e-8), torch.bfloat16: (8e-3, 1e-9)}  # relative, absolute: of rounded betas


def diffusion_of(betas: Table, dtype: torch.dtype = torch.float64, **settings: Any) -> DiffusionConfig:
    """The diffusion that has these betas [T], as rounded to `dtype`; `settings` are its other fields.

    Betas of a schedule here are named by it; others are kept as they are.
    """
    if betas.ndim != 1 or not 2 <= len(betas) <= 100_000 or not np.all((betas > 0) & (betas <= 1)):
        raise UnsupportedCheckpointError("its betas are not from 2 to 100000 numbers between 0 and 1")
    steps = len(betas)
    scale = 1000 / steps
    rtol, atol = PRECISION.get(dtype, (1e-5, 1e-9))
    for name, schedule in (("cosine", cosine_betas), ("sigmoid", sigmoid_betas)):
        if np.allclose(schedule(steps), betas, rtol, atol):
            return DiffusionConfig(steps, name, **settings)
    ends = [(1e-4, 0.02)]  # the usual ones, where they are meant
    ends += [(float(f"{betas[0] / scale:.{n}g}"), float(f"{betas[-1] / scale:.{n}g}")) for n in (2, 3, 6)]
    for low, high in ends:
        if np.allclose(linear_betas(steps, low, high), betas, rtol, atol):
            return DiffusionConfig(steps, "linear", low, high, **settings)
    return DiffusionConfig(steps, TRAINED, trained_betas=tuple(betas.tolist()), **settings)
