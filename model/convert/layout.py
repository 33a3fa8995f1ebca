"""Other projects' weights under our names: what every importer shares.

All of these networks are Ho et al.'s U-Net in other words: the same layers in the same order under other names, with
conventions that `UNetConfig` can express. A `Layout` says which name is which.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from model.diffusion import TRAINED, DiffusionConfig
from model.nn.config import UNetConfig
from model.nn.networks import AnyConfig
from model.nn.unet import UNet

Weights = dict[str, Tensor]

HO: dict[str, Any] = {"norm_groups": 32, "norm_eps": 1e-6, "downsample_padding": 0, "time_freq_shift": 1}
"""The conventions of Ho et al.'s code, which projects after it have for granted."""
NOT_OF_LEVELS = ("num_timesteps", "variance", "trained_betas", "time_scale")  # flags of schedules of betas alone


class UnsupportedCheckpointError(ValueError):
    """The source is not something this can import; the message says what it is, and what to do."""


class Source(Weights):
    """A file's tensors. Asking for one that is not there raises UnsupportedCheckpointError."""

    def __missing__(self, name: str) -> Tensor:
        raise UnsupportedCheckpointError(
            f"tensor {name!r} is missing, or its layer is not where this kind of file has it"
        )

    def take(self, name: str) -> Tensor:
        """A tensor, which is not there any more then."""
        tensor = self[name]
        del self[name]
        return tensor


@dataclass(frozen=True)
class Flags:
    """What some files do not tell. None, False and () are not given."""

    weights: str | None = None  # ema, raw: where the file has both; ema if not given
    image_size: tuple[int, int] | None = None  # 32 × 32 where nothing tells it
    num_timesteps: int | None = None
    schedule: str | None = None
    schedule_low: float | None = None  # of 1000 timesteps, as in training
    schedule_high: float | None = None
    trained_betas: tuple[float, ...] = ()  # instead of a schedule
    prediction: str | None = None
    variance: str | None = None
    num_heads: int | None = None
    head_channels: int | None = None
    num_heads_upsample: int | None = None
    new_attention_order: bool = False
    rescale_timesteps: bool = False
    time_scale: float | None = None
    time_theta: float | None = None  # of lucidrains' files: its sinusoidal_pos_emb_theta
    null_class: bool = False  # the last class means none
    norm: str | None = None  # of the original's files: with in they have tensors of the same names
    norm_groups: int | None = None
    activation: str | None = None  # of the original's files
    initial_pad: int | None = None  # of the original's files
    class_names: tuple[str, ...] = ()

    def given(self) -> dict[str, Any]:
        """The flags that are given."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {k: v for k, v in values.items() if v is not None and v is not False and v != ()}

    def with_schedule(self) -> Flags:
        """The same, with the T and schedule of `trained_betas`. Raises UnsupportedCheckpointError if others say it."""
        if not self.trained_betas:
            return self
        for name in ("num_timesteps", "schedule", "schedule_low", "schedule_high"):
            if getattr(self, name) is not None:
                raise UnsupportedCheckpointError(f"--trained_betas say all of the schedule: leave out --{name}")
        return replace(self, num_timesteps=len(self.trained_betas), schedule=TRAINED)

    def need(self, **defaults: Any) -> None:
        """Raises UnsupportedCheckpointError unless all are given; `defaults` are what their project has for them."""
        if self.schedule not in (None, "linear"):  # the others have no ends
            defaults = {name: value for name, value in defaults.items() if not name.startswith("schedule_")}
        if missing := [
            f"--{name} {format_value(value)}" for name, value in defaults.items() if getattr(self, name) is None
        ]:
            raise UnsupportedCheckpointError(
                f"the file does not tell all that it needs: add {' '.join(missing)}, "
                "or what it was trained with instead (these are its project's defaults)"
            )

    def need_ends(self) -> None:
        """Those of a linear schedule, of projects that do not scale it by 1000 / T. T and schedule are known."""
        if self.schedule == "linear" and self.num_timesteps is not None and self.num_timesteps != 1000:
            scale = self.num_timesteps / 1000
            self.need(schedule_low=1e-4 * scale, schedule_high=0.02 * scale)

    def classes(self, rows: int | None) -> dict[str, Any]:
        """`num_classes` and `null_class` of a network whose table of classes has so many rows; None: no table."""
        if self.null_class and (rows or 0) < 2:
            raise UnsupportedCheckpointError("--null_class needs a network with classes, of which the last means none")
        return {"num_classes": rows - self.null_class if rows else None, "null_class": self.null_class}


@dataclass(frozen=True)
class Imported:
    """A network under our names. `origin` says where its diffusion is from; `assumed` what nothing told.

    `limit` is that of x0 while sampling, as the source has it. `used` has flags that leave no trace in the
    configurations, `sampling` the settings that a request has by default, where they are not the usual ones.
    """

    weights: Weights
    unet: AnyConfig
    diffusion: DiffusionConfig
    origin: str
    assumed: tuple[str, ...] = ()
    limit: str = "clamp"
    used: frozenset[str] = frozenset()
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def check(self, flags: Flags) -> None:
        """Raises UnsupportedCheckpointError for a flag that contradicts what was imported, or means nothing for it."""
        has = {f.name: getattr(part, f.name) for part in (self.unet, self.diffusion) for f in fields(part)}
        is_linear = self.diffusion.schedule == "linear"
        if flags.variance == "learned_range" and not self.unet.learned_variance:
            raise UnsupportedCheckpointError("--variance learned_range: its network does not say its variance")
        for name, value in flags.given().items():
            if name in self.used or name == "class_names":
                continue
            if name in NOT_OF_LEVELS and self.diffusion.sigmas is not None:
                raise UnsupportedCheckpointError(f"--{name} means nothing for levels of noise: leave it out")
            if name == "trained_betas" and value != has[name]:
                raise UnsupportedCheckpointError("--trained_betas contradict the file, which has betas: leave them out")
            if name not in has or (name.startswith("schedule_") and not is_linear):
                raise UnsupportedCheckpointError(f"--{name} means nothing for this file: leave it out")
            same = math.isclose(value, has[name], rel_tol=1e-4) if isinstance(value, float) else value == has[name]
            if not same:
                given, found = format_value(value), format_value(has[name])
                raise UnsupportedCheckpointError(
                    f"--{name} {given} contradicts the file, which has {found}: leave it out"
                )


def format_value(value: Any) -> str:
    """As on a command line."""
    if isinstance(value, tuple):
        return ",".join(map(format_value, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Layout:
    """Where a project keeps what: `names` maps our layers' names to theirs, below the place of a layer."""

    names: Mapping[str, str]
    top: Mapping[str, str]
    place: Callable[[UNet], Iterator[tuple[str, str, str]]]  # ours, theirs, where theirs has the attention
    qkv: Callable[[Source, str, UNetConfig], tuple[Tensor, Tensor]]  # (weight, bias) of the fused convolution


