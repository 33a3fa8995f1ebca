"""python -m training.distill: a teacher → a student of few steps, each of one network row, with its guidance inside."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from model import checkpoint
from model.checkpoint import Checkpoint
from model.nn.networks import AnyUNet, build
from model.sampling.schedule import SamplingParams
from training import data
from training.classifier.network import Classifier
from training.cli.options import Parser, boolean, choice_option, expanded, format_value, integers
from training.console import exit_code, lasting_output
from training.distillation.config import FIXED, DistillConfig
from training.distillation.matching import FeatureMatching
from training.distillation.trainer import DistillTrainer
from training.evaluation import feature_extractor
from training.memory import memory_for
from training.run.config import torch_device
from training.run.run_dir import RunDir

TEACHER_STEPS = 16  # where nobody says how many
DETERMINISTIC = ("ddim", "dpmpp_2m", "dpmpp_3m")


def distill(config: DistillConfig, resume: bool = False) -> Path:
    """Runs to `config.iterations`, or until a signal, and leaves a checkpoint. Returns the run's folder.

    Raises ValueError or OSError with a sentence, before anything is written, where teacher and options do not go
    together.
    """
    device = torch_device(config.device)
    teacher = checkpoint.load(config.teacher, device)
    if teacher.config.diffusion.sigmas is not None:
        raise ValueError(f"--teacher {config.teacher} has EDM's levels of noise, which no student can be taught here")
    params = teacher_params(config, teacher)
    student = begin_with("" if resume else config.student, teacher)
    judges = tuple(load_judge(path, teacher, device) for path in config.features.split(",") if path)
    matching = load_real_images(config, teacher, judges, device)
    with RunDir(config, resume) as run:
        saved = run.load_state() if resume else None
        done = saved["iteration"] if saved else 0
        if done > config.iterations:
            raise ValueError(f"--iterations {config.iterations}: {config.run_dir} has done {done} already; give more")
        if done == config.iterations:
            print(f"Nothing to do: {run.path} has done its {done} iterations; give more --iterations to go on")
            return config.run_dir
        with memory_for("the student", "give a smaller --batch_size"):
            trainer = DistillTrainer(config, teacher, student, params, judges, matching, device, run, saved)
        trainer.fit()
    return config.run_dir


def teacher_params(config: DistillConfig, teacher: Checkpoint) -> SamplingParams:
    """How the teacher makes its trajectories: its own way, without noise, with the student's guidance.

    Raises ValueError where that cannot be.
    """
    params = own_params(config, teacher)
    there = teacher.config.schedule(params).timesteps.tolist()
    if len(there) < config.steps:
        raise ValueError(f"--steps {config.steps}: the teacher has no more than {len(there)}")
    if unknown := [t for t in config.timesteps if t not in there]:
        raise ValueError(f"--timesteps {unknown[0]} is none of the teacher's: {', '.join(f'{t:g}' for t in there)}")
    if config.timesteps and list(config.timesteps) != sorted({there[0], *config.timesteps}, reverse=True):
        raise ValueError(
            f"--timesteps {format_value(config.timesteps)} must fall, and begin with the teacher's first, {there[0]:g}"
        )
    return params


def own_params(config: DistillConfig, teacher: Checkpoint) -> SamplingParams:
    """The teacher's settings; those of a student, which may teach, too, are inside it."""
    own, unet, inside = teacher.config.sampling, teacher.config.unet, teacher.config.distilled
    scale = own.guidance_scale if config.guidance_scale is None else config.guidance_scale
    if inside and config.method == "guidance":
        raise ValueError("--method guidance: the teacher is distilled, and has its guidance inside already")
    if inside and scale != inside.guidance_scale:
        raise ValueError(
            f"--guidance_scale {scale:g}: the teacher is distilled, and has {inside.guidance_scale:g} inside"
        )
    if scale != 1 and not unet.null_class:
        raise ValueError(
            f"--guidance_scale {scale:g}: the teacher has no null class to guide away from, so it must be 1"
        )
    if inside and inside.has_fixed_steps:
        if config.teacher_steps not in (None, own.steps):
            raise ValueError(f"--teacher_steps {config.teacher_steps}: the teacher is distilled to {own.steps}")
        return own
    steps, total = config.teacher_steps or TEACHER_STEPS, teacher.config.diffusion.num_timesteps
    if max(config.steps, config.teacher_steps or 1) > total:
        raise ValueError(
            f"--teacher_steps {steps}, --steps {config.steps}: the teacher has no more than {total} timesteps"
        )
    sampler = own.sampler if own.sampler in DETERMINISTIC else "dpmpp_2m"
    interval = own.guidance_interval if scale != 1 else (0.0, 1.0)
    return SamplingParams(sampler, min(steps, total), 0.0, scale, interval, own.spacing, own.limit)


def begin_with(student: str, teacher: Checkpoint) -> AnyUNet:
    """A network of its own with the weights that the student begins with: the teacher's where none are named."""
    source = checkpoint.load(student) if student else teacher
    if source.config.unet != teacher.config.unet:
        raise ValueError(f"--student {student} is another network than the teacher's")
    network = build(teacher.config.unet)
    network.load_state_dict(source.network.state_dict())
    return network


