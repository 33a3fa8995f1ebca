"""Weights of ermongroup/ddim, and the network that it shares with pesser/pytorch_diffusion: Ho et al.'s, in PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, takewhile
from typing import Any

from model.convert.layout import (
    HO,
    Flags,
    Imported,
    Layout,
    Source,
    UnsupportedCheckpointError,
    Weights,
    architecture,
    checked_size,
    convert,
    diffusion_by_flags,
    layers,
    separate_qkv,
)
from model.diffusion import DiffusionConfig
from model.nn.config import UNetConfig
from model.nn.layers import ResBlock
from model.nn.unet import UNet


def _place(network: UNet) -> Iterator[tuple[str, str, str]]:
    level = block = 0
    for ours, layer in layers(network):
        group, index = ours.split(".")
        way = group.removesuffix("s")
        if group == "mid":
            yield ours, f"mid.block_{int(index) + 1}", "mid.attn_1"
            block = 0
        elif isinstance(layer, ResBlock):
            yield ours, f"{way}.{level}.block.{block}", f"{way}.{level}.attn.{block}"
            block += 1
        else:
            yield ours, f"{way}.{level}.{way}sample.conv", ""
            level, block = level + (1 if way == "down" else -1), 0


LAYOUT = Layout(
    names={
        "norm_1": "norm1",
        "conv_1": "conv1",
        "time_bias": "temb_proj",
        "norm_2": "norm2",
        "conv_2": "conv2",
        "shortcut": "nin_shortcut",
        "attention.norm": "norm",
        "attention.out": "proj_out",
        "conv": "",  # of an Upsample
    },
    top={
        "time_mlp.0": "temb.dense.0",
        "time_mlp.2": "temb.dense.1",
        "init_conv": "conv_in",
        "out_norm": "norm_out",
        "out_conv": "conv_out",
    },
    place=_place,
    qkv=separate_qkv("q", "k", "v"),
)


def import_ermongroup(state: list[Any], flags: Flags) -> Imported:
    """`ckpt.pth`: [network, optimizer, epoch, step, average], without the average where there was none."""
    has_average = len(state) > 4
    if flags.weights == "ema" and not has_average:
        raise UnsupportedCheckpointError("it has no average of its weights: leave out --weights ema")
    averaged = has_average and flags.weights != "raw"
    which = "averaged" if averaged else "raw"
    return Imported(
        *network_by_flags(state[4] if averaged else state[0], flags),
        f"by flags, since such a file has none; {which} weights",
        used=frozenset({"weights"}),
    )


def network_by_flags(state: Weights, flags: Flags) -> tuple[Weights, UNetConfig, DiffusionConfig]:
    """Such a network, and the diffusion that the flags tell. It always predicts eps."""
    flags.need(image_size=(32, 32), num_timesteps=1000, schedule="linear", variance="fixed_large")
    flags.need_ends()
    if flags.prediction not in (None, "eps"):
        raise UnsupportedCheckpointError(f"--prediction {flags.prediction}: such a network always predicts eps")
    source = Source(state)
    levels = list(takewhile(len, (_level(source, level) for level in count())))
    if len(levels) > 1 and "down.0.downsample.conv.weight" not in source:
        raise UnsupportedCheckpointError(
            "its levels are halved by pooling (resamp_with_conv false), which cannot be expressed here"
        )
    config = UNetConfig(
        image_channels=source["conv_in.weight"].shape[1],
        image_size=flags.image_size or (32, 32),
        time_emb_dim=len(source["temb.dense.0.weight"]),
        **flags.classes(None),
        **architecture(levels, len(source["conv_in.weight"])),
        **HO,
    )
    return convert(source, checked_size(config), LAYOUT), config, diffusion_by_flags(flags)


def _level(source: Source, level: int) -> list[tuple[int, bool]]:
    """Its residual blocks: channels, and whether attention follows."""
    blocks = takewhile(lambda block: f"down.{level}.block.{block}.conv1.weight" in source, count())
    return [
        (len(source[f"down.{level}.block.{block}.conv1.weight"]), f"down.{level}.attn.{block}.q.weight" in source)
        for block in blocks
    ]
