"""Sampling schedules: a sampler made concrete for one request, one row of scalars per step, in float64.

With e the network's output for the class, u that for the null class and z standard normal noise (fresh, or x_T again),
a step is

    out    = u + g·(e - u)                      g = 1: only e is computed
    x0     = limit(p·x - q·out)                 limit: none, clamp to ±1, or dynamic
    x_next = a·x + b·x0 + c·x0_prev + d·x0_prev2 + s·exp(k·v)·z

so that requests with different samplers and step counts share one batch without a branch. v is the second half of e,
where the variance is learned. Which noise z is says the row's `draw`: the step's own number, or 0, which is x_T.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model.diffusion import VARIANCES, DiffusionConfig, GaussianDiffusion, Table, require_one_of
from model.sampling.solvers import CONSISTENCY, SAMPLERS, consistency
from model.sampling.timestep_spacing import LAMBDA_MIN_CLIPPED, SPACINGS, Timesteps, make_timesteps
from model.sigmas import Sigmas

COEFFICIENTS = ("g", "p", "q", "limit", "a", "b", "c", "d", "k", "s")
THRESHOLDING = ("none", "clamp", "dynamic")  # of x0; the column holds the place in this list
NOISE_ALONE = 0.0, 1.0  # what x begins as: the parts of a reference and of the noise
FITTED = "fitted"  # the sampler whose rows no formula has: the checkpoint does, see `model.sampling.fitted`


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


def _setting(
    default: Any, description: str, choices: Collection[str] | None = None, bounds: tuple[float, float] | None = None
) -> Any:
    metadata = {"description": description, "choices": choices and tuple(choices), "bounds": bounds}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class SamplingParams:
    """How a checkpoint is sampled when a request does not say; the arguments of `make_schedule`.

    The fields of requests, responses and headers and the options of command lines follow from these: `metadata` of each
    has its `description`, and the `choices` or `bounds` of its value, or None.
    """

    sampler: str = _setting("ddim", "", (*SAMPLERS, CONSISTENCY, FITTED))
    steps: int = _setting(50, "denoising steps", bounds=(1, math.inf))
    eta: float = _setting(0.0, "ddim's noise: 0 deterministic, 1 ancestral", bounds=(0, 1))
    guidance_scale: float = _setting(1.0, "classifier-free guidance; 1 for none")
    guidance_interval: tuple[float, float] = _setting(
        (0.0, 1.0), "where guidance acts, from one level of noise to another: 0 is the finished image, 1 is noise"
    )
    spacing: str = _setting("trailing", "which timesteps the steps visit", SPACINGS)
    limit: str = _setting(
        "clamp",
        "what keeps the predicted image within black and white at every step: "
        "nothing, clamping, or scaling by its own 99.5 % quantile",
        THRESHOLDING,
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "guidance_interval", tuple(self.guidance_interval))  # JSON has lists only

    def with_overrides(self, num_timesteps: int, **given: Any) -> SamplingParams:
        """These settings with what somebody asked for in their place; None is not asked for.

        Steps, eta and spacing are the sampler's: with another one they are `DEFAULT_STEPS`, at most `num_timesteps`
        (T), 0 and trailing. Without guidance there is no interval of it. Raises InvalidSamplingParams where they
        contradict each other. `CheckpointConfig.sampling_params` knows fitted tables, too.
        """
        given = {name: value for name, value in given.items() if value is not None}
        sampler = given.get("sampler", self.sampler)
        require_one_of(
            "sampler", sampler, (*SAMPLERS, CONSISTENCY)
        )  # fitted's are in a table, whose checkpoint is not known here
        if given.get("eta") and sampler != "ddim":
            raise InvalidSamplingParams("eta", f"belongs to the ddim sampler; {sampler} takes none")
        settings = self
        if sampler != self.sampler:
            plain = SamplingParams(sampler, min(DEFAULT_STEPS.get(sampler, 1), num_timesteps))
            settings = replace(self, sampler=sampler, steps=plain.steps, eta=plain.eta, spacing=plain.spacing)
        settings = replace(settings, **given)
        if settings.guidance_scale != 1:
            return settings
        if "guidance_interval" in given and settings.guidance_interval != (0, 1):
            raise InvalidSamplingParams(
                "guidance_interval", "says where guidance acts: it needs a guidance_scale besides 1"
            )
        return replace(settings, guidance_interval=(0.0, 1.0))

    def check(self) -> None:
        """Raises ValueError where a value is none of the choices, InvalidSamplingParams where it is out of bounds."""
        for setting in fields(self):
            value = getattr(self, setting.name)
            if setting.metadata["choices"]:
                require_one_of(setting.name, value, setting.metadata["choices"])
            low, high = setting.metadata["bounds"] or (-math.inf, math.inf)
            if math.isfinite(high) and not low <= value <= high:  # of steps T is the bound
                raise InvalidSamplingParams(setting.name, f"must be between {low} and {high}, not {value}")
        if not math.isfinite(self.guidance_scale):
            raise InvalidSamplingParams("guidance_scale", f"must be finite, not {self.guidance_scale}")
        if len(self.guidance_interval) != 2:
            raise InvalidSamplingParams(
                "guidance_interval", f"must be two numbers, lower end first, not {len(self.guidance_interval)}"
            )
        start, end = self.guidance_interval
        if not 0 <= start <= end <= 1:
            raise InvalidSamplingParams(
                "guidance_interval", f"must be within 0 and 1, lower end first, not {start}, {end}"
            )


@dataclass(frozen=True, eq=False)
class SamplingSchedule:
    """A sampler made concrete for one request.

    `timesteps` [S], descending, is what the network sees: int64, or float64 where they were fitted. `table` float64
    [S, 10] holds the scalars of `COEFFICIENTS`. `draws` int64 [S] is the number of each step's noise z: 1 … S, or 0,
    which is x_T's, drawn again. None is 1 … S. x begins as start[0] · reference + start[1] · noise: noise alone, unless
    it begins midway. Its scale, diffusers' `init_noise_sigma`, is 1 but for levels of noise, which end at sigma_max.
    """

    sampler: str
    timesteps: Timesteps | Table
    table: Table
    draws: Timesteps | None = None
    start: tuple[float, float] = NOISE_ALONE

    def draw(self, step: int) -> int:
        """The number of the noise of step `step` (from 0)."""
        return step + 1 if self.draws is None else int(self.draws[step])

    def __len__(self) -> int:
        return len(self.timesteps)

    def from_latents(self) -> SamplingSchedule:
        """The same for a reference that is the noise already."""
        return replace(self, start=(self.start[1], 0.0))

    def digest(self) -> str:
        """SHA-256, in hexadecimal, of all that it does."""
        draws = b"" if self.draws is None else self.draws.tobytes()
        start = b"" if self.start == NOISE_ALONE else np.array(self.start).tobytes()
        return hashlib.sha256(self.timesteps.tobytes() + self.table.tobytes() + draws + start).hexdigest()

    @cached_property
    def nfe(self) -> NDArray[np.int64]:
        """Network rows that each step takes, int64 [S]: two where guidance adds the null class."""
        return np.where(self.table[:, 0] == 1, 1, 2)

    @cached_property
    def nfe_of_steps(self) -> list[int]:
        """The same as Python's numbers."""
        return [int(rows) for rows in self.nfe]


