"""Networks that compute something: the last convolution of a fresh one gives zeros."""

from __future__ import annotations

from typing import overload

import torch

from model.nn.config import LucidrainsConfig, UNetConfig
from model.nn.lucidrains import LucidrainsUNet
from model.nn.networks import build
from model.nn.unet import UNet


@overload
def randomised(config: UNetConfig, std: float = 0.2, seed: int = 0) -> UNet: ...
@overload
def randomised(config: LucidrainsConfig, std: float = 0.2, seed: int = 0) -> LucidrainsUNet: ...
def randomised(config: UNetConfig | LucidrainsConfig, std: float = 0.2, seed: int = 0) -> UNet | LucidrainsUNet:
    """In eval mode; every weight is random."""
    network = build(config).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data.normal_(std=std, generator=generator)
    return network
