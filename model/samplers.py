"""Samplers as tables: a plan has one row of scalars per step, made in float64 from the beta schedule.

With e the network's output for the class, u that for the null class and z standard normal noise, a step is

    out    = u + g·(e - u)                      g = 1: only e is computed
    x0     = limit(p·x - q·out)                 limit: none, clamp to ±1, or dynamic
    x_next = a·x + b·x0 + c·x0_prev + d·x0_prev2 + s·exp(k·v)·z

so that requests with different samplers and step counts share one batch without a branch. v is the second half of e,
where the variance is learned. A new sampler is one function and one entry in `SAMPLERS`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.diffusion import VARIANCES, GaussianDiffusion, Network, Table, one_of
from model.rng import normals
from model.spacing import MIN_LOG_SNR, Timesteps, spaced

COLUMNS = ("g", "p", "q", "limit", "a", "b", "c", "d", "k", "s")
LIMITS = ("none", "clamp", "dynamic")  # of x0; the column holds the place in this list
DYNAMIC_QUANTILE = 0.995


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


def ddpm(diffusion: GaussianDiffusion, timesteps: Timesteps, eta: float, variance: str) -> dict[str, Table]:
    """Ancestral sampling (Ho et al. 2020, eq. 7), respaced (Nichol & Dhariwal 2021, eq. 19).

    `variance` is the posterior's (fixed_small), β (fixed_large), or what the network's v says between their logarithms
    (learned_range, eq. 15). `eta` is not used: it belongs to ddim.
    """
    ab, ab_prev = _alpha_bars(diffusion, timesteps)
    beta = 1 - ab / ab_prev
    small = beta * (1 - ab_prev) / (1 - ab)  # 0 on the last row, which adds no noise
    s, k = np.sqrt(small), np.zeros(len(ab))
    if variance == "fixed_large":
        s = np.where(small > 0, np.sqrt(beta), 0)
    elif variance == "learned_range":
        k[:-1] = (np.log(beta[:-1]) - np.log(small[:-1])) / 4
        s[:-1] = np.exp((np.log(beta[:-1]) + np.log(small[:-1])) / 4)
    return {
        "a": (1 - ab_prev) * np.sqrt(1 - beta) / (1 - ab),
        "b": beta * np.sqrt(ab_prev) / (1 - ab),
        "k": k,
        "s": s,
    }


def ddim(diffusion: GaussianDiffusion, timesteps: Timesteps, eta: float, variance: str) -> dict[str, Table]:
    """Song et al. 2021, eq. 12 and 16: eta 0 is deterministic, eta 1 is ancestral.

    eps is re-derived from the limited x0.
    """
    ab, ab_prev = _alpha_bars(diffusion, timesteps)
    s = eta * np.sqrt((1 - ab_prev) / (1 - ab)) * np.sqrt(1 - ab / ab_prev)
    a = np.sqrt(np.maximum(1 - ab_prev - s**2, 0) / (1 - ab))
    return {"a": a, "b": np.sqrt(ab_prev) - a * np.sqrt(ab), "s": s}


def dpmpp_2m(diffusion: GaussianDiffusion, timesteps: Timesteps, eta: float, variance: str) -> dict[str, Table]:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2): second order, from this x0 and the last.

    The first and the last step are first order; the last goes to sigma = 0, where x is x0. `eta` is not used.
    """
    a, phi, h = _exponential_step(diffusion, timesteps)
    half_inverse_r = 0.5 * _ratio(h)
    return {"a": a, "b": phi * (1 + half_inverse_r), "c": -phi * half_inverse_r}