def make_schedule(
    diffusion: GaussianDiffusion,
    sampler: str,
    steps: int,
    *,
    variance: str | None = None,
    strength: float = 1.0,
    **settings: Any,
) -> SamplingSchedule:
    """The table of `sampler` over `steps` timesteps; `settings` are the other fields of `SamplingParams`.

    `eta` in [0, 1] is ddim's. `guidance_scale` g is 1 for none; it acts where t/(T - 1), 0 for the finished image and 1
    for noise, is within `guidance_interval` (Kynkäänniemi et al. 2024). `spacing` is that of `make_timesteps`. `limit`
    is that of x0: none, clamp to [-1, 1], or dynamic, where the 99.5 % quantile of |x0| is scaled to 1 if it is more
    (Saharia et al. 2022, §2.3). Without a limit an eps network starts where log(alpha/sigma) ≥ -5.1, since its x0
    explodes before, unless ddpm takes all T steps. `variance` is ddpm's, the diffusion's own if None; fixed_large
    with fewer steps than T would leave noise in the image: it is refused, or, if not asked for here, replaced by
    fixed_small with a warning. With zero terminal SNR the first timestep must be the last of training (Lin et al.
    2023, §3.3). `strength` in (0, 1] is for an image to begin from: steps before the timestep nearest to that part of
    T - 1 are left out, and multistep solvers begin there. Raises ValueError, InvalidSamplingParams where one number is
    at fault.
    """
    params = SamplingParams(sampler, steps, **settings)
    params.check()
    if sampler == FITTED:
        raise InvalidSamplingParams("sampler", "fitted needs a checkpoint with fitted tables")
    if (sampler == CONSISTENCY) != (diffusion.config.prediction == CONSISTENCY):
        why = "belongs to consistency models" if sampler == CONSISTENCY else f"must be {CONSISTENCY}, not {sampler}"
        raise InvalidSamplingParams("sampler", f"{why}: their networks take a step to the image, and no other")
    num_timesteps, log_snr = diffusion.num_timesteps, diffusion.log_snr()
    is_ancestral = sampler == "ddpm" and steps == num_timesteps  # which never divides by more than √(1 - β)
    if diffusion.config.prediction == "eps" and params.limit == "none" and not is_ancestral:
        num_timesteps = int(np.sum(log_snr >= LAMBDA_MIN_CLIPPED))
    if not isinstance(steps, int):
        raise InvalidSamplingParams("steps", f"must be a whole number, not {steps}")
    if not 1 <= steps <= num_timesteps:
        why = "" if num_timesteps == diffusion.num_timesteps else " (of an eps network with limit none)"
        if why and sampler == "ddpm":
            why = f" or {diffusion.num_timesteps}, all of them,{why}"
        raise InvalidSamplingParams("steps", f"must be between 1 and {num_timesteps}{why}, not {steps}")
    told: Table | None = None
    if diffusion.config.sigmas is None:
        timesteps = make_timesteps(num_timesteps, steps, params.spacing, log_snr)
    else:
        diffusion, timesteps, told = _of_levels(diffusion.config, diffusion.config.sigmas, params)
    if diffusion.config.zero_terminal_snr and timesteps[0] < num_timesteps - 1:
        raise InvalidSamplingParams(
            "spacing",
            f"{params.spacing} starts at timestep {timesteps[0]}: zero terminal SNR needs {num_timesteps - 1}",
        )
    if not 0 < strength <= 1:
        raise InvalidSamplingParams("strength", f"must be above 0 and at most 1, not {strength}")
    if strength < 1:
        timesteps = timesteps[np.abs(timesteps - strength * (diffusion.num_timesteps - 1)).argmin() :]
    low, high = params.guidance_interval
    p, q = diffusion.x0_coefficients(timesteps)
    place = timesteps / (diffusion.num_timesteps - 1)
    columns: dict[str, Table | float] = {
        "g": np.where((low <= place) & (place <= high), params.guidance_scale, 1.0),
        "p": p,
        "q": q,
        "limit": float(THRESHOLDING.index(params.limit)),
        "c": 0.0,
        "d": 0.0,
        "k": 0.0,
        "s": 0.0,
    }
    solver = consistency if sampler == CONSISTENCY else SAMPLERS[sampler]
    columns |= solver(diffusion, timesteps, params.eta, _checked_variance(diffusion, sampler, steps, variance))
    if diffusion.config.sigmas is not None:
        columns |= diffusion.config.sigmas.in_image_units(columns, len(timesteps))
    table = np.stack([np.broadcast_to(columns[name], len(timesteps)) for name in COEFFICIENTS], axis=1)
    seen = timesteps if told is None else told[-len(timesteps) :]
    start = _start(diffusion, int(timesteps[0]), strength < 1)
    return SamplingSchedule(sampler, seen, table.astype(np.float64), start=start)


