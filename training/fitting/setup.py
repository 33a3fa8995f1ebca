"""What the fits of one command share: the checkpoint, its teacher's images, the distance between images."""

from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from model.backends.compile import compile_for_inference
from model.checkpoint import SOLVER, Checkpoint
from model.diffusion import Network
from model.nn.networks import config_fields
from model.sampling.fitted import FITTED_TO, weights_digest
from model.sampling.schedule import InvalidSamplingParams, SamplingParams
from training.classifier.network import Classifier
from training.evaluation import feature_extractor
from training.fitting.distance import Distance, feature_distance, pixel_distance
from training.fitting.fit import Pairs
from training.fitting.progress import say
from training.fitting.teacher import classes_of, draw, noise, teacher_images


@dataclass(frozen=True)
class Setup:
    """What all fits of a command share."""

    source: Checkpoint
    teacher: SamplingParams
    train: Pairs
    held_out: Pairs
    distance: Distance
    fast: Network  # without gradients
    network: Network  # with gradients
    args: argparse.Namespace
    key: str


def prepare(source: Checkpoint, device: torch.device, out: Path, args: argparse.Namespace) -> Setup:
    """The teacher's images and the distance. Raises ValueError where settings do not go together."""
    own = source.config.without_tables()
    asked = {name: getattr(args, name) for name in FITTED_TO}
    given = {"steps": args.teacher_steps, **asked}
    try:
        teacher = own.sampling_params(**({"sampler": SOLVER} | given if own.sampling.sampler != SOLVER else given))
        schedule = own.schedule(teacher)
    except InvalidSamplingParams as error:
        raise ValueError(f"--teacher_{error}" if error.field == "steps" else str(error)) from error
    for steps in args.steps:
        if steps >= teacher.steps:
            raise ValueError(f"--steps {steps} is not fewer than the teacher's {teacher.steps}: give --teacher_steps")
    if args.guided is not None and teacher.guidance_scale == 1:
        raise ValueError("--guided says how many rows are guided: it needs a --guidance_scale besides 1")
    distance: Distance = pixel_distance
    features = ""
    if args.features:
        judge = feature_extractor.load(args.features, device)
        if not isinstance(judge.network, Classifier):
            raise ValueError(f"{args.features}: the loss needs a classifier of training.classifier")
        if judge.image_shape != source.config.unet.image_shape:
            raise ValueError(
                f"{args.features} has images of (channels, height, width) {judge.image_shape}, the checkpoint "
                f"{source.config.unet.image_shape}"
            )
        distance, features = feature_distance(judge.network), judge.sha256
    fast = compile_for_inference(source.network, device, args.precision)
    work = out.with_suffix(".fit")
    work.mkdir(exist_ok=True)
    network = weights_digest(source.network.state_dict()), config_fields(source.config.unet)  # whatever tables it has
    key = json.dumps([network, schedule.digest(), args.seed, args.precision])
    count = args.images + args.held_out

    def made(done: int) -> None:
        say(f"teacher's images: {done} of {count}")

    images = teacher_images(
        work / "teacher.safetensors",
        key,
        count,
        lambda indices: draw(source, fast, schedule, args.seed, indices),
        args.batch_size,
        made,
    )
    if not torch.isfinite(images).all():
        raise ValueError("the teacher's images are not finite: give --limit clamp")
    indices = list(range(count))
    classes = classes_of(source, indices)
    y = None if classes is None else torch.tensor(classes)
    pairs = Pairs(noise(source, args.seed, indices).to(device), images.to(device), None if y is None else y.to(device))
    whole = torch.arange(count)
    return Setup(
        source,
        teacher,
        pairs.select(whole[: args.images]),
        pairs.select(whole[args.images :]),
        distance,
        fast,
        differentiable(source.network, device, args.precision),
        args,
        hashlib.sha256(f"{key}{features}".encode()).hexdigest(),
    )


def differentiable(network: torch.nn.Module, device: torch.device, precision: str) -> Network:
    """The frozen network with gradients to x and t, float32 in and out."""

    def forward(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            out: Tensor = network(x.contiguous(memory_format=torch.channels_last), t, y)
        return out.float()

    return forward
