"""The settings of a training run: one frozen dataclass, and its JSON. Its command line is in `command.py`."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from model.backends.cuda import use_tf32
from model.diffusion import LOSSES, PREDICTIONS, SCHEDULES, VARIANCES, WEIGHTINGS, DiffusionConfig, GaussianDiffusion
from model.nn.config import CONDITIONINGS, UNetConfig
from model.nn.ema import NARROWEST, WIDEST
from model.nn.layers import ACTIVATIONS, NORMS
from model.sampling.schedule import SamplingParams, make_schedule
from training.cli.options import check_choice, expanded, format_value, printable
from training.data.options import LABEL_SOURCES, LoadOptions
from training.loop.lognormal import LOGNORMAL
from training.loop.timestep_sampler import TIMESTEP_SAMPLERS

LOSS_AWARE = "loss_second_moment"  # of --timestep_sampler; the others are functions of uniform numbers


def _option(default: Any, text: str, choices: Any = None) -> Any:
    return field(default=default, metadata={"help": text, "choices": list(choices) if choices else None})


def _sampling(name: str, more: str = "", default: Any = None) -> Any:
    """The option of a setting of `SamplingParams`; `more` ends its description, `default` is another than there."""
    setting = next(setting for setting in fields(SamplingParams) if setting.name == name)
    own = setting.default if default is None else default
    return _option(own, setting.metadata["description"] + more, setting.metadata["choices"])


@dataclass(frozen=True)
class TrainConfig:
    """Names and defaults are those of abarankab/DDPM wherever it has them. Raises ValueError on what makes no sense."""

    dataset: str = _option(
        "uoft-cs/cifar10", "a name on the Hugging Face hub, or a folder (parquet, or images per class)"
    )
    image_size: tuple[int, ...] = _option((), "height,width: crop and resize to it; default: as the images are")
    use_labels: bool = _option(False, "condition on the class")
    label_from: str = _option("auto", "where the class stands: auto is a folder or a table's column", LABEL_SOURCES)
    label_column: str = _option("", "the column of a table that tells the class; default: label or class")
    skip_broken: bool = _option(False, "leave out images that cannot be read")
    max_megapixels: int = _option(179, "of one image; larger ones are refused")
    grey_bits: int = _option(0, "of 16-bit greys that are in use, such as 12; 0: as measured")
    label_dropout: float = _option(0.0, "share of images trained without their class, for classifier-free guidance")
    flip: bool = _option(False, "mirror images at random (not for digits)")

    base_channels: int = _option(128, "channels of the first level")
    channel_mults: tuple[int, ...] = _option((1, 2, 2, 2), "channels of each level, as multiples of the first's")
    num_res_blocks: int = _option(2, "residual blocks per level")
    patch_size: int = _option(1, "2: squares of 2 × 2 pixels enter as channels, for a quarter of the work")
    haar: bool = _option(False, "the channels of squares of 2 × 2 are their Haar wavelets, not their pixels")
    attention_resolutions: tuple[int, ...] = _option((1,), "levels with attention, counted from 0, the full size")
    attention_at: tuple[int, ...] = _option(
        (), "the same by the shorter side in pixels, such as 16,8; instead of these"
    )
    num_heads: int = _option(1, "heads of each attention")
    head_channels: int = _option(0, "channels of each head, instead of --num_heads; 0: as that says")
    time_emb_dim: int = _option(512, "width of the time embedding")
    norm: str = _option("gn", "group, batch or instance norm", NORMS)
    norm_groups: int = _option(32, "groups of gn, or the largest divisor of it that divides the channels")
    activation: str = _option("silu", "in all blocks", ACTIVATIONS)
    class_conditioning: str = _option("bias", "the class as a bias per block, with the time, or both", CONDITIONINGS)
    scale_shift_norm: bool = _option(False, "time and class scale and shift the second norm, instead of a bias before")
    resblock_updown: bool = _option(False, "residual blocks change the resolution, not convolutions alone")
    dropout: float = _option(0.1, "dropout in the residual blocks")
    norm_eps: float = _option(1e-5, "of the norms; Ho et al. have 1e-6")
    downsample_padding: int = _option(1, "1: on every side; 0: below and to the right, as Ho et al.")
    time_freq_shift: int = _option(0, "1: the lowest frequency of the time embedding is 1/10000, as Ho et al.'s")
    time_scale: float = _option(1.0, "of t before it is embedded")

    num_timesteps: int = _option(1000, "T")
    schedule: str = _option("linear", "beta schedule", SCHEDULES)
    schedule_low: float = _option(1e-4, "first beta of the linear schedule, at T = 1000")
    schedule_high: float = _option(0.02, "last beta of the linear schedule, at T = 1000")
    zero_terminal_snr: bool = _option(False, "betas that end at pure noise; not with --prediction eps")
    prediction: str = _option("eps", "what the network predicts", PREDICTIONS)
    variance: str = _option("fixed_small", "of a step of ddpm; learned_range adds the variational bound", VARIANCES)
    loss_type: str = _option("l2", "distance", LOSSES)
    weighting: str = _option("none", "of each timestep's loss", WEIGHTINGS)
    timestep_sampler: str = _option(
        "uniform", "how a step draws its timesteps", (*TIMESTEP_SAMPLERS, LOSS_AWARE, LOGNORMAL)
    )
    noise_mean: float = _option(-1.2, "of the logarithm of lognormal's noise levels, as Karras et al. 2022")
    noise_std: float = _option(1.2, "its standard deviation")

    batch_size: int = _option(128, "images per step")
    accumulate: int = _option(1, "parts of a batch that the device sees one by one; divides --batch_size")
    iterations: int = _option(800_000, "steps in all")
    optimizer: str = _option(
        "adam", "muon is for inner kernels, with adamw for the rest, at one learning rate", ("adam", "adamw", "muon")
    )
    learning_rate: float = _option(2e-4, "of the optimizer")
    weight_decay: float = _option(0.0, "of adamw and muon")
    warmup: int = _option(0, "steps over which the learning rate rises from 0")
    lr_schedule: str = _option(
        "constant", "after the warm-up; cosine and wsd end at 0, wsd along a line", ("constant", "cosine", "wsd")
    )
    decay_share: float = _option(0.2, "of the steps, the last ones, over which the learning rate of wsd falls")
    grad_clip: float = _option(0.0, "largest norm of the gradient; 0 for no limit")
    ema_decay: tuple[float, ...] = _option((0.9999,), "of the weights' moving averages; the first is the one served")
    ema_power: tuple[float, ...] = _option(
        (), "widths of further averages, as shares of the run so far, such as 0.05,0.1 (EDM2's sigma_rel)"
    )
    ema_update_rate: int = _option(1, "steps between updates of the averages; their horizon in steps stays")
    precision: str = _option(
        "fp32", "bf16 is autocast; tf32 is fp32 whose products have 10 bits, on a GPU", ("fp32", "tf32", "bf16")
    )
    channels_last: bool = _option(True, "a pixel's channels side by side, on a GPU or with --compile")
    compile: bool = _option(False, "compile the network")
    device: str = _option("auto", "auto, cpu, cuda, cuda:1, …")
    seed: int = _option(0, "every random draw of step i follows from this and i")
    model_checkpoint: str = _option("", "weights to begin with: a checkpoint of ours, or the original's -model.pth")
    optim_checkpoint: str = _option("", "the optimizer's state with them: state-*.pt, or the original's -optim.pth")

    log_dir: str = _option("~/ddpm_logs", "where runs go")
    project_name: str = _option("", "a folder in log_dir for the run's; also W&B's project")
    run_name: str = _option("", "the run's folder; default: ddpm- and the time")
    log_rate: int = _option(1000, "steps between lines of log.jsonl")
    checkpoint_rate: int = _option(1000, "steps between checkpoints, validation losses and sample grids")
    keep: int = _option(3, "how many of the last checkpoints stay (the best stays too)")
    log_to_wandb: bool = _option(False, "also log to Weights & Biases")
    tensorboard: bool = _option(False, "also log to TensorBoard, into the run's folder")

    sampler: str = _sampling("sampler", "of sample grids, and the checkpoint's default when served", "dpmpp_2m")
    sample_steps: int = _sampling("steps", default=20)
    guidance_scale: float = _sampling("guidance_scale", ", others need --label_dropout")
    guidance_interval: tuple[float, ...] = _sampling("guidance_interval")
    spacing: str = _sampling("spacing")
    limit: str = _sampling("limit")

    def __post_init__(self) -> None:
        for f in fields(self):
            if isinstance(f.default, tuple):
                if not isinstance(getattr(self, f.name), (tuple, list)):
                    raise ValueError(f"{f.name} is a list, not {getattr(self, f.name)!r}")
                object.__setattr__(self, f.name, tuple(getattr(self, f.name)))
            if f.metadata["choices"]:
                check_choice(f.name, getattr(self, f.name), f.metadata["choices"])
        self._check_numbers()
        self._check_combinations()
        self.load_options()
        make_schedule(
            GaussianDiffusion(self.diffusion()), **vars(self.sampling())
        )  # these raise for what they do not take
        # Where only the images will tell the size: one that has all of --attention_at, if there is any
        deepest = self.patch_size * 2 ** (len(self.channel_mults) - 1)
        side = min(self.attention_at) * deepest if self.attention_at else 32
        self.unet((3, *(self.image_size or (side, side))), 2)
        if not self.run_name:
            object.__setattr__(self, "run_name", datetime.now().strftime("ddpm-%Y-%m-%d-%H-%M"))

    def _check_numbers(self) -> None:
        counts = ("batch_size", "accumulate", "iterations", "ema_update_rate", "log_rate", "checkpoint_rate", "keep")
        for name in (*counts, "sample_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, not {getattr(self, name)}")
        for name in ("warmup", "grad_clip", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name} must not be negative, as {getattr(self, name)} is")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed must be at least 0 and below 2^63, not {self.seed}")
        if not 0 < self.learning_rate < 1:
            raise ValueError(f"--learning_rate must be between 0 and 1, not {self.learning_rate}")
        if not (abs(self.noise_mean) <= 10 and 0 < self.noise_std <= 10):
            raise ValueError(
                f"--noise_mean is from -10 to 10 and --noise_std above 0, at most 10, not {self.noise_mean} and "
                f"{self.noise_std}"
            )
        if not 0 < self.decay_share <= 1:
            raise ValueError(f"--decay_share must be above 0 and at most 1, not {self.decay_share}")
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"--label_dropout must be at least 0 and below 1, not {self.label_dropout}")
        decays = self.ema_decay
        if not decays or len(set(decays)) < len(decays) or not all(0 <= decay < 1 for decay in decays):
            raise ValueError(
                f"--ema_decay must be at least 0 and below 1, or several such, not {format_value(decays)!r}"
            )
        powers = self.ema_power
        if len(set(powers)) < len(powers) or not all(NARROWEST <= width <= WIDEST for width in powers):
            raise ValueError(
                f"--ema_power is from {NARROWEST} to {WIDEST}, or several such, not {format_value(powers)!r}"
            )
        if self.image_size and (len(self.image_size) != 2 or min(self.image_size) < 1):
            raise ValueError(f"--image_size is height,width, such as 32,48, not {self.image_size}")
        if not self.channel_mults or min((*self.channel_mults, *self.attention_at)) < 1:
            raise ValueError("--channel_mults is one number or more, and they and --attention_at are at least 1")
        if self.batch_size % self.accumulate:
            raise ValueError(f"--accumulate {self.accumulate} must divide --batch_size {self.batch_size}")
        if self.sample_steps > self.num_timesteps:
            raise ValueError(f"--sample_steps must not be more than --num_timesteps ({self.num_timesteps})")
        if len(self.guidance_interval) != 2:
            raise ValueError("--guidance_interval is two numbers, from 0 to 1, lower end first")

    def _check_combinations(self) -> None:
        """No option is accepted and ignored."""
        defaults = {f.name: f.default for f in fields(self)}
        for name, needed, has in (
            ("label_dropout", "--use_labels", self.use_labels),
            ("label_from", "--use_labels", self.use_labels),
            ("label_column", "--use_labels", self.use_labels),
            ("class_conditioning", "--use_labels", self.use_labels),
            ("guidance_scale", "--label_dropout, which teaches the network the null class", self.label_dropout),
            ("guidance_interval", "a --guidance_scale besides 1", self.guidance_scale != 1),
            ("schedule_low", "--schedule linear", self.schedule == "linear"),
            ("schedule_high", "--schedule linear", self.schedule == "linear"),
            ("haar", "--patch_size 2", self.patch_size == 2),
            ("norm_groups", "--norm gn", self.norm == "gn"),
            ("norm_eps", "a --norm", self.norm != "none"),
            ("num_heads", "--head_channels 0", not self.head_channels),
            ("downsample_padding", "--resblock_updown false", not self.resblock_updown),
            ("noise_mean", f"--timestep_sampler {LOGNORMAL}", self.timestep_sampler == LOGNORMAL),
            ("noise_std", f"--timestep_sampler {LOGNORMAL}", self.timestep_sampler == LOGNORMAL),
            ("decay_share", "--lr_schedule wsd", self.lr_schedule == "wsd"),
            ("weight_decay", "--optimizer adamw or muon", self.optimizer != "adam"),
            ("optim_checkpoint", "--model_checkpoint", self.model_checkpoint),
            ("optim_checkpoint", "--optimizer adam or adamw", self.optimizer != "muon"),
        ):
            if getattr(self, name) != defaults[name] and not has:
                raise ValueError(f"--{name} needs {needed}")
        if self.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
            raise ValueError(f"--optimizer muon needs torch 2.9 or newer, and this is {torch.__version__}: take adamw")
        if self.timestep_sampler == LOGNORMAL and self.zero_terminal_snr:
            raise ValueError(
                f"--timestep_sampler {LOGNORMAL} draws no infinite noise level, as --zero_terminal_snr has at the last "
                "timestep, so that it would not be learned: choose another"
            )
        if self.attention_at and self.attention_resolutions not in ((), defaults["attention_resolutions"]):
            raise ValueError("--attention_at and --attention_resolutions say the same in two ways: give one of them")
        if not self.attention_at and not all(0 <= i < len(self.channel_mults) for i in self.attention_resolutions):
            raise ValueError(
                f"--attention_resolutions {format_value(self.attention_resolutions)} counts levels from 0: "
                f"with these --channel_mults they are 0 to {len(self.channel_mults) - 1} (--attention_at takes pixels)"
            )
        for name in ("project_name", "run_name"):  # a plot shows it, and W&B
            if printable(getattr(self, name)) != getattr(self, name):
                raise ValueError(f"--{name} {printable(getattr(self, name))} is not UTF-8: choose another name")
        if Path(self.project_name).name != self.project_name or self.project_name == "..":
            raise ValueError(f"--project_name is the name of a folder, not a path, as {self.project_name!r} is")

    @property
    def run_dir(self) -> Path:
        """Where the run's files are. Raises ValueError where --log_dir is in a home folder that there is not."""
        return expanded(self.log_dir, "--log_dir") / self.project_name / self.run_name

    def load_options(self) -> LoadOptions:
        """How the data set is read."""
        return LoadOptions(**{f.name: getattr(self, f.name) for f in fields(LoadOptions)})

    def torch_device(self) -> torch.device:
        """See `torch_device`."""
        return torch_device(self.device)

    def unet(self, image_shape: tuple[int, int, int], num_classes: int) -> UNetConfig:
        """The network for images of (C, H, W); it is conditional with --use_labels only."""
        return UNetConfig(
            image_channels=image_shape[0],
            image_size=image_shape[1:],
            base_channels=self.base_channels,
            channel_mults=self.channel_mults,
            num_res_blocks=self.num_res_blocks,
            patch_size=self.patch_size,
            haar=self.haar,
            attention_levels=self._attention_levels(min(image_shape[1:])),
            time_emb_dim=self.time_emb_dim,
            num_classes=num_classes if self.use_labels else None,
            null_class=self.label_dropout > 0,
            class_conditioning=self.class_conditioning,
            dropout=self.dropout,
            norm=self.norm,
            activation=self.activation,
            num_heads=self.num_heads,
            head_channels=self.head_channels,
            learned_variance=self.variance == "learned_range",
            scale_shift_norm=self.scale_shift_norm,
            resblock_updown=self.resblock_updown,
            norm_groups=self.norm_groups,
            norm_eps=self.norm_eps,
            downsample_padding=self.downsample_padding,
            time_freq_shift=self.time_freq_shift,
            time_scale=self.time_scale,
        )

    def _attention_levels(self, side: int) -> tuple[int, ...]:
        """The levels with attention, where the images' shorter side is `side`; the network pads it to whole halves."""
        if not self.attention_at:
            return self.attention_resolutions
        levels = range(len(self.channel_mults))
        sides = [-(-side // (self.patch_size * 2 ** levels[-1])) * 2 ** (levels[-1] - i) for i in levels]
        if missing := [str(at) for at in self.attention_at if at not in sides]:
            raise ValueError(
                f"--attention_at {','.join(missing)}: with these images and --channel_mults "
                f"the levels' shorter sides are {format_value(tuple(sides))}"
            )
        return tuple(i for i in levels if sides[i] in self.attention_at)

    def diffusion(self) -> DiffusionConfig:
        """The forward process."""
        names = {setting.name for setting in fields(DiffusionConfig)} & vars(self).keys()  # no trained betas
        return DiffusionConfig(**{name: getattr(self, name) for name in names})

    def sampling(self) -> SamplingParams:
        """How sample grids are made, and the checkpoint's default when served."""
        names = {setting.name for setting in fields(SamplingParams)} & vars(self).keys()  # eta is 0
        return SamplingParams(steps=self.sample_steps, **{name: getattr(self, name) for name in names})

    def to_json(self) -> str:
        """Every option; `TrainConfig(**json.loads(…))` is the inverse."""
        return json.dumps(asdict(self), indent=2)

    def command(self) -> str:
        """The command line that trains this again, whatever resumes lay between; its folder and device left out."""
        words = ["python", "-m", "training.train"]
        for f in fields(self):
            value = getattr(self, f.name)
            if value != f.default and f.name not in ("log_dir", "project_name", "run_name", "device"):
                words.append(f"--{f.name}")
                if value is not True:
                    words.append(format_value(value))
        return shlex.join(words)


GROUPS = {  # headline of --help → the first option below it
    "images": "dataset",
    "network": "base_channels",
    "diffusion": "num_timesteps",
    "optimisation": "batch_size",
    "run": "log_dir",
    "sampling": "sampler",
}

# What the saved weights, losses, averages and best checkpoint mean, and what the optimizer's state brings with it: a
# resumed run keeps these.
FIXED = (
    "image_size",
    "use_labels",
    "label_dropout",
    *(f.name for f in fields(TrainConfig) if f.name in {g.name for g in fields(UNetConfig)} - {"dropout"}),
    "attention_resolutions",
    "attention_at",
    *(f.name for f in fields(DiffusionConfig) if f.name not in ("trained_betas", "sigmas")),
    "timestep_sampler",
    "noise_mean",
    "noise_std",
    "optimizer",
    "weight_decay",
    "ema_decay",
    "ema_power",
    "ema_update_rate",
    "model_checkpoint",
    "optim_checkpoint",
)


def torch_device(name: str) -> torch.device:
    """ "auto" is the GPU where there is one. A GPU has its index, as its tensors' devices have, and fp32 is fp32 on it.

    Raises ValueError on a device that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "cuda":
            use_tf32(False)  # only --precision tf32 allows it: see `training.gpu`
            device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device
