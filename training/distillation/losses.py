"""What a student is told: for each method the losses of a batch, one after the other, each [n] for an update."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.diffusion import GaussianDiffusion, Network
from model.sampling.schedule import COEFFICIENTS, SamplingSchedule
from model.sampling.step import cfg_forward
from training.classifier.network import Classifier
from training.distillation.matching import FeatureMatching
from training.distillation.student import Batch, walk

B = COEFFICIENTS.index("b")


@dataclass(frozen=True)
class Lesson:
    """What all batches have in common. `judges` compare images by their layers, with `weight`.

    `anchor` is the weight of the distance to the teacher at other timesteps. `matching` compares the student's images
    with real ones, with `matching_weight`, where there are any.
    """

    schedule: SamplingSchedule
    diffusion: GaussianDiffusion
    teacher: Network
    guidance: float
    null_class: int | None
    judges: tuple[Classifier, ...]
    weight: float
    anchor: float
    matching: FeatureMatching | None
    matching_weight: float
    bf16: bool


def sfd(network: Network, batch: Batch, lesson: Lesson) -> Iterator[Tensor]:
    """Simple and fast distillation (Zhou et al. 2024, 2409.19681): after each step, the distance to the trajectory.

    The next step goes on from where the student came to, without its gradient. A step's distance is divided by the
    weight of its x_0, so that all steps are told their x_0's error.
    """
    for i, x in walk(network, lesson.schedule, batch.x_T, batch.y, lesson.bf16, detached=True):
        loss = _l1(x, batch.targets[:, i]) / float(lesson.schedule.table[i, B])
        yield loss + _features(x, batch.targets[:, i], lesson) if i == len(lesson.schedule) - 1 else loss


def end_to_end(network: Network, batch: Batch, lesson: Lesson) -> Iterator[Tensor]:
    """The distance of the images alone, through all steps (Luhman & Luhman 2021, 2101.02388, for more than one)."""
    *_, (_, x) = walk(network, lesson.schedule, batch.x_T, batch.y, lesson.bf16, detached=False)
    loss = _l1(x, batch.targets[:, -1]) + _features(x, batch.targets[:, -1], lesson)
    if lesson.matching is not None:
        loss = loss + lesson.matching_weight * lesson.matching(x, batch.y)
    yield loss + lesson.anchor * _anchor(network, batch, lesson) if lesson.anchor else loss


def _anchor(network: Network, batch: Batch, lesson: Lesson) -> Tensor:
    """How far the student is from its teacher at random timesteps, on the teacher's images; a quarter without class."""
    x, t = _noised(batch, lesson)
    y = batch.y
    if y is not None and lesson.null_class is not None:
        y = torch.where(torch.arange(len(y), device=y.device) % 4 == 0, lesson.null_class, y)
    with torch.no_grad():
        target = lesson.teacher(x, t, y).float()
    return _apart(network, x, t, y, target, lesson)


def _apart(network: Network, x: Tensor, t: Tensor, y: Tensor | None, target: Tensor, lesson: Lesson) -> Tensor:
    """The mean squared difference of the student's output and the teacher's `target`, [n]."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=lesson.bf16):
        out: Tensor = network(x, t, y)
    return (out.float() - target).square().mean(dim=(1, 2, 3))


def _noised(batch: Batch, lesson: Lesson) -> tuple[Tensor, Tensor]:
    """The teacher's images with noise, [n, C, H, W], and of which timesteps [n]."""
    t = (batch.u.double() * lesson.diffusion.num_timesteps).long()
    return lesson.diffusion.q_sample(batch.targets[:, -1], t, batch.noise), t


def guidance(network: Network, batch: Batch, lesson: Lesson) -> Iterator[Tensor]:
    """The first stage of Meng et al. 2022 (2210.03142): the guided output in one row, on the teacher's own images."""
    x, t = _noised(batch, lesson)
    with torch.no_grad():
        g = torch.full((len(x),), lesson.guidance, device=x.device)
        target = cfg_forward(lesson.teacher, x, t, batch.y, g, lesson.null_class).float()
    yield _apart(network, x, t, batch.y, target, lesson)


LOSSES: dict[str, Callable[[Network, Batch, Lesson], Iterator[Tensor]]] = {
    "sfd": sfd,
    "end_to_end": end_to_end,
    "guidance": guidance,
}


def _l1(x: Tensor, target: Tensor) -> Tensor:
    return (x - target).abs().mean(dim=(1, 2, 3))


def _features(x: Tensor, target: Tensor, lesson: Lesson) -> Tensor | float:
    if not lesson.judges or not lesson.weight:
        return 0.0
    return lesson.weight * feature_distance(lesson.judges, x, target, lesson.bf16)


def feature_distance(judges: Sequence[Classifier], x: Tensor, target: Tensor, bf16: bool) -> Tensor:
    """How far images look apart, [n]: squared distances of a judge's layers, each position's channels of length 1.

    As LPIPS (Zhang et al. 2018), without learned weights; the last layer's features count as a layer. The mean over
    judges.
    """
    return torch.stack([_distance(judge, x, target, bf16) for judge in judges]).mean(dim=0)


def _distance(judge: Classifier, x: Tensor, target: Tensor, bf16: bool) -> Tensor:
    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        with torch.no_grad():
            wanted = list(_layers(judge, target))
        found = list(_layers(judge, x))
    parts = [(a - b).square().sum(dim=1).reshape(len(x), -1).mean(dim=1) for a, b in zip(found, wanted, strict=True)]
    return torch.stack(parts).sum(dim=0)


def _layers(judge: Classifier, x: Tensor) -> Iterator[Tensor]:
    for h in judge.layers(x.contiguous(memory_format=torch.channels_last)):
        yield F.normalize(h.float(), dim=1)
    yield F.normalize(h.float().amax(dim=(2, 3)), dim=1)
