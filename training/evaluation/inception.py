"""Inception-v3 as everyone's FID uses it (Szegedy et al. 2016; Heusel et al. 2017), where its weights are on disk.

The weights are those of TensorFlow's network of 2015-12-05, with 1008 outputs, in the file of pytorch-fid
(`pt_inception-2015-12-05-6726825d.pth`) or torch-fidelity, whose first sha256 digits are in its name. The averages of
its pooling branches leave out the padding, the last block takes maxima, and images are scaled to 299 × 299 as
pytorch-fid scales them. Other weights of the same shape give other numbers, so they are refused.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.images import from_uint8

SHA256 = "6726825d"  # how the sha256 of the weights begins; torch's hub names files so
FEATURES = 2048
SIDE = 299

Spec = tuple[str, int, int | tuple[int, int], int]
"""Name, channels out, kernel, stride; strided convolutions are not padded, others keep the size."""


class Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, channels: int, out: int, kernel: int | tuple[int, int], stride: int, pad: bool) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = (height // 2, width // 2) if pad else 0
        self.conv = nn.Conv2d(channels, out, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """Chains of convolutions side by side, and a pooling branch; what they say is concatenated.

    A pair of specs at the end of a chain is two convolutions of the same input, concatenated.
    """

    def __init__(self, channels: int, chains: list[list[Spec | tuple[Spec, Spec]]], pool: str, pooled: int = 0) -> None:
        super().__init__()
        self.pool, self.chains, self.out = pool, [], pooled or channels
        for chain in chains:
            width, names = channels, []
            for link in chain:
                specs = [link] if isinstance(link[0], str) else list(link)
                for name, out, kernel, stride in specs:
                    setattr(self, f"branch{name}", Conv(width, out, kernel, stride, stride == 1))
                names.append([f"branch{spec[0]}" for spec in specs])
                width = sum(spec[1] for spec in specs)
            self.chains.append(names)
            self.out += width
        if pooled:
            self.branch_pool = Conv(channels, pooled, 1, 1, True)

    def forward(self, x: Tensor) -> Tensor:
        results = []
        for chain in self.chains:
            h = x
            for names in chain:
                h = torch.cat([getattr(self, name)(h) for name in names], dim=1)
            results.append(h)
        if self.pool == "stride":
            return torch.cat([*results, F.max_pool2d(x, 3, 2)], dim=1)
        pooled = F.max_pool2d(x, 3, 1, 1) if self.pool == "max" else F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        return torch.cat([*results, self.branch_pool(pooled)], dim=1)


def block_a(channels: int, pooled: int) -> Block:
    """35 × 35: 1×1, 5×5 and two 3×3 (figure 5)."""
    double: list[Spec] = [("3x3dbl_1", 64, 1, 1), ("3x3dbl_2", 96, 3, 1), ("3x3dbl_3", 96, 3, 1)]
    return Block(channels, [[("1x1", 64, 1, 1)], [("5x5_1", 48, 1, 1), ("5x5_2", 64, 5, 1)], double], "average", pooled)


def block_b(channels: int) -> Block:
    """35 × 35 to 17 × 17."""
    double: list[Spec] = [("3x3dbl_1", 64, 1, 1), ("3x3dbl_2", 96, 3, 1), ("3x3dbl_3", 96, 3, 2)]
    return Block(channels, [[("3x3", 384, 3, 2)], double], "stride")


def block_c(channels: int, c: int) -> Block:
    """17 × 17: 7×7 as rows and columns (figure 6)."""
    row, column = (1, 7), (7, 1)
    single: list[Spec] = [("7x7_1", c, 1, 1), ("7x7_2", c, row, 1), ("7x7_3", 192, column, 1)]
    double: list[Spec] = [("7x7dbl_1", c, 1, 1), ("7x7dbl_2", c, column, 1), ("7x7dbl_3", c, row, 1)]
    double += [("7x7dbl_4", c, column, 1), ("7x7dbl_5", 192, row, 1)]
    return Block(channels, [[("1x1", 192, 1, 1)], single, double], "average", 192)


def block_d(channels: int) -> Block:
    """17 × 17 to 8 × 8."""
    wide: list[Spec] = [("7x7x3_1", 192, 1, 1), ("7x7x3_2", 192, (1, 7), 1), ("7x7x3_3", 192, (7, 1), 1)]
    wide += [("7x7x3_4", 192, 3, 2)]
    return Block(channels, [[("3x3_1", 192, 1, 1), ("3x3_2", 320, 3, 2)], wide], "stride")


def block_e(channels: int, pool: str) -> Block:
    """8 × 8: rows and columns side by side (figure 7)."""

    def split(name: str) -> tuple[Spec, Spec]:
        return (f"{name}a", 384, (1, 3), 1), (f"{name}b", 384, (3, 1), 1)

    double = [("3x3dbl_1", 448, 1, 1), ("3x3dbl_2", 384, 3, 1), split("3x3dbl_3")]
    return Block(channels, [[("1x1", 320, 1, 1)], [("3x3_1", 384, 1, 1), split("3x3_2")], double], pool, 192)


class Inception(nn.Module):
    """Up to the average of the last block, 2048 numbers an image. Names are torchvision's, as the file has them."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2, pad=False)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, 1, pad=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3, 1, pad=True)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1, 1, pad=False)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, 1, pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = block_a(192, 32), block_a(256, 64), block_a(288, 64)
        self.Mixed_6a, self.Mixed_6b, self.Mixed_6c = block_b(288), block_c(768, 128), block_c(768, 160)
        self.Mixed_6d, self.Mixed_6e, self.Mixed_7a = block_c(768, 160), block_c(768, 192), block_d(768)
        self.Mixed_7b, self.Mixed_7c = block_e(1280, "average"), block_e(2048, "max")

    def forward(self, x: Tensor) -> Tensor:
        """x [N, 3, H, W] in [-1, 1] → [N, 2048]."""
        x = F.interpolate(x, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean(dim=(2, 3))

    @torch.no_grad()
    def extract(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [N, C, H, W], grey ones as if in colour → features [N, 2048], and no logits, [N, 0]."""
        x = from_uint8(images.to(self.Conv2d_1a_3x3.conv.weight.device))
        features = self(x.expand(-1, 3, -1, -1))
        return features, features.new_empty(len(features), 0)


def load(path: Path) -> tuple[Inception, str]:
    """The network in eval mode, and the sha256 of its file. Raises ValueError for any other; executes nothing."""
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if not sha256.startswith(SHA256):
        raise ValueError(
            f"{path} is not the Inception of FID: its sha256 begins with {sha256[:8]}, not {SHA256} "
            "(pt_inception-2015-12-05-6726825d.pth of pytorch-fid)"
        )
    return from_state(torch.load(path, map_location="cpu", weights_only=True)), sha256


def from_state(state: dict[str, Tensor]) -> Inception:
    """The network with these weights; the classifier on top of it is left out."""
    network = Inception()
    network.load_state_dict({name: t for name, t in state.items() if not name.startswith(("fc.", "AuxLogits."))})
    return network.eval().requires_grad_(False)
