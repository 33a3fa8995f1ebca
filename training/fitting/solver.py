"""A sampling schedule whose numbers are parameters (Generalized Solver, arXiv 2510.17699, §3.1).

Timesteps by stick breaking, t_n = (T - 1)·∏ σ(θ_j) for j ≤ n; the rows of DPM-Solver++(3M) at these timesteps, with
corrections that are added and begin at 0; x_T as one more state of every row; and an offset between the t that the
formulas use and the t that the network is told. Guidance acts on chosen rows, each with a scale of its own.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.diffusion import GaussianDiffusion, Network
from model.sampling.fitted import FittedTable
from model.sampling.schedule import COEFFICIENTS, THRESHOLDING, SamplingParams
from model.sampling.step import apply_step, cfg_forward
from model.sampling.timestep_spacing import Timesteps

STICK = 1e-4  # the least that stick breaking leaves of a stick, and takes from it, at the start
LAMBDA_MIN = -15.0  # log(alpha/sigma) where zero terminal SNR has -∞
CORRECTED = ("a", "b", "c", "d", "s")  # columns with corrections


@dataclass(frozen=True)
class Target:
    """What a solver is fitted for: the teacher's settings, and which rows are guided."""

    params: SamplingParams
    guided: tuple[bool, ...]

    @property
    def nfe(self) -> int:
        """Network rows of an image."""
        return len(self.guided) + sum(self.guided)


