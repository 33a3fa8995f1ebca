"""Samplers as tables: a plan has one row of scalars per step, made in float64 from the beta schedule.

With e the network's output for the class, u that for the null class and z standard normal noise, a step is

    out    = u + g·(e - u)                      g = 1: only e is computed
    x0     = limit(p·x - q·out)                 limit: clamp to ±1, or none
    x_next = a·x + b·x0 + c·x0_prev + s·z

so that requests with different samplers and step counts share one batch without a branch. A new sampler is
one function and one entry in `SAMPLERS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.diffusion import GaussianDiffusion, Network, Table
from model.rng import normals

Timesteps = NDArray[np.int64]
COLUMNS = ("g", "p", "q", "clip", "a", "b", "c", "s")
MIN_LOG_SNR = -5.1  # log(alpha/sigma) below which dividing by alpha makes nonsense of an eps network's x0


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

    `timesteps` int64 [S], descending, is what the network sees; `table` float64 [S, 8] holds the scalars of
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


def spaced(num_timesteps: int, steps: int, spacing: str) -> Timesteps:
    """`steps` of the timesteps 0 … T - 1, descending, in one of three ways (Lin et al. 2023, table 2).

    leading ends at 0 and starts late; trailing starts at T - 1 and ends early; linspace spreads over both
    ends, as diffusers' DPM-Solver does (steps + 1 points, the last of them dropped).
    """
    if spacing == "leading":
        return np.arange(steps, dtype=np.int64)[::-1] * (num_timesteps // steps)
    if spacing == "trailing":
        return np.round(np.arange(num_timesteps, 0, -num_timesteps / steps)).astype(np.int64)[:steps] - 1
    if spacing == "linspace":
        if steps == num_timesteps:
            return np.arange(steps, dtype=np.int64)[::-1]
        return np.linspace(0, num_timesteps - 1, steps + 1).round().astype(np.int64)[:0:-1]
    raise ValueError(f"spacing must be one of leading, trailing, linspace, not {spacing!r}")


def ddpm(diffusion: GaussianDiffusion, timesteps: Timesteps, eta: float) -> dict[str, Table]:
    """Ancestral sampling (Ho et al. 2020, eq. 7), respaced (Nichol & Dhariwal 2021, eq. 19).

    Its variance is the posterior's. `eta` is not used: it belongs to ddim.
    """
    ab, ab_prev = _alpha_bars(diffusion, timesteps)
    beta = 1 - ab / ab_prev
    return {
        "a": (1 - ab_prev) * np.sqrt(1 - beta) / (1 - ab),
        "b": beta * np.sqrt(ab_prev) / (1 - ab),
        "s": np.sqrt(beta * (1 - ab_prev) / (1 - ab)),
    }


def ddim(diffusion: GaussianDiffusion, timesteps: Timesteps, eta: float) -> dict[str, Table]:
    """Song et al. 2021, eq. 12 and 16: eta 0 is deterministic, eta 1 is ancestral.

    eps is re-derived from the limited x0.
    """
    ab, ab_prev = _alpha_bars(diffusion, timesteps)
    s = eta * np.sqrt((1 - ab_prev) / (1 - ab)) * np.sqrt(1 - ab / ab_prev)
    a = np.sqrt(np.maximum(1 - ab_prev - s**2, 0) / (1 - ab))
    return {"a": a, "b": np.sqrt(ab_prev) - a * np.sqrt(ab), "s": s}


def dpmpp_2m(diffusion: GaussianDiffusion, timesteps: Timesteps, eta: float) -> dict[str, Table]:
    """DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2): second order, from this x0 and the last.

    The first and the last step are first order; the last goes to sigma = 0, where x is x0. `eta` is not used.
    """
    ab, ab_prev = _alpha_bars(diffusion, timesteps)
    alpha, sigma = np.sqrt(ab_prev), np.sqrt(1 - ab_prev)  # where each step goes
    log_snr = 0.5 * np.log(ab / (1 - ab))
    h = np.diff(log_snr)  # of every step but the last, whose h is infinite
    phi = alpha * -np.expm1(-np.append(h, np.inf))
    half_inverse_r = np.zeros(len(ab))  # 1/(2r), r = h_last / h
    half_inverse_r[1:-1] = 0.5 * h[1:] / h[:-1]
    return {
        "a": sigma / np.sqrt(1 - ab),
        "b": phi * (1 + half_inverse_r),
        "c": -phi * half_inverse_r,
    }


def _alpha_bars(diffusion: GaussianDiffusion, timesteps: Timesteps) -> tuple[Table, Table]:
    """ᾱ where each step starts and where it goes; the last goes to ᾱ = 1, a clean image."""
    ab = diffusion.alphas_cumprod[timesteps]
    return ab, np.append(ab[1:], 1.0)


Sampler = Callable[[GaussianDiffusion, Timesteps, float], dict[str, Table]]
SAMPLERS: dict[str, Sampler] = {"ddpm": ddpm, "ddim": ddim, "dpmpp_2m": dpmpp_2m}


def make_plan(
    diffusion: GaussianDiffusion,
    sampler: str,
    steps: int,
    *,
    eta: float = 0.0,
    guidance_scale: float = 1.0,
    spacing: str = "trailing",
    clip: bool = True,
) -> Plan:
    """The table of `sampler` over `steps` timesteps.

    `eta` in [0, 1] is ddim's; `guidance_scale` g is 1 for none; `clip` limits x0 to [-1, 1]. Without it an
    eps network starts where log(alpha/sigma) ≥ -5.1, since its x0 explodes before. Raises ValueError on
    values out of range.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, not {sampler!r}")
    num_timesteps = diffusion.num_timesteps
    if diffusion.config.prediction == "eps" and not clip:
        ab = diffusion.alphas_cumprod
        num_timesteps = int(np.sum(0.5 * np.log(ab / (1 - ab)) >= MIN_LOG_SNR))
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"steps must be between 1 and {num_timesteps}, not {steps}")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be between 0 and 1, not {eta}")
    if not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale must be finite, not {guidance_scale}")
    timesteps = spaced(num_timesteps, steps, spacing)
    p, q = diffusion.x0_coefficients(timesteps)
    columns: dict[str, Table | float] = {
        "g": guidance_scale,
        "p": p,
        "q": q,
        "clip": float(clip),
        "c": 0.0,
        "s": 0.0,
    }
    columns |= SAMPLERS[sampler](diffusion, timesteps, eta)
    table = np.stack([np.broadcast_to(columns[name], len(timesteps)) for name in COLUMNS], axis=1)
    return Plan(sampler, timesteps, table.astype(np.float64))


