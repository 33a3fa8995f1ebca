"""Edits: an image to begin from, and the part of it that stays."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.sampling.schedule import SamplingSchedule


@dataclass(frozen=True, eq=False)
class Edit:
    """What is edited: a reference, and where it may change.

    `image` is float32 [C, H, W] in [-1, 1], or [N, C, H, W], one for each of N images. `mask` is float32 [1, H, W] in
    [0, 1], 1 where the image is painted anew and 0 where it stays. None: it changes everywhere.
    """

    image: Tensor
    mask: Tensor | None = None

    def image_of(self, i: int) -> Tensor:
        """What image i begins from, [C, H, W]."""
        return self.image if self.image.ndim == 3 else self.image[i]

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Edit:
        """The same on a device."""
        return Edit(self.image.to(device, dtype), None if self.mask is None else self.mask.to(device, dtype))


def start_from(image: Tensor | None, noise: Tensor, schedule: SamplingSchedule) -> Tensor:
    """The reference with the noise of the schedule's first timestep (Meng et al. 2022, SDEdit), as `noise`'s shape.

    A schedule of strength 1 begins from noise alone, as all do without a reference: of the schedule's own scale.
    """
    alpha, sigma = schedule.start
    if image is None:
        return noise if sigma == 1 else sigma * noise
    return alpha * image + sigma * noise


def keep(x0: Tensor, image: Tensor, mask: Tensor) -> Tensor:
    """x0 [N, C, H, W] with `image` put back where `mask` [N, 1, H, W] is below 1, as DDNM does for inpainting (Wang et
    al. 2023, algorithm 1). Where it is 1, x0 is left alone to the bit."""
    return torch.where(mask < 1, mask * x0 + (1 - mask) * image, x0)
