"""The U-Net as it runs fastest on a CPU, where nothing is learnt.

Most of a network's time is spent around its convolutions. What is done about it, without a compiler:

- Convolutions take weights that oneDNN has packed beforehand, in bfloat16 where asked for.
- On large maps a normalisation becomes one scale and one shift per sample and channel. Whatever is linear around it is
  folded into them: the bias of time and class, scale and shift of Dhariwal & Nichol 2021. So norm and activation are
  two passes. On small maps a call costs more than a pass, and PyTorch's own function is one call.
- Activations lie with their channels last. The residual stream, norms and sums stay in float32.
- Time and class are embedded once per timestep and class, not once per step.

A row's bits do not depend on what is in the others. On how many they are they may depend: see `app.engine.runner`.
What a GPU runs is in `model.backends.cuda`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.backends.packed_conv import PackedConv
from model.nn.layers import Attention, ResBlock, Upsample, patchify, unpatchify
from model.nn.unet import UNet, padded, unpadded

CACHE_BYTES = 64 * 2**20  # of embedded timesteps
SMALL_MAP = 1024  # pixels; on larger maps PyTorch's group norm splits its sums by the number of rows

IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: F.silu(x, inplace=True),
    "relu": torch.relu_,
    "mish": lambda x: F.mish(x, inplace=True),
}


def channels_last_rows(x: Tensor) -> Tensor:
    """[N, C, H, W] with channels last, as [N, H·W, C]; no copy."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


