"""Exponential moving averages of the weights, kept outside the network and the optimiser."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor, nn


class EMAState(TypedDict):
    """What a resumed run needs: one average for each decay, by its `repr`."""

    averages: dict[str, dict[str, Tensor]]
    updates: int


def move(averages: list[Tensor], sources: list[Tensor], share: Tensor) -> None:
    """averages ← averages + share·(sources - averages), in place; share [] on their device, which nobody waits for."""
    if share.device.type == "cuda":
        move_together(averages, sources, share)
    else:
        torch._foreach_lerp_(averages, sources, [share] * len(sources))


def move_together(averages: list[Tensor], sources: list[Tensor], share: Tensor) -> None:
    """The same in a few launches for all of them, where a lerp whose share is a tensor has one for each."""
    steps = torch._foreach_sub(sources, averages)
    torch._foreach_mul_(steps, share)
    torch._foreach_add_(averages, steps)


class EMA:
    """θ̄ ← d·θ̄ + (1 - d)·θ with d = min(decay, (1 + k)/(10 + k)) at the k-th update, for each of several decays.

    The warm-up is TensorFlow's `ExponentialMovingAverage(num_updates)`, as in Ho et al.'s code: early
    averages follow the network instead of remembering its random start. It is float32, and updated in place.
    Buffers (a batch norm's statistics, averages themselves) are copied. `averages` maps each decay to a state dict;
    `weights` is that of the first. Raises ValueError for no decay, one twice, or one outside [0, 1).
    """

    def __init__(self, network: nn.Module, *decays: float) -> None:
        if not decays or len(set(decays)) < len(decays):
            raise ValueError(f"ema_decay must be one number or several different ones, not {decays}")
        for decay in decays:
            if not 0 <= decay < 1:
                raise ValueError(f"ema_decay must be at least 0 and below 1, not {decay}")
        self._source = dict(network.state_dict(keep_vars=True))
        device = next(iter(self._source.values())).device
        self._updates = torch.zeros((), dtype=torch.float64, device=device)
        self._averaged = [name for name, tensor in self._source.items() if isinstance(tensor, nn.Parameter)]
        self._copied = [name for name in self._source if name not in set(self._averaged)]
        self.averages = {
            decay: {name: tensor.detach().float().clone() for name, tensor in self._source.items()} for decay in decays
        }

    @property
    def weights(self) -> dict[str, Tensor]:
        """The average of the first decay."""
        return next(iter(self.averages.values()))

    @property
    def updates(self) -> int:
        """How many have counted. Waits for the device."""
        return int(self._updates)

    @torch.no_grad()
    def update(self, counts: Tensor | None = None) -> None:
        """Moves the averages towards the network's present weights.

        Where `counts`, a bool [] on the weights' device, is false, nothing changes; nobody waits to find out.
        """
        moved = torch.ones_like(self._updates) if counts is None else counts.to(self._updates)
        self._updates += moved
        warm = (1 + self._updates) / (10 + self._updates)
        sources = [self._source[name].detach().float() for name in self._averaged]
        for decay, average in self.averages.items():
            share = ((1 - warm.clamp(max=decay)) * moved).float()
            move([average[name] for name in self._averaged], sources, share)
            for name in self._copied:
                source = self._source[name]
                average[name].copy_(source if counts is None else torch.where(counts, source, average[name]))

    def state_dict(self) -> EMAState:
        averages = {repr(decay): average for decay, average in self.averages.items()}
        return {"averages": averages, "updates": self.updates}

    def load_state_dict(self, state: EMAState) -> None:
        """Raises ValueError where the state is of other decays."""
        if state["averages"].keys() != {repr(decay) for decay in self.averages}:
            raise ValueError(f"averages of {', '.join(state['averages'])}, where this run has {list(self.averages)}")
        for decay, average in self.averages.items():
            for name, tensor in average.items():
                tensor.copy_(state["averages"][repr(decay)][name])
        self._updates.fill_(state["updates"])
