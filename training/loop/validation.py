"""The loss on images that were not trained on, with the same images, timesteps and noise whenever it is asked."""

from __future__ import annotations

import torch
from torch import Tensor

from model.diffusion import GaussianDiffusion
from model.images import from_uint8
from model.nn.unet import UNet
from training.data.datasets import Images

VALIDATION_IMAGES = 1024  # a multiple of four
AT_ONCE = 64


def chosen(images: Images, device: torch.device) -> Images:
    """The images that are looked at, on the device: some twice if there are few."""
    n = VALIDATION_IMAGES
    return images.select(torch.arange(n) * len(images) // n).to(device)  # from everywhere: a folder is sorted by class


@torch.no_grad()
def validation_loss(network: UNet, diffusion: GaussianDiffusion, images: Images, precision: str) -> list[float]:
    """The loss of the `chosen` images by quartile of t: four numbers."""
    n, device = len(images), images.images.device
    generator = torch.Generator().manual_seed(0)
    t = ((torch.arange(n) + torch.rand(n, generator=generator)) / n * diffusion.num_timesteps).long()
    t = t.clamp(max=diffusion.num_timesteps - 1)[torch.randperm(n, generator=generator)]
    losses: list[Tensor] = []
    for start in range(0, n, AT_ONCE):
        part = slice(start, start + AT_ONCE)
        x0, y = from_uint8(images.images[part]), images.labels
        y = None if y is None or network.config.num_classes is None else y[part]
        noise = torch.randn(x0.shape, generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            losses.append(diffusion.loss(network, x0, y, t[part].to(device), noise))
    by_t = torch.cat(losses).cpu()[t.argsort()]
    return [float(quarter.mean()) for quarter in by_t.chunk(4)]
