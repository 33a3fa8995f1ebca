"""Plans: a sampler made concrete for one request, one row of scalars per step, made in float64 from the beta schedule.

With e the network's output for the class, u that for the null class and z standard normal noise, a step is

    out    = u + g·(e - u)                      g = 1: only e is computed
    x0     = limit(p·x - q·out)                 limit: none, clamp to ±1, or dynamic
    x_next = a·x + b·x0 + c·x0_prev + d·x0_prev2 + s·exp(k·v)·z

so that requests with different samplers and step counts share one batch without a branch. v is the second half of e,
where the variance is learned.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from model.diffusion import VARIANCES, GaussianDiffusion, Table, one_of
from model.samplers import SAMPLERS
from model.spacing import MIN_LOG_SNR, Timesteps, spaced

COLUMNS = ("g", "p", "q", "limit", "a", "b", "c", "d", "k", "s")
LIMITS = ("none", "clamp", "dynamic")  # of x0; the column holds the place in this list


@dataclass(frozen=True)
class SamplingDefaults:
    """How a checkpoint is sampled when a request does not say."""

    sampler: str = "ddim"
    steps: int = 50
    eta: float = 0.0
    guidance_scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Plan:
    """A sampler made concrete for one request.

    `timesteps` int64 [S], descending, is what the network sees; `table` float64 [S, 10] holds the scalars of
    `COLUMNS`.
    """

    sampler: str
    timesteps: Timesteps
    table: Table

    def __len__(self) -> int:
        return len(self.timesteps)

    @property
    def rows(self) -> NDArray[np.int64]:
        """Rows of a U-Net batch that each step takes, int64 [S]: two where guidance adds the null class."""
        return np.where(self.table[:, 0] == 1, 1, 2)


def make_plan(
    diffusion: GaussianDiffusion,
    sampler: str,
    steps: int,
    *,
    eta: float = 0.0,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    spacing: str = "trailing",
    limit: str = "clamp",
    variance: str | None = None,
) -> Plan:
    """The table of `sampler` over `steps` timesteps.

    `eta` in [0, 1] is ddim's. `guidance_scale` g is 1 for none; it acts where t/(T - 1) is within `guidance_interval`
    (Kynkäänniemi et al. 2024). `limit` is that of x0: none, clamp to [-1, 1], or dynamic, where the 99.5 % quantile of
    |x0| is scaled to 1 if it is more (Saharia et al. 2022, §2.3). Without a limit an eps network starts where
    log(alpha/sigma) ≥ -5.1, since its x0 explodes before. `variance` is ddpm's, the diffusion's own if None;
    fixed_large with fewer steps than T would leave noise in the image: it is refused, or, if not asked for here,
    replaced by fixed_small with a warning. Raises ValueError on values out of range.
    """
    one_of("sampler", sampler, SAMPLERS)
    one_of("limit", limit, LIMITS)
    num_timesteps, log_snr = diffusion.num_timesteps, diffusion.log_snr()
    if diffusion.config.prediction == "eps" and limit == "none":
        num_timesteps = int(np.sum(log_snr >= MIN_LOG_SNR))
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"steps must be between 1 and {num_timesteps}, not {steps}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 and 1, not {eta}")
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale must be finite, not {guidance_scale}")
    low, high = guidance_interval
    if not 0 <= low <= high <= 1:
        raise ValueError(f"guidance_interval must be within 0 and 1, lower end first, not {guidance_interval}")
    timesteps = spaced(num_timesteps, steps, spacing, log_snr)
    p, q = diffusion.x0_coefficients(timesteps)
    place = timesteps / (diffusion.num_timesteps - 1)
    columns: dict[str, Table | float] = {
        "g": np.where((low <= place) & (place <= high), guidance_scale, 1.0),
        "p": p,
        "q": q,
        "limit": float(LIMITS.index(limit)),
        "c": 0.0,
        "d": 0.0,
        "k": 0.0,
        "s": 0.0,
    }
    columns |= SAMPLERS[sampler](diffusion, timesteps, eta, _variance(diffusion, sampler, steps, variance))
    table = np.stack([np.broadcast_to(columns[name], len(timesteps)) for name in COLUMNS], axis=1)
    return Plan(sampler, timesteps, table.astype(np.float64))


def _variance(diffusion: GaussianDiffusion, sampler: str, steps: int, asked: str | None) -> str:
    variance = diffusion.config.variance if asked is None else asked
    one_of("variance", variance, VARIANCES)
    if variance == "learned_range" != diffusion.config.variance:
        raise ValueError("variance learned_range needs a network that learned it")
    if sampler == "ddpm" and variance == "fixed_large" and steps < diffusion.num_timesteps:
        sentence = f"variance fixed_large needs all {diffusion.num_timesteps} steps: with {steps} noise would remain"
        if asked is not None:
            raise ValueError(sentence)
        warnings.warn(f"{sentence}; fixed_small is used", stacklevel=3)
        return "fixed_small"
    return variance
