"""Weights of NVlabs/edm's ADM network ("DhariwalUNet") under EDM's preconditioning."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import torch
from torch import Tensor

from model.convert.layout import (
    Flags,
    Imported,
    Layout,
    Source,
    UnsupportedCheckpointError,
    Weights,
    architecture,
    convert,
    cosines_first,
    layers,
)
from model.diffusion import KARRAS, DiffusionConfig
from model.nn.config import UNetConfig
from model.nn.unet import UNet
from model.sigmas import Sigmas

WIDTH = 64  # of every attention head


def _place(network: UNet) -> Iterator[tuple[str, str, str]]:
    side = network.config.image_size[0]
    last = len(network.config.channel_mults) - 1
    names = ["in0", "in1"]
    for group, levels in (("enc", range(last + 1)), ("dec", range(last, -1, -1))):
        blocks = network.config.num_res_blocks + (group == "dec")
        found = [f"{group}.{side >> last}x{side >> last}_{name}" for name in names] if group == "dec" else []
        for level in levels:
            res = f"{group}.{side >> level}x{side >> level}"
            if level != (0 if group == "enc" else last):
                found.append(f"{res}_{'down' if group == 'enc' else 'up'}")
            found += [f"{res}_block{i}" for i in range(blocks)]
        ours = [name for name, _ in layers(network) if name.startswith("downs") == (group == "enc")]
        yield from ((name, theirs, theirs) for name, theirs in zip(ours, found, strict=True))


def _qkv(source: Source, place: str, config: UNetConfig) -> tuple[Tensor, Tensor]:
    """Their channels are heads × width × (q, k, v)."""
    fused = []
    for leaf in ("weight", "bias"):
        tensor = source.take(f"{place}.qkv.{leaf}")
        parts = tensor.reshape(-1, WIDTH, 3, *tensor.shape[1:])
        fused.append(parts.movedim(2, 0).reshape(tensor.shape))
    return fused[0], fused[1]


EDM = Layout(
    names={
        "norm_1": "norm0",
        "conv_1": "conv0",
        "time_bias": "affine",
        "norm_2": "norm1",
        "conv_2": "conv1",
        "shortcut": "skip",
        "attention.norm": "norm2",
        "attention.out": "proj",
    },
    top={
        "time_mlp.0": "map_layer0",
        "time_mlp.2": "map_layer1",
        "class_emb": "map_label",
        "init_conv": "conv",
        "out_norm": "out_norm",
        "out_conv": "out_conv",
    },
    place=_place,
    qkv=_qkv,
)


def import_edm(state: Weights, flags: Flags) -> Imported:
    """An EDMPrecond's `state_dict()`, or its network's alone. Its levels of noise are EDM's own."""
    if "u" in state:
        raise UnsupportedCheckpointError("it is an iDDPMPrecond of NVlabs/edm; those of EDMPrecond are imported")
    source = Source({n.removeprefix("model."): t for n, t in state.items() if not n.endswith("resample_filter")})
    if "out_conv.weight" not in source:
        raise UnsupportedCheckpointError(
            "it is a SongUNet of NVlabs/edm (DDPM++ or NCSN++), another architecture; its ADM networks are imported"
        )
    side = max((int(found[1]) for found in map(re.compile(r"enc\.(\d+)x").match, source) if found), default=1)
    source |= {f"conv.{leaf}": source.take(f"enc.{side}x{side}_conv.{leaf}") for leaf in ("weight", "bias")}
    source["map_layer0.weight"] = cosines_first(source["map_layer0.weight"])
    assumed = ["levels of noise from 0.002 to 80, sigma_data 0.5: EDMPrecond's own"]
    if "map_augment.weight" in source:
        source.take("map_augment.weight")
        assumed.append("no augmentation")
    classes = source.get("map_label.weight")
    if classes is not None:
        source["map_label.weight"] = classes.t()
    config = UNetConfig(
        image_channels=source["conv.weight"].shape[1],
        image_size=(side, side),
        time_emb_dim=len(source["map_layer0.weight"]),
        **flags.classes(None if classes is None else classes.shape[1]),
        class_conditioning="embedding",
        head_channels=WIDTH,
        scale_shift_norm=True,
        resblock_updown=True,
        **architecture(_levels(source, side), source["map_layer0.weight"].shape[1]),
    )
    _check_norms(config)
    return Imported(
        convert(source, config, EDM),
        config,
        DiffusionConfig(schedule=KARRAS, prediction="edm", sigmas=Sigmas()),
        "EDM's preconditioning",
        tuple(assumed),
        limit="none",
        sampling={"sampler": "dpmpp_2m", "steps": 18},
    )


def _levels(source: Source, side: int) -> list[list[tuple[int, bool]]]:
    """Each level's residual blocks on the way down: channels, and whether attention follows."""
    found: list[list[tuple[int, bool]]] = []
    for level in itertools.count():
        res = f"enc.{side >> level}x{side >> level}_block"
        names = [name for name in (f"{res}{i}" for i in range(64)) if f"{name}.conv0.weight" in source]
        if not names:
            return found
        found.append([(len(source[f"{name}.conv0.weight"]), f"{name}.qkv.weight" in source) for name in names])
    return found


def _check_norms(config: UNetConfig) -> None:
    """Raises UnsupportedCheckpointError where their groups, of 4 channels at least, are not ours."""
    with torch.device("meta"):
        norms = [module for module in UNet(config).modules() if isinstance(module, torch.nn.GroupNorm)]
    if any(norm.num_groups != min(32, norm.num_channels // 4) for norm in norms):
        raise UnsupportedCheckpointError("its levels are too narrow: their norms have other groups than ours")
