"""The U-Net of lucidrains/denoising-diffusion-pytorch, from its version 2.0.0 on, and its classifier-free one.

Convolution, RMS norm, SiLU, where ours has norm, SiLU, convolution; linear attention at every level (Shen et al. 2021),
full attention in the middle and where it is asked for, with learned keys and values besides those of the image.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.nn.config import LucidrainsConfig
from model.nn.layers import attention


class RMSNorm(nn.Module):
    """x [N, C, H, W] → x / ‖x‖ · √C · weight, over the channels of each position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        gain = self.weight * len(self.weight) ** 0.5
        out: Tensor = F.normalize(x, dim=1) * gain[:, None, None]  # under autocast in float32
        return out


class LinearAttention(nn.Module):
    """softmax(q)·(softmax(k)ᵀ·v): q over each head's width, k over the positions and the memory; with a residual."""

    def __init__(self, channels: int, heads: int, width: int, memory: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.norm = RMSNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * heads * width, 1, bias=False)
        self.memory = nn.Parameter(torch.randn(2, heads, memory, width)) if memory else None
        self.out = nn.Conv2d(heads * width, channels, 1)
        self.out_norm = RMSNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        q, k, v = with_memory(self.qkv(self.norm(x)), self.heads, self.memory)
        context = k.softmax(dim=2).transpose(2, 3) @ v  # [N, heads, width, width]
        y = (q.softmax(dim=3) * self.width**-0.5) @ context
        out: Tensor = x + self.out_norm(self.out(y.transpose(2, 3).reshape(n, -1, h, w)))
        return out