def load_judge(path: str, teacher: Checkpoint, device: torch.device) -> Classifier:
    """A classifier of --features, frozen. Raises ValueError where it takes other images."""
    found = feature_extractor.load(path, device)
    if not isinstance(found.network, Classifier):
        raise ValueError(f"--features {path}: only classifiers of training.classifier have their layers read")
    if found.image_shape != teacher.config.unet.image_shape:
        raise ValueError(
            f"--features {path} takes images of (channels, height, width) {found.image_shape}, "
            f"the teacher makes {teacher.config.unet.image_shape}"
        )
    return found.network


def load_real_images(
    config: DistillConfig, teacher: Checkpoint, judges: tuple[Classifier, ...], device: torch.device
) -> FeatureMatching | None:
    """What compares with the --real_images. Raises ValueError where they are others than the teacher's."""
    if not config.real_images:
        return None
    unet, source = teacher.config.unet, f"--real_images {config.real_images}"
    images, _ = data.load(
        config.real_images,
        unet.image_size,
        use_labels=unet.num_classes is not None,
        cache=expanded(config.log_dir, "--log_dir"),
    )
    if tuple(images.images.shape[1:]) != unet.image_shape:
        raise ValueError(
            f"{source} are of (channels, height, width) {tuple(images.images.shape[1:])}, "
            f"the teacher makes {unet.image_shape}"
        )
    if unet.num_classes is not None:
        images = images.ordered_as(teacher.config.class_names)
        if images.class_names != teacher.config.class_names:
            here, there = ", ".join(images.class_names), ", ".join(teacher.config.class_names)
            raise ValueError(f"{source}: its classes are {here}, the teacher's {there}")
    try:
        with memory_for("the features of real images", "give smaller --features"):
            matching = FeatureMatching(judges, images, unet.num_classes, device)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    equally = "" if unet.num_classes is None else ", equally many of each class"
    print(f"{source}: {matching.count} of {len(images)} train images are compared{equally}", file=sys.stderr)
    if matching.count <= matching.features:
        print(f"{source}: so few, beside {matching.features} features of a layer, teach little", file=sys.stderr)
    return matching


def parse(argv: list[str] | None) -> tuple[DistillConfig, bool]:
    """The configuration of this run, and whether it goes on from one that exists."""
    parser = Parser(
        prog="python -m training.distill",
        usage="%(prog)s --teacher CHECKPOINT --steps N [options]\n       %(prog)s --resume DIR [options]",
        description="Train a student of 1 to 8 steps, one network row each, from its teacher alone.",
    )
    parser.add_argument("--resume", metavar="DIR", help="go on with the run in this folder; options replace its own")
    for f in fields(DistillConfig):
        text = f.metadata["help"].replace("%", "%%")
        text += f" (default: {format_value(f.default)})" if f.default not in ("", (), None) else ""
        kinds: dict[str, Any] = {
            "int": int,
            "int | None": int,
            "str": str,
            "bool": boolean,
            "tuple[int, ...]": integers,
        }
        metavars: dict[Any, str] = {int: "N", str: "TEXT", boolean: "yes|no", integers: "N,N,.."}
        kind = kinds.get(str(f.type), float)
        settings: dict[str, Any] = {"type": kind, "metavar": metavars.get(kind, "X")}
        settings |= {"nargs": "?", "const": True} if kind is boolean else {}
        settings |= choice_option(f.metadata["choices"]) if f.metadata["choices"] else {}
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=text, **settings)
    given = vars(parser.read(argv))
    resume = given.pop("resume")
    try:
        return (resumed(resume, given), True) if resume else (DistillConfig(**given), False)
    except ValueError as error:
        parser.error(str(error))


def resumed(resume: str, given: dict[str, Any]) -> DistillConfig:
    """The configuration of the run in folder `resume`, with the options `given` in place of its own."""
    folder = expanded(resume).resolve()
    if given.keys() & {"log_dir", "run_name"}:
        raise ValueError("--resume names the run's folder, so --log_dir and --run_name cannot be given with it")
    try:
        saved = DistillConfig(**json.loads((folder / "config.json").read_text("utf-8")))
    except OSError as error:
        raise ValueError(f"--resume {resume}: no run there ({error.strerror}: config.json)") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"--resume {resume}: its config.json is not that of a distillation: {error}") from error
    config = replace(saved, **given, log_dir=str(folder.parent), run_name=folder.name)
    for name in FIXED:
        if getattr(config, name) != getattr(saved, name):
            raise ValueError(f"--{name} cannot change on --resume: the run has {getattr(saved, name)}")
    return config


def main(argv: list[str] | None = None) -> int:
    with lasting_output():
        arguments = parse(argv)
        return exit_code("training.distill", lambda: distill(*arguments))


if __name__ == "__main__":
    sys.exit(main())
