"""Weights of abarankab/DDPM ("the original") and of w86763777/pytorch-ddpm."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from model.convert.betas import diffusion_of
from model.convert.layout import (
    Flags,
    Imported,
    Layout,
    Source,
    UnsupportedCheckpointError,
    Weights,
    architecture,
    checked_groups,
    convert,
    diffusion_by_flags,
    format_value,
    layers,
    separate_qkv,
)
from model.nn.config import UNetConfig
from model.nn.layers import ResBlock, time_embedding
from model.nn.unet import UNet

# abarankab/DDPM, "the original"


def _abarankab_place(network: UNet) -> Iterator[tuple[str, str, str]]:
    for ours, layer in layers(network):
        suffix = ""
        if not isinstance(layer, ResBlock):
            suffix = ".downsample" if ours.startswith("downs") else ".upsample.1"
        yield ours, ours + suffix, ours


def _abarankab_qkv(source: Source, place: str, config: UNetConfig) -> tuple[Tensor, Tensor]:
    return source.take(f"{place}.attention.to_qkv.weight"), source.take(f"{place}.attention.to_qkv.bias")


ABARANKAB = Layout(
    names={
        "conv_2": "conv_2.1",
        "shortcut": "residual_connection",
        "attention.norm": "attention.norm",
        "attention.out": "attention.to_out",
        "conv": "",  # of an Upsample
    },
    top={
        "time_mlp.0": "time_mlp.1",
        "time_mlp.2": "time_mlp.3",
        "init_conv": "init_conv",
        "out_norm": "out_norm",
        "out_conv": "out_conv",
    },
    place=_abarankab_place,
    qkv=_abarankab_qkv,
)


def levels_of(source: Weights, list_name: str, down: str, block: str, attention: str) -> list[list[tuple[int, bool]]]:
    """Each level's residual blocks: channels, and whether attention follows. The last three name their weights."""
    levels: list[list[tuple[int, bool]]] = [[]]
    for k in itertools.count():
        at = f"{list_name}.{k}"
        if f"{at}.{down}.weight" in source:
            levels.append([])
        elif f"{at}.{block}.weight" in source:
            levels[-1].append((len(source[f"{at}.{block}.weight"]), f"{at}.{attention}.weight" in source))
        else:
            break
    return levels


def import_abarankab(state: Weights, flags: Flags) -> Imported:
    """`GaussianDiffusion.state_dict()`, which has everything that its command line can choose but dropout, activation
    and in for gn; or its U-Net's alone, whose diffusion comes by flags."""
    if "betas" in state:
        betas = state["betas"]
        if not betas.is_floating_point():
            raise UnsupportedCheckpointError("its betas are not floating point numbers")
        diffusion = diffusion_of(betas.double().numpy(), betas.dtype, variance="fixed_large")
        prefix = "model." if flags.weights == "raw" else "ema_model."
        source = Source({name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)})
        origin, used = "from its betas; prediction and variance are always the same there", {"weights"}
    else:
        flags.need(num_timesteps=1000, schedule="linear")
        diffusion, source = diffusion_by_flags(flags, variance="fixed_large"), Source(state)
        origin, used = "by flags, since the file is a network's alone", set()
    return Imported(
        *_abarankab_network(source, flags), diffusion, origin, _assumed(source, flags), used=frozenset(used)
    )


def _abarankab_network(source: Source, flags: Flags) -> tuple[Weights, UNetConfig]:
    levels = levels_of(source, "downs", down="downsample", block="conv_1", attention="attention.to_qkv")
    if "downs.0.norm_1.running_mean" in source:
        norm = "bn"
        source = Source({name: t for name, t in source.items() if not name.endswith("num_batches_tracked")})
    else:
        norm = (flags.norm or "gn") if "downs.0.norm_1.weight" in source else "none"
    classes = source.get("downs.0.class_bias.weight")
    config = UNetConfig(
        image_channels=source["init_conv.weight"].shape[1],
        image_size=flags.image_size or (32, 32),
        time_emb_dim=len(source["time_mlp.1.weight"]),
        **flags.classes(None if classes is None else len(classes)),
        norm=norm,
        norm_groups=flags.norm_groups or 32,
        activation=flags.activation or "silu",
        time_scale=1.0 if flags.time_scale is None else flags.time_scale,
        initial_pad=flags.initial_pad or 0,
        **architecture(levels, len(source["init_conv.weight"])),
    )
    if flags.initial_pad is None and any(side % config.multiple for side in config.image_size):
        raise UnsupportedCheckpointError(
            f"its levels need sides that {config.multiple} divides, so images of {format_value(config.image_size)} "
            "were padded: add --initial_pad as its UNet had it (or 0, to pad below and to the right as is usual here)"
        )
    return convert(source, checked_groups(config, flags), ABARANKAB), config


