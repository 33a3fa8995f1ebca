"""Everything that changes while a network is trained, as one thing to save and to go on from."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from model.diffusion import GaussianDiffusion
from model.nn.ema import EMA
from model.nn.unet import UNet
from training.loop.gpu import layout
from training.loop.lognormal import LOGNORMAL, LogNormal
from training.loop.loss_meter import LossMeter
from training.loop.optimizer import load_state, make_optimizer
from training.loop.timestep_sampler import TIMESTEP_SAMPLERS, LossSecondMoment
from training.run.config import LOSS_AWARE, TrainConfig


class TrainState:
    """A run at its beginning: random weights, nothing seen. `best` is the lowest validation loss so far."""

    def __init__(
        self, config: TrainConfig, image_shape: tuple[int, int, int], num_classes: int, device: torch.device
    ) -> None:
        torch.manual_seed(config.seed)
        network = UNet(config.unet(image_shape, num_classes))
        self.network = network.to(device, memory_format=layout(config, device))
        decays = (decay**config.ema_update_rate for decay in config.ema_decay)
        self.ema = EMA(self.network, *decays, powers=config.ema_power)
        self.optimizer = make_optimizer(self.network, config)
        is_loss_aware = config.timestep_sampler == LOSS_AWARE
        self.importance = LossSecondMoment(config.num_timesteps, device=device) if is_loss_aware else None
        self._lognormal = None
        if config.timestep_sampler == LOGNORMAL:
            alphas_cumprod = GaussianDiffusion(config.diffusion()).alphas_cumprod
            self._lognormal = LogNormal(alphas_cumprod, config.noise_mean, config.noise_std, device)
        self.tally = LossMeter(device)
        self.iteration, self.images_seen, self.best = 0, 0, math.inf
        self._sampler, self._num_timesteps = config.timestep_sampler, config.num_timesteps

    def timesteps(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """The timesteps t, int64 [N], that --timestep_sampler makes of u [N], and the weights of their losses [N]."""
        if self.importance:
            return self.importance.draw(u)
        if self._lognormal:
            return self._lognormal.draw(u), torch.ones_like(u)
        return TIMESTEP_SAMPLERS[self._sampler](u, self._num_timesteps), torch.ones_like(u)

    def buffers_changed(self) -> list[Tensor]:
        """What a forward pass and its losses change, besides the gradient: a step that does not count undoes it."""
        return [*self.network.buffers(), *(self.importance.state_dict().values() if self.importance else ())]

    def state_dict(self) -> dict[str, Any]:
        """Without classes of ours, so that it is loaded without executing code."""
        return {
            "network": self.network.state_dict(),
            "ema": self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "importance": self.importance.state_dict() if self.importance else None,
            "tally": self.tally.numbers,
            "iteration": self.iteration,
            "images_seen": self.images_seen,
            "best": self.best,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises RuntimeError where it is that of another network, ValueError where of other averages."""
        self.network.load_state_dict(state["network"])
        self.ema.load_state_dict(state["ema"])
        load_state(self.optimizer, state["optimizer"])
        if self.importance:
            self.importance.load_state_dict(state["importance"])
        self.tally.numbers = state["tally"].to(self.tally.numbers)
        self.iteration, self.images_seen, self.best = state["iteration"], state["images_seen"], state["best"]
