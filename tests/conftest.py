"""What several test modules share. Networks here are tiny: milliseconds on one core."""

from __future__ import annotations

import pytest
import torch

from model.nn.config import UNetConfig
from model.nn.unet import UNet
from tests.networks import randomised

torch.set_num_threads(1)  # tiny networks are fastest so, and it leaves the machine to others


@pytest.fixture
def tiny_config() -> UNetConfig:
    """8 × 8 grey images of three classes, with a null class.

    12 channels make groups of three: a GroupNorm of single channels undoes the biases of time and class.
    """
    return UNetConfig(
        image_channels=1,
        image_size=(8, 8),
        base_channels=12,
        channel_mults=(1, 2),
        num_res_blocks=1,
        attention_levels=(1,),
        time_emb_dim=16,
        num_classes=3,
        null_class=True,
    )


@pytest.fixture
def tiny(tiny_config: UNetConfig) -> UNet:
    """A network in eval mode whose output is not zero, as a fresh one's is: every weight is random."""
    return randomised(tiny_config)
