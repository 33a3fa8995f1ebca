"""The images that a fit imitates: of each x_T what the checkpoint makes of it in many steps, kept beside the result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.checkpoint import Checkpoint
from model.diffusion import Network
from model.safetensors_io import write_tensors
from model.sampling.noise import normals
from model.sampling.schedule import SamplingSchedule
from model.sampling.step import sample
from training.fitting import progress

OWN_SEEDS = 2**63  # added to a fit's seed: its x_T are none of those that requests and evaluations draw


def classes_of(source: Checkpoint, indices: list[int]) -> list[int] | None:
    """Of K classes, image i has class i mod K; None without classes."""
    count = source.config.unet.num_classes
    return None if count is None else [i % count for i in indices]


def null_class(source: Checkpoint) -> int | None:
    """The number of the null class."""
    return source.config.unet.num_classes if source.config.unet.null_class else None


def noise(source: Checkpoint, seed: int, indices: list[int]) -> Tensor:
    """x_T of these images, float32 [N, C, H, W]."""
    return normals([OWN_SEEDS + seed] * len(indices), indices, [0] * len(indices), source.config.unet.image_shape)


def draw(source: Checkpoint, network: Network, schedule: SamplingSchedule, seed: int, indices: list[int]) -> Tensor:
    """What a schedule makes of these images' x_T, float32 [N, C, H, W]."""
    return sample(
        network,
        schedule,
        source.config.unet.image_shape,
        [OWN_SEEDS + seed] * len(indices),
        indices,
        classes_of(source, indices),
        null_class=null_class(source),
        device=next(source.network.parameters()).device,
    ).cpu()


def teacher_images(
    path: Path,
    key: str,
    count: int,
    make: Callable[[list[int]], Tensor],
    batch_size: int,
    say: Callable[[int], None],
) -> Tensor:
    """The first `count` images, float32 [count, C, H, W], from the file where it has them of this `key`, and into it.

    The file grows as they are made, so a killed fit goes on; `say` hears how many there are.
    """
    found = _read(path, key)
    parts, there = ([] if found is None else [found]), 0 if found is None else len(found)
    while there < count:
        indices = list(range(there, min(there + batch_size, count)))
        parts.append(make(indices))
        there += len(indices)
        say(there)
        if len(parts) % 8 == 0 or there == count:
            parts = [torch.cat(parts)]
            write_tensors(path, {"images": parts[0]}, {"key": key})
    return torch.cat(parts)[:count]


def _read(path: Path, key: str) -> Tensor | None:
    """The images in the file. None, and a line, where they are of another key, or it cannot be read."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            if (file.metadata() or {}).get("key") == key:
                return file.get_tensor("images").clone()
            why = "is of another teacher"
    except (OSError, SafetensorError):
        why = "cannot be read"
    progress.say(f"{path} {why}: its images are made anew", end="\n")
    return None
