"""The U-Net of Ho et al. 2020, and of those who came after, so that one network runs their weights.

Time and class reach every residual block as a bias (or, after Dhariwal & Nichol 2021, as scale and shift of its second
norm); attention stands at chosen levels.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.nn.config import UNetConfig
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

    @property
    def body(self) -> tuple[nn.Module, ...]:
        """All but the first convolution, in whose precision time is embedded, and the last norm."""
        return self.downs, self.mid, self.ups, self.out_conv

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
