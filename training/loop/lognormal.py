"""Timesteps whose noise levels have a normally distributed logarithm."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

LOGNORMAL = "lognormal"  # of --timestep_sampler


class LogNormal:
    """t whose noise level σ_t = √((1 - ᾱ_t)/ᾱ_t) is nearest to one with ln σ ~ N(mean, std²), in its logarithm.

    Karras et al. 2022 (EDM), table 1, have mean -1.2 and standard deviation 1.2. The draws are stratified, as
    `stratified` of the timestep samplers is. The losses are not weighted for it: what the network learns is weighted
    by how often each t is drawn. `alphas_cumprod` is ᾱ, float64 [T].
    """

    def __init__(
        self, alphas_cumprod: NDArray[np.float64], mean: float, std: float, device: torch.device | str = "cpu"
    ) -> None:
        alpha_bar = torch.from_numpy(alphas_cumprod)
        logs = 0.5 * ((1 - alpha_bar).log() - alpha_bar.log())  # of σ; infinite where ᾱ is 0
        between = (logs[1:] + logs[:-1]) / 2
        self._ends = torch.special.ndtr((between - mean) / std).to(device)  # where t ends and t + 1 begins, [T - 1]

    def draw(self, u: Tensor) -> Tensor:
        """t, int64 [N], from u [N] uniform in [0, 1)."""
        places = torch.arange(len(u), device=u.device, dtype=torch.float64)
        return torch.searchsorted(self._ends, (places + u.double()) / len(u), right=True)
