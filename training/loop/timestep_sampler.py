"""Which timesteps a training step sees: functions of uniform numbers, so that randomness stays an argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

import torch
import torch.distributed as dist
from torch import Tensor


def uniform(u: Tensor, num_timesteps: int) -> Tensor:
    """t, int64 [N], each uniform over 0 … T - 1, from u [N] uniform in [0, 1)."""
    return (u.double() * num_timesteps).long()


def antithetic(u: Tensor, num_timesteps: int) -> Tensor:
    """As `uniform`, but the second half of the batch mirrors the first: t and T - 1 - t (Song et al.'s DDIM code)."""
    t = uniform(u[: (len(u) + 1) // 2], num_timesteps)
    return torch.cat([t, num_timesteps - 1 - t])[: len(u)]


def stratified(u: Tensor, num_timesteps: int) -> Tensor:
    """One t in each of N equal parts of the range (as Kingma et al. 2021, §I.1, with a draw for each part)."""
    places = torch.arange(len(u), device=u.device, dtype=torch.float64)
    return uniform((places + u.double()) / len(u), num_timesteps)


TIMESTEP_SAMPLERS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "uniform": uniform,
    "antithetic": antithetic,
    "stratified": stratified,
}


class SecondMomentState(TypedDict):
    """What a resumed run needs."""

    losses: Tensor
    counts: Tensor


class LossSecondMoment:
    """Importance sampling: p_t ∝ √E[L_t²] over the last `history` losses of each t (Nichol & Dhariwal 2021, eq. 18).

    Uniform until every t has its history; a share `uniform_share` stays uniform. Nothing waits for the device. Where
    `torch.distributed` runs, `update` gathers what all ranks saw, so all hold the same state: that of one process
    with the whole batch.
    """

    def __init__(
        self,
        num_timesteps: int,
        history: int = 10,
        uniform_share: float = 0.001,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_timesteps, self.history, self.uniform_share = num_timesteps, history, uniform_share
        # one more row, which is never read, for the losses of a batch that its own later ones would overwrite
        self._losses = torch.zeros(num_timesteps + 1, history, dtype=torch.float64, device=device)
        self._counts = torch.zeros(num_timesteps + 1, dtype=torch.int64, device=device)

    def probabilities(self) -> Tensor:
        """p_t, float64 [T]."""
        p = self._losses[:-1].square().mean(dim=1).sqrt()
        p = p / p.sum().clamp(min=1e-300)
        p = p * (1 - self.uniform_share) + self.uniform_share / self.num_timesteps
        is_warm = (self._counts[:-1] >= self.history).all()
        return torch.where(is_warm, p, torch.full_like(p, 1 / self.num_timesteps))

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """t, int64 [N], and the weights 1/(T·p_t), float32 [N], that keep the loss unbiased; u [N] as for `uniform`."""
        p = self.probabilities()
        t = torch.searchsorted(p.cumsum(0), u.double(), right=True).clamp(max=self.num_timesteps - 1)
        return t, (1 / (self.num_timesteps * p[t])).float()

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Remembers the unweighted losses [N] of timesteps t [N]; every rank calls it, with equally many.

        A loss that is not finite is left out: it would stay in the average for `history` draws of its t.
        """
        losses = losses.detach().double()
        if dist.is_available() and dist.is_initialized():
            t, losses = _of_all_ranks(t), _of_all_ranks(losses)
        t = torch.where(losses.isfinite(), t, self.num_timesteps)
        t, order = torch.sort(t, stable=True)
        first, end = torch.searchsorted(t, t), torch.searchsorted(t, t, right=True)
        rank = torch.arange(len(t), device=t.device) - first
        slot = (self._counts[t] + rank) % self.history
        row = torch.where(rank >= end - first - self.history, t, self.num_timesteps)
        self._losses[row, slot] = losses[order]
        self._counts.index_add_(0, t, torch.ones_like(t))

    def state_dict(self) -> SecondMomentState:
        """The losses, float64 [T + 1, history], and how many came, int64 [T + 1]; the last row means nothing."""
        return {"losses": self._losses, "counts": self._counts}

    def load_state_dict(self, state: SecondMomentState) -> None:
        """Goes on from a `state_dict`. Raises RuntimeError where T or `history` differ."""
        self._losses.copy_(state["losses"])
        self._counts.copy_(state["counts"])


def _of_all_ranks(part: Tensor) -> Tensor:
    """[ranks·N], rank after rank."""
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part.contiguous())
    return torch.cat(parts)
