"""lucidrains' U-Net as it runs fastest on a CPU: as in `model.backends.cpu`, whose convolutions it takes.

Channels are last, so that an RMS norm is a sum along rows, and its scale, that of time and class, and the shift one
pass more. The embedding is computed once per timestep and class. The residual stream, norms and softmax stay float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.backends.cpu import CACHE_BYTES, channels_last_rows
from model.backends.packed_conv import PackedConv
from model.nn.lucidrains import Block, FullAttention, LinearAttention, LucidrainsUNet, Resample, RMSNorm, Stage, resized


class FusedRMSNorm:
    """An RMSNorm of x [N, C, H, W] whose channels are last, and stay there."""

    def __init__(self, layer: RMSNorm) -> None:
        self.gain = layer.weight.detach() * len(layer.weight) ** 0.5

    def __call__(self, x: Tensor, modulation: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """modulation: (1 + scale, shift) after it, [N, C] each."""
        v = channels_last_rows(x)
        length = torch.linalg.vector_norm(v, dim=2, keepdim=True).clamp_(min=1e-12)
        if modulation is None:
            out = (v / length).mul_(self.gain)
        else:
            scale, shift = modulation
            out = torch.addcmul(shift[:, None], v / length, (self.gain * scale)[:, None])
        n, c, h, w = x.shape
        lines: Tensor = out.view(n, h, w, c)
        return lines.permute(0, 3, 1, 2)


class PackedAttention:
    """A LinearAttention or a FullAttention."""

    def __init__(self, layer: LinearAttention | FullAttention, dtype: torch.dtype) -> None:
        self.heads, self.dtype = layer.heads, dtype
        self.norm = FusedRMSNorm(layer.norm)
        self.qkv, self.out = PackedConv(layer.qkv, dtype), PackedConv(layer.out, dtype)
        self.memory = None if layer.memory is None else layer.memory.detach().to(dtype)
        self.out_norm = FusedRMSNorm(layer.out_norm) if isinstance(layer, LinearAttention) else None

    def __call__(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        qkv = channels_last_rows(self.qkv(self.norm(x).to(self.dtype))).view(n, h * w, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()  # each [N, heads, HW, width]
        if self.memory is not None:
            more_k, more_v = self.memory.expand(n, *self.memory.shape).unbind(1)
            k, v = torch.cat([more_k, k], dim=2), torch.cat([more_v, v], dim=2)
        if self.out_norm is None:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            context = k.float().softmax(dim=2).to(self.dtype).transpose(2, 3) @ v
            y = (q.float().softmax(dim=3) * q.shape[3] ** -0.5).to(self.dtype) @ context
        y = self.out(y.transpose(1, 2).reshape(n, h, w, -1).permute(0, 3, 1, 2)).float()
        return x + (y if self.out_norm is None else self.out_norm(y))


class PackedBlock:
    """A Block. `columns` is its place among the scales and shifts of all blocks."""

    def __init__(self, layer: Block, columns: slice, dtype: torch.dtype) -> None:
        self.dtype, self.columns = dtype, columns
        self.conv_1, self.conv_2 = PackedConv(layer.conv_1, dtype), PackedConv(layer.conv_2, dtype)
        self.norm_1, self.norm_2 = FusedRMSNorm(layer.norm_1), FusedRMSNorm(layer.norm_2)
        self.shortcut = PackedConv(layer.shortcut, dtype) if isinstance(layer.shortcut, nn.Conv2d) else None

    def __call__(self, x: Tensor, scale_shifts: Tensor) -> Tensor:
        scale, shift = scale_shifts[:, self.columns].chunk(2, dim=1)
        low = x.to(self.dtype)
        h = F.silu(self.norm_1(self.conv_1(low).float(), (1 + scale, shift)), inplace=True)
        h = F.silu(self.norm_2(self.conv_2(h.to(self.dtype)).float()), inplace=True)
        return h.add_(x if self.shortcut is None else self.shortcut(low).float())


class PackedStage:
    """A Stage."""

    def __init__(self, layer: Stage, blocks: tuple[PackedBlock, PackedBlock], dtype: torch.dtype) -> None:
        self.is_up, self.blocks = layer.is_up, blocks
        self.attention = PackedAttention(layer.attention, dtype)
        assert isinstance(layer.resample, Resample)
        self.how, self.conv, self.dtype = layer.resample.how, PackedConv(layer.resample.conv, dtype), dtype

    def __call__(self, x: Tensor, scale_shifts: Tensor, skips: list[Tensor]) -> Tensor:
        for i, block in enumerate(self.blocks):
            x = block(torch.cat([x, skips.pop()], dim=1) if self.is_up else x, scale_shifts)
            x = self.attention(x) if i else x
            if not self.is_up:
                skips.append(x)
        x = resized(x.to(self.dtype), self.how).contiguous(memory_format=torch.channels_last)
        return self.conv(x).float()


class PackedLucidrainsUNet:
    """A LucidrainsUNet's weights, packed, and its forward pass over them."""

    def __init__(self, network: LucidrainsUNet, dtype: torch.dtype) -> None:
        self.dtype, self._network = dtype, network
        self._cache: dict[tuple[float, int], Tensor] = {}
        self._width = 0
        self._embedders: list[nn.Linear] = []
        self.init_conv, self.out_conv = PackedConv(network.init_conv, dtype), PackedConv(network.out_conv, dtype)
        self.downs, self.ups = ([self._stage(layer) for layer in part] for part in (network.downs, network.ups))
        self.mid = self._block(network.mid.block_1), self._block(network.mid.block_2)
        self.mid_attention = PackedAttention(network.mid.attention, dtype)
        self.out_block = self._block(network.out_block)
        self._weight = torch.cat([layer.weight.detach() for layer in self._embedders])
        self._bias = torch.cat([layer.bias.detach() for layer in self._embedders])

    def _block(self, layer: Block) -> PackedBlock:
        columns = slice(self._width, self._width + layer.scale_shift.out_features)
        self._width = columns.stop
        self._embedders.append(layer.scale_shift)
        return PackedBlock(layer, columns, self.dtype)

    def _stage(self, layer: nn.Module) -> PackedStage:
        assert isinstance(layer, Stage)
        return PackedStage(layer, (self._block(layer.block_1), self._block(layer.block_2)), self.dtype)

    def embed(self, t: Tensor, y: Tensor | None) -> Tensor:
        """Scales and shifts of all blocks, [N, width]; each timestep and class is embedded alone."""
        if (y is None) != (self._network.config.num_classes is None):
            raise ValueError("a conditional network needs classes y, an unconditional one takes none")
        rows = []
        for key in zip(t.tolist(), [0] * len(t) if y is None else y.tolist(), strict=True):
            row = self._cache.get(key)
            if row is None:
                if len(self._cache) * self._width * 4 > CACHE_BYTES:
                    self._cache.clear()
                emb = self._network.embed(torch.tensor(key[:1]), None if y is None else torch.tensor(key[1:]))
                row = self._cache[key] = F.linear(emb, self._weight, self._bias)[0]
            rows.append(row)
        return torch.stack(rows)

    def forward(self, x: Tensor, scale_shifts: Tensor) -> Tensor:
        """x [N, C, H, W] and what `embed` gives → the network's output, float32."""
        x = x.contiguous(memory_format=torch.channels_last)
        x = first = self.init_conv(x.to(self.dtype)).float()
        skips: list[Tensor] = []
        for stage in self.downs:
            x = stage(x, scale_shifts, skips)
        x = self.mid[1](self.mid_attention(self.mid[0](x, scale_shifts)), scale_shifts)
        for stage in self.ups:
            x = stage(x, scale_shifts, skips)
        x = self.out_block(torch.cat([x, first], dim=1), scale_shifts)
        return self.out_conv(x.to(self.dtype)).float().contiguous()
