"""Advice about the groups of a group norm."""

from __future__ import annotations

import math

from model.nn.config import UNetConfig


def single_channel_groups(config: UNetConfig) -> str | None:
    """A warning, where groups of one channel take the mean away that time and class have just added."""
    widths = [config.base_channels * mult for mult in config.channel_mults]
    alone = [width for width in widths if math.gcd(config.norm_groups, width) == width]
    if config.norm != "gn" or config.scale_shift_norm or not alone:
        return None
    groups = next((n for n in (8, 4, 2) if all(math.gcd(n, width) < width for width in widths)), 1)
    return (
        f"at {min(alone)} channels each group of the norm is a single channel, where the biases of time and class "
        f"cancel: --norm_groups {groups} lets the network see them"
    )
