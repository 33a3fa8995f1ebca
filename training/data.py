"""Images as one uint8 tensor in memory, read by Hugging Face `datasets`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor


class DataError(ValueError):
    """The data set cannot be used; the message says why."""


@dataclass(frozen=True)
class Images:
    """images uint8 [N, C, H, W]; labels int64 [N] in 0 … len(class_names) - 1, or None; name: for provenance."""

    images: Tensor
    labels: Tensor | None
    class_names: tuple[str, ...]
    name: str

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device) -> Images:
        labels = None if self.labels is None else self.labels.to(device)
        return Images(self.images.to(device), labels, self.class_names, self.name)


def load(dataset: str, image_size: tuple[int, ...] = ()) -> tuple[Images, Images]:
    """(train, validation) images of a hub name, a folder with parquet files, or a folder of images per class.

    Validation is the data set's test or validation split, or, where it has none, every 20th image of train.
    Raises DataError where there are no images, or where their sizes differ and no `image_size` (H, W) is given.
    """
    import datasets

    path = Path(dataset).expanduser()
    try:
        splits = datasets.load_dataset(str(path) if path.exists() else dataset)
    except (FileNotFoundError, ValueError, ConnectionError, OSError) as error:
        raise DataError(f"cannot read the data set {dataset!r}: {str(error).splitlines()[0]}") from error
    name = path.resolve().name if path.exists() else dataset
    train_split = splits["train"] if "train" in splits else next(iter(splits.values()))
    train = _read(train_split, image_size, name)
    held_out = next((splits[s] for s in ("test", "validation", "valid") if s in splits and splits[s] is not train_split), None)
    if held_out is not None:
        return train, _read(held_out, tuple(train.images.shape[2:]), name, channels=train.images.shape[1])
    every = torch.arange(len(train)) % 20 == 19
    if not every.any():
        raise DataError(f"{dataset!r} has {len(train)} images; at least 20 are needed")
    return _select(train, ~every), _select(train, every)


def _select(data: Images, mask: Tensor) -> Images:
    labels = None if data.labels is None else data.labels[mask]
    return Images(data.images[mask], labels, data.class_names, data.name)


def _read(split: Any, image_size: tuple[int, ...], name: str, channels: int | None = None) -> Images:
    import datasets

    image_column = next((c for c, f in split.features.items() if isinstance(f, datasets.Image)), None)
    if image_column is None:
        raise DataError(f"{name!r} has no column of images, only {', '.join(split.features)}")
    label_column = next((c for c, f in split.features.items() if isinstance(f, datasets.ClassLabel)), None)
    pictures: Iterable[Image.Image] = (row[image_column] for row in split.select_columns([image_column]))
    images = _stack(pictures, len(split), image_size, name, channels)
    if label_column is None:
        return Images(images, None, (), name)
    labels = torch.from_numpy(np.asarray(split[label_column][:], dtype=np.int64))
    return Images(images, labels, tuple(split.features[label_column].names), name)


def _stack(
    pictures: Iterable[Image.Image], count: int, image_size: tuple[int, ...], name: str, channels: int | None
) -> Tensor:
    stack: Tensor | None = None
    for i, picture in enumerate(pictures):
        if stack is None:
            channels = channels or (1 if picture.mode in ("1", "L", "I", "I;16", "F") else 3)
            h, w = image_size or (picture.height, picture.width)
            stack = torch.empty(count, channels, h, w, dtype=torch.uint8)
        picture = picture.convert("L" if channels == 1 else "RGB")
        if picture.size != (w, h):
            if not image_size:
                raise DataError(
                    f"the images of {name!r} differ in size ({w}×{h} and {picture.width}×{picture.height}): "
                    "choose one with --image_size height,width"
                )
            picture = ImageOps.fit(picture, (w, h), Image.Resampling.LANCZOS)
        stack[i] = torch.from_numpy(np.array(picture)).reshape(h, w, -1).permute(2, 0, 1)
    if stack is None:
        raise DataError(f"{name!r} has no images")
    return stack
