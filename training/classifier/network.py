"""A small convolutional network that tells classes apart: quick to train, the extractor of `training.evaluate`.

Whitened patches, then three groups of convolutions with max pooling (Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on
a single GPU", after Page's ResNet-9).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.images import from_uint8


@dataclass(frozen=True)
class ClassifierConfig:
    """The architecture: groups of `depth` convolutions with `width`, 4·width and 4·width channels."""

    image_channels: int
    image_size: tuple[int, int]  # height, width
    num_classes: int
    width: int = 64
    depth: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", tuple(self.image_size))  # JSON has lists only
        limits = [
            ("image_channels", self.image_channels, 1, 4),
            *(("image_size", side, 4, 1024) for side in self.image_size),
            ("num_classes", self.num_classes, 2, 100_000),
            ("width", self.width, 1, 1024),
            ("depth", self.depth, 1, 32),
        ]
        for name, value, low, high in limits:
            if not isinstance(value, int) or not low <= value <= high:
                raise ValueError(f"{name} must be a whole number from {low} to {high}, not {value}")
        if len(self.image_size) != 2:
            raise ValueError(f"image_size must be (height, width), not {self.image_size}")


class Group(nn.Module):
    """conv → max pool → norm → GELU, then conv → norm → GELU. Each convolution begins as the identity."""

    def __init__(self, in_channels: int, out_channels: int, depth: int) -> None:
        super().__init__()
        widths = [in_channels, *[out_channels] * depth]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(out_channels) for _ in range(depth))
        for conv in self.convs:
            nn.init.dirac_(conv.weight[: conv.in_channels])  # the rest stays random

    def forward(self, x: Tensor) -> Tensor:
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = conv(x)
            if i == 0:
                x = F.max_pool2d(x, [min(2, side) for side in x.shape[2:]])
            x = F.gelu(norm(x))
        return x


class Classifier(nn.Module):
    """`image` [N, C, H, W] → features [N, 4·width] → logits.

    Its BatchNorm is the running one in eval mode: what it says of an image does not depend on the others of a batch.
    """

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.stem = nn.Conv2d(config.image_channels, 8 * config.image_channels, 2)
        widths = [8 * config.image_channels, width, 4 * width, 4 * width]
        self.groups = nn.Sequential(*(Group(a, b, config.depth) for a, b in pairwise(widths)))
        self.head = nn.Linear(4 * width, config.num_classes, bias=False)

    @torch.no_grad()
    def whiten(self, images: Tensor) -> None:
        """Makes the stem's filters those that whiten 2×2 patches of `images` uint8 [N, C, H, W], and their negatives.

        Eigenvectors of the patches' covariance, each over the root of its eigenvalue.
        """
        patches = F.unfold(from_uint8(images).double(), 2).transpose(1, 2).flatten(0, 1)  # [patches, C·4]
        values, vectors = torch.linalg.eigh(torch.cov(patches.T))
        filters = (vectors / (values.clamp(min=0) + 5e-4).sqrt()).T
        both = torch.cat([filters, -filters])
        self.stem.weight.copy_(both.reshape(self.stem.weight.shape))
        self.stem.bias.copy_(-both @ patches.mean(dim=0))

    def layers(self, x: Tensor) -> Iterator[Tensor]:
        """x [N, C, H, W] in [-1, 1] → what the stem and each group make of it, [N, channels, h, w]."""
        h = F.gelu(self.stem(x))
        yield h
        for group in self.groups:
            h = group(h)
            yield h

    def features(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] in [-1, 1] → what the last layer sees, [N, 4·width]: maxima over the image."""
        *_, last = self.layers(x)
        return last.amax(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] in [-1, 1] → logits [N, num_classes]."""
        logits: Tensor = self.head(self.features(x))
        return logits

    @torch.no_grad()
    def extract(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 [N, C, H, W] → features [N, 4·width] and logits [N, num_classes], both float32, on its device."""
        x = from_uint8(images.to(self.head.weight.device)).contiguous(memory_format=torch.channels_last)
        features = self.features(x)
        return features, self.head(features)