class FusedNormAct:
    """norm(x + bias), then an activation: x → act(x·scale + shift), with scale and shift per sample and channel."""

    def __init__(self, layer: nn.Module, activation: str | None) -> None:
        self.activation = IN_PLACE[activation] if activation else None
        self.groups = 0  # 0: scale and shift are constants
        self.eps = 0.0
        self.weight: Tensor | None = None
        self.offset: Tensor | None = None
        if isinstance(layer, nn.GroupNorm):
            self.groups, self.eps = layer.num_groups, layer.eps
            self.weight, self.offset = layer.weight.detach(), layer.bias.detach()
        elif isinstance(layer, nn.InstanceNorm2d):
            self.groups, self.eps = layer.num_features, layer.eps
            if layer.affine:
                self.weight, self.offset = layer.weight.detach(), layer.bias.detach()
        elif isinstance(layer, nn.BatchNorm2d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            self.weight = layer.weight.detach() * (layer.running_var + layer.eps).rsqrt()
            self.offset = layer.bias.detach() - layer.running_mean * self.weight
        else:
            assert isinstance(layer, nn.Identity)

    def __call__(
        self, x: Tensor, bias: Tensor | None = None, modulation: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """x [N, C, H, W] float32; bias [N, C] before the norm; modulation: (1 + scale, shift) after it, [N, C] each."""
        if self.groups and x[0, 0].numel() < SMALL_MAP:
            return self._small(x, bias, modulation)
        v = channels_last_rows(x)
        scale, shift = self._affine(v, bias)
        if modulation is not None:
            scale = modulation[0] if scale is None else scale * modulation[0]
            shift = modulation[1] if shift is None else torch.addcmul(modulation[1], shift, modulation[0])
        if scale is not None:
            assert shift is not None
            out = torch.addcmul(shift[:, None], v, scale[:, None])
        else:
            out = v.clone() if shift is None else v + shift[:, None]
        if self.activation is not None:
            out = self.activation(out)
        n, c, h, w = x.shape
        return out.view(n, h, w, c).permute(0, 3, 1, 2)

    def _small(self, x: Tensor, bias: Tensor | None, modulation: tuple[Tensor, Tensor] | None) -> Tensor:
        """The same by PyTorch's own function: one call instead of twenty."""
        x = x if bias is None else x + bias[:, :, None, None]
        out = F.group_norm(x, self.groups, self.weight, self.offset, self.eps)
        if modulation is not None:
            out = torch.addcmul(modulation[1][:, :, None, None], out, modulation[0][:, :, None, None])
        return out if self.activation is None else self.activation(out)

    def _affine(self, v: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        n, positions, channels = v.shape
        if not self.groups:
            if self.weight is None or self.offset is None:
                return None, bias
            weight, offset = self.weight.expand(n, -1), self.offset.expand(n, -1)
            return weight, offset if bias is None else torch.addcmul(offset, weight, bias)
        sums = v.new_empty(2, n, channels)
        torch.sum(v, 1, out=sums[0])
        torch.sum(v * v, 1, out=sums[1])
        if bias is not None:  # of x + bias: the square first, it needs the old sum
            sums[1] += bias * torch.add(bias * positions, sums[0], alpha=2)
            sums[0] += bias * positions
        width = channels // self.groups
        if width > 1:
            sums = sums.view(2, n, self.groups, width).sum(3, keepdim=True)
        mean, square = (sums * (1 / (positions * width))).unbind()
        deviation = torch.addcmul(square, mean, mean, value=-1).clamp_(min=0).add_(self.eps).rsqrt_()
        if width > 1:
            grid = (n, self.groups, width)
            mean, deviation = mean.expand(grid).reshape(n, channels), deviation.expand(grid).reshape(n, channels)
        scale = deviation if self.weight is None else deviation * self.weight
        centre = -mean if bias is None else bias - mean
        return scale, centre * scale if self.offset is None else torch.addcmul(self.offset, centre, scale)


class PackedAttention:
    """An Attention."""

    def __init__(self, layer: Attention, dtype: torch.dtype) -> None:
        self.heads, self.dtype = layer.heads, dtype
        self.norm = FusedNormAct(layer.norm, None)
        self.qkv, self.out = PackedConv(layer.qkv, dtype), PackedConv(layer.out, dtype)

    def __call__(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        qkv = channels_last_rows(self.qkv(self.norm(x).to(self.dtype))).view(n, h * w, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        y = F.scaled_dot_product_attention(q, k, v)  # [N, heads, HW, width]
        y = y.transpose(1, 2).reshape(n, h, w, c).permute(0, 3, 1, 2)
        return x + self.out(y).float()


class PackedBlock:
    """A ResBlock. `columns` is its place among the biases of all blocks."""

    def __init__(self, layer: ResBlock, activation: str, columns: slice, dtype: torch.dtype) -> None:
        self.dtype, self.columns = dtype, columns
        self.scale_shift, self.resample = layer.scale_shift, layer.resample
        self.norm_1, self.norm_2 = FusedNormAct(layer.norm_1, activation), FusedNormAct(layer.norm_2, activation)
        self.conv_1, self.conv_2 = PackedConv(layer.conv_1, dtype), PackedConv(layer.conv_2, dtype)
        self.shortcut = PackedConv(layer.shortcut, dtype) if isinstance(layer.shortcut, nn.Conv2d) else None
        self.attention = PackedAttention(layer.attention, dtype) if isinstance(layer.attention, Attention) else None

    def __call__(self, x: Tensor, biases: Tensor) -> Tensor:
        h = self.norm_1(x).to(self.dtype)
        if self.resample == 2:
            h, x = (F.interpolate(z, scale_factor=2.0, mode="nearest") for z in (h, x))
        elif self.resample == 0.5:
            h, x = (F.avg_pool2d(z, 2) for z in (h, x))
        h = self.conv_1(h).float()
        bias = biases[:, self.columns]
        if self.scale_shift:
            scale, shift = bias.chunk(2, dim=1)
            h = self.norm_2(h, modulation=(1 + scale, shift))
        else:
            h = self.norm_2(h, bias)
        h = self.conv_2(h.to(self.dtype)).float()
        x = h + (x if self.shortcut is None else self.shortcut(x.to(self.dtype)).float())
        return x if self.attention is None else self.attention(x)


class PackedUNet:
    """A UNet's weights, packed, and its forward pass over them."""

    def __init__(self, network: UNet, dtype: torch.dtype) -> None:
        self.config, self.dtype, self._network = network.config, dtype, network
        self._cache: dict[tuple[float, int], Tensor] = {}
        self._width = 0
        self._embedders: list[ResBlock] = []
        self.init_conv = PackedConv(network.init_conv, dtype)
        self.downs = [self._pack(layer) for layer in network.downs]
        self.mid = [self._pack(layer) for layer in network.mid]
        self.ups = [self._pack(layer) for layer in network.ups]
        self.out_norm = FusedNormAct(network.out_norm, self.config.activation)
        self.out_conv = PackedConv(network.out_conv, dtype)
        self._weight = torch.cat([block.time_bias.weight.detach() for block in self._embedders])
        self._bias = torch.cat([block.time_bias.bias.detach() for block in self._embedders])
        tables = [b.class_bias.weight.detach() for b in self._embedders if b.class_bias is not None]
        self._class_bias = torch.cat(tables, dim=1) if tables else None

    def _pack(self, layer: nn.Module) -> PackedBlock | PackedConv:
        if isinstance(layer, ResBlock):
            columns = slice(self._width, self._width + layer.time_bias.out_features)
            self._width = columns.stop
            self._embedders.append(layer)
            return PackedBlock(layer, self.config.activation, columns, self.dtype)
        return PackedConv(layer.conv if isinstance(layer, Upsample) else layer, self.dtype)

    def _embed(self, t: float, y: int) -> Tensor:
        """The biases of all blocks at a timestep, [width], class embedding (not class bias) included."""
        emb = self._network.embed(torch.tensor([t]), torch.tensor([y]))
        return F.linear(emb, self._weight, self._bias)[0]

    def embed(self, t: Tensor, y: Tensor | None) -> Tensor:
        """The biases of all blocks, [N, width]; each timestep and class is embedded alone, whatever the others are."""
        if (y is None) != (self.config.num_classes is None):
            raise ValueError("a conditional network needs classes y, an unconditional one takes none")
        classes = y.tolist() if y is not None and self._network.class_emb is not None else [0] * len(t)
        rows = []
        for key in zip(t.tolist(), classes, strict=True):
            row = self._cache.get(key)
            if row is None:
                if len(self._cache) * self._width * 4 > CACHE_BYTES:
                    self._cache.clear()
                row = self._cache[key] = self._embed(*key)
            rows.append(row)
        biases = torch.stack(rows)
        return biases if self._class_bias is None else biases + self._class_bias[y]

    def forward(self, x: Tensor, biases: Tensor) -> Tensor:
        """x [N, C, H, W] and `embed`'s biases → the network's output, float32."""
        config = self.config
        h, w = x.shape[2:]
        x = patchify(padded(x, config), config.patch_size, config.haar)
        x = x.contiguous(memory_format=torch.channels_last)
        x = self.init_conv(x.to(self.dtype)).float()
        skips = [x]
        for layer in self.downs:
            if isinstance(layer, PackedBlock):
                x = layer(x, biases)
            else:
                x = F.pad(x, (0, 1, 0, 1)) if layer.padding == [0, 0] else x
                x = layer(x.to(self.dtype)).float()
            skips.append(x)
        for block in self.mid:
            assert isinstance(block, PackedBlock)
            x = block(x, biases)
        for layer in self.ups:
            if not isinstance(layer, PackedBlock):
                x = layer(F.interpolate(x.to(self.dtype), scale_factor=2.0, mode="nearest")).float()
            elif layer.resample == 1:
                x = layer(torch.cat([x, skips.pop()], dim=1), biases)
            else:
                x = layer(x, biases)
        out = self.out_conv(self.out_norm(x).to(self.dtype)).float()
        out = unpatchify(out, config.patch_size, config.haar)
        return unpadded(out, config, h, w).contiguous()
