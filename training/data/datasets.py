"""A data set by its name: a folder of pictures, a folder of parquet files, or one of the Hugging Face hub."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from training.data import labels, picture, splits
from training.data.folder import image_folder
from training.data.huggingface import hugging_face
from training.data.images import DataError, Images
from training.data.labels import printable
from training.data.options import LoadOptions
from training.data.reader import Reader
from training.data.splits import Split

__all__ = ["DataError", "Images", "load"]

Say = Callable[[str], None]


def load(
    dataset: str,
    image_size: tuple[int, ...] = (),
    options: LoadOptions | None = None,
    *,
    use_labels: bool = False,
    cache: Path | None = None,
    quiet: bool = False,
) -> tuple[Images, Images]:
    """(train, validation) images of a hub name, a folder with parquet files, or a folder of images per class.

    Validation is the data set's validation or test split, or, where it has none, every 20th image of train, by class.
    One train image in colour makes all of them RGB; transparency is laid over white; 16 bits become 8. `use_labels`:
    the class of every image is needed, and each class has one to train on. What takes long to decode is kept in the
    folder `cache`, and mapped from there where it does not fit into memory. What is assumed, left out or passed over is
    said on stderr, a line each, unless `quiet`.

    Raises DataError where there are no images, one is unreadable, or their sizes differ and no `image_size` (H, W) is
    given.
    """
    options, path = options or LoadOptions(), Path(dataset).expanduser()
    if printable(dataset) != dataset:
        raise DataError(f"the name of the data set {printable(dataset)} is not UTF-8: rename it")
    name = path.resolve().name if path.exists() else dataset
    say = partial(_say, name, quiet)
    with picture.pillow(options.max_megapixels):
        found = (image_folder(path, options, say) if path.is_dir() else None) or hugging_face(
            dataset, path, options, say
        )
        parts = splits.chosen(found, dataset, say)
        if use_labels:
            _check_labels(parts, dataset)
        reader = Reader(parts, name, str(path.resolve()) if path.exists() else dataset, image_size, options, say, quiet)
        pixels = reader.read(cache)
    gone, start = set(pixels.left_out), parts[0].count
    kept = [[i for i in range(start) if i not in gone], [i for i in range(parts[1].count) if start + i not in gone]]
    if not all(kept):
        raise DataError(f"{dataset!r}: no image is left {'to train on' if not kept[0] else 'that is held out'}")
    told = [[part.labels[i] for i in which] for part, which in zip(parts, kept, strict=True)]
    class_names = parts[0].class_names or labels.ordered(label for part in parts for label in part.labels if label)
    if use_labels:
        _check_classes(told[0], class_names, dataset)
        _tell_of_single_images(told, say)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pages that cannot be written to: nothing does
        images = torch.from_numpy(pixels.array)
    numbers = {label: i for i, label in enumerate(class_names)}
    tensors = images[: len(kept[0])], images[len(kept[0]) :]
    train, held_out = (
        Images(tensor, _numbered(part, numbers), class_names, name) for tensor, part in zip(tensors, told, strict=True)
    )
    return train, held_out


def _say(name: str, quiet: bool, sentence: str) -> None:
    if not quiet:
        print(f"{printable(name)}: {printable(sentence)}", file=sys.stderr)


def _numbered(names: Sequence[str | None], numbers: dict[str, int]) -> Tensor | None:
    """int64 [N], or None where a class is not told."""
    found = [numbers[name] for name in names if name is not None]
    return torch.tensor(found) if len(found) == len(names) else None


def _check_labels(parts: tuple[Split, Split], dataset: str) -> None:
    """Raises DataError where an image has no class, with the first that has none and what to do."""
    without = [part.where(i) for part in parts for i, label in enumerate(part.labels) if label is None]
    if not without:
        return
    told = f"{dataset!r} does not tell the class of every image"
    have = f"{len(without):,} of {sum(part.count for part in parts):,} {'has' if len(without) == 1 else 'have'} none"
    train, held_out = parts
    if train.unclear:
        raise DataError(f"{told}: {train.unclear} ({have}, such as {without[0]})")
    if held_out.unclear:
        raise DataError(
            f"{told}: {have}, those that are held out, such as {without[0]}: move them away, or tell their class"
        )
    raise DataError(f"{told}: {have}, such as {without[0]}: move what has none away, or tell its class")


def _check_classes(names: Sequence[str | None], class_names: tuple[str, ...], dataset: str) -> None:
    """Raises DataError where a class has no image to train on: it would be served, though no step ever saw it."""
    if never := [name for name in class_names if name not in set(names)]:
        shown = ", ".join(never[:20]) + (f" and {len(never) - 20:,} more" if len(never) > 20 else "")
        raise DataError(f"{dataset!r} has no image to train on of the class{'es' * (len(never) > 1)} {shown}")


def _tell_of_single_images(told: Sequence[Sequence[str | None]], say: Say) -> None:
    counts, held_out = Counter(told[0]), set(told[1])
    alone = [name for name, count in counts.items() if count == 1 and name not in held_out]
    if alone:
        more = f" and {len(alone) - 20:,} more" if len(alone) > 20 else ""
        say(f"classes of one image, which is trained on and not held out: {', '.join(alone[:20])}{more}")
