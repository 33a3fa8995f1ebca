"""Images as one uint8 tensor: in memory, or mapped from a file."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass, replace

import torch
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
        """The same images on another device."""
        labels = None if self.labels is None else self.labels.to(device)
        return Images(self.images.to(device), labels, self.class_names, self.name)

    def select(self, which: Tensor) -> Images:
        """The images of a boolean mask or of indices, on their device."""
        labels = None if self.labels is None else self.labels[which]
        return Images(self.images[which], labels, self.class_names, self.name)

    def ordered_as(self, class_names: tuple[str, ...]) -> Images:
        """The same images with the classes numbered as in `class_names`, where those are the same classes.

        Older checkpoints have their classes in the order of the alphabet, 0, 1, 10, 2, or in another Unicode form.
        """
        numbers = {unicodedata.normalize("NFC", name): i for i, name in enumerate(class_names)}
        names = [unicodedata.normalize("NFC", name) for name in self.class_names]
        if self.labels is None or len(numbers) != len(class_names) or sorted(names) != sorted(numbers):
            return self
        order = torch.tensor([numbers[name] for name in names], device=self.labels.device)
        return replace(self, labels=order[self.labels], class_names=class_names)
