"""Diffusion by levels of noise σ (Karras et al. 2022, "EDM"), in the words of a DDPM.

An EDM denoiser is D(x; σ) = c_skip·x + c_out·F(c_in·x; c_noise) of x = x_0 + σ·ε. Its c_in·x is a DDPM's x_t of images
over σ_data, with √ᾱ = cos φ and √(1 - ᾱ) = sin φ where tan φ = σ/σ_data; its F is -v of them. So a schedule of ours
runs it, as long as its x_0 are multiplied by σ_data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]


@dataclass(frozen=True)
class Sigmas:
    """Levels of noise, and what they are to the images. Those in between are equidistant in σ^(1/ρ) (eq. 5)."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    sigma_data: float = 0.5  # the standard deviation of the images
    time_scale: float = 1.0  # of what the network is told, ln(σ)/4

    def __post_init__(self) -> None:
        numbers = (self.sigma_min, self.sigma_max, self.rho, self.sigma_data, self.time_scale)
        if not all(isinstance(number, (int, float)) and math.isfinite(number) and number > 0 for number in numbers):
            raise ValueError(f"sigmas must be positive numbers, not {numbers}")
        if not (1e-5 <= self.sigma_min < self.sigma_max <= 1e5 and self.rho <= 100 and 1e-3 <= self.sigma_data <= 1e3):
            raise ValueError(f"sigmas are out of range: {numbers}")

    @classmethod
    def of(cls, fields: Sigmas | Mapping[str, float] | None) -> Sigmas | None:
        """From JSON, if it is not made already."""
        return cls(**fields) if isinstance(fields, Mapping) else fields

    def levels(self, count: int) -> Table:
        """So many σ from sigma_min to sigma_max, ascending, float64 [count]."""
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        levels: Table = (low + np.arange(count) / (count - 1) * (high - low)) ** self.rho
        return levels

    def betas(self, count: int) -> Table:
        """Of a DDPM with these levels, float64 [count]."""
        alphas_cumprod = self.sigma_data**2 / (self.levels(count) ** 2 + self.sigma_data**2)
        betas: Table = 1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1])
        return betas

    def x0_coefficients(self, sigma: Table, consistency: bool) -> tuple[Table, Table]:
        """(p, q): the image is p·c_in·x - q·F. A consistency model's is x at sigma_min (Song et al. 2023, §C)."""
        total = np.sqrt(sigma**2 + self.sigma_data**2)
        past = sigma - self.sigma_min if consistency else sigma
        return self.sigma_data**2 / (past**2 + self.sigma_data**2) * total, -past * self.sigma_data / total

    def in_image_units(self, columns: Mapping[str, Table | float], steps: int) -> dict[str, Table]:
        """Columns of a DDPM's schedule of so many steps: its states are those of images over sigma_data; x_0, and what
        the last step leaves, are images."""
        changed = {}
        for name in ("a", "b", "c", "d", "s"):
            column = np.broadcast_to(columns[name], steps) / (1 if name in "as" else self.sigma_data)
            changed[name] = np.append(column[:-1], column[-1] * self.sigma_data)
        return changed

    def timesteps(self, sigma: Table) -> Table:
        """What the network is told of σ."""
        timesteps: Table = self.time_scale * np.log(sigma) / 4
        return timesteps