class FullAttention(nn.Module):
    """Self-attention over positions and memory, with a residual."""

    def __init__(self, channels: int, heads: int, width: int, memory: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = RMSNorm(channels)
        self.qkv = nn.Conv2d(channels, 3 * heads * width, 1, bias=False)
        self.memory = nn.Parameter(torch.randn(2, heads, memory, width)) if memory else None
        self.out = nn.Conv2d(heads * width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        y = attention(*with_memory(self.qkv(self.norm(x)), self.heads, self.memory))
        out: Tensor = x + self.out(y.transpose(2, 3).reshape(n, -1, h, w))
        return out


def with_memory(qkv: Tensor, heads: int, memory: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q [N, heads, H·W, width], k and v [N, heads, memory + H·W, width] from channels (q, k, v) × heads × width."""
    n, channels, h, w = qkv.shape
    q, k, v = qkv.reshape(n, 3, heads, channels // 3 // heads, h * w).transpose(3, 4).unbind(1)
    if memory is None:
        return q, k, v
    more_k, more_v = memory.to(qkv.dtype).expand(n, *memory.shape).unbind(1)
    return q, torch.cat([more_k, k], dim=2), torch.cat([more_v, v], dim=2)


class Block(nn.Module):
    """Twice convolution → RMS norm → SiLU, plus the input; time and class scale and shift the first norm."""

    def __init__(self, in_channels: int, out_channels: int, emb_dim: int) -> None:
        super().__init__()
        self.scale_shift = nn.Linear(emb_dim, 2 * out_channels)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm_1 = RMSNorm(out_channels)
        self.conv_2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.norm_2 = RMSNorm(out_channels)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.scale_shift(emb)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(self.norm_1(self.conv_1(x)) * (scale + 1) + shift)
        out: Tensor = F.silu(self.norm_2(self.conv_2(h))) + self.shortcut(x)
        return out


class Resample(nn.Module):
    """A convolution after the resolution is doubled (nearest neighbour), or halved (squares become channels)."""

    def __init__(self, how: str, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.how = how
        size, stride = {"fold": (1, 1), "stride": (4, 2), "double": (3, 1), "keep": (3, 1)}[how]
        self.conv = nn.Conv2d(
            in_channels * (4 if how == "fold" else 1), out_channels, size, stride, size // 2 - (size == 4)
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(resized(x, self.how))
        return out


def resized(x: Tensor, how: str) -> Tensor:
    """What a `Resample` does before its convolution."""
    if how == "fold":
        return F.pixel_unshuffle(x, 2)
    return F.interpolate(x, scale_factor=2.0, mode="nearest") if how == "double" else x


class Stage(nn.Module):
    """A level: two blocks, attention, and what changes the resolution.

    On the way up each block has a skip's channels beside its own, on the way down it leaves one.
    """

    def __init__(self, config: LucidrainsConfig, level: int, channels: int, skip: int, resample: Resample) -> None:
        super().__init__()
        self.is_up = skip > 0
        self.block_1 = Block(channels + skip, channels, embedding_width(config))
        self.block_2 = Block(channels + skip, channels, embedding_width(config))
        self.attention = attention_of(config, level, channels, config.full_attention[level])
        self.resample = resample

    def forward(self, x: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        """`skips` has the newest last."""
        for block, after in ((self.block_1, nn.Identity()), (self.block_2, self.attention)):
            x = after(block(torch.cat([x, skips.pop()], dim=1) if self.is_up else x, emb))
            if not self.is_up:
                skips.append(x)
        out: Tensor = self.resample(x)
        return out


def attention_of(config: LucidrainsConfig, level: int, channels: int, full: bool) -> LinearAttention | FullAttention:
    """The attention of a level; number -1 is the middle."""
    kind = FullAttention if full else LinearAttention
    return kind(channels, config.heads[level], config.head_channels[level], config.memory)


def embedding_width(config: LucidrainsConfig) -> int:
    """Of time, and of the class after it."""
    return 4 * config.dim * (1 if config.num_classes is None else 2)


class Middle(nn.Module):
    """Block, full attention, block."""

    def __init__(self, config: LucidrainsConfig, channels: int) -> None:
        super().__init__()
        self.block_1 = Block(channels, channels, embedding_width(config))
        self.attention = attention_of(config, -1, channels, True)
        self.block_2 = Block(channels, channels, embedding_width(config))


def embedding_mlp(dim: int) -> nn.Sequential:
    """[N, dim] → [N, 4·dim]."""
    return nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, 4 * dim))


class LucidrainsUNet(nn.Module):
    """Down through the levels, a middle, and up again with two intermediates a level concatenated, and the first."""

    def __init__(self, config: LucidrainsConfig) -> None:
        super().__init__()
        self.config = config
        widths = [config.init_dim, *(config.dim * mult for mult in config.dim_mults)]
        last = len(config.dim_mults) - 1
        halve = "stride" if config.strided else "fold"
        self.time_mlp = embedding_mlp(config.dim)
        if config.num_classes is not None:
            self.class_emb = nn.Embedding(config.num_classes + config.null_class, config.dim)
            self.class_mlp = embedding_mlp(config.dim)
        self.init_conv = nn.Conv2d(config.image_channels, config.init_dim, 7, padding=3)
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for level, (narrow, wide) in enumerate(pairwise(widths)):
            down = Resample("keep" if level == last else halve, narrow, wide)
            self.downs.append(Stage(config, level, narrow, 0, down))
            up = Resample("keep" if level == 0 else "double", wide, narrow)
            self.ups.insert(0, Stage(config, level, wide, narrow, up))
        self.mid = Middle(config, widths[-1])
        self.out_block = Block(2 * config.init_dim, config.init_dim, embedding_width(config))
        out_channels = config.image_channels * (2 if config.learned_variance else 1)
        self.out_conv = nn.Conv2d(config.init_dim, out_channels, 1)

    @property
    def body(self) -> tuple[nn.Module, ...]:
        """All but the first convolution, in whose precision time and class are embedded."""
        return self.downs, self.mid, self.ups, self.out_block, self.out_conv

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predicts eps, x_0 or v, as trained.

        Args: x [N, C, H, W] in about [-1, 1]; t [N], the timestep, 0 to T - 1, any dtype; y int64 [N], the
        class, where the network is conditional (`num_classes` is the null class), None where it is not.
        Returns [N, C, H, W], or [N, 2C, H, W] with learned variance.
        """
        emb = self.embed(t, y).to(x.dtype)
        x = first = self.init_conv(x)
        skips: list[Tensor] = []
        for stage in self.downs:
            x = stage(x, emb, skips)
        x = self.mid.block_2(self.mid.attention(self.mid.block_1(x, emb)), emb)
        for stage in self.ups:
            x = stage(x, emb, skips)
        out: Tensor = self.out_conv(self.out_block(torch.cat([x, first], dim=1), emb))
        return out

    def embed(self, t: Tensor, y: Tensor | None) -> Tensor:
        """Timestep and class for the blocks, [N, embedding_width]. In the weights' precision, under autocast too."""
        if (y is None) != (self.config.num_classes is None):
            raise ValueError("a conditional network needs classes y, an unconditional one takes none")
        with torch.autocast(t.device.type, enabled=False):
            half = self.config.dim // 2
            i = torch.arange(half, device=t.device, dtype=torch.float32)
            angles = t.float()[:, None] * torch.exp(i * (-math.log(self.config.time_theta) / (half - 1)))
            waves = torch.cat([angles.sin(), angles.cos()], dim=1).to(self.init_conv.weight.dtype)
            emb: Tensor = self.time_mlp(waves)
            if y is not None:
                emb = torch.cat([emb, self.class_mlp(self.class_emb(y))], dim=1)
            return F.silu(emb)
