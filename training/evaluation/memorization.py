"""Whether samples are copies of training images: how near the nearest one is, beside how near it is to held-out images.

A network that has learnt the distribution makes images as far from the train split as held-out ones are. One that
remembers it makes images that are nearer: a ratio far below 1, and many samples nearer than almost any held-out image.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.images import grid
from training.data import Images
from training.evaluation.feature_extractor import FeatureExtractor
from training.evaluation.feature_files import real_features
from training.evaluation.metrics import balanced
from training.run.image_io import enlarged, save_png

NEAREST = 5  # of the train images, that a picture shows
NUM_PREVIEW = 16  # samples, of the picture
EXTRA_CANDIDATES = 8  # more candidates than are asked for, since they are found in float32
BATCH_SIZE = 10_000  # train images that are compared together


def nearest(queries: Tensor, points: Tensor, k: int = NEAREST) -> tuple[Tensor, Tensor]:
    """Of each of `queries` [N, D] the k nearest of `points` [M, D]: Euclidean distances float64 [N, k], and which.

    Candidates come from |q|² + |p|² - 2·q·p in float32, and are then measured exactly.
    """
    k, queries = min(k, len(points)), queries.float()
    centre = queries.mean(dim=0)
    found = torch.full((len(queries), 1), torch.inf, device=queries.device)
    which = torch.zeros_like(found, dtype=torch.long)
    for start in range(0, len(points), BATCH_SIZE):
        part = points[start : start + BATCH_SIZE].to(queries.device).float() - centre
        squared = part.square().sum(dim=1) - 2 * (queries - centre) @ part.T  # |q|² is the same for all of a row
        index = torch.arange(start, start + len(part), device=queries.device).expand_as(squared)
        found, which = torch.cat([found, squared], dim=1), torch.cat([which, index], dim=1)
        found, best = found.topk(min(k + EXTRA_CANDIDATES, found.shape[1]), largest=False)
        which = which.gather(1, best)
    which = which[:, : min(which.shape[1], len(points))]  # without the infinity of the beginning
    exact = torch.stack(
        [(points[w.cpu()].to(q.device).double() - q).norm(dim=1) for q, w in zip(queries.double(), which, strict=True)]
    )
    distances, order = exact.sort(dim=1)
    return distances[:, :k].cpu(), which.gather(1, order)[:, :k].cpu()


def report(generated: Tensor, held_out: Tensor) -> dict[str, Any]:
    """What two sets of distances to the nearest train image, [N] and [M], say.

    "ratio" is that of the medians. "nearer_than_1_percent" is the share of samples that are nearer to a train image
    than the nearest 1 % of held-out images are: 0.01 where nothing is copied.
    """
    levels = {"1_percent": 0.01, "5_percent": 0.05, "median": 0.5}
    rows = {
        name: {"minimum": float(x.min())} | {level: float(x.quantile(q)) for level, q in levels.items()}
        for name, x in {"generated": generated, "held_out": held_out}.items()
    }
    base = rows["held_out"]
    shares = {f"nearer_than_{k}": float((generated < base[k]).double().mean()) for k in ("1_percent", "5_percent")}
    return rows | {"ratio": rows["generated"]["median"] / base["median"] if base["median"] else None} | shares


def compare(
    extractor: FeatureExtractor,
    train_set: Images,
    test_set: Images,
    samples: Tensor,
    num_classes: int | None,
    picture: Path,
) -> dict[str, Any]:
    """The nearest train images of `samples` uint8 [N, C, H, W], and of as many held-out images; writes the picture.

    By pixels, as the root of the mean squared difference in grey levels from 0 to 255, and by the extractor's features.
    The picture has a row for each of the first samples: the sample, its nearest train images by pixels, then by
    features.
    """
    held_out, size = balanced(test_set, num_classes, len(samples)), samples[0].numel()
    features = torch.cat([extractor.network.extract(part)[0].cpu() for part in samples.split(500)])
    real = [real_features(extractor, images)[:, : extractor.size] for images in (train_set, test_set)]
    spaces = {  # the samples', the held-out images' and the train images' places, and the unit of distance
        "pixels": (samples.flatten(1), test_set.images[held_out].flatten(1), train_set.images.flatten(1), size**0.5),
        "features": (features, real[1][held_out], real[0], 1.0),
    }
    result: dict[str, Any] = {"images": len(samples), "train_images": len(train_set)}
    columns = [samples[:NUM_PREVIEW, None]]
    for name, (own, others, train, unit) in spaces.items():
        distances, which = nearest(own.to(extractor.device), train)
        theirs, _ = nearest(others.to(extractor.device), train, 1)
        result[name] = report(distances[:, 0] / unit, theirs[:, 0] / unit)
        shown = train_set.images[which[:NUM_PREVIEW]]
        columns += [torch.full_like(shown[:, :1], 255), shown]
    rows = torch.cat(columns, dim=1)
    shape = rows.shape[2:]
    image = grid(rows.reshape(-1, *shape).numpy(), columns=rows.shape[1])
    save_png(picture, enlarged(np.ascontiguousarray(image), min(shape[1:])))
    return result
