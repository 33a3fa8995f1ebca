"""The residual network that judged before `training.classifier.network`: files of it are read, and no more are made."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from training.classifier.network import Classifier, ClassifierConfig


class Block(nn.Module):
    """norm → ReLU → conv, twice, plus the input (He et al. 2016b, "Identity mappings in deep residual networks")."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.norm_1 = nn.BatchNorm2d(in_channels)
        self.conv_1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm_2 = nn.BatchNorm2d(out_channels)
        self.conv_2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        same = in_channels == out_channels and stride == 1
        self.shortcut = None if same else nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm_1(x))
        skip = x if self.shortcut is None else self.shortcut(h)
        return skip + self.conv_2(F.relu(self.norm_2(self.conv_1(h))))


class Residual(Classifier):
    """A wide residual network (Zagoruyko & Komodakis 2016): three stages of `depth` blocks."""

    def __init__(self, config: ClassifierConfig) -> None:
        nn.Module.__init__(self)
        self.config = config
        channels = config.width
        self.stem = nn.Conv2d(config.image_channels, channels, 3, padding=1, bias=False)
        blocks = []
        for stage in range(3):
            for i in range(config.depth):
                blocks.append(Block(channels, config.width * 2**stage, stride=2 if stage and i == 0 else 1))
                channels = config.width * 2**stage
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, config.num_classes)

    def features(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] in [-1, 1] → what the last layer sees, [N, 4·width]: means over the image, none negative."""
        return F.relu(self.norm(self.blocks(self.stem(x)))).mean(dim=(2, 3))
