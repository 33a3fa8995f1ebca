"""How far two sets of images are apart, from their features [N, F]: pure functions, everything in float64.

Inception's features are what makes a Fréchet distance an FID and a kernel distance a KID; here they are anyone's.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Mean and covariance of rows that arrive in batches, none of them kept (Chan et al. 1979, eq. 1.5)."""

    def __init__(self, size: int) -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)
        self._scatter = torch.zeros(size, size, dtype=torch.float64)

    def add(self, rows: Tensor) -> Moments:
        """Takes in rows [N, F], on any device. Returns itself."""
        rows = rows.double().cpu()
        if not len(rows):
            return self
        mean = rows.mean(dim=0)
        centred, delta = rows - mean, mean - self.mean
        total = self.count + len(rows)
        self._scatter += centred.T @ centred + torch.outer(delta, delta) * (self.count * len(rows) / total)
        self.mean += delta * (len(rows) / total)
        self.count = total
        return self

    @property
    def covariance(self) -> Tensor:
        """Unbiased, [F, F]. Raises ValueError for fewer than two rows."""
        if self.count < 2:
            raise ValueError("a covariance needs at least two images")
        return self._scatter / (self.count - 1)


def square_root(matrix: Tensor) -> Tensor:
    """The root of a symmetric positive semi-definite matrix [F, F]; eigenvalues below 0 are rounding errors."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet_distance(a: Moments, b: Moments) -> float:
    """|μ_a - μ_b|² + tr(A + B - 2·(AB)^½), squared as everyone reports it (Dowson & Landau 1982; Heusel et al. 2017).

    tr (AB)^½ = tr (A^½ B A^½)^½ = the sum of the singular values of A^½ B^½: this way no small eigenvalue is rounded
    before its root is taken. Finite sets are apart even where their distributions are not, the more the smaller they
    are: compare only distances of equal numbers of images.
    """
    overlap = torch.linalg.svdvals(square_root(a.covariance) @ square_root(b.covariance)).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * overlap
    return max(0.0, float(distance))


def kernel_distance(
    a: Tensor, b: Tensor, classes: int = 1, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Unbiased MMD² with the kernel (x·y / F + 1)³ (Bińkowski et al. 2018, there of Inception's features: KID).

    The mean over random subsets of [N, F] and [M, F], and the standard deviation from subset to subset. Unlike the
    Fréchet distance it is right on average at any size, so for equal distributions it may be a little below 0.

    Rows i of a balanced set are of class i mod `classes`. Two of them are of one class less often than two images drawn
    independently, which makes the plain estimate too low; so pairs of one class and pairs of two are averaged apart
    and weighted 1 to classes - 1, and the subsets are balanced as well.
    """
    strata = [rows.double().unflatten(0, (-1, classes)).transpose(0, 1) for rows in (a, b)]  # [classes, N / classes, F]
    each = min(max(2, subset_size // classes), *(rows.shape[1] for rows in strata))
    if each < 2:
        raise ValueError("a kernel distance needs at least two images of each class on either side")
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        chosen = [torch.randperm(rows.shape[1], generator=generator)[:each].to(a.device) for rows in strata]
        x, y = (rows[:, which].flatten(0, 1) for rows, which in zip(strata, chosen, strict=True))
        values.append(_within(x, classes) + _within(y, classes) - 2 * _kernel(x, y).mean())
    distances = torch.stack(values)
    return float(distances.mean()), float(distances.std(correction=0))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _within(x: Tensor, classes: int) -> Tensor:
    """The mean kernel of two different images of independent classes; x [N, F] is sorted by class."""
    kernel, each = _kernel(x, x), len(x) // classes
    blocks = kernel.reshape(classes, each, classes, each).sum(dim=(1, 3))
    same = blocks.trace()
    return ((blocks.sum() - same) / each**2 + (same - kernel.trace()) / (each * (each - 1))) / classes**2


def precision_recall(real: Tensor, generated: Tensor, k: int = 3, rows: int = 1000) -> tuple[float, float]:
    """(precision, recall) of `generated` [N, F] against `real` [M, F] (Kynkäänniemi et al. 2019, eq. 1 and 2).

    Precision is the share of generated images within the k-th neighbour distance of some real one: low where images
    are bad. Recall is the share of real images within that of some generated one: low where modes are missing.
    Take equally many of both; `rows` at a time are compared.
    """
    if min(len(real), len(generated)) <= k:
        raise ValueError(f"precision and recall need more than {k} images on either side")
    real, generated = real.double(), generated.double()
    real_radii, generated_radii = _radii(real, k, rows), _radii(generated, k, rows)
    precise, recalled = [], torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for part, radii in zip(generated.split(rows), generated_radii.split(rows), strict=True):
        distances = _squared_distances(part, real)
        precise.append((distances <= real_radii).any(dim=1))
        recalled |= (distances <= radii[:, None]).any(dim=0)
    return float(torch.cat(precise).double().mean()), float(recalled.double().mean())


def _radii(points: Tensor, k: int, rows: int) -> Tensor:
    """Squared distance of each point to its k-th nearest neighbour; the nearest of all is the point itself."""
    return torch.cat([_squared_distances(part, points).kthvalue(k + 1, dim=1).values for part in points.split(rows)])


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """|x|² + |y|² - 2·x·y, [N, M]; never below 0, where rounding would have it."""
    squares = x.square().sum(dim=1)[:, None] + y.square().sum(dim=1)
    return (squares - 2 * (x @ y.T)).clamp(min=0)


def accuracy(logits: Tensor, labels: Tensor, num_classes: int) -> tuple[float, list[float]]:
    """The share of rows of `logits` [N, K] that are largest at their label, over all and for each class."""
    right = (logits.argmax(dim=1) == labels).double()
    total = labels.bincount(minlength=num_classes)
    by_class = torch.zeros(num_classes, dtype=torch.float64, device=right.device).index_add(0, labels, right) / total
    return float(right.mean()), by_class.tolist()