def convert(source: Weights, config: UNetConfig, layout: Layout) -> Weights:
    """`source` under our names.

    Raises UnsupportedCheckpointError where a tensor is missing, left over, or of another shape.
    """
    with torch.device("meta"):
        network = UNet(config)
    expected = {name: tuple(p.shape) for name, p in network.state_dict().items()}
    places = {ours: (theirs, attention) for ours, theirs, attention in layout.place(network)}
    left = Source(source)
    result: Weights = {}

    for name in expected:
        layer, leaf = name.rsplit(".", 1)
        if layer in layout.top:
            result[name] = left.take(f"{layout.top[layer]}.{leaf}")
            continue
        group, index, *rest = layer.split(".")
        theirs, attention = places[f"{group}.{index}"]
        inner = ".".join(rest)
        if inner == "attention.qkv":
            if leaf == "weight":
                result[name], result[f"{layer}.bias"] = layout.qkv(left, attention, config)
        elif inner.startswith("attention."):
            result[name] = left.take(f"{attention}.{layout.names[inner]}.{leaf}")
        else:
            place = ".".join(part for part in (theirs, layout.names.get(inner, inner)) if part)
            result[name] = left.take(f"{place}.{leaf}")
    if left:
        raise UnsupportedCheckpointError(
            f"{len(left)} tensors belong to no layer of such a network, {min(left)!r} among them"
        )
    for name, shape in expected.items():
        result[name] = as_float32(name, result[name], shape)
    return result


