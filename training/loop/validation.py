"""The loss on images that were not trained on, with the same images, timesteps and noise whenever it is asked."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from model.diffusion import GaussianDiffusion
from model.images import from_uint8
from model.nn.unet import UNet
from training.data import Images

VALIDATION_IMAGES = 1024  # a multiple of four
BATCH_SIZE = 64


def chosen(images: Images, device: torch.device) -> Images:
    """The images that are looked at, on the device: VALIDATION_IMAGES, or all if there are fewer."""
    n = min(VALIDATION_IMAGES, len(images))
    return images.select(torch.arange(n) * len(images) // n).to(device)  # from everywhere: a folder is sorted by class


@torch.no_grad()
def validation_loss(network: UNet, diffusion: GaussianDiffusion, images: Images, precision: str) -> list[float]:
    """The loss of the `chosen` images, some of them more than once if there are few, by quartile of t: four numbers."""
    n, device = VALIDATION_IMAGES, images.images.device
    which = torch.arange(n) * len(images) // n
    generator = torch.Generator().manual_seed(0)
    t = ((torch.arange(n) + torch.rand(n, generator=generator)) / n * diffusion.num_timesteps).long()
    t = t.clamp(max=diffusion.num_timesteps - 1)[torch.randperm(n, generator=generator)]
    losses: list[Tensor] = []
    for start in range(0, n, BATCH_SIZE):
        part = slice(start, start + BATCH_SIZE)
        some = images.select(which[part].to(device))
        x0, y = from_uint8(some.images), None if network.config.num_classes is None else some.labels
        noise = torch.randn(x0.shape, generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            losses.append(diffusion.loss(network, x0, y, t[part].to(device), noise))
    by_t = torch.cat(losses).cpu()[t.argsort()]
    return [float(quarter.mean()) for quarter in by_t.chunk(4)]


def finite(loss: float, iteration: int) -> float:
    """`loss`, unless it is infinite or not a number: then FloatingPointError, so that no such weights are saved."""
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the validation loss is {loss} at iteration {iteration}; what was saved before is good. "
            "Try a lower --learning_rate, --warmup, or --grad_clip 1"
        )
    return loss
