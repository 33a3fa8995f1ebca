"""A student's images as a set: how far the mean and covariance of their features are from real images'."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.images import from_uint8
from training.classifier.network import Classifier
from training.data import Images
from training.evaluation.metrics import balanced
from training.evaluation.statistics import Moments, square_root

AT_ONCE = 500  # real images that go through the judge together
REMEMBERED = 4096  # about how many of the student's images its mean and covariance are of
SMALLEST = 1e-10  # an eigenvalue of their product, of the largest, which smaller ones count as


class FeatureMatching:
    """The Fréchet distance to real images as a loss of batches that are far too small to measure it.

    The student's mean and covariance are moving averages. A batch's loss is how the distance changes with the part
    that its images have in them, so its gradient is right on average for a batch of any size. Distances are of each of
    the judges' layers, averaged over places, and of their features; each is divided by the real images' variance.
    """

    def __init__(
        self, judges: Sequence[Classifier], real: Images, num_classes: int | None, device: torch.device
    ) -> None:
        self._judges, wanted = judges, list[Moments]()
        with torch.no_grad():
            for part in balanced(real, num_classes).split(AT_ONCE):
                rows = [*self._rows(from_uint8(real.images[part].to(device)))]
                wanted = wanted or [Moments(x.shape[1]) for x in rows]
                for moments, x in zip(wanted, rows, strict=True):
                    moments.add(x)
        self._means = [moments.mean.to(device) for moments in wanted]
        self._variances = [float(moments.covariance.trace()) for moments in wanted]
        self._roots = [square_root(moments.covariance).to(device) for moments in wanted]
        self.seen = 0  # of the student's images
        self.first = [torch.zeros_like(mean) for mean in self._means]  # their mean, from that of the real ones
        self.second = [torch.zeros_like(root) for root in self._roots]  # the mean of outer products, likewise

    def __call__(self, x: Tensor) -> Tensor:
        """The losses [n] of the student's images x [n, C, H, W]; of use once it has seen more images than features."""
        losses = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        self.seen += len(x)
        share = len(x) / min(self.seen, REMEMBERED)
        for i, rows in enumerate(self._rows(x)):
            apart = rows.double() - self._means[i]
            with torch.no_grad():
                self.first[i].lerp_(apart.mean(dim=0), share)
                self.second[i].lerp_(apart.T @ apart / len(x), share)
                slope = self._slope(i)
            centred = apart - self.first[i]
            change = 2 * apart @ self.first[i] + (centred @ slope * centred).sum(dim=1)
            losses = losses + change / self._variances[i] / len(self._judges)
        return losses.float()

    def distance(self) -> float:
        """The Fréchet distance over the real images' variance, of the student's latest images.

        Summed over a judge's layers, the mean over judges.
        """
        total = 0.0
        for i, root in enumerate(self._roots):
            covariance = self._covariance(i)
            overlap = torch.linalg.eigvalsh(root @ covariance @ root).clamp(min=0).sqrt().sum()
            apart = self.first[i].square().sum() + covariance.trace() - 2 * overlap
            total += float(apart) / self._variances[i] + 1
        return total / len(self._judges)

    def _covariance(self, i: int) -> Tensor:
        return self.second[i] - torch.outer(self.first[i], self.first[i])

    def _slope(self, i: int) -> Tensor:
        """How the distance changes with the student's covariance S: 1 - R·(R·S·R)^-½·R, R² being the real one's."""
        root = self._roots[i]
        values, vectors = torch.linalg.eigh(root @ self._covariance(i) @ root)
        inverse = (vectors / values.clamp(min=SMALLEST * float(values[-1])).sqrt()) @ vectors.T
        return torch.eye(len(root), dtype=root.dtype, device=root.device) - root @ inverse @ root

    def _rows(self, x: Tensor) -> Iterator[Tensor]:
        return (rows for judge in self._judges for rows in _pooled(judge, x))

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on with."""
        return {"seen": self.seen, "first": self.first, "second": self.second}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a `state_dict`."""
        self.seen = state["seen"]
        for name in ("first", "second"):
            for own, saved in zip(getattr(self, name), state[name], strict=True):
                own.copy_(saved)


def _pooled(judge: Classifier, x: Tensor) -> Iterator[Tensor]:
    """Of each layer the mean over places, and of the last one the maximum, too: [n, channels] each, float32."""
    h = F.gelu(judge.stem(x.contiguous(memory_format=torch.channels_last)))
    yield h.mean(dim=(2, 3))
    for group in judge.groups:
        h = group(h)
        yield h.mean(dim=(2, 3))
    yield h.amax(dim=(2, 3))
