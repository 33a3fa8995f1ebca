"""Networks that compute something: the last convolution of a fresh one gives zeros."""

from __future__ import annotations

import torch

from model.nn.config import UNetConfig
from model.nn.unet import UNet


def randomised(config: UNetConfig, std: float = 0.2, seed: int = 0) -> UNet:
    """In eval mode; every weight is random."""
    network = UNet(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data.normal_(std=std, generator=generator)
    return network
