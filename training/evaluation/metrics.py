"""Samples against the train split, beside as many held-out images, in the features of an extractor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from training.data import Images
from training.evaluation import statistics
from training.evaluation.feature_extractor import FeatureExtractor
from training.evaluation.feature_files import real_features
from training.evaluation.inception import Inception
from training.evaluation.statistics import Moments

NEIGHBOURS = 3  # the k of precision and recall
BATCH_SIZE = 10_000  # rows that go into the moments at once


def balanced(images: Images, num_classes: int | None, num_images: int | None = None) -> Tensor:
    """Indices of real images, drawn once and for all: 0, 1, …, K - 1, 0, 1, … are their classes, if there are classes.

    As many as there can be, or the first `num_images` of them.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    if num_classes is not None:
        assert images.labels is not None
        labels = images.labels[order]
        each = int(labels.bincount(minlength=num_classes).min())
        order = torch.stack([order[labels == k][:each] for k in range(num_classes)], dim=1).flatten()
    return order[:num_images]


def compare(train: Tensor, all_train: Moments, features: Tensor, num_classes: int | None) -> dict[str, float]:
    """How far `features` [n, F] are from as many `train` images, and from `all_train` of them."""
    size = features.shape[1]
    own = Moments(size).add(features)
    kernel_distance, deviation = statistics.kernel_distance(train, features, num_classes or 1)
    precision, recall = statistics.precision_recall(train, features, NEIGHBOURS)
    return {
        "frechet_distance": statistics.frechet_distance(Moments(size).add(train), own),
        "frechet_distance_all_train": statistics.frechet_distance(all_train, own),
        "kernel_distance": kernel_distance,
        "kernel_distance_std": deviation,
        "precision": precision,
        "recall": recall,
    }


def measure(
    extractor: FeatureExtractor, train_set: Images, test_set: Images, rows: Tensor, num_classes: int | None
) -> dict[str, Any]:
    """The numbers of samples, given as `rows` of features and logits, and of as many held-out images.

    Accuracy is that of all samples. A set is compared with others of its size: that of the smallest balanced split,
    where there are more samples than real images.
    """
    chosen, held_out = balanced(train_set, num_classes), balanced(test_set, num_classes)
    n = min(len(rows), len(chosen), len(held_out))
    train, test = real_features(extractor, train_set)[chosen], real_features(extractor, test_set)[held_out[:n]]
    all_train = Moments(extractor.size)
    for part in train.split(BATCH_SIZE):
        all_train.add(part[:, : extractor.size])
    widths = [extractor.size, len(extractor.class_names)]
    near = train[:n, : extractor.size].to(extractor.device)
    sets = {name: x.to(extractor.device).split(widths, dim=1) for name, x in {"generated": rows, "test": test}.items()}
    result: dict[str, Any] = {"compared_images": n, "train_images": len(chosen)}
    for name, (features, logits) in sets.items():
        result[name] = compare(near, all_train, features[:n], num_classes)
        if num_classes is not None and extractor.class_names:
            labels = torch.arange(len(logits), device=extractor.device) % num_classes
            share, by_class = statistics.accuracy(logits, labels, num_classes)
            result[name] |= {
                "accuracy": share,
                "accuracy_by_class": dict(zip(extractor.class_names, by_class, strict=True)),
            }
    floor = result["test"]["frechet_distance"]
    result["frechet_ratio"] = result["generated"]["frechet_distance"] / floor if floor else None
    return inception_names(result) if isinstance(extractor.network, Inception) else result


def inception_names(result: dict[str, Any]) -> dict[str, Any]:
    """With Inception's features, and only with them, the distances are called what everyone calls them."""
    names = {"frechet_distance": "fid", "frechet_ratio": "fid_ratio", "kernel_distance": "kid"}
    names |= {"frechet_distance_all_train": "fid_all_train", "kernel_distance_std": "kid_std"}
    return {
        names.get(key, key): inception_names(value) if isinstance(value, dict) else value
        for key, value in result.items()
    }
