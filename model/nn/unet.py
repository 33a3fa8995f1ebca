"""The U-Net of Ho et al. 2020, and of those who came after, so that one network runs their weights.

Time and class reach every residual block as a bias (or, after Dhariwal & Nichol 2021, as scale and shift of its second
norm); attention stands at chosen levels.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.nn.layers import (
    ACTIVATIONS,
    NORMS,
    Downsample,
    ResBlock,
    Upsample,
    class_embedding,
    patchify,
    time_embedding,
    unpatchify,
    zero,
)

CONDITIONINGS = ("bias", "embedding", "both")


@dataclass(frozen=True)
class UNetConfig:
    """The architecture. It travels inside the checkpoint, so loading one needs no flag.

    `patch_size` p > 1 folds every p × p square of pixels into channels before the first convolution, and out again
    after the last (Hoogeboom et al. 2023, "simple diffusion", §3.3): a network for few operations. With `haar` the
    channels are a square's Haar wavelets instead of its pixels, for p = 2.
    `attention_levels` counts resolutions from the top: 0 is the image's own size over `patch_size`, 1 is half of it.
    `num_classes` None is an unconditional network; with `null_class` one more class, numbered `num_classes`,
    stands for "no class" (classifier-free guidance, Ho & Salimans 2022). The class acts as a bias in every residual
    block, as an embedding added to the time's, or both. An attention has `num_heads` heads, or, where `head_channels`
    is not 0, heads of that width. The fields from `norm_groups` on are conventions in which other projects' networks
    differ.
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
    class_conditioning: str = "bias"  # bias, embedding, both
    dropout: float = 0.1
    norm: str = "gn"  # gn, bn, in, none
    activation: str = "silu"  # silu, relu, mish
    num_heads: int = 1
    head_channels: int = 0
    learned_variance: bool = False  # twice the channels out: the prediction, then v of Nichol & Dhariwal 2021, eq. 15
    scale_shift_norm: bool = False
    resblock_updown: bool = False  # residual blocks change the resolution, instead of a convolution alone
    norm_groups: int = 32  # of gn, or its largest divisor that divides the channels; single channels lose time's bias
    norm_eps: float = 1e-5
    downsample_padding: int = 1  # 1 on every side; 0: one row below and one column to the right, as Ho's TensorFlow
    time_freq_shift: int = 0  # frequencies end at 10000^-((half - 1) / (half - shift))
    time_scale: float = 1.0  # of t before it is embedded
    time_table: int = 0  # not 0: t is embedded by a stored table with so many rows, not by sines and cosines
    initial_pad: int = 0  # zeros on every side of the image, whatever its size, which are cut off again
    num_heads_upsample: int = 0  # not 0: the number of heads on the way up

    patch_size: int = 1
    haar: bool = False

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
            ("num_heads", self.num_heads, 1, 4096),
            ("head_channels", self.head_channels, 0, 65536),
            ("downsample_padding", self.downsample_padding, 0, 1),
            ("time_freq_shift", self.time_freq_shift, 0, 1),
            ("time_table", self.time_table, 0, 100_000),
            ("norm_groups", self.norm_groups, 1, 4096),
            ("initial_pad", self.initial_pad, 0, 64),
            ("num_heads_upsample", self.num_heads_upsample, 0, 4096),
            ("patch_size", self.patch_size, 1, 16),
            ("num_classes", 1 if self.num_classes is None else self.num_classes, 1, 100_000),
        ]
        for name, value, low, high in limits:
            if not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{name} must be a whole number from {low} to {high}, not {value}")
        if self.base_channels % 2:
            raise ValueError(f"base_channels must be even (sines and cosines), not {self.base_channels}")
        for name, chosen, valid in (
            ("norm", self.norm, NORMS),
            ("activation", self.activation, ACTIVATIONS),
            ("class_conditioning", self.class_conditioning, CONDITIONINGS),
        ):
            if chosen not in valid:
                raise ValueError(f"{name} must be one of {', '.join(valid)}, not {chosen!r}")
        if not 0 < self.norm_eps < 1 or not 0 < self.time_scale < 1e6:
            raise ValueError(f"norm_eps {self.norm_eps} or time_scale {self.time_scale} is out of range")
        for level in {*self.attention_levels, len(self.channel_mults) - 1}:  # the last: the middle's
            if 0 <= level < len(self.channel_mults):
                channels = self.base_channels * self.channel_mults[level]
                heads = (self.num_heads, self.num_heads_upsample or 1)
                if any(channels % (self.head_channels or count) for count in heads):
                    raise ValueError(f"{channels} channels cannot be divided among the attention heads")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if not all(0 <= level < len(self.channel_mults) for level in self.attention_levels):
            raise ValueError(
                f"attention_levels {self.attention_levels} are level indices: "
                f"they must be between 0 and {len(self.channel_mults) - 1}"
            )
        if self.haar not in (False, True) or (self.haar and self.patch_size != 2):
            raise ValueError(f"haar is true or false, and needs patch_size 2, not {self.patch_size}")
        if self.null_class and self.num_classes is None:
            raise ValueError("null_class needs num_classes")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return (self.image_channels, *self.image_size)

    @property
    def multiple(self) -> int:
        """Of which height and width are multiples inside the network; it pads them."""
        return int(self.patch_size * 2 ** (len(self.channel_mults) - 1))


