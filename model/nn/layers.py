"""What a U-Net is built of: residual blocks, attention, and what changes the resolution."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.nn.config import UNetConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "relu": F.relu, "mish": F.mish}
NORMS: dict[str, Callable[[int, UNetConfig], nn.Module]] = {
    "gn": lambda channels, c: nn.GroupNorm(math.gcd(c.norm_groups, channels), channels, c.norm_eps),
    "bn": lambda channels, c: BatchNorm(channels, c.norm_eps),
    "in": lambda channels, c: nn.InstanceNorm2d(channels, c.norm_eps, affine=True),
    "none": lambda channels, c: nn.Identity(),
}


def time_embedding(t: Tensor, dim: int, freq_shift: int = 0) -> Tensor:
    """Sines, then cosines, of t·10000^(-i / (dim/2 - shift)), float32 [N, dim] (Vaswani et al. 2017, §3.5)."""
    half = dim // 2
    i = torch.arange(half, device=t.device, dtype=torch.float32)
    frequencies = torch.exp(i * (-math.log(1e4) / (half - freq_shift)))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class BatchNorm(nn.BatchNorm2d):
    """Without the count of batches: an integer that is not used, and could not be averaged."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__(channels, eps)
        self.num_batches_tracked = None

    def _load_from_state_dict(self, *args: Any) -> None:
        nn.Module._load_from_state_dict(self, *args)  # its own would add the count


def zero(module: nn.Module) -> nn.Module:
    """Zero-initialised, so a residual block starts as the identity (Ho et al.'s code; Goyal et al. 2017)."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q·kᵀ / √width)·v of [N, heads, L, width] each (Vaswani et al. 2017, eq. 1).

    On a CPU it is written out, which is two to three times as fast there as torch's function; that one, where gradients
    are needed, even computes in float32 under autocast. The price is L × L weights, so long rows are left to it.

    On a GPU the fused kernels of torch's function want each row's numbers side by side, and without them it writes
    L × L weights out, in float32. They lie so in a network whose channels are last; elsewhere they are copied.
    """
    if q.device.type != "cpu":
        q, k, v = (z if z.stride(3) == 1 else z.contiguous() for z in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v)
    if q.shape[2] > 1024:
        return F.scaled_dot_product_attention(q, k, v)
    weights = torch.softmax((q * q.shape[3] ** -0.5) @ k.transpose(2, 3), dim=3)
    return weights @ v


class Attention(nn.Module):
    """Self-attention over the H·W positions, with a residual. qkv has its channels as (q, k, v) × heads × width."""

    def __init__(self, config: UNetConfig, channels: int) -> None:
        super().__init__()
        self.heads = channels // config.head_channels if config.head_channels else config.num_heads
        self.norm = NORMS[config.norm](channels, config)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(n, 3, self.heads, c // self.heads, h * w)
        q, k, v = qkv.transpose(3, 4).unbind(1)  # each [N, heads, HW, width]
        y = attention(q, k, v)
        out: Tensor = self.out(y.transpose(2, 3).reshape(n, c, h, w))
        return x + out


class ResBlock(nn.Module):
    """norm → activation → conv, time and class, norm → activation → dropout → conv, plus the input.

    Time and class are a bias before the second norm, or scale and shift after it. `resample` 0.5 or 2 changes the
    resolution of both paths before the first convolution.
    """

    def __init__(
        self, config: UNetConfig, in_channels: int, out_channels: int, attention: bool = False, resample: float = 1
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]
        self.scale_shift, self.resample = config.scale_shift_norm, resample
        self.norm_1 = NORMS[config.norm](in_channels, config)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        width = 2 * out_channels if self.scale_shift else out_channels
        self.time_bias = nn.Linear(config.time_emb_dim, width)
        has_bias = config.num_classes is not None and config.class_conditioning != "embedding"
        self.class_bias = class_embedding(config, width) if has_bias else None
        self.norm_2 = NORMS[config.norm](out_channels, config)
        self.dropout = nn.Dropout(config.dropout)
        self.conv_2 = zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()
        self.attention = Attention(config, out_channels) if attention else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor, y: Tensor | None) -> Tensor:
        h = self.activation(self.norm_1(x))
        if self.resample == 2:
            h, x = doubled(h), doubled(x)
        elif self.resample == 0.5:
            h, x = (F.avg_pool2d(z, 2) for z in (h, x))
        h = self.conv_1(h)
        bias = self.time_bias(emb)
        if self.class_bias is not None:
            bias = bias + self.class_bias(y)
        bias = bias[:, :, None, None]
        if self.scale_shift:
            scale, shift = bias.chunk(2, dim=1)
            h = self.norm_2(h) * (1 + scale) + shift
        else:
            h = self.norm_2(h + bias)
        h = self.conv_2(self.dropout(self.activation(h)))
        out: Tensor = self.attention(h + self.shortcut(x))
        return out


class Downsample(nn.Conv2d):
    """A 3×3 convolution with stride 2."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if self.padding != (0, 0) else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest-neighbour doubling, then a 3×3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(doubled(x))
        return out


def doubled(x: Tensor) -> Tensor:
    """[N, C, H, W] → [N, C, 2H, 2W], each pixel four times.

    For a compiler by broadcasting: on a CPU, the gradient that inductor makes of torch's function is 0 in bfloat16.
    """
    if not torch.compiler.is_dynamo_compiling():
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    n, c, h, w = x.shape
    return x[:, :, :, None, :, None].expand(n, c, h, 2, w, 2).reshape(n, c, 2 * h, 2 * w)


def patchify(x: Tensor, size: int, haar: bool = False) -> Tensor:
    """[N, C, H, W] → [N, C·size², H/size, W/size]: the pixels of a square become channels, or their Haar wavelets."""
    if size == 1:
        return x
    x = F.pixel_unshuffle(x, size)
    return hadamard(x) if haar else x


def unpatchify(x: Tensor, size: int, haar: bool = False) -> Tensor:
    """The inverse of `patchify`."""
    if size == 1:
        return x
    return F.pixel_shuffle(hadamard(x) if haar else x, size)


def hadamard(x: Tensor) -> Tensor:
    """Each four channels a, b, c, d of [N, 4C, H, W] as mean·2, and differences across, down and diagonal.

    It is Haar's transform of 2 × 2 squares, an orthonormal matrix that is its own inverse: white noise stays white.
    In float32, whatever x is, since each number out is made of four.
    """
    n, channels, h, w = x.shape
    a, b, c, d = x.float().reshape(n, channels // 4, 4, h, w).unbind(2)
    above, below, across_above, across_below = a + b, c + d, a - b, c - d
    parts = (above + below, across_above + across_below, above - below, across_above - across_below)
    return torch.stack(parts, dim=2).flatten(1, 2) / 2


def class_embedding(config: UNetConfig, width: int) -> nn.Embedding:
    """One row of `width` numbers for each class and, where there is one, the null class."""
    assert config.num_classes is not None
    weight = torch.empty(config.num_classes + config.null_class, width)
    if not weight.is_meta:  # where there is nothing to draw, torch would import its compiler: 2 s of a server's start
        nn.init.normal_(weight)
    return nn.Embedding(len(weight), width, _weight=weight)
