"""Weights of openai/improved-diffusion and openai/guided-diffusion: bare U-Nets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

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
    checked_groups,
    convert,
    cosines_first,
    diffusion_by_flags,
    layers,
)
from model.diffusion import KARRAS, DiffusionConfig
from model.nn.config import UNetConfig
from model.nn.layers import ResBlock
from model.nn.unet import UNet
from model.sampling.solvers import CONSISTENCY
from model.sigmas import Sigmas

# openai/improved-diffusion and openai/guided-diffusion


def _openai_place(network: UNet) -> Iterator[tuple[str, str, str]]:
    outer = -1  # an up-sampling stands inside the block of the residual block before it
    inside = 0
    for ours, layer in layers(network):
        group, index = ours.split(".")
        is_res = isinstance(layer, ResBlock)
        if group == "downs":
            block = f"input_blocks.{int(index) + 1}"
            yield ours, f"{block}.0" if is_res else f"{block}.0.op", f"{block}.1"
        elif group == "mid":
            yield ours, f"middle_block.{2 * int(index)}", "middle_block.1"
        elif isinstance(layer, ResBlock) and layer.resample == 1:
            outer += 1
            inside = 1 + (not isinstance(layer.attention, torch.nn.Identity))
            yield ours, f"output_blocks.{outer}.0", f"output_blocks.{outer}.1"
        else:
            yield ours, f"output_blocks.{outer}.{inside}", ""


OPENAI = Layout(
    names={
        "norm_1": "in_layers.0",
        "conv_1": "in_layers.2",
        "time_bias": "emb_layers.1",
        "norm_2": "out_layers.0",
        "conv_2": "out_layers.3",
        "shortcut": "skip_connection",
        "attention.norm": "norm",
        "attention.out": "proj_out",
    },
    top={
        "time_mlp.0": "time_embed.0",
        "time_mlp.2": "time_embed.2",
        "class_emb": "label_emb",
        "init_conv": "input_blocks.0.0",
        "out_norm": "out.0",
        "out_conv": "out.2",
    },
    place=_openai_place,
    qkv=lambda source, place, config: (source.take(f"{place}.qkv.weight"), source.take(f"{place}.qkv.bias")),
)


def import_openai(state: Weights, flags: Flags) -> Imported:
    """A bare U-Net. What it predicts, its heads, T and the beta schedule come by flags."""
    source = Source(state)
    if source["middle_block.1.qkv.weight"].dim() == 4:
        return _import_consistency(source, flags)
    _check_kind(source, flags)
    heads = _heads(flags)
    config = UNetConfig(
        **_read_off(source),
        **heads,
        **flags.classes(len(source["label_emb.weight"]) if "label_emb.weight" in source else None),
        image_size=flags.image_size or (32, 32),
        class_conditioning="embedding",
        norm_groups=flags.norm_groups or 32,
        time_scale=_time_scale(flags),
    )
    if config.learned_variance and flags.variance not in (None, "learned_range"):
        raise UnsupportedCheckpointError(
            f"--variance {flags.variance} contradicts the file, whose network says its variance"
        )
    source["time_embed.0.weight"] = cosines_first(source["time_embed.0.weight"])  # it embeds cosines before sines
    if not flags.new_attention_order:
        for name in [n for n in source if ".qkv." in n]:
            count = config.num_heads_upsample if name.startswith("output_blocks") else 0
            heads_here = replace(config, num_heads=count or config.num_heads)
            source[name] = _heads_first_to_qkv_first(source[name], heads_here)
    variance = "learned_range" if config.learned_variance else "fixed_large"
    assumed = [] if flags.image_size else ["image_size 32,32"]
    if not config.learned_variance and flags.variance is None:
        assumed.append("variance fixed_large, as its project's scripts have it")
    return Imported(
        convert(source, checked_groups(config, flags), OPENAI),
        config,
        diffusion_by_flags(flags, variance=variance),
        "by flags, since such a file has none",
        tuple(assumed),
        used=frozenset({"new_attention_order", "rescale_timesteps"}),
    )


def _import_consistency(source: Source, flags: Flags) -> Imported:
    """openai/consistency_models: the same network as a consistency model, or as the EDM one that it is made from."""
    heads = flags.num_heads is None and flags.head_channels is None
    flags.need(prediction=CONSISTENCY, image_size=(64, 64), **({"head_channels": 64} if heads else {}))
    if flags.num_heads is not None and flags.head_channels is not None:
        raise UnsupportedCheckpointError("with --head_channels the number of heads follows: leave out --num_heads")
    config = UNetConfig(
        **_read_off(source),
        num_heads=flags.num_heads or 1,
        head_channels=flags.head_channels or 0,
        **flags.classes(len(source["label_emb.weight"]) if "label_emb.weight" in source else None),
        image_size=flags.image_size or (64, 64),
        class_conditioning="embedding",
    )
    source["time_embed.0.weight"] = cosines_first(source["time_embed.0.weight"])
    is_consistency = flags.prediction == CONSISTENCY
    return Imported(
        convert(source, checked_groups(config, flags), OPENAI),
        config,
        DiffusionConfig(schedule=KARRAS, prediction=flags.prediction or "", sigmas=Sigmas(time_scale=1000.0)),
        "their KarrasDenoiser",
        ("levels of noise from 0.002 to 80, sigma_data 0.5: their defaults",),
        sampling={"sampler": CONSISTENCY, "steps": 1} if is_consistency else {"sampler": "dpmpp_2m", "steps": 18},
    )


def _check_kind(source: Source, flags: Flags) -> None:
    """Raises UnsupportedCheckpointError for networks that have the same layers' names and are something else."""
    given, made = source["input_blocks.0.0.weight"].shape[1], len(source["out.2.weight"])
    if given in (6, 8) or made not in (given, 2 * given):
        raise UnsupportedCheckpointError(
            f"it is an upsampler: it sees {given} channels, the small image's too, and makes {made}"
        )
    if (given, made) == (2, 2) and flags.variance not in ("fixed_small", "fixed_large"):
        raise UnsupportedCheckpointError(
            "it is an upsampler of grey images with a learned variance, or a network of 2-channel images, "
            "which the file does not tell: if the latter, add --variance fixed_large"
        )
    if source["time_embed.0.weight"].shape[1] != len(source["input_blocks.0.0.weight"]):
        raise UnsupportedCheckpointError(
            "its first level is not as wide as its time embedding, as in the 512 × 512 model (channel_mult 0.5), "
            "which cannot be expressed here"
        )