def as_float32(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of ours. Raises UnsupportedCheckpointError unless it has this shape, and only finite numbers."""
    if not tensor.is_floating_point():
        raise UnsupportedCheckpointError(
            f"{name} is {str(tensor.dtype).removeprefix('torch.')} in the file, not floating point"
        )
    if _without_ones(tensor.shape) != _without_ones(shape):  # a linear layer may be a 1 × 1 convolution, or back
        raise UnsupportedCheckpointError(f"{name}: {tuple(tensor.shape)} in the file, where the network has {shape}")
    result = tensor.float().reshape(shape)
    if not torch.isfinite(result).all():
        raise UnsupportedCheckpointError(f"tensor {name!r} has numbers that are not finite")
    return result


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without the ones at its end."""
    sizes = list(shape)
    while sizes and sizes[-1] == 1:
        sizes.pop()
    return tuple(sizes)


def checked_groups(config: UNetConfig, flags: Flags) -> UNetConfig:
    """Raises UnsupportedCheckpointError where a GroupNorm cannot have as many groups as it says."""
    if config.norm == "gn" and norm_groups(config) != {config.norm_groups}:
        how = "--norm_groups must be what" if flags.norm_groups else "these are usual, so give --norm_groups as"
        raise UnsupportedCheckpointError(
            f"its channels do not divide into {config.norm_groups} groups: {how} it was trained with"
        )
    return config


def checked_size(config: UNetConfig) -> UNetConfig:
    """Raises UnsupportedCheckpointError where a network that pads nothing could not halve its images."""
    if any(side % config.multiple for side in config.image_size):
        raise UnsupportedCheckpointError(
            f"--image_size {format_value(config.image_size)}: its levels need sides that {config.multiple} divides"
        )
    return checked_groups(config, Flags())


def norm_groups(config: UNetConfig) -> set[int]:
    """The numbers of groups of a network's GroupNorms."""
    with torch.device("meta"):
        network = UNet(config)
    return {module.num_groups for module in network.modules() if isinstance(module, torch.nn.GroupNorm)}


def architecture(levels: list[list[tuple[int, bool]]], base: int) -> dict[str, Any]:
    """Configuration from the residual blocks of each level on the way down, each (channels out, has attention)."""
    blocks = {len(level) for level in levels}
    if len(blocks) != 1 or 0 in blocks or any(channels % base for level in levels for channels, _ in level):
        raise UnsupportedCheckpointError(
            "its levels do not have equal numbers of residual blocks, or whole channel multiples"
        )
    return {
        "base_channels": base,
        "channel_mults": tuple(level[0][0] // base for level in levels),
        "num_res_blocks": blocks.pop(),
        "attention_levels": tuple(i for i, level in enumerate(levels) if level[0][1]),
    }


def layers(network: UNet) -> Iterator[tuple[str, torch.nn.Module]]:
    """The network's blocks in the order of the forward pass, with their names (downs.0, …)."""
    for group in ("downs", "mid", "ups"):
        for i, layer in enumerate(getattr(network, group)):
            yield f"{group}.{i}", layer


def separate_qkv(q: str, k: str, v: str) -> Callable[[Source, str, UNetConfig], tuple[Tensor, Tensor]]:
    """q, k and v as three layers, convolutions or linear."""

    def fused(source: Source, place: str, config: UNetConfig) -> tuple[Tensor, Tensor]:
        weights, biases = ([source.take(f"{place}.{name}.{leaf}") for name in (q, k, v)] for leaf in ("weight", "bias"))
        if len({tensor.shape for tensor in weights}) > 1:
            raise UnsupportedCheckpointError(f"{place}: {q}, {k} and {v} have different shapes")
        return torch.cat(weights), torch.cat(biases)

    return fused


def cosines_first(weight: Tensor) -> Tensor:
    """The first layer over cosines and sines [n, 2·half] as one over sines and cosines, and back."""
    half = weight.shape[1] // 2
    return torch.cat([weight[:, half:], weight[:, :half]], dim=1)


def diffusion_by_flags(flags: Flags, **settings: Any) -> DiffusionConfig:
    """The diffusion that flags tell; `settings` are fields that they leave open."""
    names = ("num_timesteps", "schedule", "schedule_low", "schedule_high", "trained_betas", "prediction", "variance")
    given = {name: value for name, value in flags.given().items() if name in names}
    return DiffusionConfig(**settings | given)