def dpmpp_2m_sde(diffusion: GaussianDiffusion, timesteps: Timesteps, eta: float, variance: str) -> dict[str, Table]:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022b, eq. 18 and §B.4): as dpmpp_2m, with fresh noise. `eta` is not used."""
    a, _, h = _exponential_step(diffusion, timesteps)
    _, ab_prev = _alpha_bars(diffusion, timesteps)
    psi = np.sqrt(ab_prev) * -np.expm1(-2 * h)
    half_inverse_r = 0.5 * _ratio(h)
    return {
        "a": a * np.exp(-h),
        "b": psi * (1 + half_inverse_r),
        "c": -psi * half_inverse_r,
        "s": np.sqrt(1 - ab_prev) * np.sqrt(-np.expm1(-2 * h)),
    }


def dpmpp_3m(diffusion: GaussianDiffusion, timesteps: Timesteps, eta: float, variance: str) -> dict[str, Table]:
    """DPM-Solver++(3M) (Lu et al. 2022b, §3.3; diffusers' third order): from this x0 and the last two.

    The first and the last step are first order, the second is second order, and with fewer than 15 steps the last but
    one as well, for stability. D2 is as published, half of h²·m'', so the order is 2 in the limit, with a smaller error
    than dpmpp_2m's. `eta` is not used.
    """
    a, phi, h = _exponential_step(diffusion, timesteps)
    steps = len(h)
    second = 0.5 * _ratio(h)
    b, c, d = phi * (1 + second), -phi * second, np.zeros(steps)
    third = range(2, steps - 2 if steps < 15 else steps - 1)
    alpha = np.sqrt(_alpha_bars(diffusion, timesteps)[1])
    for i in third:
        h0, h1 = h[i - 1], h[i - 2]
        # D1 and D2, approximations to h·m' and h²·m'', as combinations of m0, m1, m2
        first = np.array([h[i] / h0, -h[i] / h0, 0.0])
        before = np.array([0.0, h[i] / h1, -h[i] / h1])
        share, bend = (h0 / (h0 + h1), h[i] / (h0 + h1)) if math.isfinite(h1) else (0.0, 0.0)
        d1, d2 = first + share * (first - before), bend * (first - before)
        e = math.expm1(-h[i])
        weights = -alpha[i] * e * np.array([1.0, 0.0, 0.0])
        weights += alpha[i] * (e / h[i] + 1) * d1 - alpha[i] * ((e + h[i]) / h[i] ** 2 - 0.5) * d2
        b[i], c[i], d[i] = weights
    return {"a": a, "b": b, "c": c, "d": d}


def _exponential_step(diffusion: GaussianDiffusion, timesteps: Timesteps) -> tuple[Table, Table, Table]:
    """σ_next/σ, α_next·(1 - exp(-h)) and h, the growth of log-SNR, of every step; the last h is infinite."""
    ab, ab_prev = _alpha_bars(diffusion, timesteps)
    h = np.append(np.diff(diffusion.log_snr()[timesteps]), np.inf)
    return np.sqrt(1 - ab_prev) / np.sqrt(1 - ab), np.sqrt(ab_prev) * -np.expm1(-h), h


def _ratio(h: Table) -> Table:
    """1/r = h / (the h before it) of every step; 0 for the first and the last, which are first order."""
    ratio = np.zeros(len(h))
    ratio[1:-1] = h[1:-1] / h[:-2]
    return ratio


def _alpha_bars(diffusion: GaussianDiffusion, timesteps: Timesteps) -> tuple[Table, Table]:
    """ᾱ where each step starts and where it goes; the last goes to ᾱ = 1, a clean image."""
    ab = diffusion.alphas_cumprod[timesteps]
    return ab, np.append(ab[1:], 1.0)


Sampler = Callable[[GaussianDiffusion, Timesteps, float, str], dict[str, Table]]
SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
}


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


def apply_step(
    x: Tensor, out: Tensor, x0_prev: Tensor, x0_prev2: Tensor, rows: Tensor, z: Tensor
) -> tuple[Tensor, Tensor]:
    """One update of a batch, whatever its samplers: (x_next, x0).

    x, x0_prev, x0_prev2 and z are [N, C, H, W], out (guidance applied) too, or [N, 2C, H, W] with learned variance;
    `rows` [N, 10] holds one plan row per sample.
    """
    _, p, q, limit, a, b, c, d, k, s = (column.reshape(-1, 1, 1, 1) for column in rows.unbind(1))
    channels = x.shape[1]
    if out.shape[1] == 2 * channels:
        s = s * torch.exp(k * out[:, channels:])
    x0 = p * x - q * out[:, :channels]
    x0 = torch.where(limit > 0, _limited(x0, limit), x0)
    return a * x + b * x0 + c * x0_prev + d * x0_prev2 + s * z, x0


def _limited(x0: Tensor, limit: Tensor) -> Tensor:
    """x0 within ±1: clamped at 1, or, where `limit` says dynamic, at the image's own quantile, if more, and divided."""
    if not (limit == LIMITS.index("dynamic")).any():
        return x0.clamp(-1, 1)
    # Once for all rows: a row's bytes do not depend on its mates
    largest = torch.quantile(x0.flatten(1).abs(), DYNAMIC_QUANTILE, dim=1).clamp(min=1).reshape(-1, 1, 1, 1)
    bound = torch.where(limit == LIMITS.index("dynamic"), largest, 1.0)
    return torch.maximum(torch.minimum(x0, bound), -bound) / bound


def predict(network: Network, x: Tensor, t: Tensor, y: Tensor | None, g: Tensor, null_class: int | None) -> Tensor:
    """The network's output with classifier-free guidance, u + g·(e - u) (Ho & Salimans 2022), [N, C or 2C, H, W].

    The rows that need the null class (g ≠ 1, float [N]) are appended to the same network call. A learned variance, the
    channels beyond those of x, is e's own.
    """
    guided = torch.nonzero(g != 1).flatten()
    if len(guided) == 0:
        return network(x, t, y)
    assert y is not None
    assert null_class is not None, "guidance needs a network with a null class"
    rows = torch.cat([torch.arange(len(x), device=x.device), guided])
    classes = torch.cat([y, torch.full_like(guided, null_class)])
    out = network(x[rows], t[rows], classes).to(x.dtype)  # autocast gives bfloat16
    channels = x.shape[1]
    result, u = out[: len(x)].clone(), out[len(x) :, :channels]
    e = result[guided, :channels]
    result[guided, :channels] = u + g[guided].reshape(-1, 1, 1, 1) * (e - u)
    return result


@torch.no_grad()
def sample(
    network: Network,
    plan: Plan,
    shape: tuple[int, int, int],
    seeds: Sequence[int],
    indices: Sequence[int],
    classes: Sequence[int] | None = None,
    *,
    null_class: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    on_step: Callable[[int, Tensor, Tensor], Any] | None = None,
) -> Tensor:
    """The naive loop: N images of one plan, [N, C, H, W]. It defines what the engine must compute.

    `classes` None is for unconditional networks. `on_step(i, x_next, x0)` is called after step i = 1 … S.
    """
    x = normals(seeds, indices, [0] * len(seeds), shape, device).to(dtype)
    x0 = x0_prev = torch.zeros_like(x)
    y = None if classes is None else torch.tensor(classes, device=device)
    for i, (timestep, row) in enumerate(zip(plan.timesteps, plan.table, strict=True), start=1):
        rows = torch.tensor(row, dtype=dtype, device=device).expand(len(x), -1)
        t = torch.full((len(x),), int(timestep), device=device)
        noise = torch.zeros_like(x)
        if row[-1]:
            noise = normals(seeds, indices, [i] * len(seeds), shape, device).to(dtype)
        out = predict(network, x, t, y, rows[:, 0], null_class)
        x, new = apply_step(x, out, x0, x0_prev, rows, noise)
        x0, x0_prev = new, x0
        if on_step:
            on_step(i, x, x0)
    return x
