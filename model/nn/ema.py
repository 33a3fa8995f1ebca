"""Exponential moving averages of the weights, kept outside the network and the optimiser."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

NARROWEST, WIDEST = 0.001, 0.28  # of a power profile; that of a plain mean is 0.2887


class EMAState(TypedDict):
    """What a resumed run needs: every average by its name, and how many updates counted."""

    averages: dict[str, dict[str, Tensor]]
    updates: int
    power_updates: NotRequired[int]


def power_name(width: float) -> str:
    """What the average of a power profile is called."""
    return f"power-{width!r}"


def power_exponent(width: float) -> float:
    """γ of the profile t^γ with a standard deviation of `width` times its length (Karras et al. 2024, appendix C)."""
    inverse = width**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


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
    For each of `powers` there is another average, with d = (1 - 1/k)^(γ + 1): a power profile of EDM2 (§3.1), which
    reaches back over the same share of the run at every moment, since its width is that share (σ_rel, 0.05 to 0.15).
    Buffers (a batch norm's statistics, averages themselves) are copied. `averages` maps each name, the decay's
    number or "power-0.1", to a state dict; `weights` is that of the first decay. Raises ValueError for no decay, one
    twice, one outside [0, 1), or a width that no power profile has.
    """

    def __init__(self, network: nn.Module, *decays: float, powers: Sequence[float] = ()) -> None:
        if not decays or len(set(decays)) < len(decays):
            raise ValueError(f"ema_decay must be one number or several different ones, not {decays}")
        for decay in decays:
            if not 0 <= decay < 1:
                raise ValueError(f"ema_decay must be at least 0 and below 1, not {decay}")
        if len(set(powers)) < len(powers) or not all(NARROWEST <= width <= WIDEST for width in powers):
            raise ValueError(f"ema_power is from {NARROWEST} to {WIDEST}, or several such, not {powers}")
        self._source = dict(network.state_dict(keep_vars=True))
        device = next(iter(self._source.values())).device
        self._updates = torch.zeros((), dtype=torch.float64, device=device)
        self._power_updates = torch.zeros((), dtype=torch.float64, device=device)
        self._averaged = [name for name, tensor in self._source.items() if isinstance(tensor, nn.Parameter)]
        self._copied = [name for name in self._source if name not in set(self._averaged)]
        self._exponents = {power_name(width): power_exponent(width) for width in powers}
        keys: list[float | str] = [*decays, *self._exponents]
        self.averages = {
            key: {name: tensor.detach().float().clone() for name, tensor in self._source.items()} for key in keys
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
        self._power_updates += moved
        warm = (1 + self._updates) / (10 + self._updates)
        k = self._power_updates.clamp(min=1)
        sources = [self._source[name].detach().float() for name in self._averaged]
        for key, average in self.averages.items():
            kept = ((k - 1) / k) ** (self._exponents[key] + 1) if isinstance(key, str) else warm.clamp(max=key)
            share = ((1 - kept) * moved).float()
            move([average[name] for name in self._averaged], sources, share)
            for name in self._copied:
                source = self._source[name]
                average[name].copy_(source if counts is None else torch.where(counts, source, average[name]))

    def begin_with(self, weights: dict[str, Tensor]) -> None:
        """Lets every average be `weights`, those of a trained network.

        The decays' warm-up counts as done, so that they keep what they have; a power profile reaches back to here.
        """
        largest = max(key for key in self.averages if isinstance(key, float))
        for average in self.averages.values():
            for name, tensor in average.items():
                tensor.copy_(weights[name])
        self._updates.fill_(max(0, math.ceil((10 * largest - 1) / (1 - largest))))  # (1 + k)/(10 + k) exceeds it then

    def state_dict(self) -> EMAState:
        averages = {_named(key): average for key, average in self.averages.items()}
        state: EMAState = {"averages": averages, "updates": self.updates}
        return state | {"power_updates": int(self._power_updates)} if self._exponents else state

    def load_state_dict(self, state: EMAState) -> None:
        """Raises ValueError where the state is of other averages."""
        if state["averages"].keys() != {_named(key) for key in self.averages}:
            raise ValueError(f"averages of {', '.join(state['averages'])}, where this run has {list(self.averages)}")
        for key, average in self.averages.items():
            for name, tensor in average.items():
                tensor.copy_(state["averages"][_named(key)][name])
        self._updates.fill_(state["updates"])
        self._power_updates.fill_(state.get("power_updates", 0))


def _named(key: float | str) -> str:
    """An average's name in a state."""
    return key if isinstance(key, str) else repr(key)