class LearnedSolver(nn.Module):
    """A schedule of S steps over a frozen network. `rows` gives its numbers, with gradients, in float64."""

    def __init__(self, diffusion: GaussianDiffusion, target: Target, timesteps: Timesteps, whole: bool = False) -> None:
        """Begins as DPM-Solver++(3M) at these `timesteps` [S], descending. `whole`: the network is told whole ones."""
        super().__init__()
        self.diffusion, self.target, self.whole = diffusion, target, whole
        self.steps, self.last = len(timesteps), diffusion.num_timesteps - 1
        start = torch.tensor(timesteps.tolist(), dtype=torch.float64)
        above = torch.cat([torch.tensor([float(self.last)], dtype=torch.float64), start[:-1]])
        left = (start / above).clamp(STICK, 1 - STICK)
        self.theta = nn.Parameter(torch.logit(left))
        self.offset = nn.Parameter(torch.zeros(self.steps, dtype=torch.float64))  # of the told t, in T/100
        self.corrections = nn.Parameter(torch.zeros(self.steps, len(CORRECTED), dtype=torch.float64))
        self.guidance = nn.Parameter(torch.zeros(self.steps, dtype=torch.float64))
        self._log_snr = torch.from_numpy(diffusion.log_snr()).clamp(min=LAMBDA_MIN)

    def timesteps(self) -> Tensor:
        """t of the formulas, [S], descending."""
        return self.last * torch.cumprod(torch.sigmoid(self.theta), dim=0)

    def told(self) -> Tensor:
        """t of the network, [S]."""
        t = self.timesteps() + self.offset * (self.last / 100)
        t = t.clamp(0, self.last)
        return t + (t.round() - t).detach() if self.whole else t

    def _levels(self) -> tuple[Tensor, Tensor, Tensor]:
        """α, σ and log(α/σ) at t, [S] each; between whole timesteps log(α/σ) is linear."""
        t = self.timesteps()
        below = t.detach().floor().long().clamp(max=self.last - 1)
        low, high = self._log_snr[below], self._log_snr[below + 1]
        snr = low + (high - low) * (t - below)
        return torch.sigmoid(2 * snr).sqrt(), torch.sigmoid(-2 * snr).sqrt(), snr

    def rows(self) -> Tensor:
        """The schedule's table [S, 10], of `COEFFICIENTS`; s is of x_T."""
        alpha, sigma, snr = self._levels()
        columns = dict(zip(("a", "b", "c", "d"), dpmpp_3m(alpha, sigma, snr), strict=True))
        columns["s"] = torch.zeros_like(alpha)
        for name, correction in zip(CORRECTED, self.corrections.unbind(1), strict=True):
            columns[name] = columns[name] + correction
        first, second = torch.arange(self.steps) > 0, torch.arange(self.steps) > 1
        columns["c"], columns["d"] = columns["c"] * first, columns["d"] * second  # of an x_0 that is there
        columns["s"] = columns["s"] * first  # x is x_T in the first
        guided = torch.tensor(self.target.guided)
        columns["g"] = torch.where(guided, self.target.params.guidance_scale + self.guidance, 1.0)
        columns["limit"] = torch.full_like(alpha, THRESHOLDING.index(self.target.params.limit))
        columns["k"] = torch.zeros_like(alpha)
        prediction = self.diffusion.config.prediction
        if prediction == "eps":
            columns["p"], columns["q"] = 1 / alpha, sigma / alpha
        elif prediction == "x0":
            columns["p"], columns["q"] = torch.zeros_like(alpha), -torch.ones_like(alpha)
        else:
            columns["p"], columns["q"] = alpha, sigma
        return torch.stack([columns[name] for name in COEFFICIENTS], dim=1)

    def forward(
        self, network: Network, x_T: Tensor, y: Tensor | None, null_class: int | None, recompute: bool = False
    ) -> Tensor:
        """The images of x_T [N, C, H, W], with gradients to the schedule. `recompute`: each step anew for them, so that
        memory holds one."""
        table, told = self.rows().to(x_T), self.told().to(x_T)
        x, x0 = x_T, torch.zeros_like(x_T)
        x0_prev = x0

        def advance(x: Tensor, x0: Tensor, x0_prev: Tensor, rows: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            out = cfg_forward(network, x, t, y, rows[:, 0], null_class)  # one call a row where g is 1
            return apply_step(x, out, x0, x0_prev, rows, x_T)

        for step in range(self.steps):
            rows, t = table[step].expand(len(x), -1), told[step].expand(len(x))

            if recompute:
                x, new = checkpoint(advance, x, x0, x0_prev, rows, t, use_reentrant=False)
            else:
                x, new = advance(x, x0, x0_prev, rows, t)
            x0, x0_prev = new, x0
        return x

    @torch.no_grad()
    def table(self, weights: str, provenance: dict[str, object]) -> FittedTable:
        """What a checkpoint keeps of it."""
        params = self.target.params
        return FittedTable(
            steps=self.steps,
            guidance_scale=params.guidance_scale,
            guidance_interval=params.guidance_interval,
            limit=params.limit,
            timesteps=tuple(self.told().tolist()),
            rows=tuple(map(tuple, self.rows().tolist())),
            draws=(0,) * self.steps,
            weights=weights,
            provenance=provenance,
        )


def dpmpp_3m(alpha: Tensor, sigma: Tensor, snr: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The columns a, b, c, d of `model.sampling.solvers.dpmpp_3m`, [S] each, with gradients."""
    steps = len(alpha)
    next_alpha, next_sigma = torch.cat([alpha[1:], alpha.new_ones(1)]), torch.cat([sigma[1:], sigma.new_zeros(1)])
    h = torch.diff(snr)
    phi = torch.cat([alpha[1:] * -torch.expm1(-h), alpha.new_ones(1)])
    zero = alpha.new_zeros(())
    b, c, d = list(phi.unbind()), [zero] * steps, [zero] * steps
    for i in range(1, steps - 1):
        half = 0.5 * h[i] / h[i - 1]
        b[i], c[i] = phi[i] * (1 + half), -phi[i] * half
    for i in range(2, steps - 2 if steps < 15 else steps - 1):
        h0, h1 = h[i - 1], h[i - 2]
        ones = torch.eye(3, dtype=alpha.dtype)
        first, before = (ones[0] - ones[1]) * h[i] / h0, (ones[1] - ones[2]) * h[i] / h1
        d1, d2 = first + h0 / (h0 + h1) * (first - before), h[i] / (h0 + h1) * (first - before)
        e = torch.expm1(-h[i])
        weights = -e * ones[0] + (e / h[i] + 1) * d1 - ((e + h[i]) / h[i] ** 2 - 0.5) * d2
        b[i], c[i], d[i] = (next_alpha[i] * weights).unbind()
    return next_sigma / sigma, torch.stack(b), torch.stack(c), torch.stack(d)


def guided_rows(steps: int, chosen: Collection[int]) -> tuple[bool, ...]:
    """Which rows are guided, as `Target` has it."""
    return tuple(step in chosen for step in range(steps))