def _assumed(source: Source, flags: Flags) -> tuple[str, ...]:
    """What only the code that made the file knows, where no flag tells: as its scripts have it."""
    usual = {"image_size": (32, 32), "activation": "silu", "time_scale": 1, "initial_pad": 0}
    if "downs.0.norm_1.weight" in source and "downs.0.norm_1.running_mean" not in source:
        usual = {"norm": "gn", **usual}
        if flags.norm in (None, "gn"):
            usual["norm_groups"] = 32
    return tuple(f"{name} {format_value(value)}" for name, value in usual.items() if getattr(flags, name) is None)


# w86763777/pytorch-ddpm


def _w86_place(network: UNet) -> Iterator[tuple[str, str, str]]:
    for ours, layer in layers(network):
        theirs = ours.replace("downs", "downblocks").replace("mid", "middleblocks").replace("ups", "upblocks")
        yield ours, theirs if isinstance(layer, ResBlock) else f"{theirs}.main", f"{theirs}.attn"


W86 = Layout(
    names={
        "norm_1": "block1.0",
        "conv_1": "block1.2",
        "time_bias": "temb_proj.1",
        "norm_2": "block2.0",
        "conv_2": "block2.3",
        "attention.norm": "group_norm",
        "attention.out": "proj",
        "conv": "",
    },
    top={
        "time_table": "time_embedding.timembedding.0",
        "time_mlp.0": "time_embedding.timembedding.1",
        "time_mlp.2": "time_embedding.timembedding.3",
        "init_conv": "head",
        "out_norm": "tail.0",
        "out_conv": "tail.2",
    },
    place=_w86_place,
    qkv=separate_qkv("proj_q", "proj_k", "proj_v"),
)


def import_w86763777(state: dict[str, Any], flags: Flags) -> Imported:
    """`ckpt.pt`: {net_model, ema_model, …, x_T}. Linear betas, whose ends come by flags.

    Its embedding table alternates sines and cosines; it is kept only where it is not the formula.
    """
    source = Source(state["net_model" if flags.weights == "raw" else "ema_model"])
    table = source.take("time_embedding.timembedding.0.weight").float()
    steps = len(table)
    flags.need(
        prediction="eps", variance="fixed_large", schedule_low=1e-4 * steps / 1000, schedule_high=0.02 * steps / 1000
    )  # theirs are not scaled, ours are
    first = source["time_embedding.timembedding.1.weight"]
    formula = time_embedding(torch.arange(steps), table.shape[1])  # sines, then cosines; theirs alternate
    is_formula = torch.allclose(torch.cat([table[:, 0::2], table[:, 1::2]], dim=1), formula, rtol=0, atol=1e-3)
    if is_formula:
        source["time_embedding.timembedding.1.weight"] = torch.cat([first[:, 0::2], first[:, 1::2]], dim=1)
    else:
        source["time_embedding.timembedding.0.weight"] = table
    noise = state.get("x_T")
    size = (noise.shape[2], noise.shape[3]) if isinstance(noise, Tensor) and noise.dim() == 4 else None
    levels = levels_of(source, "downblocks", down="main", block="block1.2", attention="attn.proj")
    config = UNetConfig(
        image_channels=source["head.weight"].shape[1],
        image_size=size or flags.image_size or (32, 32),
        time_emb_dim=len(first),
        time_table=0 if is_formula else steps,
        norm_groups=flags.norm_groups or 32,
        **flags.classes(None),
        **architecture(levels, len(source["head.weight"])),
    )
    if flags.num_timesteps not in (None, steps):
        raise UnsupportedCheckpointError(f"{flags.num_timesteps} timesteps contradict the file, which has {steps}")
    return Imported(
        convert(source, checked_groups(config, flags), W86),
        config,
        diffusion_by_flags(flags, num_timesteps=steps),
        "by flags; T from the file",
        () if size or flags.image_size else ("image_size 32,32",),
        used=frozenset({"weights"}),
    )
