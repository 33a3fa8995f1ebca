"""The loss that makes a student's images, as a set, be like real ones."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.images import from_uint8, to_uint8
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
    monkeypatch.setattr(matching, "_looks", lambda x: [])
    ours, theirs = (judge.features(x) for x in (students(), from_uint8(real.images)))
    a, b = (Moments(ours.shape[1]).add(rows) for rows in (ours, theirs))
    matched = new()
    for part, y in zip(students().split(60), Y.split(60), strict=True):
        matched(part, y)
    by_class = torch.stack([ours[k == Y].mean(dim=0) - theirs[k == Y].mean(dim=0) for k in range(3)])
    distance = frechet_distance(a, b) + float(by_class.square().sum(dim=1).mean())
    assert 2 * matched.distance() == pytest.approx(distance / float(b.covariance.trace()), rel=0.01)
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


@pytest.mark.parametrize(
    "spoiled",
    [
        pytest.param(lambda x: x.mean(dim=1, keepdim=True).expand(-1, 3, -1, -1), id="grey"),
        pytest.param(lambda x: torch.where(Y.bool()[:, None, None, None], x, x.roll(1, 1)), id="a class's colours"),
        pytest.param(lambda x: x + 0.2, id="brighter"),
        pytest.param(lambda x: x.lerp(x.roll(1, 3), 0.3), id="blurred"),
    ],
)
def test_what_classifiers_overlook_counts(
    spoiled: Callable[[Tensor], Tensor], judge: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matching, "_pooled", lambda judge, x: [])
    hue = torch.eye(3)[Y][:, :, None, None]
    draws = [torch.rand(COUNT, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    a, b = (0.5 * hue + 0.8 * x - 0.7 for x in draws)
    real = Images(to_uint8(a), Y, ("cat", "dog", "emu"), "pictures")
    distances = []
    for x in (b, spoiled(b)):
        matched = FeatureMatching([judge], real, 3, torch.device("cpu"))
        matched(x, Y)
        distances.append(matched.distance())
    assert distances[1] > 1.5 * distances[0]


def test_a_grid_of_2_by_2_counts(judge: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same squares, which begin at any place in real images, and always at even ones in the student's."""
    monkeypatch.setattr(matching, "_pooled", lambda judge, x: [])
    draws = [torch.rand(COUNT, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) - 0.5 for seed in (1, 2)]
    a, b = (x.repeat_interleave(2, 2).repeat_interleave(2, 3) for x in draws)
    anywhere = [
        torch.stack([image.roll((i // 3 % 2, i // 3 % 2), (1, 2)) for i, image in enumerate(x)]) for x in (a, b)
    ]
    real = Images(to_uint8(anywhere[0]), Y, ("cat", "dog", "emu"), "pictures")
    distances = []
    for x in (anywhere[1], b):
        matched = FeatureMatching([judge], real, 3, torch.device("cpu"))
        matched(x, Y)
        distances.append(matched.distance())
    assert distances[1] > 5 * distances[0]


def test_grey_images_in_three_channels_teach_grey(real: Images) -> None:
    torch.manual_seed(0)
    judge = Classifier(ClassifierConfig(3, (8, 8), 3, width=3)).eval().requires_grad_(False)
    real = replace(real, images=real.images.expand(-1, 3, -1, -1))
    matched = FeatureMatching([judge], real, 3, torch.device("cpu"))
    coloured = (students().expand(-1, 3, -1, -1) + torch.tensor([0.1, 0, -0.1])[:, None, None]).requires_grad_()
    matched(coloured.detach(), Y)
    (gradient,) = torch.autograd.grad(matched(coloured, Y).sum(), coloured)
    assert matched.distance() < 100
    assert gradient[:, 0].mean() > 0 > gradient[:, 2].mean()


def test_of_the_last_layer_the_largest_counts_too_and_colour_counts_threefold(judge: Classifier) -> None:
    *_, last = matching._pooled(judge, students())
    assert torch.equal(last, [*judge.layers(students())][-1].amax(dim=(2, 3)))
    grey = students().expand(-1, 3, -1, -1)
    red = torch.tensor([0.2, -0.1, -0.1])[:, None, None]
    plain, coloured = (next(matching._looks(x)).unflatten(1, (3, 8, 8)) for x in (grey, grey + red))
    assert torch.allclose(coloured - plain, 3 * red.expand(3, 8, 8), atol=1e-6)


@pytest.mark.parametrize(("size", "left"), [(60, 0.5**6), (240, 0)])
def test_averages_are_of_the_latest_images(
    new: Callable[[], FeatureMatching], monkeypatch: pytest.MonkeyPatch, size: int, left: float
) -> None:
    """Of 120 images, or of a batch that is larger; of a class of its share of them, however rarely it comes."""
    monkeypatch.setattr(matching, "REMEMBERED", 120)
    loss, only = new(), new()
    for part, y in zip(students().split(60), Y.split(60), strict=True):
        loss(0.3 * part, y)
    before, rare = [x.clone() for x in loss.first], [x.clone() for x in loss.by_class]
    y = 1 + Y[:size] % 2  # of class 0 there is one
    y[0] = 0
    only(students(3)[:size], y)
    for _ in range(6):
        loss(students(3)[:size], y)
    for old, ours, theirs in zip(before, loss.first, only.first, strict=True):
        assert torch.allclose(ours, theirs + left * (old - theirs))
    for old, ours, theirs in zip(rare, loss.by_class, only.by_class, strict=True):
        assert torch.allclose(ours[0], theirs[0] + (39 / 40) ** 6 * (old[0] - theirs[0]))


def test_without_classes_no_mean_counts_twice(judge: Classifier, real: Images) -> None:
    """A shift of everything by its own mean: the same distance as for one class, less that of the class's mean."""
    one, none = (
        FeatureMatching([judge], replace(real, labels=labels), classes, torch.device("cpu"))
        for labels, classes in ((torch.zeros(COUNT, dtype=torch.int64), 1), (None, None))
    )
    one(students(), torch.zeros(COUNT, dtype=torch.int64))
    none(students(), None)
    units = zip(one.by_class, one._class_means, one._units, strict=True)
    of_class = sum(float((ours - theirs).square().sum()) / unit for ours, theirs, unit in units)
    assert none.distance() == pytest.approx(one.distance() - of_class, rel=1e-6)


def test_a_state_goes_on(new: Callable[[], FeatureMatching]) -> None:
    first, second = new(), new()
    first(students(), Y)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(students(3), Y), second(students(3), Y))
    assert first.distance() == second.distance()
