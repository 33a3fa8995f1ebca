"""Pictures of what a network makes: grids of samples, and how noise becomes images, as a strip and as a GIF.

Equal input gives equal bytes. Files appear whole or not at all.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Pillow
from torch import Tensor

from model.atomic_write import atomic_write
from model.images import Image, grid, to_uint8
from model.nn.unet import UNet
from model.sampling.edit import start_from
from model.sampling.noise import normals
from model.sampling.schedule import SamplingSchedule
from model.sampling.step import sample

Frames = NDArray[np.uint8]
"""uint8 [F, 2, N, C, H, W]: from noise to image, what the network saw (x_t) and its prediction of x_0 from that."""

NUM_PREVIEW = 4  # images whose making is shown as a strip and a GIF
ROWS = 16  # of a grid: classes beyond are left out
STRIP_COLUMNS = 9
LEAST_SIDE = 64  # pixels; smaller images are enlarged in strips and GIFs
LAST_FRAME_MS = 1500


def sample_grid(network: UNet, schedule: SamplingSchedule, per_class: int = 8) -> Image:
    """A picture uint8 [H', W', C]: one row of images per class (at most 16 of them), or 8 × 8 without classes."""
    rows = min(network.config.num_classes or per_class, ROWS)
    indices = list(range(rows * per_class))
    classes = None if network.config.num_classes is None else [i // per_class for i in indices]
    return grid(to_uint8(_sample(network, schedule, indices, classes)).cpu().numpy(), columns=per_class)


def sequence(
    network: UNet,
    schedule: SamplingSchedule,
    indices: Sequence[int],
    classes: Sequence[int] | None = None,
    seed: int = 0,
    frames: int = 51,
) -> Frames:
    """How the N images of these Philox indices come to be, in at most `frames` frames, uint8 [F, 2, N, C, H, W].

    The first is noise and what the network sees in it; the last is the image, twice. Raises ValueError for less than
    two frames.
    """
    if frames < 2:
        raise ValueError(f"a sequence has at least 2 frames, not {frames}")
    shown = set(np.linspace(0, len(schedule), min(frames, len(schedule) + 1)).round().astype(int).tolist())
    device = next(network.parameters()).device
    noise = normals([seed] * len(indices), list(indices), [0] * len(indices), network.config.image_shape, device)
    x = start_from(None, noise, schedule)
    pairs: list[tuple[Tensor, Tensor]] = []

    def keep(step: int, x_next: Tensor, x0: Tensor) -> None:
        nonlocal x
        if step - 1 in shown:
            pairs.append((to_uint8(x), to_uint8(x0)))
        x = x_next

    last = to_uint8(_sample(network, schedule, indices, classes, seed, keep))
    return np.stack([np.stack([part.cpu().numpy() for part in pair]) for pair in [*pairs, (last, last)]])


def strip(frames: Frames, columns: int = STRIP_COLUMNS) -> Image:
    """Frames from left to right, at most `columns` of them: for each image a row of x_t, and below it one of x_0."""
    shape = frames.shape[3:]
    shown = np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int)
    images = frames[shown].transpose(2, 1, 0, 3, 4, 5)  # [N, 2, columns, C, H, W]
    return enlarged(grid(images.reshape(-1, *shape), columns=len(shown)), min(shape[1:]))


def animation(frames: Frames) -> list[Image]:
    """One picture per frame: x_t of each image above, its x_0 below."""
    n, *shape = frames.shape[2:]
    return [enlarged(grid(frame.reshape(-1, *shape), columns=n), min(shape[1:])) for frame in frames]


def save_png(path: Path, picture: Image) -> None:
    """A picture uint8 [H, W, C] as PNG."""
    out = io.BytesIO()
    Pillow.fromarray(picture.squeeze(2) if picture.shape[2] == 1 else picture).save(out, "PNG")
    _write(path, out.getvalue())


def save_strip(path: Path, frames: Frames, columns: int = STRIP_COLUMNS) -> None:
    """The strip of a sequence as PNG."""
    save_png(path, strip(frames, columns))


def save_gif(path: Path, frames: Frames, seconds: float = 3.0) -> None:
    """A sequence as a GIF that plays in about `seconds`, rests on the images, and begins again."""
    # RGB for grey too: of mode L, Pillow writes frames of few shades with another frame's palette
    pictures = [Pillow.fromarray(np.broadcast_to(p, (*p.shape[:2], 3))) for p in animation(frames)]
    each = max(20, round(1000 * seconds / len(pictures)))
    durations = [each] * (len(pictures) - 1) + [LAST_FRAME_MS]
    out = io.BytesIO()
    pictures[0].save(out, "GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    _write(path, out.getvalue())


def _sample(
    network: UNet,
    schedule: SamplingSchedule,
    indices: Sequence[int],
    classes: Sequence[int] | None,
    seed: int = 0,
    on_step: Callable[[int, Tensor, Tensor], Any] | None = None,
) -> Tensor:
    config = network.config
    return sample(
        network,
        schedule,
        config.image_shape,
        seeds=[seed] * len(indices),
        indices=indices,
        classes=classes,
        null_class=config.num_classes if config.null_class else None,
        device=next(network.parameters()).device,
        on_step=on_step,
    )


def enlarged(picture: Image, side: int) -> Image:
    """Every pixel as a square, so that images whose shorter side is `side` can be seen."""
    times = -(-LEAST_SIDE // side)
    return picture.repeat(times, axis=0).repeat(times, axis=1)


def _write(path: Path, data: bytes) -> None:
    with atomic_write(path) as part:
        part.write_bytes(data)
