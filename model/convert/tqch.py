"""Weights of tqch/ddpm-torch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, takewhile
from typing import Any

import torch

from model.convert.layout import (
    HO,
    Flags,
    Imported,
    Layout,
    Source,
    UnsupportedCheckpointError,
    architecture,
    checked_size,
    convert,
    diffusion_by_flags,
    layers,
)
from model.nn.config import UNetConfig
from model.nn.layers import ResBlock
from model.nn.unet import UNet


def _place(network: UNet) -> Iterator[tuple[str, str, str]]:
    level = block = 0
    for ours, layer in layers(network):
        group, index = ours.split(".")
        place = f"{group.removesuffix('s')}samples.level_{level}.{block}"
        block += 1
        if group == "mid":
            yield ours, f"middle.{2 * int(index)}", "middle.1"
            block = 0
        elif not isinstance(layer, ResBlock):  # after the padding, or the repetition of pixels
            yield ours, f"{place}.1", ""
            level, block = level + (1 if group == "downs" else -1), 0
        elif isinstance(layer.attention, torch.nn.Identity):
            yield ours, place, ""
        else:
            yield ours, f"{place}.0", f"{place}.1"


LAYOUT = Layout(
    names={
        "norm_1": "norm1",
        "conv_1": "conv1",
        "time_bias": "fc",
        "norm_2": "norm2",
        "conv_2": "conv2",
        "shortcut": "skip",
        "attention.norm": "norm",
        "attention.out": "project_out",
        "conv": "",  # of an Upsample
    },
    top={
        "time_mlp.0": "embed.0",
        "time_mlp.2": "embed.2",
        "init_conv": "in_conv",
        "out_norm": "out_conv.0",
        "out_conv": "out_conv.2",
    },
    place=_place,
    qkv=lambda source, place, config: (
        source.take(f"{place}.project_in.weight"),
        source.take(f"{place}.project_in.bias"),
    ),
)


def import_tqch(state: dict[str, Any], flags: Flags) -> Imported:
    """`NAME_EPOCH.pt`: {model, optimizer, …} with an average in ema.shadow, or a network's tensors alone."""
    is_whole, average = "model" in state, state.get("ema")
    if flags.weights is not None and (not is_whole or (average is None and flags.weights == "ema")):
        raise UnsupportedCheckpointError("it has one set of weights alone: leave out --weights")
    if is_whole:
        averaged = average is not None and flags.weights != "raw"
        state, which = (average["shadow"], "averaged") if averaged and average else (state["model"], "raw")
    else:
        which = "its only"
    flags.need(image_size=(32, 32), num_timesteps=1000, schedule="linear", prediction="eps", variance="fixed_large")
    flags.need_ends()
    source = Source(state)
    levels = list(takewhile(len, (_level(source, level) for level in count())))
    if len(levels) > 1 and f"downsamples.level_0.{len(levels[0])}.1.weight" not in source:
        raise UnsupportedCheckpointError(
            "its levels are halved by pooling (resample_with_conv false), which cannot be expressed here"
        )
    channels, made = source["in_conv.weight"].shape[1], len(source["out_conv.2.weight"])
    if made == 2 * channels:
        raise UnsupportedCheckpointError(
            "it has a learned log variance (model_var_type learned), which cannot be expressed here"
        )
    config = UNetConfig(
        image_channels=channels,
        image_size=flags.image_size or (32, 32),
        time_emb_dim=len(source["embed.0.weight"]),
        **flags.classes(None),
        **architecture(levels, len(source["in_conv.weight"])),
        **HO,
    )
    return Imported(
        convert(source, checked_size(config), LAYOUT),
        config,
        diffusion_by_flags(flags),
        f"by flags, since such a file has none; {which} weights",
        used=frozenset({"weights"}),
    )


def _level(source: Source, level: int) -> list[tuple[int, bool]]:
    """Its residual blocks: channels, and whether attention follows, in a sequence with the block then."""
    place, blocks = f"downsamples.level_{level}", []
    for block in count():
        if (inner := f"{place}.{block}.0.conv1.weight") in source:
            blocks.append((len(source[inner]), True))
        elif (plain := f"{place}.{block}.conv1.weight") in source:
            blocks.append((len(source[plain]), False))
        else:
            break
    return blocks
