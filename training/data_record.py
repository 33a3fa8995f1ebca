"""What a run was trained on, so that `--resume` goes on with the same classes and images, wherever they are now."""

from __future__ import annotations

import hashlib
import os
import sys
import unicodedata
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model import checkpoint
from model.checkpoint import CheckpointError
from training.cli.options import expanded, printable
from training.data import DataError, Images
from training.run.config import TrainConfig


@dataclass(frozen=True)
class DataChanges:
    """What may differ from the run's own data on a resume: classes that are called otherwise, and the images."""

    renamed: Mapping[str, str] = field(default_factory=dict)  # the run's name of a class → its name now
    images: bool = False


NOTHING = DataChanges()


@dataclass(frozen=True)
class DataRecord:
    """A data set as a run saw it: of its training images unless it says held out. `class_names` is () without labels.

    `folder` is absolute, `beside` the same relative to the run's folder; both are empty for a name on the hub.
    Fingerprints are empty where they were not taken.
    """

    dataset: str  # as --dataset says it
    folder: str
    beside: str
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    count: int = 0
    fingerprint: str = ""
    held_out: str = ""  # the fingerprint of the images that are

    @classmethod
    def of(cls, config: TrainConfig, place: str, training_set: Images, held_out: Images) -> DataRecord:
        """The record of the images of `config` that were read from `place`; see `fingerprint` for how long it takes."""
        folder = Path(os.path.abspath(expanded(place))) if expanded(place).is_dir() else None
        training_set, held_out = (s if config.use_labels else _unlabelled(s) for s in (training_set, held_out))
        channels, height, width = training_set.images.shape[1:]
        return cls(
            config.dataset,
            str(folder or ""),
            os.path.relpath(folder, config.run_dir.absolute()) if folder else "",
            (channels, height, width),
            training_set.class_names,
            len(training_set),
            fingerprint(training_set),
            fingerprint(held_out),
        )

    @classmethod
    def of_best(cls, config: TrainConfig) -> DataRecord | None:
        """What the best checkpoint of a run tells, where the run has no record."""
        try:
            saved = checkpoint.load(config.run_dir / "best.safetensors").config
        except CheckpointError:
            return None
        return cls(config.dataset, "", "", saved.unet.image_shape, saved.class_names)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataRecord:
        """The inverse of `to_dict`. Raises TypeError or KeyError on anything else."""
        lists = {name: tuple(values[name]) for name in ("image_shape", "class_names")}
        return cls(**{**values, **lists})

    def to_dict(self) -> dict[str, Any]:
        """For JSON, and for a state."""
        return asdict(self)

    def renamed(self, names: Mapping[str, str]) -> DataRecord:
        """The same with classes called otherwise. Raises DataError where there is no such class, or two of a name."""
        known = [_key(name) for name in self.class_names]
        for old in names:
            if _key(old) not in known:
                raise DataError(f"--rename_classes {old}=…: the run's classes are {_listed(self.class_names)}")
        new = {_key(old): name for old, name in names.items()}
        class_names = tuple(new.get(_key(name), name) for name in self.class_names)
        if len({_key(name) for name in class_names}) < len(class_names):
            raise DataError(f"--rename_classes makes two classes of one name: {_listed(class_names)}")
        return replace(self, class_names=class_names)

    def in_order(self, images: Images) -> Images:
        """`images` with this record's numbers for the classes, where they are the same classes."""
        numbers = {_key(name): i for i, name in enumerate(self.class_names)}
        keys = [_key(name) for name in images.class_names]
        if images.labels is None or sorted(keys) != sorted(numbers):
            return images
        order = torch.tensor([numbers[key] for key in keys])
        return replace(images, labels=order[images.labels], class_names=self.class_names)

    def check(self, here: DataRecord, changes: DataChanges) -> None:
        """Raises DataError that says in what the images `here` differ from those of the run, and what can be done."""
        theirs, ours = self.image_shape, here.image_shape
        place = repr(here.dataset)
        if theirs[1:] != ours[1:]:
            raise DataError(
                f"{place} has images of {_size(ours)} pixels, and the run was trained on {_size(theirs)}: "
                f"resume it with --dataset of that size, or begin a new run"
            )
        if theirs[0] != ours[0]:
            raise DataError(f"{place} has images of {ours[0]} channels, and the run was trained on {theirs[0]}")
        if [_key(name) for name in self.class_names] != [_key(name) for name in here.class_names]:
            raise DataError(
                f"{place} has the classes {_listed(here.class_names)}, and the run was trained on "
                f"{_listed(self.class_names)}: give its own data set, or --rename_classes OLD=NEW if only names changed"
            )
        if not self.fingerprint:
            _say("the run does not tell which images it was trained on, so those here are not compared with them")
        elif (self.fingerprint, self.held_out) != (here.fingerprint, here.held_out):
            what = f"{self.count:,} images, and here are {here.count:,}"
            if self.count == here.count:
                what = f"{self.count:,} images, and here are other ones, or others of them are held out"
            if not changes.images:
                raise DataError(
                    f"{place} is not what it was: the run was trained on {what}; --changed_data goes on all the same"
                )
            _say(f"going on with changed data: the run was trained on {what}")


def find_dataset(config: TrainConfig, record: DataRecord | None) -> str:
    """Where the data set of a run is that goes on: where it was, or beside the run as it was, or as --dataset says.

    Raises DataError where a folder is in none of these places.
    """
    if record is None or not record.folder or config.dataset != record.dataset:
        return config.dataset
    places = (record.folder, os.path.normpath(config.run_dir.absolute() / record.beside), config.dataset)
    found = next((place for place in places if expanded(place).is_dir()), None)
    if found is None:
        raise DataError(f"the run was trained on the folder {record.folder}, which is gone: say where by --dataset")
    if found != record.folder:
        _say(f"{record.folder} is gone; the data set is read from {found}")
    return found


def fingerprint(images: Images) -> str:
    """SHA-256, in hexadecimal, of uint8 images [N, C, H, W] with their labels, in whatever order they come.

    Every image is hashed, about a gigabyte a second.
    """
    pixels = images.images.numpy()
    labels = [0] * len(images) if images.labels is None else images.labels.tolist()
    digests = []
    for image, label in zip(pixels, labels, strict=True):
        digest = hashlib.sha256(np.ascontiguousarray(image))
        digest.update(label.to_bytes(8, "little", signed=True))
        digests.append(digest.digest())
    return hashlib.sha256(repr(pixels.shape[1:]).encode() + b"".join(sorted(digests))).hexdigest()


def check_text(class_names: tuple[str, ...]) -> None:
    """Raises DataError where the name of a class is no text, which no checkpoint could keep."""
    for name in class_names:
        if printable(name) != name:
            raise DataError(f"the folder of the class {printable(name)} has a name that is not UTF-8: rename it")


def _unlabelled(images: Images) -> Images:
    return replace(images, labels=None, class_names=())


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _listed(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return (", ".join(names[:20]) or "none") + more


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}×{shape[2]}"


def _say(sentence: str) -> None:
    print(f"training.train: {printable(sentence)}", file=sys.stderr)
