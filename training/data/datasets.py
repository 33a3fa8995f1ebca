"""Images as one uint8 tensor in memory: from a folder of images per class, or by Hugging Face `datasets`."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
PACKED_SUFFIXES = {
    ".parquet",
    ".arrow",
    ".zip",
    ".tar",
    ".tgz",
    ".gz",
}  # left to `datasets`, as is metadata.csv
HELD_OUT = ("validation", "valid", "val", "test")
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


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
        """The same images on another device."""
        labels = None if self.labels is None else self.labels.to(device)
        return Images(self.images.to(device), labels, self.class_names, self.name)

    def select(self, which: Tensor) -> Images:
        """The images of a boolean mask or of indices, on their device."""
        labels = None if self.labels is None else self.labels[which]
        return Images(self.images[which], labels, self.class_names, self.name)


@dataclass(frozen=True)
class Split:
    """One part of a data set, not read yet: `read(i)` opens image i of `count`."""

    read: Callable[[int], Image.Image]
    count: int
    labels: Tensor | None
    class_names: tuple[str, ...]


def load(dataset: str, image_size: tuple[int, ...] = ()) -> tuple[Images, Images]:
    """(train, validation) images of a hub name, a folder with parquet files, or a folder of images per class.

    Validation is the data set's validation or test split, or, where it has none, every 20th image of train. One image
    in colour makes all of them RGB; transparency is laid over white; 16 bits become 8. Raises DataError where there are
    no images, one is unreadable, or their sizes differ and no `image_size` (H, W) is given.
    """
    path = Path(dataset).expanduser()
    name = path.resolve().name if path.exists() else dataset
    splits = (image_folder(path) if path.is_dir() else None) or hugging_face(dataset, path)
    train_name = "train" if "train" in splits else next(iter(splits))
    train = _read(splits[train_name], name, image_size)
    held_out = next((s for s in HELD_OUT if s in splits and s != train_name), None)
    if held_out:
        if splits[held_out].class_names != train.class_names:
            raise DataError(f"{name!r} has other classes in its {held_out} split than in {train_name}")
        return train, _read(splits[held_out], name, image_size, like=train.images)
    every = torch.arange(len(train)) % 20 == 19
    if not every.any():
        raise DataError(f"{dataset!r} has {len(train)} images; at least 20 are needed")
    return train.select(~every), train.select(every)


def image_folder(path: Path) -> dict[str, Split] | None:
    """The splits of a folder of images, or None where it is not one. An image's class is the name of its folder.

    Folders train, validation, valid, val and test at the top are splits if there are no others. `datasets` is not
    asked: it would take a class called "train" or "a-dev" for a split and leave the other classes out.
    """
    files: list[Path] = []
    for folder, folders, names in os.walk(path, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        found = [Path(folder, n) for n in sorted(names) if not n.startswith(".")]
        if any(f.suffix.lower() in PACKED_SUFFIXES or f.stem == "metadata" for f in found):
            return None
        files += [f for f in found if f.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        return None
    tops = {f.relative_to(path).parts[0] for f in files}
    roots = {"train": path}
    if "train" in tops and tops <= {"train", *HELD_OUT}:
        roots = {top: path / top for top in sorted(tops)}
    members = {split: [f for f in files if f.is_relative_to(root)] for split, root in roots.items()}
    class_names: tuple[str, ...] = ()
    if all(f.parent != roots[split] for split, fs in members.items() for f in fs):
        class_names = tuple(sorted({f.parent.name for f in files}))
    number = {name: i for i, name in enumerate(class_names)}
    splits = {}
    for split, fs in members.items():
        labels = torch.tensor([number[f.parent.name] for f in fs]) if class_names else None
        splits[split] = Split(lambda i, fs=fs: _open(fs[i]), len(fs), labels, class_names)
    return splits


def hugging_face(dataset: str, path: Path) -> dict[str, Split]:
    """The splits of what `datasets` reads: a folder with parquet files and the like, or a name on the hub."""
    import datasets

    if path.is_file():
        raise DataError(f"{dataset!r} is a file; a data set is a folder, or a name on the Hugging Face hub")
    if not path.exists() and not HUB_NAME.fullmatch(dataset):
        raise DataError(f"there is no folder {dataset!r}")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; the outcome is reported below
    try:
        found = datasets.load_dataset(str(path) if path.exists() else dataset)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        told = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        why = " ".join(str(told).split())
        if not path.exists():
            why = f"there is no such folder, and the Hugging Face hub does not give it: {why}"
        raise DataError(f"cannot read the data set {dataset!r}: {why}") from error
    return {str(name): _hugging_face_split(split, dataset) for name, split in found.items()}


def _hugging_face_split(split: object, dataset: str) -> Split:
    import datasets

    assert isinstance(split, datasets.Dataset)
    image_column = next((c for c, f in split.features.items() if isinstance(f, datasets.Image)), None)
    if image_column is None:
        raise DataError(f"{dataset!r} has no column of images, only {', '.join(split.features)}")
    pictures = split.select_columns([image_column])
    label_column = next((c for c, f in split.features.items() if isinstance(f, datasets.ClassLabel)), None)
    labels, class_names = None, ()
    if label_column is not None:
        class_names = tuple(split.features[label_column].names)
        labels = torch.from_numpy(np.asarray(split[label_column][:], dtype=np.int64))
        if (labels < 0).any():  # -1 stands for a class that is not told
            labels = None
    return Split(lambda i: pictures[i][image_column], len(split), labels, class_names)


def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            picture.load()
            return ImageOps.exif_transpose(picture)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{path} is not a readable image: {error}") from error


def _read(split: Split, name: str, image_size: tuple[int, ...], like: Tensor | None = None) -> Images:
    """Decodes a split, as `like` [N, C, H, W] in channels and size."""
    if not split.count:
        raise DataError(f"{name!r} has no images")
    stack: Tensor | None = None
    for i in range(split.count):
        picture = _eight_bits(split, i, name)
        if stack is None:
            channels = like.shape[1] if like is not None else len(picture.getbands())
            h, w = image_size or (like.shape[2:] if like is not None else (picture.height, picture.width))
            stack = torch.empty(split.count, channels, h, w, dtype=torch.uint8)
        elif stack.shape[1] < len(picture.getbands()) and like is None:
            stack = stack.repeat(1, 3, 1, 1)
        picture = picture.convert("L" if stack.shape[1] == 1 else "RGB")
        if picture.size != (w, h):
            if not image_size:
                raise DataError(
                    f"the images of {name!r} differ in size ({w}×{h} and {picture.width}×{picture.height}): "
                    "choose one with --image_size height,width"
                )
            picture = ImageOps.fit(picture, (w, h), Image.Resampling.LANCZOS)
        stack[i] = torch.from_numpy(np.array(picture)).reshape(h, w, -1).permute(2, 0, 1)
    assert stack is not None
    return Images(stack, split.labels, split.class_names, name)


def _eight_bits(split: Split, i: int, name: str) -> Image.Image:
    """Image i in mode L or RGB."""
    try:
        picture = split.read(i)
        if picture.mode == "F":
            raise ValueError("it has floating-point pixels, of unknown range")
        if picture.mode.startswith("I"):  # 16 bits
            return Image.fromarray((np.asarray(picture).clip(0, 65535) / 257).round().astype(np.uint8))
        mode = "L" if picture.mode in ("1", "L", "LA") else "RGB"
        if picture.has_transparency_data:
            white = Image.new("RGBA", picture.size, "white")
            white.alpha_composite(picture.convert("RGBA"))
            picture = white
        return picture.convert(mode)
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError, AttributeError) as error:
        raise DataError(f"image {i} of {name!r} cannot be used: {error}") from error