def _start(diffusion: GaussianDiffusion, timestep: int, midway: bool) -> tuple[float, float]:
    """What x begins as. A DDPM's x_T is standard normal, levels of noise have σ·ε, over √(σ² + sigma_data²)."""
    sigmas, alpha_bar = diffusion.config.sigmas, float(diffusion.alphas_cumprod[timestep])
    if not midway and sigmas is None:
        return NOISE_ALONE
    alpha = math.sqrt(alpha_bar) / (1 if sigmas is None else sigmas.sigma_data)
    return alpha * midway, math.sqrt(1 - alpha_bar)


def _of_levels(
    config: DiffusionConfig, sigmas: Sigmas, params: SamplingParams
) -> tuple[GaussianDiffusion, Timesteps, Table]:
    """The diffusion whose timesteps are the levels of noise that are visited, those, and what the network is told.

    They are those of Karras et al. 2022, eq. 5: the last is sigma_min, or with consistency the one before.
    """
    if params.spacing != SamplingParams.spacing:
        raise InvalidSamplingParams(
            "spacing", f"means nothing here: levels of noise have their own, not {params.spacing}"
        )
    count = max(params.steps + (params.sampler == CONSISTENCY), 2)  # which does not visit sigma_min
    timesteps = np.arange(count - 1, count - 1 - params.steps, -1)
    told = sigmas.timesteps(sigmas.levels(count)[timesteps])
    return GaussianDiffusion(replace(config, num_timesteps=count)), timesteps, told


def usable_variance(diffusion: GaussianDiffusion, steps: int) -> str:
    """ddpm's variance over `steps` steps: the diffusion's own, but fixed_small where fixed_large would leave noise."""
    variance = diffusion.config.variance
    return "fixed_small" if variance == "fixed_large" and steps < diffusion.num_timesteps else variance


def _checked_variance(diffusion: GaussianDiffusion, sampler: str, steps: int, asked: str | None) -> str:
    variance = diffusion.config.variance if asked is None else asked
    require_one_of("variance", variance, VARIANCES)
    if variance == "learned_range" != diffusion.config.variance:
        raise InvalidSamplingParams("variance", "learned_range needs a network that learned it")
    if sampler == "ddpm" and variance == "fixed_large" and steps < diffusion.num_timesteps:
        sentence = f"fixed_large needs all {diffusion.num_timesteps} steps: with {steps} noise would remain"
        if asked is not None:
            raise InvalidSamplingParams("variance", sentence)
        warnings.warn(f"variance {sentence}; fixed_small is used", stacklevel=3)
        return usable_variance(diffusion, steps)
    return variance
