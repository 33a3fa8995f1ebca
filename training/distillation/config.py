"""The settings of a distillation: one frozen dataclass, its JSON, and its command line."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from training.cli.options import check_choice, expanded, format_value, printable

METHODS = ("end_to_end", "sfd", "guidance")
LARGEST_STEPS = 8


def _option(default: Any, text: str, choices: Any = None) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices})


@dataclass(frozen=True)
class DistillConfig:
    """What is called as in `training.train` means the same. Raises ValueError on what makes no sense."""

    teacher: str = _option("", "a bundled checkpoint by its name, such as mnist, or a file")
    steps: int = _option(4, "of the student, each of one network row: 1 to 8")
    guidance_scale: float | None = _option(None, "what the student has inside; default: the teacher's own")
    method: str = _option(
        "end_to_end",
        "end_to_end: only the image counts; sfd: every step of the student lands on the teacher's trajectory; "
        "guidance: one row says what two said, for any sampler",
        METHODS,
    )
    student: str = _option("", "weights to begin with, of a distilled checkpoint; default: the teacher's")
    sampler: str = _option("ddim", "whose formula makes the student's steps", ("ddim", "dpmpp_2m", "dpmpp_3m"))
    timesteps: tuple[int, ...] = _option(
        (), "of the student's steps, among the teacher's; default: chosen on its trajectories"
    )
    teacher_steps: int | None = _option(None, "of a trajectory of the teacher; default: 16, or a student's own")
    trajectories: int = _option(8192, "how many are made and kept; 0: none is kept, each step has new ones")
    features: str = _option("", "classifiers of training.classifier, FILE,FILE, whose layers compare images, too")
    feature_weight: float = _option(1.0, "of the distance in these layers, beside that of pixels")
    anchor: float = _option(
        0.0,
        "of the distance to the teacher at all timesteps, guided or not, for end_to_end: the student then keeps every "
        "sampler and guidance, and its own steps become a fitted table; 0: none",
    )
    real_images: str = _option(
        "",
        "a data set, as for training.train: the student's images shall have the mean, covariance and classes' means of "
        "its train images, equally many of each class, in the layers of --features and in looks, for end_to_end; "
        "default: none",
    )
    real_weight: float = _option(1.0, "of the distance to --real_images, beside that to the teacher")

    batch_size: int = _option(64, "trajectories per iteration")
    iterations: int = _option(4000, "batches in all; sfd updates the weights after each step of the student")
    learning_rate: float = _option(1e-4, "of Adam")
    warmup: int = _option(50, "iterations over which the learning rate rises from 0")
    lr_schedule: str = _option("cosine", "after the warm-up; cosine ends at 0", ("constant", "cosine"))
    grad_clip: float = _option(1.0, "largest norm of the gradient; 0 for no limit")
    ema_decay: float = _option(0.999, "of the weights' moving average, the one that is served")
    precision: str = _option("fp32", "of teacher and student; bf16 is autocast", ("fp32", "bf16"))
    compile: bool = _option(False, "compile the student, whose channels then lie side by side")
    device: str = _option("auto", "auto, cpu, cuda, cuda:1, …")
    seed: int = _option(0, "every random draw of step i follows from this and i")

    log_dir: str = _option("~/ddpm_logs", "where runs go, and the trajectories that they share")
    run_name: str = _option("", "the run's folder; default: distill- and the time")
    log_rate: int = _option(100, "iterations between lines of log.jsonl")
    checkpoint_rate: int = _option(500, "iterations between checkpoints, validation losses and sample grids")
    keep: int = _option(3, "how many of the last checkpoints stay (the best stays too)")

    def __post_init__(self) -> None:
        object.__setattr__(self, "timesteps", tuple(self.timesteps))  # JSON has lists only
        for f in fields(self):
            if f.type == "str" and not isinstance(getattr(self, f.name), str):  # JSON may have anything
                raise TypeError(f"{f.name} is {getattr(self, f.name)!r}")
            if f.metadata["choices"]:
                check_choice(f.name, getattr(self, f.name), f.metadata["choices"])
        if not self.teacher:
            raise ValueError("--teacher is missing: the checkpoint to learn from")
        if not 1 <= self.steps <= LARGEST_STEPS:
            raise ValueError(f"--steps must be from 1 to {LARGEST_STEPS}, not {self.steps}")
        for name in ("batch_size", "iterations", "log_rate", "checkpoint_rate", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}")
        for name in ("warmup", "grad_clip", "trajectories", "feature_weight", "anchor", "real_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name} must not be negative or infinite, as {getattr(self, name)} is")
        if self.guidance_scale is not None and not math.isfinite(self.guidance_scale):
            raise ValueError(f"--guidance_scale must be finite, not {self.guidance_scale}")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"--learning_rate must be between 0 and 1, not {self.learning_rate}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"--ema_decay must be at least 0 and below 1, not {self.ema_decay}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed must be at least 0 and below 2^63, not {self.seed}")
        if self.teacher_steps is not None and self.teacher_steps < self.steps:
            raise ValueError(f"--teacher_steps {self.teacher_steps} are fewer than the student's --steps {self.steps}")
        if self.timesteps and len(self.timesteps) != self.steps:
            raise ValueError(f"--timesteps are {len(self.timesteps)}, where --steps says {self.steps}")
        if self.timesteps and self.method == "guidance":
            raise ValueError("--timesteps are for a student of fixed steps: --method guidance learns all timesteps")
        if self.features and self.method == "guidance":
            raise ValueError("--features compare images: --method guidance makes none")
        if self.anchor and self.method != "end_to_end":
            raise ValueError(f"--anchor is for --method end_to_end, not {self.method}")
        if self.features and not all(path.strip() for path in self.features.split(",")):
            raise ValueError(f"--features {self.features}: a name is missing")
        if self.real_images and self.method != "end_to_end":
            raise ValueError(f"--real_images is for --method end_to_end, not {self.method}")
        if self.real_images and not self.features:
            raise ValueError("--real_images needs --features to compare by")
        if self.real_weight != 1 and not self.real_images:
            raise ValueError(f"--real_weight {self.real_weight:g} is of --real_images: name a data set")
        if not self.run_name:
            object.__setattr__(self, "run_name", datetime.now().strftime("distill-%Y-%m-%d-%H-%M"))
        if Path(self.run_name).name != self.run_name or self.run_name == "..":
            raise ValueError(f"--run_name is the name of a folder, not a path, as {self.run_name!r} is")
        if printable(self.run_name) != self.run_name:
            raise ValueError(f"--run_name {printable(self.run_name)} is not UTF-8: choose another name")

    @property
    def run_dir(self) -> Path:
        """Where the run's files are. Raises ValueError where --log_dir is in a home folder that there is not."""
        return expanded(self.log_dir, "--log_dir") / self.run_name

    def to_json(self) -> str:
        """Every option; `DistillConfig(**json.loads(…))` is the inverse."""
        return json.dumps(asdict(self), indent=2)

    def command(self) -> str:
        """The command line that distils this again; its folder and device left out."""
        words = ["python", "-m", "training.distill"]
        for f in fields(self):
            value = getattr(self, f.name)
            is_needed = f.name in ("teacher", "steps") or value != f.default
            if is_needed and f.name not in ("log_dir", "run_name", "device"):
                words += [f"--{f.name}", *([] if value is True else [format_value(value)])]
        return shlex.join(words)


# What the saved weights, losses and trajectories mean: a resumed run keeps these.
FIXED = (
    "teacher",
    "steps",
    "guidance_scale",
    "method",
    "student",
    "sampler",
    "timesteps",
    "teacher_steps",
    "features",
    "feature_weight",
    "anchor",
    "real_images",
    "real_weight",
    "ema_decay",
    "seed",
)
