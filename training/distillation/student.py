"""The student's schedule: which of the teacher's timesteps it visits, its steps, through which gradients flow, and what
a checkpoint says of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from model.checkpoint import Checkpoint, CheckpointConfig
from model.diffusion import GaussianDiffusion, Network, Table
from model.distilled import ANY_STEPS, Distilled
from model.sampling.fitted import FITTED_TO, FittedTable, weights_digest
from model.sampling.schedule import COEFFICIENTS, FITTED, THRESHOLDING, SamplingParams, SamplingSchedule
from model.sampling.solvers import SAMPLERS
from model.sampling.step import _limited
from training.distillation.config import DistillConfig


def easiest_points(diffusion: GaussianDiffusion, teacher: SamplingSchedule, states: Tensor, steps: int) -> list[int]:
    """Which `steps` of the teacher's M points a student of ddim's steps should visit: indices from 0, ascending.

    The sum of the distances between where a step from the trajectory ends and where the trajectory is then is the least
    that `steps` steps can have: by dynamic programming over all pairs of points (Chen et al. 2024, GITS, 2405.11326).
    `states` [n, M + 1, …] are x_T and the teacher's states.
    """
    alphas_cumprod = diffusion.alphas_cumprod[teacher.timesteps.astype(np.int64)]
    alpha, sigma = np.append(np.sqrt(alphas_cumprod), 1.0), np.append(np.sqrt(1 - alphas_cumprod), 0.0)
    m, x0 = len(teacher), teacher_x0(teacher, states)
    cost = np.full((m + 1, m + 1), np.inf)
    for i in range(m):
        for j in range(i + 1, m + 1):
            a = sigma[j] / sigma[i]
            b = alpha[j] - a * alpha[i]
            reached = a * states[:, i] + b * x0[:, i]
            cost[i, j] = float((reached - states[:, j]).abs().mean())
    best, came = np.full((steps + 1, m + 1), np.inf), np.zeros((steps + 1, m + 1), np.int64)
    best[0, 0] = 0
    for k in range(1, steps + 1):
        totals = best[k - 1][:, None] + cost
        best[k], came[k] = totals.min(axis=0), totals.argmin(axis=0)
    points, at = [], m
    for k in range(steps, 0, -1):
        at = int(came[k, at])
        points.append(at)
    return points[::-1]


def teacher_x0(teacher: SamplingSchedule, states: Tensor) -> Tensor:
    """What the teacher took for x_0 at each of its M points, [n, M, …], from its states [n, M + 1, …]."""
    x0: list[Tensor] = []
    for i, row in enumerate(teacher.table):
        a, b, c, d = (float(row[COEFFICIENTS.index(name)]) for name in "abcd")
        rest = states[:, i + 1] - a * states[:, i]
        rest = rest - c * x0[-1] if c else rest
        x0.append((rest - d * x0[-2] if d else rest) / b)
    return torch.stack(x0, dim=1)


def student_table(diffusion: GaussianDiffusion, timesteps: Table, sampler: str, limit: str) -> SamplingSchedule:
    """A schedule of one row a step over these timesteps, descending."""
    t = np.asarray(timesteps, np.int64)
    p, q = diffusion.x0_coefficients(t)
    columns = dict.fromkeys(COEFFICIENTS, 0.0) | {"g": 1.0, "limit": float(THRESHOLDING.index(limit))}
    columns |= {"p": p, "q": q} | SAMPLERS[sampler](diffusion, t, 0.0, "fixed_small")
    table = np.stack([np.broadcast_to(columns[name], len(t)) for name in COEFFICIENTS], axis=1)
    return SamplingSchedule(sampler, t, table.astype(np.float64))


@dataclass(frozen=True)
class Batch:
    """Trajectories: `x_T` [n, C, H, W], `targets` [n, N, C, H, W] at the ends of the student's steps, classes `y` [n].

    `noise` [n, C, H, W] and `u` [n] in [0, 1) are what --method guidance and --anchor draw.
    """

    x_T: Tensor
    targets: Tensor
    y: Tensor | None
    noise: Tensor
    u: Tensor


def walk(
    network: Network, schedule: SamplingSchedule, x_T: Tensor, y: Tensor | None, bf16: bool, detached: bool
) -> Iterator[tuple[int, Tensor]]:
    """The steps of `model.sampling.step.sample` for a schedule without guidance and noise, with their gradients.

    Yields (i, x [n, C, H, W]) after step i = 0 … N - 1. A limit lets the gradient through as if it were not there.
    `detached`: each step's gradient ends where the step begins, so that a caller may change the weights in between.
    """
    x, x0, x0_prev = x_T, torch.zeros_like(x_T), torch.zeros_like(x_T)
    for i, (timestep, row) in enumerate(zip(schedule.timesteps, schedule.table, strict=True)):
        _, p, q, limit, a, b, c, d, _, _ = row.tolist()
        t = torch.full((len(x),), timestep.item(), device=x.device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            out = network(x, t, y)
        new = p * x - q * out[:, : x.shape[1]].float()
        if limit:
            limited = _limited(new.detach(), torch.full((len(x), 1, 1, 1), limit, device=x.device), True)
            new = new + (limited - new).detach()
        x = a * x + b * new + c * x0 + d * x0_prev
        x0, x0_prev = new, x0
        yield i, x
        if detached:
            x, x0, x0_prev = x.detach(), x0.detach(), x0_prev.detach()


def inside(config: DistillConfig, teacher: Checkpoint, params: SamplingParams) -> Distilled:
    """What a student without an anchor has learned of its teacher."""
    return Distilled(params.guidance_scale, config.steps, config.method, teacher.sha256)


def student_config(
    config: DistillConfig,
    teacher: Checkpoint,
    params: SamplingParams,
    schedule: SamplingSchedule,
    weights: Mapping[str, Tensor],
) -> CheckpointConfig:
    """The teacher's, with the student's sampling: its own table, or, where it has all timesteps, the sampler's.

    With an anchor it has all timesteps and its own table, and guidance as its teacher has it.
    """
    sampling, tables = replace(params, steps=config.steps), tuple[FittedTable, ...]()
    if config.method != ANY_STEPS:
        sampling = replace(sampling, sampler=FITTED)
        fitted_to = {name: getattr(params, name) for name in FITTED_TO}
        timesteps, rows = map(tuple, (schedule.timesteps.tolist(), schedule.table.tolist()))
        digest, draws = weights_digest(weights), tuple(range(1, config.steps + 1))
        tables = (FittedTable(config.steps, **fitted_to, timesteps=timesteps, rows=rows, draws=draws, weights=digest),)
    distilled = None if config.anchor else inside(config, teacher, params)
    return replace(teacher.config, sampling=sampling, fitted=tables, distilled=distilled)
