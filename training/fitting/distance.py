"""How far a student's images are from its teacher's: in the layers of a classifier, or pixel by pixel."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from training.classifier.network import Classifier

Distance = Callable[[Tensor, Tensor], Tensor]
"""(student's, teacher's images [N, C, H, W] in [-1, 1]) → [N]."""

PIXELS = 0.1  # the weight of pixels beside features


def pixel_distance(x: Tensor, y: Tensor) -> Tensor:
    """The mean squared difference of each image, [N]."""
    return (x - y).square().flatten(1).mean(dim=1)


def feature_distance(network: Classifier) -> Distance:
    """As LPIPS (Zhang et al. 2018, eq. 1), in this classifier: after its stem and each group, channels are scaled to
    length 1 at every place, and squared differences summed over channels, averaged over places. Plus 0.1 × pixels."""

    def layers(x: Tensor) -> list[Tensor]:
        return [F.normalize(layer.float(), dim=1) for layer in network.layers(x)]

    def distance(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            theirs = layers(y)
        parts = [(a - b).square().sum(1).flatten(1).mean(1) for a, b in zip(layers(x), theirs, strict=True)]
        return torch.stack(parts).mean(dim=0) + PIXELS * pixel_distance(x, y)

    return distance