def padded(x: Tensor, config: UNetConfig) -> Tensor:
    """x [N, C, H, W] with the initial padding around, and what the levels still need below and to the right."""
    pad = config.initial_pad
    h, w = (side + 2 * pad for side in x.shape[2:])
    return F.pad(x, (pad, pad + -w % config.multiple, pad, pad + -h % config.multiple))


def unpadded(x: Tensor, config: UNetConfig, h: int, w: int) -> Tensor:
    """The [N, C, h, w] that `padded` put something around."""
    pad = config.initial_pad
    return x[:, :, pad : pad + h, pad : pad + w]


class UNet(nn.Module):
    """Down through the levels, a middle with attention, and up again with every intermediate concatenated."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.base_channels
        self.activation = ACTIVATIONS[config.activation]
        self.time_mlp = nn.Sequential(
            nn.Linear(channels, config.time_emb_dim),
            nn.SiLU(),
            nn.Linear(config.time_emb_dim, config.time_emb_dim),
        )
        self.time_table = nn.Embedding(config.time_table, channels) if config.time_table else None
        has_embedding = config.num_classes is not None and config.class_conditioning != "bias"
        self.class_emb = class_embedding(config, config.time_emb_dim) if has_embedding else None
        self.init_conv = nn.Conv2d(config.image_channels * config.patch_size**2, channels, 3, padding=1)

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
                self.downs.append(
                    ResBlock(config, channels, channels, resample=0.5)
                    if config.resblock_updown
                    else Downsample(channels, config.downsample_padding)
                )
                skips.append(channels)

        self.mid = nn.ModuleList(
            [
                ResBlock(config, channels, channels, attention=True),
                ResBlock(config, channels, channels),
            ]
        )

        up = replace(config, num_heads=config.num_heads_upsample or config.num_heads)
        for level, mult in reversed(list(enumerate(config.channel_mults))):
            for _ in range(config.num_res_blocks + 1):
                width = config.base_channels * mult
                self.ups.append(ResBlock(up, channels + skips.pop(), width, level in config.attention_levels))
                channels = width
            if level != 0:
                self.ups.append(
                    ResBlock(config, channels, channels, resample=2) if config.resblock_updown else Upsample(channels)
                )

        self.out_norm = NORMS[config.norm](channels, config)
        out_channels = config.image_channels * (2 if config.learned_variance else 1)
        self.out_conv = zero(nn.Conv2d(channels, out_channels * config.patch_size**2, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """Predicts eps, x_0 or v, as trained.

        Args: x [N, C, H, W] in about [-1, 1]; t [N], the timestep, 0 to T - 1, any dtype; y int64 [N], the
        class, where the network is conditional (`num_classes` is the null class), None where it is not.
        Returns [N, C, H, W], or [N, 2C, H, W] with learned variance.
        """
        config = self.config
        if (y is None) != (config.num_classes is None):
            raise ValueError("a conditional network needs classes y, an unconditional one takes none")
        h, w = x.shape[2:]
        x = padded(x, config)

        x = self.init_conv(patchify(x, config.patch_size, config.haar))
        emb = self.embed(t, y).to(x.dtype)
        skips = [x]
        for layer in self.downs:
            x = layer(x, emb, y) if isinstance(layer, ResBlock) else layer(x)
            skips.append(x)
        for layer in self.mid:
            x = layer(x, emb, y)
        for layer in self.ups:
            if not isinstance(layer, ResBlock):
                x = layer(x)
            elif layer.resample == 1:
                x = layer(torch.cat([x, skips.pop()], dim=1), emb, y)
            else:
                x = layer(x, emb, y)
        out = unpatchify(self.out_conv(self.activation(self.out_norm(x))), config.patch_size, config.haar)
        return unpadded(out, config, h, w)

    def embed(self, t: Tensor, y: Tensor | None) -> Tensor:
        """Timestep and class for the blocks, [N, time_emb_dim]. In the weights' precision, under autocast too."""
        with torch.autocast(t.device.type, enabled=False):
            if self.time_table is None:
                config = self.config
                embedding = time_embedding(t * config.time_scale, config.base_channels, config.time_freq_shift)
            else:
                embedding = self.time_table(t.long())
            emb = self.time_mlp(embedding.to(self.init_conv.weight.dtype))
            if self.class_emb is not None:
                emb = emb + self.class_emb(y)
            return self.activation(emb)
