"""The loss that makes a student's images, as a set, be like real ones."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from model.images import from_uint8
from training.classifier.network import Classifier, ClassifierConfig
from training.data import Images
from training.distillation import matching
from training.distillation.matching import FeatureMatching
from training.evaluation.statistics import Moments, frechet_distance

COUNT = 240
Y = torch.arange(COUNT) % 3


@pytest.fixture
def judge() -> Classifier:
    torch.manual_seed(0)
    return Classifier(ClassifierConfig(1, (8, 8), 3, width=3)).eval().requires_grad_(False)


@pytest.fixture
def real() -> Images:
    images = torch.randint(0, 256, (COUNT, 1, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Images(images, Y, ("cat", "dog", "emu"), "pictures")


@pytest.fixture
def new(judge: Classifier, real: Images) -> Callable[[], FeatureMatching]:
    """Makes comparisons with the real images."""
    return lambda: FeatureMatching([judge], real, 3, torch.device("cpu"))


def students(seed: int = 2) -> Tensor:
    """[240, 1, 8, 8], darker than the real ones, more alike, and each class of a shade of its own."""
    noise = torch.rand(COUNT, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    return 0.4 * noise - 0.7 + 0.2 * Y[:, None, None, None]


def test_the_distance_is_frechets_over_the_real_images_variance(
    new: Callable[[], FeatureMatching], judge: Classifier, real: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the classes' means are in it. Of one layer here; a moving average divides by n, `Moments` by n - 1."""
    monkeypatch.setattr(matching, "_pooled", lambda judge, x: [judge.features(x)])
    ours, theirs = (judge.features(x) for x in (students(), from_uint8(real.images)))
    a, b = (Moments(ours.shape[1]).add(rows) for rows in (ours, theirs))
    matched = new()
    for part, y in zip(students().split(60), Y.split(60), strict=True):
        matched(part, y)
    by_class = torch.stack([ours[k == Y].mean(dim=0) - theirs[k == Y].mean(dim=0) for k in range(3)])
    distance = frechet_distance(a, b) + float(by_class.square().sum(dim=1).mean())
    assert matched.distance() == pytest.approx(distance / float(b.covariance.trace()), rel=0.01)
    matched = new()
    matched(from_uint8(real.images), Y)
    assert matched.distance() == pytest.approx(0, abs=1e-4)


def test_a_batch_has_the_distances_gradient(new: Callable[[], FeatureMatching]) -> None:
    """Beside the difference quotient of the distance itself, along the gradient and along another direction."""
    x, loss = students().requires_grad_(), new()
    loss(x.detach(), Y)
    (gradient,) = torch.autograd.grad(loss(x, Y).mean(), x)
    for direction in (gradient, gradient * (torch.arange(COUNT)[:, None, None, None] < 99)):
        unit, ends = direction / direction.norm(), []
        for side in (-0.01, 0.01):
            moved = new()
            moved(x.detach() + side * unit, Y)
            ends.append(moved.distance())
        assert float((gradient * unit).sum()) == pytest.approx((ends[1] - ends[0]) / 0.02, rel=0.01)


def test_batches_have_the_gradient_of_their_set(new: Callable[[], FeatureMatching]) -> None:
    x, loss = students().requires_grad_(), new()
    loss(x.detach(), Y)
    (whole,) = torch.autograd.grad(loss(x, Y).mean(), x)
    parts = []
    for part, y in zip(x.split(60), Y.split(60), strict=True):
        again = new()
        again.load_state_dict(loss.state_dict() | {"seen": 2**40})
        parts.append(torch.autograd.grad(again(part, y).sum() / COUNT, x)[0])
    apart = torch.stack(parts).sum(dim=0) - whole
    assert float(apart.norm()) < 0.1 * float(whole.norm())


def test_a_state_goes_on(new: Callable[[], FeatureMatching]) -> None:
    first, second = new(), new()
    first(students(), Y)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(students(3), Y), second(students(3), Y))
    assert first.distance() == second.distance()
