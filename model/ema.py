"""Exponential moving average of the weights, kept outside the network and the optimiser."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor, nn


class EMAState(TypedDict):
    """What a resumed run needs."""

    weights: dict[str, Tensor]
    updates: int


class EMA:
    """θ̄ ← d·θ̄ + (1 - d)·θ with d = min(decay, (1 + k)/(10 + k)) at the k-th update.

    The warm-up is TensorFlow's `ExponentialMovingAverage(num_updates)`, as in Ho et al.'s code: early
    averages follow the network instead of remembering its random start. It is float32, and updated in place.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema_decay must be at least 0 and below 1, not {decay}")
        self.decay, self.updates = decay, 0
        self._source = dict(network.state_dict(keep_vars=True))
        self.weights = {name: p.detach().float().clone() for name, p in self._source.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the network's present weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        sources = [p.detach().float() for p in self._source.values()]
        torch._foreach_lerp_(list(self.weights.values()), sources, 1 - decay)

    def state_dict(self) -> EMAState:
        return {"weights": self.weights, "updates": self.updates}

    def load_state_dict(self, state: EMAState) -> None:
        for name, average in self.weights.items():
            average.copy_(state["weights"][name])
        self.updates = state["updates"]
