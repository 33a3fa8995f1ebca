"""Bits per dimension: the variational bound on the data, term by term (Ho et al. 2020, §4.2 and table 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from model.diffusion import GaussianDiffusion, Network
from model.gaussians import normal_kl
from model.sampling.noise import normals


class BitsPerDim(NamedTuple):
    """`total` = `prior` + the sum of `terms`, float64 [N], [N] and [N, T]; term 0 is the decoder's."""

    total: Tensor
    prior: Tensor
    terms: Tensor


def prior_bpd(diffusion: GaussianDiffusion, x0: Tensor) -> Tensor:
    """KL(q(x_T | x_0) ‖ N(0, I)) in bits per dimension, [N]."""
    alpha_bar = torch.tensor(diffusion.alphas_cumprod[-1], dtype=x0.dtype, device=x0.device)
    zero = torch.zeros((), dtype=x0.dtype, device=x0.device)
    divergence = normal_kl(alpha_bar.sqrt() * x0, torch.log1p(-alpha_bar), zero, zero)
    return divergence.mean(dim=(1, 2, 3)) / math.log(2)


@torch.no_grad()
def bits_per_dim(
    diffusion: GaussianDiffusion,
    network: Network,
    x0: Tensor,
    y: Tensor | None,
    seeds: Sequence[int],
    indices: Sequence[int],
    *,
    clip: bool = True,
) -> BitsPerDim:
    """The bound on images x0 [N, C, H, W], 8 bits in [-1, 1], with one draw of noise for each t: T network calls.

    The noise of image i at t is normal(seeds[i], indices[i], t + 1). `clip` limits the predicted x_0 to [-1, 1].
    """
    terms = []
    for step in range(diffusion.num_timesteps):
        t = torch.full((len(x0),), step, device=x0.device)
        noise = normals(seeds, indices, [step + 1] * len(x0), tuple(x0.shape[1:]), x0.device).to(x0.dtype)
        xt = diffusion.q_sample(x0, t, noise)
        terms.append(diffusion.vb_term_bpd(x0, xt, t, network(xt, t, y).to(x0.dtype), clip).double())
    prior = prior_bpd(diffusion, x0).double()
    stacked = torch.stack(terms, dim=1)
    return BitsPerDim(prior + stacked.sum(dim=1), prior, stacked)
