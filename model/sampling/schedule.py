"""Sampling schedules: a sampler made concrete for one request, one row of scalars per step, in float64.

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
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from model.diffusion import VARIANCES, GaussianDiffusion, Table, one_of
from model.sampling.solvers import SAMPLERS
from model.sampling.timestep_spacing import LAMBDA_MIN_CLIPPED, Timesteps, make_timesteps

COEFFICIENTS = ("g", "p", "q", "limit", "a", "b", "c", "d", "k", "s")
THRESHOLDING = ("none", "clamp", "dynamic")  # of x0; the column holds the place in this list


DEFAULT_STEPS = {  # of a sampler that is not the checkpoint's own, where nobody says how many
    "ddpm": 250,  # as Dhariwal & Nichol 2021 do; digits look as good with 50
    "ddim": 50,
    "dpmpp_2m": 20,
    "dpmpp_3m": 20,
    "dpmpp_2m_sde": 50,
}


class InvalidSamplingParams(ValueError):
    """A setting that makes no sense here. `field` is its name, the first word of the sentence."""

    def __init__(self, field: str, sentence: str) -> None:
        super().__init__(f"{field} {sentence}")
        self.field = field


@dataclass(frozen=True)
class SamplingParams:
    """How a checkpoint is sampled when a request does not say; the arguments of `make_schedule`."""

    sampler: str = "ddim"
    steps: int = 50
    eta: float = 0.0
    guidance_scale: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    spacing: str = "trailing"
    limit: str = "clamp"

    def __post_init__(self) -> None:
        object.__setattr__(self, "guidance_interval", tuple(self.guidance_interval))  # JSON has lists only

    def with_overrides(
        self,
        num_timesteps: int,
        *,
        sampler: str | None = None,
        steps: int | None = None,
        eta: float | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        spacing: str | None = None,
        limit: str | None = None,
    ) -> SamplingParams:
        """These settings with what somebody asked for in their place; None is not asked for.

        Steps, eta and spacing are the sampler's: with another one they are `DEFAULT_STEPS`, at most `num_timesteps`
        (T), 0 and trailing. Without guidance there is no interval of it. Raises InvalidSamplingParams where they
        contradict each other.
        """
        own = self if sampler in (None, self.sampler) else None
        sampler = sampler or self.sampler
        one_of("sampler", sampler, SAMPLERS)
        if eta and sampler != "ddim":
            raise InvalidSamplingParams("eta", f"belongs to the ddim sampler; {sampler} takes none")
        if steps is None:
            steps = own.steps if own else min(DEFAULT_STEPS[sampler], num_timesteps)
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        interval = self.guidance_interval if guidance_interval is None else guidance_interval
        if scale == 1:
            if guidance_interval not in (None, (0, 1)):
                raise InvalidSamplingParams(
                    "guidance_interval", "says where guidance acts: it needs a guidance_scale besides 1"
                )
            interval = (0.0, 1.0)
        return SamplingParams(
            sampler,
            steps,
            (own.eta if own else 0.0) if eta is None else eta,
            scale,
            interval,
            (own.spacing if own else "trailing") if spacing is None else spacing,
            self.limit if limit is None else limit,
        )


@dataclass(frozen=True, eq=False)
class SamplingSchedule:
    """A sampler made concrete for one request.

    `timesteps` int64 [S], descending, is what the network sees; `table` float64 [S, 10] holds the scalars of
    `COEFFICIENTS`.
    """

    sampler: str
    timesteps: Timesteps
    table: Table

    def __len__(self) -> int:
        return len(self.timesteps)

    @cached_property
    def nfe(self) -> NDArray[np.int64]:
        """Network rows that each step takes, int64 [S]: two where guidance adds the null class."""
        return np.where(self.table[:, 0] == 1, 1, 2)


def make_schedule(
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
) -> SamplingSchedule:
    """The table of `sampler` over `steps` timesteps.

    `eta` in [0, 1] is ddim's. `guidance_scale` g is 1 for none; it acts where t/(T - 1), 0 for the finished image and 1
    for noise, is within `guidance_interval` (Kynkäänniemi et al. 2024). `spacing` is that of `make_timesteps`. `limit`
    is that of x0: none, clamp to [-1, 1], or dynamic, where the 99.5 % quantile of |x0| is scaled to 1 if it is more
    (Saharia et al. 2022, §2.3). Without a limit an eps network starts where log(alpha/sigma) ≥ -5.1, since its x0
    explodes before, unless ddpm takes all T steps. `variance` is ddpm's, the diffusion's own if None; fixed_large
    with fewer steps than T would leave noise in the image: it is refused, or, if not asked for here, replaced by
    fixed_small with a warning. With zero terminal SNR the first timestep must be the last of training (Lin et al.
    2023, §3.3). Raises ValueError, InvalidSamplingParams where one number is at fault.
    """
    one_of("sampler", sampler, SAMPLERS)
    one_of("limit", limit, THRESHOLDING)
    num_timesteps, log_snr = diffusion.num_timesteps, diffusion.log_snr()
    is_ancestral = sampler == "ddpm" and steps == num_timesteps  # which never divides by more than √(1 - β)
    if diffusion.config.prediction == "eps" and limit == "none" and not is_ancestral:
        num_timesteps = int(np.sum(log_snr >= LAMBDA_MIN_CLIPPED))
    if not isinstance(steps, int):
        raise InvalidSamplingParams("steps", f"must be a whole number, not {steps}")
    if not 1 <= steps <= num_timesteps:
        why = "" if num_timesteps == diffusion.num_timesteps else " (of an eps network with limit none)"
        if why and sampler == "ddpm":
            why = f" or {diffusion.num_timesteps}, all of them,{why}"
        raise InvalidSamplingParams("steps", f"must be between 1 and {num_timesteps}{why}, not {steps}")
    if not 0 <= eta <= 1:
        raise InvalidSamplingParams("eta", f"must be between 0 and 1, not {eta}")
    if not math.isfinite(guidance_scale):
        raise InvalidSamplingParams("guidance_scale", f"must be finite, not {guidance_scale}")
    low, high = guidance_interval
    if not 0 <= low <= high <= 1:
        raise InvalidSamplingParams("guidance_interval", f"must be within 0 and 1, lower end first, not {low}, {high}")
    timesteps = make_timesteps(num_timesteps, steps, spacing, log_snr)
    if diffusion.config.zero_terminal_snr and timesteps[0] < num_timesteps - 1:
        raise InvalidSamplingParams(
            "spacing", f"{spacing} starts at timestep {timesteps[0]}: zero terminal SNR needs {num_timesteps - 1}"
        )
    p, q = diffusion.x0_coefficients(timesteps)
    place = timesteps / (diffusion.num_timesteps - 1)
    columns: dict[str, Table | float] = {
        "g": np.where((low <= place) & (place <= high), guidance_scale, 1.0),
        "p": p,
        "q": q,
        "limit": float(THRESHOLDING.index(limit)),
        "c": 0.0,
        "d": 0.0,
        "k": 0.0,
        "s": 0.0,
    }
    columns |= SAMPLERS[sampler](diffusion, timesteps, eta, _checked_variance(diffusion, sampler, steps, variance))
    table = np.stack([np.broadcast_to(columns[name], len(timesteps)) for name in COEFFICIENTS], axis=1)
    return SamplingSchedule(sampler, timesteps, table.astype(np.float64))


def usable_variance(diffusion: GaussianDiffusion, steps: int) -> str:
    """ddpm's variance over `steps` steps: the diffusion's own, but fixed_small where fixed_large would leave noise."""
    variance = diffusion.config.variance
    return "fixed_small" if variance == "fixed_large" and steps < diffusion.num_timesteps else variance


def _checked_variance(diffusion: GaussianDiffusion, sampler: str, steps: int, asked: str | None) -> str:
    variance = diffusion.config.variance if asked is None else asked
    one_of("variance", variance, VARIANCES)
    if variance == "learned_range" != diffusion.config.variance:
        raise InvalidSamplingParams("variance", "learned_range needs a network that learned it")
    if sampler == "ddpm" and variance == "fixed_large" and steps < diffusion.num_timesteps:
        sentence = f"fixed_large needs all {diffusion.num_timesteps} steps: with {steps} noise would remain"
        if asked is not None:
            raise InvalidSamplingParams("variance", sentence)
        warnings.warn(f"variance {sentence}; fixed_small is used", stacklevel=3)
        return usable_variance(diffusion, steps)
    return variance
