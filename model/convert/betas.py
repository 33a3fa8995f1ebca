"""Beta schedules by the names that diffusers has for them, in its units: nothing is scaled by 1000 / T."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from model.diffusion import Table, cosine_betas


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
