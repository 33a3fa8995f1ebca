"""A student's images as a set: how far the mean and covariance of their features are from real images'."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.images import from_uint8
from training.classifier.network import Classifier
from training.data import Images
from training.data_record import fingerprint
from training.evaluation.metrics import balanced
from training.evaluation.statistics import Moments, square_root

AT_ONCE = 500  # real images that go through the judge together
REMEMBERED = 4096  # about how many of the student's images its mean and covariance are of
SMALLEST = 1e-10  # an eigenvalue of their product, of the largest, which smaller ones count as
GRID = 8  # places across and down whose brightness and colour are compared
COLOUR = 3  # what colour counts for beside brightness, from which it is about a third as far in photographs


class FeatureMatching:
    """The Fréchet distance to real images as a loss of batches that are far too small to measure it.

    The student's mean and covariance are moving averages. A batch's loss is how the distance changes with the part
    that its images have in them, so its gradient is right on average for a batch of any size. Distances are of each of
    the judges' layers, averaged over places, of their features, and of what classifiers overlook: brightness, colour
    and grain of the pixels, which count as much as one judge. Each is divided by the real images' variance.
    Where there are classes, as many real images of each are compared, and the squared distance of each class's mean to
    that of its real images is added, its own mean over classes.

    Raises ValueError where the real images do not differ, or are fewer than two. `count` says how many are compared,
    `features` how many the largest layer has, `fingerprint` which images they are.
    """

    def __init__(
        self, judges: Sequence[Classifier], real: Images, num_classes: int | None, device: torch.device
    ) -> None:
        self._judges, self._device = judges, device
        order, k = balanced(real, num_classes), num_classes or 1
        self.fingerprint = fingerprint(real)
        self.count, self._of_classes = len(order), float(num_classes is not None)
        moments, sums = self._of_real(real.images, order, k)
        self._means = [m.mean.to(device) for m in moments]
        self._class_means = [s.to(device) * k / len(order) - m for s, m in zip(sums, self._means, strict=True)]
        self._variances = [float(m.covariance.trace()) for m in moments]
        if any(v <= SMALLEST * float(m.square().sum()) for v, m in zip(self._variances, self._means, strict=True)):
            raise ValueError("the real images are too alike: in a layer, or in brightness or grain, none differs")
        self.features = max(map(len, self._means))
        self._units = [variance * (len(judges) + 1) for variance in self._variances]
        self._roots = [square_root(m.covariance).to(device) for m in moments]
        self._begin()

    def _begin(self) -> None:
        """Of the student's images, all from the real ones' mean: how many, their mean, that of their outer products,
        how many of each class, and its mean."""
        classes = len(self._class_means[0])
        self.seen, self.seen_by_class = 0, torch.zeros(classes, dtype=torch.float64, device=self._device)
        self.first = [torch.zeros_like(mean) for mean in self._means]
        self.second = [torch.zeros_like(root) for root in self._roots]
        self.by_class = [torch.zeros_like(means) for means in self._class_means]

    def anew(self) -> FeatureMatching:
        """A comparison with the same real images, of no images of a student yet."""
        other = copy.copy(self)
        other._begin()
        return other

    @torch.no_grad()
    def _of_real(self, images: Tensor, order: Tensor, classes: int) -> tuple[list[Moments], list[Tensor]]:
        """Of each layer the moments, and the sum over each class [classes, F], which follow one another in `order`."""
        moments: list[Moments] = []
        sums: list[Tensor] = []
        for places in torch.arange(len(order)).split(AT_ONCE):
            for i, rows in enumerate(self._rows(from_uint8(images[order[places]].to(self._device)))):
                rows = rows.double().cpu()
                if i == len(moments):
                    moments.append(Moments(rows.shape[1]))
                    sums.append(torch.zeros(classes, rows.shape[1], dtype=torch.float64))
                moments[i].add(rows)
                sums[i].index_add_(0, places % classes, rows)
        return moments, sums

    def __call__(self, x: Tensor, y: Tensor | None) -> Tensor:
        """The losses [n] of the student's images x [n, C, H, W] of classes y [n], if there are classes.

        They are of use once more images were seen than there are features. Of images that are not finite they aren't,
        either.
        """
        found = self.add(x, y)
        if not found:
            return x.flatten(1).sum(dim=1) * torch.nan
        losses = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        for i, apart in enumerate(found):
            with torch.no_grad():
                slope, off = self._slope(i), self.by_class[i] - self._class_means[i]
            centred = apart - self.first[i]
            change = 2 * apart @ self.first[i] + (centred @ slope * centred).sum(dim=1)
            if y is not None:
                change = change + 2 * (apart * off[y]).sum(dim=1)
            losses = losses + change / self._units[i]
        return losses.float()

    def add(self, x: Tensor, y: Tensor | None) -> list[Tensor]:
        """Takes images into the averages. Returns how far each layer's features are from the real mean, [n, F].

        Images that are not finite are left out, all of them, and nothing is returned.
        """
        if not x.isfinite().all():
            return []
        y = torch.zeros(len(x), dtype=torch.int64, device=x.device) if y is None else y
        here = y.bincount(minlength=len(self.seen_by_class)).double()
        self.seen, self.seen_by_class = self.seen + len(x), self.seen_by_class + here
        share = min(1, len(x) / min(self.seen, REMEMBERED))
        shares = (here / self.seen_by_class.clamp(max=REMEMBERED / len(here)).clamp(min=1)).clamp(max=1)
        found = [rows.double() - mean for rows, mean in zip(self._rows(x), self._means, strict=True)]
        with torch.no_grad():
            for i, apart in enumerate(found):
                self.first[i].lerp_(apart.mean(dim=0), share)
                self.second[i].lerp_(apart.T @ apart / len(x), share)
                sums = torch.zeros_like(self.by_class[i]).index_add_(0, y, apart)
                self.by_class[i].lerp_(sums / here.clamp(min=1)[:, None], shares[:, None])
        return found

    def distance(self) -> float:
        """The distance of the student's latest images: summed over layers, the mean over judges and pixels."""
        total = 0.0
        for i, root in enumerate(self._roots):
            covariance = self._covariance(i)
            overlap = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum()
            apart = self.first[i].square().sum() + covariance.trace() - 2 * overlap
            by_class = self._of_classes * (self.by_class[i] - self._class_means[i]).square().sum(dim=1).mean()
            total += (float(apart + by_class) + self._variances[i]) / self._units[i]
        return total

    def _covariance(self, i: int) -> Tensor:
        return self.second[i] - torch.outer(self.first[i], self.first[i])

    def _slope(self, i: int) -> Tensor:
        """How the distance changes with the student's covariance S: 1 - R·(R·S·R)^-½·R, R² being the real one's."""
        root = self._roots[i]
        values, vectors = torch.linalg.eigh(root @ self._covariance(i) @ root)
        inverse = (vectors / values.clamp(min=SMALLEST * float(values[-1])).sqrt()) @ vectors.T
        return torch.eye(len(root), dtype=root.dtype, device=root.device) - root @ inverse @ root

    def _rows(self, x: Tensor) -> Iterator[Tensor]:
        for judge in self._judges:
            yield from _pooled(judge, x)
        yield from _looks(x)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        return {
            "seen": self.seen,
            "seen_by_class": self.seen_by_class,
            "first": self.first,
            "second": self.second,
            "by_class": self.by_class,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a `state_dict`."""
        self.seen = state["seen"]
        self.seen_by_class = state["seen_by_class"].to(self.seen_by_class)
        for name in ("first", "second", "by_class"):
            for own, saved in zip(getattr(self, name), state[name], strict=True):
                own.copy_(saved)


def _pooled(judge: Classifier, x: Tensor) -> Iterator[Tensor]:
    """Of each layer the mean over places, and of the last one the maximum, too: [n, channels] each, float32."""
    for h in judge.layers(x.contiguous(memory_format=torch.channels_last)):
        yield h.mean(dim=(2, 3))
    yield h.amax(dim=(2, 3))


def _looks(x: Tensor) -> Iterator[Tensor]:
    """Of images [n, C, H, W] brightness and colour at each place [n, C · places], and grain [n, 4 · C].

    Grain is how far neighbours differ, of even and odd places apart: a grid of 2 × 2 pixels shows in it.
    """
    small = F.adaptive_avg_pool2d(x, GRID)
    brightness = small.mean(dim=1, keepdim=True)
    yield (brightness + COLOUR * (small - brightness)).flatten(1)
    across, down = x.diff(dim=3).abs(), x.diff(dim=2).abs()
    halves = (across[..., ::2], across[..., 1::2], down[:, :, ::2], down[:, :, 1::2])
    yield torch.cat([half.mean(dim=(2, 3)) for half in halves], dim=1)
