"""The forward process and its loss (Ho et al. 2020): beta schedules, q(x_t | x_0), what the network predicts.

t runs from 0 (almost clean) to T - 1 (almost noise). All tables are float64, cast where they meet images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x [N, C, H, W], t [N], y [N] or None) → prediction [N, C, H, W]."""

Table = NDArray[np.float64]


def linear_betas(num_timesteps: int, low: float = 1e-4, high: float = 0.02) -> Table:
    """Ho et al.'s linear betas, scaled by 1000 / T so that fewer timesteps end at the same noise."""
    scale = 1000 / num_timesteps
    return np.linspace(low * scale, high * scale, num_timesteps, dtype=np.float64)


def cosine_betas(num_timesteps: int) -> Table:
    """Nichol & Dhariwal 2021, eq. 17: ᾱ(u) = cos²((u + 0.008)/1.008 · π/2), betas clipped at 0.999."""
    u = np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps
    alpha_bar = np.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    betas: Table = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    return betas


@dataclass(frozen=True)
class DiffusionConfig:
    """Everything that fixes the forward process and the meaning of the network's output."""

    num_timesteps: int = 1000
    schedule: str = "linear"  # linear, cosine
    schedule_low: float = 1e-4
    schedule_high: float = 0.02
    prediction: str = "eps"  # eps, x0, v
    loss_type: str = "l2"  # l1, l2

    def __post_init__(self) -> None:
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("prediction", self.prediction, PREDICTIONS)
        _one_of("loss_type", self.loss_type, LOSSES)
        if not isinstance(self.num_timesteps, int) or not 2 <= self.num_timesteps <= 100_000:
            raise ValueError(f"num_timesteps must be a whole number from 2 to 100000, not {self.num_timesteps}")
        betas = self.betas()
        if not (np.all(betas > 0) and np.all(betas < 1)):
            raise ValueError(
                f"these settings give betas outside (0, 1): {betas.min():.3g} to {betas.max():.3g}; "
                "with few timesteps the linear schedule needs smaller schedule_low and schedule_high"
            )

    def betas(self) -> Table:
        """β_t, float64 [T]."""
        return SCHEDULES[self.schedule](self)


SCHEDULES: dict[str, Callable[[DiffusionConfig], Table]] = {
    "linear": lambda c: linear_betas(c.num_timesteps, c.schedule_low, c.schedule_high),
    "cosine": lambda c: cosine_betas(c.num_timesteps),
}
PREDICTIONS = ("eps", "x0", "v")
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {  # of each element
    "l1": partial(F.l1_loss, reduction="none"),
    "l2": partial(F.mse_loss, reduction="none"),
}


class GaussianDiffusion:
    """q(x_t | x_0) = N(√ᾱ_t·x_0, (1 - ᾱ_t)·I), and the loss of a network that undoes it.

    The tables `betas`, `alphas_cumprod` (ᾱ) are float64 numpy arrays [T]; methods take image tensors
    [N, C, H, W] in [-1, 1] and timesteps t, int64 [N].
    """

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        self.num_timesteps = config.num_timesteps
        self.betas = config.betas()
        self.alphas_cumprod = np.cumprod(1 - self.betas, dtype=np.float64)
        self._alpha = torch.from_numpy(np.sqrt(self.alphas_cumprod))
        self._sigma = torch.from_numpy(np.sqrt(1 - self.alphas_cumprod))

    def to(self, device: torch.device | str) -> GaussianDiffusion:
        """Moves the tables that meet images to `device`, so that a training step copies nothing."""
        self._alpha, self._sigma = self._alpha.to(device), self._sigma.to(device)
        return self

    def alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ_t and √(1 - ᾱ_t), each [N, 1, 1, 1] in the type of `like`."""
        alpha, sigma = self._alpha[t].to(like.dtype), self._sigma[t].to(like.dtype)
        return alpha.reshape(-1, 1, 1, 1), sigma.reshape(-1, 1, 1, 1)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = √ᾱ_t·x_0 + √(1 - ᾱ_t)·ε (Ho et al., eq. 4)."""
        alpha, sigma = self.alpha_sigma(t, x0)
        return alpha * x0 + sigma * noise

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network should have said: ε, x_0, or v = √ᾱ·ε - √(1 - ᾱ)·x_0 (Salimans & Ho 2022)."""
        if self.config.prediction == "eps":
            return noise
        if self.config.prediction == "x0":
            return x0
        alpha, sigma = self.alpha_sigma(t, x0)
        return alpha * noise - sigma * x0

    def loss(self, network: Network, x0: Tensor, y: Tensor | None, t: Tensor, noise: Tensor) -> Tensor:
        """The training loss of each image, float32 [N] (Ho et al., eq. 14, for l2 and eps)."""
        out = network(self.q_sample(x0, t, noise), t, y)
        distance = LOSSES[self.config.loss_type]
        return distance(out.float(), self.target(x0, t, noise)).mean(dim=(1, 2, 3))

    def x0_coefficients(self, t: NDArray[np.int64]) -> tuple[Table, Table]:
        """(p, q), float64 [len(t)] each: x_0 = p·x_t - q·out, whatever the network predicts."""
        alpha, sigma = np.sqrt(self.alphas_cumprod[t]), np.sqrt(1 - self.alphas_cumprod[t])
        if self.config.prediction == "eps":
            return 1 / alpha, sigma / alpha
        if self.config.prediction == "x0":
            return np.zeros_like(alpha), -np.ones_like(alpha)
        return alpha, sigma


def _one_of(name: str, value: str, valid: Collection[str]) -> None:
    if value not in valid:
        raise ValueError(f"{name} must be one of {', '.join(valid)}, not {value!r}")
