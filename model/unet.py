"""The U-Net of Ho et al. 2020: time and class bias every residual block, attention at chosen levels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class UNetConfig:
    """The architecture. It travels inside the checkpoint, so loading one needs no flag.

    `attention_levels` counts resolutions from the top: 0 is the image's own size, 1 is half of it.
    `num_classes` None is an unconditional network; with `null_class` one more class, numbered `num_classes`,
    stands for "no class" (classifier-free guidance, Ho & Salimans 2022).
    """

    image_channels: int = 3
    image_size: tuple[int, int] = (32, 32)  # height, width
    base_channels: int = 128
    channel_mults: tuple[int, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = (1,)
    time_emb_dim: int = 512
    num_classes: int | None = None
    null_class: bool = False
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("image_size", "channel_mults", "attention_levels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists only
        if len(self.image_size) != 2:
            raise ValueError(f"image_size must be (height, width), not {self.image_size}")
        limits = [
            ("image_channels", self.image_channels, 1, 4),
            *(("image_size", side, 1, 4096) for side in self.image_size),
            ("base_channels", self.base_channels, 2, 4096),
            ("number of channel_mults", len(self.channel_mults), 1, 8),
            *(("channel_mults", mult, 1, 64) for mult in self.channel_mults),
            ("num_res_blocks", self.num_res_blocks, 1, 16),
            ("time_emb_dim", self.time_emb_dim, 1, 16384),
            ("num_classes", 1 if self.num_classes is None else self.num_classes, 1, 100_000),
        ]
        for name, value, low, high in limits:
            if not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{name} must be a whole number from {low} to {high}, not {value}")
        if self.base_channels % 2:
            raise ValueError(f"base_channels must be even (sines and cosines), not {self.base_channels}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if not all(0 <= level < len(self.channel_mults) for level in self.attention_levels):
            raise ValueError(
                f"attention_levels {self.attention_levels} are level indices: "
                f"they must be between 0 and {len(self.channel_mults) - 1}"
            )
        if self.null_class and self.num_classes is None:
            raise ValueError("null_class needs num_classes")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return (self.image_channels, *self.image_size)


def time_embedding(t: Tensor, dim: int) -> Tensor:
    """Sines, then cosines, of t·10000^(-i / (dim/2)), float32 [N, dim] (Vaswani et al. 2017, §3.5)."""
    half = dim // 2
    i = torch.arange(half, device=t.device, dtype=torch.float32)
    frequencies = torch.exp(i * (-math.log(1e4) / half))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with Ho's 32 groups, or as many as divide the channels."""
    return nn.GroupNorm(math.gcd(32, channels), channels)


def zero(module: nn.Module) -> nn.Module:
    """Zero-initialised, so a residual block starts as the identity (Ho et al.'s code; Goyal et al. 2017)."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class Attention(nn.Module):
    """Single-head self-attention over the H·W positions, with a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(n, 3, c, h * w).transpose(2, 3).unbind(1)  # each [N, HW, C]
        y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        out: Tensor = self.out(y.transpose(1, 2).reshape(n, c, h, w))
        return x + out


class ResBlock(nn.Module):
    """norm → SiLU → conv, plus the biases of time and class, norm → SiLU → dropout → conv, plus the input."""

    def __init__(self, config: UNetConfig, in_channels: int, out_channels: int, attention: bool) -> None:
        super().__init__()
        self.norm_1 = group_norm(in_channels)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_bias = nn.Linear(config.time_emb_dim, out_channels)
        classes = None if config.num_classes is None else config.num_classes + config.null_class
        self.class_bias = None if classes is None else nn.Embedding(classes, out_channels)
        self.norm_2 = group_norm(out_channels)
        self.dropout = nn.Dropout(config.dropout)
        self.conv_2 = zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.attention = Attention(out_channels) if attention else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor, y: Tensor | None) -> Tensor:
        h = self.conv_1(F.silu(self.norm_1(x)))
        bias = self.time_bias(emb)
        if self.class_bias is not None:
            bias = bias + self.class_bias(y)
        h = h + bias[:, :, None, None]
        h = self.conv_2(self.dropout(F.silu(self.norm_2(h))))
        out: Tensor = self.attention(h + self.shortcut(x))
        return out


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3×3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class UNet(nn.Module):
    """Down through the levels, a middle with attention, and up again with every intermediate concatenated."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.base_channels
        self.time_mlp = nn.Sequential(
            nn.Linear(channels, config.time_emb_dim),
            nn.SiLU(),
            nn.Linear(config.time_emb_dim, config.time_emb_dim),
        )
        self.init_conv = nn.Conv2d(config.image_channels, channels, 3, padding=1)

        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        skips = [channels]
        last = len(config.channel_mults) - 1
        for level, mult in enumerate(config.channel_mults):
            for _ in range(config.num_res_blocks):
                width = config.base_channels * mult
                self.downs.append(ResBlock(config, channels, width, level in config.attention_levels))
                channels = width
                skips.append(channels)
            if level != last:
                self.downs.append(nn.Conv2d(channels, channels, 3, stride=2, padding=1))
                skips.append(channels)

        self.mid = nn.ModuleList(
            [
                ResBlock(config, channels, channels, attention=True),
                ResBlock(config, channels, channels, attention=False),
            ]
        )

        for level, mult in reversed(list(enumerate(config.channel_mults))):
            for _ in range(config.num_res_blocks + 1):
                width = config.base_channels * mult
                self.ups.append(ResBlock(config, channels + skips.pop(), width, level in config.attention_levels))
                channels = width
            if level != 0:
                self.ups.append(Upsample(channels))

        self.out_norm = group_norm(channels)
        self.out_conv = zero(nn.Conv2d(channels, config.image_channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predicts eps, x_0 or v, as trained.

        Args: x [N, C, H, W] in about [-1, 1]; t [N], the timestep, 0 to T - 1, any dtype; y int64 [N], the
        class, where the network is conditional (`num_classes` is the null class), None where it is not.
        Returns [N, C, H, W].
        """
        if (y is None) != (self.config.num_classes is None):
            raise ValueError("a conditional network needs classes y, an unconditional one takes none")
        h, w = x.shape[2:]
        multiple = 2 ** (len(self.config.channel_mults) - 1)
        x = F.pad(x, (0, -w % multiple, 0, -h % multiple))

        weight = self.init_conv.weight
        emb = F.silu(self.time_mlp(time_embedding(t, self.config.base_channels).to(weight.dtype)))
        x = self.init_conv(x)
        skips = [x]
        for layer in self.downs:
            x = layer(x, emb, y) if isinstance(layer, ResBlock) else layer(x)
            skips.append(x)
        for layer in self.mid:
            x = layer(x, emb, y)
        for layer in self.ups:
            x = layer(torch.cat([x, skips.pop()], dim=1), emb, y) if isinstance(layer, ResBlock) else layer(x)
        out: Tensor = self.out_conv(F.silu(self.out_norm(x)))
        return out[:, :, :h, :w]
