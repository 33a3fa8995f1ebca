"""Weights of openai/improved-diffusion and openai/guided-diffusion: bare U-Nets."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from model.convert.layout import Flags, Imported, ImportRefused, Layout, Weights, architecture, convert, layers
from model.diffusion import DiffusionConfig
from model.nn.layers import ResBlock
from model.nn.unet import UNet, UNetConfig

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
    qkv=lambda source, place, config: (source.pop(f"{place}.qkv.weight"), source.pop(f"{place}.qkv.bias")),
)


def import_openai(state: Weights, flags: Flags) -> Imported:
    """A bare U-Net. Heads, their order, T and the beta schedule come by flags. It embeds cosines before sines."""
    source = dict(state)
    first = source["time_embed.0.weight"]
    half = first.shape[1] // 2
    source["time_embed.0.weight"] = torch.cat([first[:, half:], first[:, :half]], dim=1)
    ups = [n for n in source if n.startswith("output_blocks.") and n.endswith((".2.conv.weight", ".1.conv.weight"))]
    res_ups = [n for n in source if n.startswith("output_blocks.") and n.endswith(".in_layers.0.weight")]
    res_ups = [n for n in res_ups if n.split(".")[2] != "0"]
    num_levels = 1 + len(ups) + len(res_ups)
    count = len({name.split(".")[1] for name in source if name.startswith("input_blocks.")}) - 1
    per_level = (count + 1) // num_levels  # residual blocks and what halves the resolution after them
    levels = []
    for level in range(num_levels):
        numbers = range(1 + level * per_level, (level + 1) * per_level)
        try:
            widths = [len(source[f"input_blocks.{i}.0.in_layers.2.weight"]) for i in numbers]
        except KeyError as error:
            raise ImportRefused(f"tensor {error} is missing") from error
        levels.append([(w, f"input_blocks.{i}.1.qkv.weight" in source) for w, i in zip(widths, numbers, strict=True)])
    in_channels, out_channels = source["input_blocks.0.0.weight"].shape[1], len(source["out.2.weight"])
    labels = source.get("label_emb.weight")
    width = len(source["middle_block.0.out_layers.0.weight"])
    scale_shift = len(source["middle_block.0.emb_layers.1.weight"]) == 2 * width
    config = UNetConfig(
        image_channels=in_channels,
        image_size=flags.image_size,
        time_emb_dim=len(first),
        num_classes=None if labels is None else len(labels),
        class_conditioning="embedding",
        num_heads=flags.num_heads,
        head_channels=flags.head_channels,
        learned_variance=out_channels == 2 * in_channels,
        scale_shift_norm=scale_shift,
        resblock_updown=bool(res_ups),
        time_scale=1000 / flags.num_timesteps if flags.rescale_timesteps else 1.0,
        **architecture(levels, len(source["input_blocks.0.0.weight"])),
    )
    if not flags.new_attention_order:
        for name in [n for n in source if ".qkv." in n]:
            source[name] = _heads_first_to_qkv_first(source[name], flags)
    variance = "learned_range" if config.learned_variance else "fixed_large"
    diffusion = DiffusionConfig(flags.num_timesteps, flags.schedule, variance=variance)
    return convert(source, config, OPENAI), config, diffusion


def _heads_first_to_qkv_first(fused: Tensor, flags: Flags) -> Tensor:
    """The older attention order has channels as heads × (q, k, v) × width."""
    channels = len(fused) // 3
    heads = channels // flags.head_channels if flags.head_channels else flags.num_heads
    return fused.reshape(heads, 3, channels // heads, *fused.shape[1:]).transpose(0, 1).reshape(fused.shape)
