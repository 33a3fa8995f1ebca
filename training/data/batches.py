"""What a training step sees. Every random draw of step i follows from (seed, i), whatever came before."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.images import from_uint8
from training.data import DataError, Images
from training.loop.distributed import DistributedContext
from training.loop.gpu import layout
from training.run.config import TrainConfig

SHARE_OF_DEVICE = 0.5  # of its free memory, at most, for the images


@dataclass(frozen=True)
class Batch:
    """One process's part of a global batch of N = b·ranks images; `u` alone is that of all of them."""

    x0: Tensor  # float32 [b, C, H, W] in [-1, 1]
    y: Tensor | None  # int64 [b]
    noise: Tensor  # float32 [b, C, H, W]
    u: Tensor  # uniform in [0, 1), float32 [N]: where the timesteps come from


class Batches:
    """Batch i of a run: the next images of the epoch's permutation, mirrored and without their class at random.

    The draws are made for the global batch and then shared out, so that several processes see what one would see. The
    images stay on the device if they fit; else they are copied from pinned memory while the device works on other
    things. Raises DataError where the images are too few, ValueError where the batch cannot be divided.
    """

    def __init__(
        self,
        images: Images,
        config: TrainConfig,
        ranks: DistributedContext,
        device: torch.device,
        resident: bool | None = None,
    ) -> None:
        if config.batch_size > len(images):
            raise DataError(f"--batch_size {config.batch_size}, but only {len(images)} images to train on")
        if config.batch_size % (config.accumulate * ranks.size):
            raise ValueError(
                f"--batch_size {config.batch_size} must be a multiple of the {ranks.size} processes of torchrun"
                + (f" times --accumulate {config.accumulate}" if config.accumulate > 1 else "")
            )
        if resident is None:
            resident = fits(images.images.nbytes, device)
        self._images = images.to(device) if resident else images
        self._resident = resident  # not to be told by devices: that of a tensor has an index, "cuda" has none
        self._config, self._ranks, self._device = config, ranks, device
        self._generator, self._layout = torch.Generator(device), layout(config, device)
        self._epoch, self._order = -1, torch.empty(0)
        self.null_class = len(images.class_names)

    def __getitem__(self, iteration: int) -> Batch:
        """Seeds torch for this step as well, for the network's dropout: each process has its own."""
        config, ranks, device = self._config, self._ranks, self._device
        seeds = np.random.SeedSequence([config.seed, 1, iteration]).generate_state(1 + ranks.size, np.uint64).tolist()
        torch.manual_seed(seeds[1 + ranks.rank])
        draw = self._generator.manual_seed(seeds[0])
        n = config.batch_size
        pixels, y = self._next(iteration)
        x0 = from_uint8(pixels)
        if config.flip:
            mirrored = ranks.shard(torch.rand(n, device=device, generator=draw) < 0.5)
            x0 = torch.where(mirrored[:, None, None, None], x0.flip(3), x0)
        if y is not None and config.label_dropout:
            dropped = ranks.shard(torch.rand(n, device=device, generator=draw) < config.label_dropout)
            y = torch.where(dropped, self.null_class, y)
        u = torch.rand(n, device=device, generator=draw)
        noise = ranks.shard(torch.randn(n, *x0.shape[1:], device=device, generator=draw))
        return Batch(x0.contiguous(memory_format=self._layout), y, noise.contiguous(memory_format=self._layout), u)

    def _next(self, iteration: int) -> tuple[Tensor, Tensor | None]:
        """This process's images, uint8 [b, C, H, W], and their classes, on the device."""
        size = self._config.batch_size
        epoch, i = divmod(iteration, len(self._images) // size)
        home = self._images.images.device
        if epoch != self._epoch:
            order = np.random.default_rng([self._config.seed, 0, epoch]).permutation(len(self._images))
            self._epoch, self._order = epoch, torch.from_numpy(order).to(home)  # the only wait for the device
        chosen = self._ranks.shard(self._order[i * size : (i + 1) * size])
        labels = self._images.labels if self._config.use_labels else None
        taken = [tensor.index_select(0, chosen) for tensor in (self._images.images, labels) if tensor is not None]
        if not self._resident:
            taken = [tensor.pin_memory().to(self._device, non_blocking=True) for tensor in taken]
        return taken[0], taken[1] if len(taken) == 2 else None


def fits(size: int, device: torch.device) -> bool:
    """Whether `size` bytes of images may stay on the device."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return size <= SHARE_OF_DEVICE * free
