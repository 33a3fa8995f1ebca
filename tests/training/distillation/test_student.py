"""The student's steps and timesteps, and what it is told."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from model.diffusion import DiffusionConfig, GaussianDiffusion
from model.nn.config import UNetConfig
from model.nn.unet import UNet
from model.sampling.noise import normals
from model.sampling.schedule import make_schedule
from model.sampling.step import sample
from tests.networks import randomised
from training.classifier.network import Classifier, ClassifierConfig
from training.distillation.losses import Lesson, end_to_end, feature_distance
from training.distillation.student import Batch, easiest_points, student_table, teacher_x0, walk

DIFFUSION = GaussianDiffusion(DiffusionConfig(schedule="cosine", prediction="v"))
SHAPE = (1, 8, 8)


@pytest.mark.parametrize(("sampler", "limit"), [("ddim", "clamp"), ("dpmpp_2m", "none"), ("dpmpp_3m", "dynamic")])
def test_the_walk_is_the_naive_loop(tiny: UNet, sampler: str, limit: str) -> None:
    schedule = student_table(DIFFUSION, np.array([999, 700, 480, 200, 30]), sampler, limit)
    expected = sample(tiny, schedule, SHAPE, [5] * 3, [0, 1, 2], [0, 1, 2])
    x_T = normals([5] * 3, [0, 1, 2], [0] * 3, SHAPE)
    *_, (last, x) = walk(tiny, schedule, x_T, torch.arange(3), bf16=False, detached=False)
    assert last == 4
    assert torch.allclose(x.detach(), expected, atol=1e-5)


def test_a_clamped_pixel_has_a_gradient(tiny: UNet) -> None:
    schedule = student_table(DIFFUSION, np.array([999, 500]), "ddim", "clamp")
    tiny.requires_grad_(True)
    tiny.out_conv.bias.data.fill_(9.0)
    *_, (_, x) = walk(tiny, schedule, torch.zeros(1, *SHAPE), torch.zeros(1, dtype=torch.int64), False, False)
    assert x.abs().max() <= 1
    x.sum().backward()
    assert tiny.out_conv.bias.grad is not None
    assert tiny.out_conv.bias.grad.abs() > 0.1


def test_the_teachers_x0_follows_from_its_states(tiny: UNet) -> None:
    schedule, seen = make_schedule(DIFFUSION, "dpmpp_3m", 6, spacing="logsnr"), []
    states = [normals([1], [0], [0], SHAPE)]
    sample(tiny, schedule, SHAPE, [1], [0], [0], on_step=lambda _, x, x0: (states.append(x), seen.append(x0)))
    found = teacher_x0(schedule, torch.stack(states, dim=1))
    assert torch.allclose(found, torch.stack(seen, dim=1), atol=1e-3)


def test_the_points_are_those_of_the_least_error() -> None:
    """Where x0 changes in one place alone, a student needs a point there, and none elsewhere."""
    teacher = make_schedule(DIFFUSION, "ddim", 8)
    x = [torch.ones(1, *SHAPE)]
    for i, row in enumerate(teacher.table):
        a, b = row[4], row[5]
        x.append(a * x[-1] + b * torch.full((1, *SHAPE), -0.5 if i < 5 else 0.5))
    states = torch.stack(x, dim=1)
    assert easiest_points(DIFFUSION, teacher, states, 2) == [0, 5]
    assert easiest_points(DIFFUSION, teacher, states, 8) == list(range(8))
    assert easiest_points(DIFFUSION, teacher, states, 1) == [0]


def test_images_that_look_alike_are_at_no_distance() -> None:
    torch.manual_seed(0)
    judge = Classifier(ClassifierConfig(1, (8, 8), 3, width=3)).eval()
    x = torch.rand(4, *SHAPE) * 2 - 1
    assert torch.allclose(feature_distance([judge], x, x, bf16=False), torch.zeros(4))
    near, far = (feature_distance([judge], x, x + scale * torch.randn_like(x), bf16=False) for scale in (0.02, 0.5))
    assert (near < far).all()
    assert near.shape == (4,)


def test_a_learned_variance_stays_as_it_is(tiny_config: UNetConfig) -> None:
    network = randomised(replace(tiny_config, learned_variance=True))
    schedule = student_table(DIFFUSION, np.array([999, 500]), "ddim", "clamp")
    *_, (_, x) = walk(network, schedule, torch.zeros(2, *SHAPE), torch.arange(2), False, False)
    assert x.shape == (2, *SHAPE)


def test_an_anchor_is_the_teacher_with_and_without_classes(tiny: UNet) -> None:
    asked: list[tuple[torch.Tensor, ...]] = []

    def teacher(x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None) -> torch.Tensor:
        assert y is not None
        asked.append((x, t, y))
        return torch.zeros_like(x)

    u = torch.arange(8) / 8
    x_T, target, noise = torch.randn(3, 8, *SHAPE, generator=torch.Generator().manual_seed(0)).unbind()
    batch = Batch(x_T, target[:, None], torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]), noise, u)
    schedule = student_table(DIFFUSION, np.array([999, 500]), "ddim", "clamp")
    lesson = Lesson(schedule, DIFFUSION, teacher, 2.0, 3, (), 0.0, 0.0, None, 0.0, False)
    (plain,) = end_to_end(tiny, batch, lesson)
    assert not asked
    (anchored,) = end_to_end(tiny, batch, replace(lesson, anchor=10.0))
    ((x, t, y),) = asked
    assert t.tolist() == [0, 125, 250, 375, 500, 625, 750, 875]
    assert torch.equal(x, DIFFUSION.q_sample(target, t, noise))
    assert y.tolist() == [3, 1, 2, 0, 3, 2, 0, 1]
    apart = tiny(x, t, y).square().mean(dim=(1, 2, 3))
    assert torch.allclose(anchored, plain + 10 * apart)
