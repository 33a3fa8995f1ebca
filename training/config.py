"""The settings of a training run: one frozen dataclass, its command line, its JSON."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from model.diffusion import LOSSES, PREDICTIONS, SCHEDULES, DiffusionConfig
from model.samplers import SAMPLERS
from model.unet import UNetConfig


def _option(default: Any, text: str, choices: Any = None) -> Any:
    return field(default=default, metadata={"help": text, "choices": list(choices) if choices else None})


@dataclass(frozen=True)
class TrainConfig:
    """Names and defaults are those of abarankab/DDPM wherever it has them. Raises ValueError on what makes no sense."""

    dataset: str = _option("uoft-cs/cifar10", "a name on the Hugging Face hub, or a folder (parquet, or images per class)")
    image_size: tuple[int, ...] = _option((), "height,width: crop and resize to it; default: as the images are")
    use_labels: bool = _option(False, "condition on the class")
    label_dropout: float = _option(0.0, "share of images trained without their class, for classifier-free guidance")
    flip: bool = _option(False, "mirror images at random (not for digits)")

    base_channels: int = _option(128, "channels of the first level")
    channel_mults: tuple[int, ...] = _option((1, 2, 2, 2), "channels of each level, as multiples of the first's")
    num_res_blocks: int = _option(2, "residual blocks per level")
    attention_resolutions: tuple[int, ...] = _option((1,), "levels with attention, counted from 0, the full size")
    time_emb_dim: int = _option(512, "width of the time embedding")
    dropout: float = _option(0.1, "dropout in the residual blocks")

    num_timesteps: int = _option(1000, "T")
    schedule: str = _option("linear", "beta schedule", SCHEDULES)
    schedule_low: float = _option(1e-4, "first beta of the linear schedule, at T = 1000")
    schedule_high: float = _option(0.02, "last beta of the linear schedule, at T = 1000")
    prediction: str = _option("eps", "what the network predicts", PREDICTIONS)
    loss_type: str = _option("l2", "distance", LOSSES)

    batch_size: int = _option(128, "images per step")
    iterations: int = _option(800_000, "steps in all")
    learning_rate: float = _option(2e-4, "of Adam")
    warmup: int = _option(0, "steps over which the learning rate rises from 0")
    lr_schedule: str = _option("constant", "after the warm-up; cosine ends at 0", ("constant", "cosine"))
    grad_clip: float = _option(0.0, "largest norm of the gradient; 0 for no limit")
    ema_decay: float = _option(0.9999, "of the weights' moving average")
    precision: str = _option("fp32", "bf16 is autocast", ("fp32", "bf16"))
    device: str = _option("auto", "auto, cpu, cuda, cuda:1, …")
    seed: int = _option(0, "every random draw of step i follows from this and i")

    log_dir: str = _option("~/ddpm_logs", "where runs go")
    run_name: str = _option("", "the run's folder in log_dir; default: ddpm- and the time")
    log_rate: int = _option(1000, "steps between lines of log.jsonl")
    checkpoint_rate: int = _option(1000, "steps between checkpoints, validation losses and sample grids")
    keep: int = _option(3, "how many of the last checkpoints stay (the best stays too)")

    sampler: str = _option("dpmpp_2m", "of sample grids, and the checkpoint's default when served", SAMPLERS)
    sample_steps: int = _option(20, "its steps")
    guidance_scale: float = _option(1.0, "its guidance towards the class; 1 is none, others need --label_dropout")

    def __post_init__(self) -> None:
        for name in ("image_size", "channel_mults", "attention_resolutions"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for f in fields(self):
            choices = f.metadata["choices"]
            if choices and getattr(self, f.name) not in choices:
                raise ValueError(f"--{f.name} must be one of {', '.join(choices)}, not {getattr(self, f.name)!r}")
        for name in ("batch_size", "iterations", "log_rate", "checkpoint_rate", "keep", "sample_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}")
        for name in ("warmup", "grad_clip"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name} must not be negative, as {getattr(self, name)} is")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed must be at least 0 and below 2^63, not {self.seed}")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"--learning_rate must be between 0 and 1, not {self.learning_rate}")
        for name in ("label_dropout", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 0 and below 1, not {getattr(self, name)}")
        if self.image_size and (len(self.image_size) != 2 or min(self.image_size) < 1):
            raise ValueError(f"--image_size is height,width, such as 32,48, not {self.image_size}")
        if not all(0 <= level < len(self.channel_mults) for level in self.attention_resolutions):
            raise ValueError(
                f"--attention_resolutions {self.attention_resolutions} counts levels, 0 for the full size: "
                f"with these --channel_mults they are 0 to {len(self.channel_mults) - 1}"
            )
        if self.label_dropout and not self.use_labels:
            raise ValueError("--label_dropout needs --use_labels")
        if self.guidance_scale != 1 and not self.label_dropout:
            raise ValueError("--guidance_scale needs --label_dropout, which teaches the network the null class")
        if self.sample_steps > self.num_timesteps:
            raise ValueError(f"--sample_steps must not be more than --num_timesteps ({self.num_timesteps})")
        self.diffusion()  # these two raise for what they do not take
        self.unet((3, *(self.image_size or (32, 32))), 2)
        if not self.run_name:
            object.__setattr__(self, "run_name", datetime.now().strftime("ddpm-%Y-%m-%d-%H-%M"))

    @property
    def run_dir(self) -> Path:
        return Path(self.log_dir).expanduser() / self.run_name

    def torch_device(self) -> torch.device:
        return torch_device(self.device)

    def unet(self, image_shape: tuple[int, int, int], num_classes: int) -> UNetConfig:
        """The network for images of (C, H, W); it is conditional with --use_labels only."""
        return UNetConfig(
            image_channels=image_shape[0],
            image_size=image_shape[1:],
            base_channels=self.base_channels,
            channel_mults=self.channel_mults,
            num_res_blocks=self.num_res_blocks,
            attention_levels=self.attention_resolutions,
            time_emb_dim=self.time_emb_dim,
            num_classes=num_classes if self.use_labels else None,
            null_class=self.label_dropout > 0,
            dropout=self.dropout,
        )

    def diffusion(self) -> DiffusionConfig:
        """The forward process."""
        return DiffusionConfig(
            num_timesteps=self.num_timesteps,
            schedule=self.schedule,
            schedule_low=self.schedule_low,
            schedule_high=self.schedule_high,
            prediction=self.prediction,
            loss_type=self.loss_type,
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def command(self) -> str:
        """The command line that trains this again, whatever resumes lay between; its folder and device left out."""
        words = ["python", "-m", "training.train"]
        for f in fields(self):
            value = getattr(self, f.name)
            if value != f.default and f.name not in ("log_dir", "run_name", "device"):
                words.append(f"--{f.name}")
                if value is not True:
                    words.append(",".join(map(str, value)) if isinstance(value, tuple) else str(value))
        return shlex.join(words)


GROUPS = {  # headline of --help → the first option below it
    "images": "dataset",
    "network": "base_channels",
    "diffusion": "num_timesteps",
    "optimisation": "batch_size",
    "run": "log_dir",
    "sampling": "sampler",
}

# What the saved weights, losses and best checkpoint mean: a resumed run keeps these.
FIXED = (
    "image_size",
    "use_labels",
    "label_dropout",
    "base_channels",
    "channel_mults",
    "num_res_blocks",
    "attention_resolutions",
    "time_emb_dim",
    "num_timesteps",
    "schedule",
    "schedule_low",
    "schedule_high",
    "prediction",
    "loss_type",
)


def torch_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one. Raises ValueError on a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def boolean(text: str) -> bool:
    """yes/true/t/y/1 and no/false/f/n/0, as in the original's command line."""
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, not {text!r}")


