"""Samplers as functions of the beta schedule: the coefficients a, b, c, d, k, s of each step, in float64.

A new sampler is one function and one entry in `SAMPLERS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from model.diffusion import GaussianDiffusion, Table
from model.sampling.timestep_spacing import Timesteps


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
        d1, d2 = first + h0 / (h0 + h1) * (first - before), h[i] / (h0 + h1) * (first - before)
        e = math.expm1(-h[i])
        weights = -alpha[i] * e * np.array([1.0, 0.0, 0.0])
        weights += alpha[i] * (e / h[i] + 1) * d1 - alpha[i] * ((e + h[i]) / h[i] ** 2 - 0.5) * d2
        b[i], c[i], d[i] = weights
    return {"a": a, "b": b, "c": c, "d": d}


def consistency(diffusion: GaussianDiffusion, timesteps: Timesteps, eta: float, variance: str) -> dict[str, Table]:
    """x0, with fresh noise up to the next level (Song et al. 2023, algorithm 1), for consistency models alone.

    Their images have noise of sigma_min already. `eta` is not used.
    """
    sigmas = diffusion.config.sigmas
    assert sigmas is not None
    _, ab_prev = _alpha_bars(diffusion, timesteps)
    variance_left = 1 - ab_prev * (1 + (sigmas.sigma_min / sigmas.sigma_data) ** 2)
    return {"a": np.zeros_like(ab_prev), "b": np.sqrt(ab_prev), "s": np.sqrt(np.maximum(variance_left, 0))}


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


CONSISTENCY = "consistency"
Sampler = Callable[[GaussianDiffusion, Timesteps, float, str], dict[str, Table]]
SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
}
