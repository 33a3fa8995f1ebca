"""Other projects' weights under our names: what every importer shares.

All of these networks are Ho et al.'s U-Net in other words: the same layers in the same order under other names, with
conventions that `UNetConfig` can express. A `Layout` says which name is which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.diffusion import DiffusionConfig, Table
from model.nn.unet import UNet, UNetConfig

Weights = dict[str, Tensor]
Imported = tuple[Weights, UNetConfig, DiffusionConfig]


class ImportRefused(ValueError):
    """The source is not something this can import; the message says what it is, and what to do."""


@dataclass(frozen=True)
class Flags:
    """What some files cannot tell."""

    weights: str = "ema"  # ema, raw: where the file has both
    image_size: tuple[int, int] = (32, 32)
    num_timesteps: int = 1000
    schedule: str = "linear"
    num_heads: int = 1
    head_channels: int = 0
    new_attention_order: bool = False
    rescale_timesteps: bool = False
    null_class: bool = False  # the last class means none
    norm: str = "gn"  # of the original's files: with in they have tensors of the same names
    activation: str = "silu"  # of the original's files
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layout:
    """Where a project keeps what: `names` maps our layers' names to theirs, below the place of a layer."""

    names: Mapping[str, str]
    top: Mapping[str, str]
    place: Callable[[UNet], Iterator[tuple[str, str, str]]]  # ours, theirs, where theirs has the attention
    qkv: Callable[[Weights, str, UNetConfig], tuple[Tensor, Tensor]]  # (weight, bias) of the fused convolution


def convert(source: Weights, config: UNetConfig, layout: Layout) -> Weights:
    """`source` under our names. Raises ImportRefused where a tensor is missing, left over, or of another shape."""
    with torch.device("meta"):
        network = UNet(config)
    expected = {name: tuple(p.shape) for name, p in network.state_dict().items()}
    places = {ours: (theirs, attention) for ours, theirs, attention in layout.place(network)}
    left = dict(source)
    result: Weights = {}

    def take(name: str) -> Tensor:
        if name not in left:
            raise ImportRefused(f"tensor {name!r} is missing, or its layer is not where this kind of file has it")
        return left.pop(name)

    for name in expected:
        layer, leaf = name.rsplit(".", 1)
        if layer in layout.top:
            result[name] = take(f"{layout.top[layer]}.{leaf}")
            continue
        group, index, *rest = layer.split(".")
        theirs, attention = places[f"{group}.{index}"]
        inner = ".".join(rest)
        if inner == "attention.qkv":
            if leaf == "weight":
                result[name], result[f"{layer}.bias"] = layout.qkv(left, attention, config)
        elif inner.startswith("attention."):
            result[name] = take(f"{attention}.{layout.names[inner]}.{leaf}")
        else:
            place = ".".join(part for part in (theirs, layout.names.get(inner, inner)) if part)
            result[name] = take(f"{place}.{leaf}")
    if left:
        raise ImportRefused(f"{len(left)} tensors belong to no layer of such a network, {min(left)!r} among them")
    for name, shape in expected.items():
        if result[name].numel() != int(np.prod(shape)):
            raise ImportRefused(f"{name}: {tuple(result[name].shape)} in the file, where the network has {shape}")
        result[name] = result[name].float().reshape(shape)
    return result


def architecture(levels: list[list[tuple[int, bool]]], base: int) -> dict[str, Any]:
    """Configuration from the residual blocks of each level on the way down, each (channels out, has attention)."""
    blocks = {len(level) for level in levels}
    if len(blocks) != 1 or any(channels % base for level in levels for channels, _ in level):
        raise ImportRefused("its levels do not have equal numbers of residual blocks, or whole channel multiples")
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


def separate_qkv(q: str, k: str, v: str) -> Callable[[Weights, str, UNetConfig], tuple[Tensor, Tensor]]:
    """q, k and v as three layers, convolutions or linear."""

    def fused(source: Weights, place: str, config: UNetConfig) -> tuple[Tensor, Tensor]:
        try:
            weights, biases = (
                [source.pop(f"{place}.{name}.{leaf}") for name in (q, k, v)] for leaf in ("weight", "bias")
            )
        except KeyError as error:
            raise ImportRefused(f"tensor {error} is missing") from error
        return torch.cat(weights), torch.cat(biases)

    return fused


def diffusion_of(betas: Table, **settings: Any) -> DiffusionConfig:
    """The diffusion whose beta schedule these betas [T] are, float32 or better; `settings` are its other fields."""
    steps = len(betas)
    scale = 1000 / steps
    candidates = [
        DiffusionConfig(steps, "cosine", **settings),
        DiffusionConfig(steps, "linear", **settings),
        DiffusionConfig(
            steps, "linear", float(f"{betas[0] / scale:.6g}"), float(f"{betas[-1] / scale:.6g}"), **settings
        ),
    ]
    for candidate in candidates:
        if np.allclose(candidate.betas(), betas, rtol=1e-5, atol=1e-9):
            return candidate
    raise ImportRefused("its betas are neither a linear nor the cosine schedule")
