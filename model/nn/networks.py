"""The kinds of network that a checkpoint may hold, by their name in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from model.nn.config import LucidrainsConfig, UNetConfig
from model.nn.lucidrains import LucidrainsUNet
from model.nn.unet import UNet

AnyConfig = UNetConfig | LucidrainsConfig
AnyUNet = UNet | LucidrainsUNet

UNET = "unet"  # where a checkpoint names none
CONFIGS: dict[str, Callable[..., AnyConfig]] = {UNET: UNetConfig, "lucidrains": LucidrainsConfig}


def build(config: AnyConfig) -> AnyUNet:
    """A network of this architecture, its weights drawn at random."""
    return LucidrainsUNet(config) if isinstance(config, LucidrainsConfig) else UNet(config)


def config_fields(config: AnyConfig) -> dict[str, Any]:
    """Its fields, after the kind of network where that is not ours; `config_of` reads them."""
    fields = asdict(config)
    return fields if isinstance(config, UNetConfig) else {"network": config.network} | fields


def config_of(fields: dict[str, Any]) -> AnyConfig:
    """The inverse of `config_fields`. Raises ValueError or TypeError on anything else."""
    kind = fields.get("network", UNET)
    if kind not in CONFIGS:
        raise ValueError(f"its network is {kind!r}, where this version reads {', '.join(CONFIGS)}")
    return CONFIGS[kind](**{name: value for name, value in fields.items() if name != "network"})