def integers(text: str) -> tuple[int, ...]:
    """ "1,2,2", "(1, 2, 2)", "(1,)"; "()" is none at all."""
    inner = text.strip("()[], ")
    try:
        return tuple(int(word) for word in inner.split(",")) if inner else ()
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected whole numbers such as 1,2,2, not {text!r}") from error


def add_options(parser: argparse.ArgumentParser) -> None:
    """One option per field. What is not given stays out of the namespace, so that a resumed run keeps its own."""
    types = {bool: boolean, tuple: integers, int: int, float: float, str: str}
    metavars = {bool: "yes|no", tuple: "N,N,..", int: "N", float: "X", str: "TEXT"}
    headlines = {first: headline for headline, first in GROUPS.items()}
    group = parser.add_argument_group("options")
    for f in fields(TrainConfig):
        if f.name in headlines:
            group = parser.add_argument_group(headlines[f.name])
        kind: dict[str, Any] = {"type": types[type(f.default)], "choices": f.metadata["choices"]}
        if not f.metadata["choices"]:
            kind["metavar"] = metavars[type(f.default)]
        if isinstance(f.default, bool):
            kind |= {"nargs": "?", "const": True}
        text = f.metadata["help"].replace("%", "%%")
        if f.default not in ("", ()):
            text += f" (default: {','.join(map(str, f.default)) if isinstance(f.default, tuple) else f.default})"
        group.add_argument(f"--{f.name}", default=argparse.SUPPRESS, help=text, **kind)


def parse(argv: list[str] | None = None) -> tuple[TrainConfig, bool]:
    """The configuration of this run, and whether it goes on from a run that exists."""
    parser = argparse.ArgumentParser(
        prog="python -m training.train",
        usage="%(prog)s --dataset NAME_OR_FOLDER [options]\n       %(prog)s --resume DIR [options]",
        description="Train a diffusion model on images.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
        allow_abbrev=False,
    )
    parser.add_argument("--resume", metavar="DIR", help="go on with the run in this folder; options replace its own")
    add_options(parser)
    given = vars(parser.parse_args(argv))
    resume = given.pop("resume")
    try:
        return (_resumed(resume, given), True) if resume else (TrainConfig(**given), False)
    except ValueError as error:
        parser.error(str(error))


def _resumed(resume: str, given: dict[str, Any]) -> TrainConfig:
    """The configuration of the run in folder `resume`, with the options `given` in place of its own."""
    folder = Path(resume).expanduser().resolve()
    if "log_dir" in given or "run_name" in given:
        raise ValueError("--resume names the run's folder, so --log_dir and --run_name cannot be given with it")
    try:
        saved = TrainConfig(**json.loads((folder / "config.json").read_text()))
    except OSError as error:
        raise ValueError(f"--resume {resume}: no run there ({error.strerror}: config.json)") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"--resume {resume}: its config.json cannot be used: {error}") from error
    config = replace(saved, **given, log_dir=str(folder.parent), run_name=folder.name)
    for name in FIXED:
        if getattr(config, name) != getattr(saved, name):
            raise ValueError(f"--{name} cannot change on --resume: the run has {getattr(saved, name)}")
    return config
