"""Weights of abarankab/DDPM ("the original") and of w86763777/pytorch-ddpm."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from model.convert.layout import (
    Flags,
    Imported,
    Layout,
    Weights,
    architecture,
    convert,
    diffusion_of,
    layers,
    separate_qkv,
)
from model.diffusion import linear_betas
from model.nn.layers import ResBlock, time_embedding
from model.nn.unet import UNet, UNetConfig

# abarankab/DDPM, "the original"


def _original_place(network: UNet) -> Iterator[tuple[str, str, str]]:
    for ours, layer in layers(network):
        suffix = ""
        if not isinstance(layer, ResBlock):
            suffix = ".downsample" if ours.startswith("downs") else ".upsample.1"
        yield ours, ours + suffix, ours


def _original_qkv(source: Weights, place: str, config: UNetConfig) -> tuple[Tensor, Tensor]:
    return source.pop(f"{place}.attention.to_qkv.weight"), source.pop(f"{place}.attention.to_qkv.bias")


ORIGINAL = Layout(
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
    place=_original_place,
    qkv=_original_qkv,
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


def import_original(state: Weights, flags: Flags) -> Imported:
    """`GaussianDiffusion.state_dict()`: everything but dropout, activation and in for gn is in the file."""
    betas = state["betas"].double().numpy()
    prefix = "ema_model." if flags.weights == "ema" else "model."
    source = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    levels = levels_of(source, "downs", down="downsample", block="conv_1", attention="attention.to_qkv")
    if "downs.0.norm_1.running_mean" in source:
        norm = "bn"
        source = {name: t for name, t in source.items() if not name.endswith("num_batches_tracked")}
    else:
        norm = flags.norm if "downs.0.norm_1.weight" in source else "none"
    classes = source.get("downs.0.class_bias.weight")
    config = UNetConfig(
        image_channels=source["init_conv.weight"].shape[1],
        image_size=flags.image_size,
        time_emb_dim=len(source["time_mlp.1.weight"]),
        num_classes=None if classes is None else len(classes),
        norm=norm,
        activation=flags.activation,
        **architecture(levels, len(source["init_conv.weight"])),
    )
    return convert(source, config, ORIGINAL), config, diffusion_of(betas, variance="fixed_large")


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
    """`ckpt.pt`: {net_model, ema_model, …}. Always linear betas, 10⁻⁴ to 0.02.

    Its embedding table alternates sines and cosines; it is kept only where it is not the formula.
    """
    source = dict(state["ema_model" if flags.weights == "ema" else "net_model"])
    table = source.pop("time_embedding.timembedding.0.weight")
    first = source["time_embedding.timembedding.1.weight"]
    formula = time_embedding(torch.arange(len(table)), table.shape[1])  # sines, then cosines; theirs alternate
    is_formula = torch.allclose(torch.cat([table[:, 0::2], table[:, 1::2]], dim=1), formula, rtol=0, atol=1e-3)
    if is_formula:
        source["time_embedding.timembedding.1.weight"] = torch.cat([first[:, 0::2], first[:, 1::2]], dim=1)
    else:
        source["time_embedding.timembedding.0.weight"] = table
    levels = levels_of(source, "downblocks", down="main", block="block1.2", attention="attn.proj")
    config = UNetConfig(
        image_channels=source["head.weight"].shape[1],
        image_size=flags.image_size,
        time_emb_dim=len(first),
        time_table=0 if is_formula else len(table),
        **architecture(levels, len(source["head.weight"])),
    )
    betas = linear_betas(len(table)) * (len(table) / 1000)  # theirs are the same whatever T is
    return convert(source, config, W86), config, diffusion_of(betas, variance="fixed_large")