def apply_step(x: Tensor, out: Tensor, x0_prev: Tensor, rows: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """One update of a batch, whatever its samplers: (x_next, x0).

    x, out (guidance applied), x0_prev and z are [N, C, H, W]; `rows` [N, 8] holds one plan row per sample.
    """
    _, p, q, clip, a, b, c, s = (column.reshape(-1, 1, 1, 1) for column in rows.unbind(1))
    x0 = p * x - q * out
    x0 = torch.where(clip > 0, x0.clamp(-1, 1), x0)
    return a * x + b * x0 + c * x0_prev + s * z, x0


def predict(network: Network, x: Tensor, t: Tensor, y: Tensor | None, g: Tensor, null_class: int | None) -> Tensor:
    """The network's output with classifier-free guidance, u + g·(e - u) (Ho & Salimans 2022), [N, C, H, W].

    The rows that need the null class (g ≠ 1, float [N]) are appended to the same network call.
    """
    guided = torch.nonzero(g != 1).flatten()
    if len(guided) == 0:
        return network(x, t, y)
    assert y is not None
    assert null_class is not None, "guidance needs a network with a null class"
    rows = torch.cat([torch.arange(len(x), device=x.device), guided])
    classes = torch.cat([y, torch.full_like(guided, null_class)])
    out = network(x[rows], t[rows], classes).to(x.dtype)  # autocast gives bfloat16
    e, u = out[: len(x)].clone(), out[len(x) :]
    e[guided] = u + g[guided].reshape(-1, 1, 1, 1) * (e[guided] - u)
    return e


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
    x0 = torch.zeros_like(x)
    y = None if classes is None else torch.tensor(classes, device=device)
    for i, (timestep, row) in enumerate(zip(plan.timesteps, plan.table, strict=True), start=1):
        rows = torch.tensor(row, dtype=dtype, device=device).expand(len(x), -1)
        t = torch.full((len(x),), int(timestep), device=device)
        noise = torch.zeros_like(x)
        if row[-1]:
            noise = normals(seeds, indices, [i] * len(seeds), shape, device).to(dtype)
        out = predict(network, x, t, y, rows[:, 0], null_class)
        x, x0 = apply_step(x, out, x0, rows, noise)
        if on_step:
            on_step(i, x, x0)
    return x
