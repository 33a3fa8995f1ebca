"""A sampling schedule carried out: guidance, the update of one step, and the naive loop over all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from model.diffusion import Network
from model.sampling.edit import Edit, keep, start_from
from model.sampling.noise import normals
from model.sampling.schedule import THRESHOLDING, SamplingSchedule

DYNAMIC_QUANTILE = 0.995


def apply_step(
    x: Tensor,
    out: Tensor,
    x0_prev: Tensor | None,
    x0_prev2: Tensor | None,
    rows: Tensor,
    z: Tensor | None,
    dynamic: bool = True,
    kept: tuple[Tensor, Tensor] | None = None,
    clamped: bool = False,
) -> tuple[Tensor, Tensor]:
    """One update of a batch, whatever its samplers: (x_next, x0).

    x, x0_prev, x0_prev2 and z are [N, C, H, W], out (guidance applied) too, or [N, 2C, H, W] with learned variance;
    `rows` [N, 10] holds a row of each sample's schedule. Of the last three one may be None whose column is zero in
    all rows. `dynamic` False: the limit of none of them is, and nobody has to wait for the device to say so. `kept`
    are image and mask of `model.sampling.edit.keep`, where some keep a part. `clamped`: the limit of all is clamp.
    """
    _, p, q, limit, a, b, c, d, k, s = rows.reshape(*rows.shape, 1, 1, 1).unbind(1)
    channels = x.shape[1]
    x0 = p * x
    x0 -= q * out[:, :channels]
    x0 = x0.clamp(-1, 1) if clamped else torch.where(limit > 0, _limited(x0, limit, dynamic), x0)
    if kept is not None:
        x0 = keep(x0, *kept)
    x_next = a * x
    x_next += b * x0
    if x0_prev is not None:
        x_next += c * x0_prev
    if x0_prev2 is not None:
        x_next += d * x0_prev2
    if z is not None:
        noise = s * torch.exp(k * out[:, channels:]) if out.shape[1] == 2 * channels else s
        x_next += noise * z
    return x_next, x0


def _limited(x0: Tensor, limit: Tensor, dynamic: bool) -> Tensor:
    """x0 within ±1: clamped at 1, or, where `limit` says dynamic, at the image's own quantile, if more, and divided."""
    if not dynamic or not (limit == THRESHOLDING.index("dynamic")).any():
        return x0.clamp(-1, 1)
    # Once for all rows: a row's bytes do not depend on its mates
    largest = torch.quantile(x0.flatten(1).abs(), DYNAMIC_QUANTILE, dim=1).clamp(min=1).reshape(-1, 1, 1, 1)
    bound = torch.where(limit == THRESHOLDING.index("dynamic"), largest, 1.0)
    return torch.maximum(torch.minimum(x0, bound), -bound) / bound


def cfg_forward(network: Network, x: Tensor, t: Tensor, y: Tensor | None, g: Tensor, null_class: int | None) -> Tensor:
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


def apply_cfg(out: Tensor, u: Tensor, g: Tensor) -> Tensor:
    """The same where both outputs are there for every row: of `out` [N, C or 2C, H, W] and g [N], and u [N, C, H, W].

    Rows with g = 1 are left alone, whatever their u. The host has no part in it, so it can be in a CUDA graph.
    """
    channels = u.shape[1]
    e, g = out[:, :channels], g.reshape(-1, 1, 1, 1)
    mixed = torch.where(g != 1, u + g * (e - u), e)
    return mixed if out.shape[1] == channels else torch.cat([mixed, out[:, channels:]], dim=1)


@torch.no_grad()
def sample(
    network: Network,
    schedule: SamplingSchedule,
    shape: tuple[int, int, int],
    seeds: Sequence[int],
    indices: Sequence[int],
    classes: Sequence[int] | None = None,
    *,
    null_class: int | None = None,
    edit: Edit | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    on_step: Callable[[int, Tensor, Tensor], Any] | None = None,
) -> Tensor:
    """The naive loop: N images of one schedule, [N, C, H, W]. It defines what the engine must compute.

    `classes` None is for unconditional networks. `edit` is begun from, each image with its own noise, and kept where
    its mask says so. `on_step(i, x_next, x0)` is called after step i = 1 … S.
    """
    x = normals(seeds, indices, [0] * len(seeds), shape, device).to(dtype)
    edit = None if edit is None else edit.to(device, dtype)
    x = start_from(None if edit is None else edit.image, x, schedule)
    kept = None if edit is None or edit.mask is None else (edit.image, edit.mask)
    x0 = x0_prev = torch.zeros_like(x)
    y = None if classes is None else torch.tensor(classes, device=device)
    for step, (timestep, row) in enumerate(zip(schedule.timesteps, schedule.table, strict=True)):
        rows = torch.tensor(row, dtype=dtype, device=device).expand(len(x), -1)
        t = torch.full((len(x),), timestep.item(), device=device)
        noise = torch.zeros_like(x)
        if row[-1]:
            noise = normals(seeds, indices, [schedule.draw(step)] * len(seeds), shape, device).to(dtype)
        out = cfg_forward(network, x, t, y, rows[:, 0], null_class)
        x, new = apply_step(x, out, x0, x0_prev, rows, noise, kept=kept)
        x0, x0_prev = new, x0
        if on_step:
            on_step(step + 1, x, x0)
    return x
