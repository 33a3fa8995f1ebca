"""Between the [-1, 1] of the diffusion and the bytes of a picture. Pure functions."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Image = NDArray[np.uint8]


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] → uint8, rounded to nearest, same shape and device."""
    return x.float().clamp(-1, 1).add_(1).mul_(127.5).round_().to(torch.uint8)


def from_uint8(images: Tensor) -> Tensor:
    """uint8 → float32 in [-1, 1], same shape and device."""
    return images.float() / 127.5 - 1


def grid(images: Image, columns: int | None = None) -> Image:
    """Images [N, C, H, W] → one [H', W', C], row by row without gaps; `columns` defaults to ⌈√N⌉."""
    n, c, h, w = images.shape
    columns = min(columns or math.ceil(math.sqrt(n)), n)
    rows = math.ceil(n / columns)
    canvas = np.zeros((rows * columns, c, h, w), np.uint8)
    canvas[:n] = images
    return canvas.reshape(rows, columns, c, h, w).transpose(0, 3, 1, 4, 2).reshape(rows * h, columns * w, c)
