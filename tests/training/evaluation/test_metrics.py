"""What a comparison of samples with real images says, and which way round."""

from collections.abc import Callable

import torch

from training.classifier.network import Classifier
from training.data import Images
from training.evaluation import feature_extractor, metrics, statistics
from training.evaluation.metrics import balanced, compare
from training.evaluation.statistics import Moments


def test_samples_of_one_mode_are_precise_and_recall_little() -> None:
    draw = torch.Generator().manual_seed(0)
    modes = torch.tensor([[0.0, 0.0], [30.0, 0.0], [0.0, 30.0], [30.0, 30.0]], dtype=torch.float64)
    real = modes.repeat(25, 1) + torch.rand(100, 2, generator=draw, dtype=torch.float64)
    one_mode = modes[:1] + 0.3 + 0.4 * torch.rand(100, 2, generator=draw, dtype=torch.float64)
    found = compare(real, Moments(2).add(real), one_mode, None)
    assert found["precision"] > 0.9
    assert found["recall"] < 0.3


def noise(n: int, seed: int) -> Images:
    pixels = torch.randint(0, 256, (n, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return Images(pixels, torch.arange(n) % 3, ("cat", "dog", "emu"), "noise")


def test_sets_are_compared_at_the_size_of_the_smallest(save_extractor: Callable[..., str]) -> None:
    """Against numbers worked out here from the sets that are meant: 9 held-out images, of 60 to train on."""
    who, train, test = feature_extractor.load(save_extractor()), noise(60, 0), noise(9, 1)
    assert isinstance(who.network, Classifier)
    rows = torch.cat(who.network.extract(noise(30, 2).images), dim=1)
    found = metrics.measure(who, train, test, rows, 3)
    assert (found["compared_images"], found["train_images"]) == (9, 60)
    every = who.network.extract(train.images[balanced(train, 3)])[0]
    held_out = who.network.extract(test.images[balanced(test, 3)])[0]
    size = who.size
    for name, features in {"generated": rows[:9, :size], "test": held_out}.items():
        expected = compare(every[:9], Moments(size).add(every), features, 3)
        for key, value in expected.items():
            assert abs(found[name][key] - value) <= 1e-4 * abs(value) + 1e-6, (name, key)
    labels = torch.arange(30) % 3  # accuracy is that of all samples
    assert found["generated"]["accuracy"] == statistics.accuracy(rows[:, size:], labels, 3)[0]
    few = metrics.measure(who, train, test, rows[:6], 3)
    assert few["compared_images"] == 6
    found = metrics.measure(who, noise(6, 0), test, rows, 3)
    assert (found["compared_images"], found["train_images"]) == (6, 6)