def _heads(flags: Flags) -> dict[str, Any]:
    """Raises UnsupportedCheckpointError where the flags do not tell how many, or tell it twice."""
    if flags.head_channels is not None:
        if flags.num_heads is not None or flags.num_heads_upsample is not None:
            raise UnsupportedCheckpointError("with --head_channels the number of heads follows: leave out the other")
        names: dict[str, Any] = {}
    else:
        names = {"num_heads": 4}
    flags.need(**names, num_timesteps=1000, schedule="linear", prediction="eps")
    return {
        "num_heads": flags.num_heads or 1,
        "head_channels": flags.head_channels or 0,
        "num_heads_upsample": flags.num_heads_upsample or 0,
    }


def _time_scale(flags: Flags) -> float:
    """Nothing tells improved-diffusion, which scales timesteps to 1000 by default, from guided-diffusion."""
    steps = flags.num_timesteps or 1000
    if flags.rescale_timesteps:
        if flags.time_scale is not None:
            raise UnsupportedCheckpointError("--rescale_timesteps is a --time_scale of 1000/T: leave out one of them")
        return 1000 / steps
    if flags.time_scale is None and steps != 1000:
        raise UnsupportedCheckpointError(
            "the file does not tell whether its timesteps were scaled to 1000: add --rescale_timesteps "
            "(improved-diffusion's default), or --time_scale 1 (guided-diffusion's)"
        )
    return 1.0 if flags.time_scale is None else flags.time_scale


def _read_off(source: Source) -> dict[str, Any]:
    """What the tensors tell of the architecture."""
    ups = [n for n in source if n.startswith("output_blocks.") and n.endswith((".2.conv.weight", ".1.conv.weight"))]
    res_ups = [n for n in source if n.startswith("output_blocks.") and n.endswith(".in_layers.0.weight")]
    res_ups = [n for n in res_ups if n.split(".")[2] != "0"]
    num_levels = 1 + len(ups) + len(res_ups)
    count = len({name.split(".")[1] for name in source if name.startswith("input_blocks.")}) - 1
    per_level = (count + 1) // num_levels  # residual blocks and what halves the resolution after them
    levels = []
    for level in range(num_levels):
        numbers = range(1 + level * per_level, (level + 1) * per_level)
        widths = [len(source[f"input_blocks.{i}.0.in_layers.2.weight"]) for i in numbers]
        levels.append([(w, f"input_blocks.{i}.1.qkv.weight" in source) for w, i in zip(widths, numbers, strict=True)])
    in_channels = source["input_blocks.0.0.weight"].shape[1]
    width = len(source["middle_block.0.out_layers.0.weight"])
    return {
        "image_channels": in_channels,
        "time_emb_dim": len(source["time_embed.0.weight"]),
        "learned_variance": len(source["out.2.weight"]) == 2 * in_channels,
        "scale_shift_norm": len(source["middle_block.0.emb_layers.1.weight"]) == 2 * width,
        "resblock_updown": bool(res_ups),
        **architecture(levels, len(source["input_blocks.0.0.weight"])),
    }


def _heads_first_to_qkv_first(fused: Tensor, config: UNetConfig) -> Tensor:
    """The older attention order has channels as heads × (q, k, v) × width."""
    channels = len(fused) // 3
    heads = channels // config.head_channels if config.head_channels else config.num_heads
    return fused.reshape(heads, 3, channels // heads, *fused.shape[1:]).transpose(0, 1).reshape(fused.shape)
