"""Weights of Hugging Face diffusers: a UNet2DModel or DDPMPipeline folder. Only its JSON and its tensors are read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.convert.layout import (
    Flags,
    Imported,
    ImportRefused,
    Layout,
    Weights,
    convert,
    diffusion_of,
    layers,
    separate_qkv,
)
from model.diffusion import DiffusionConfig, cosine_betas
from model.nn.layers import ResBlock
from model.nn.unet import UNet, UNetConfig

OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
PREDICTIONS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "fixed_large_log": "fixed_large",
    "learned_range": "learned_range",
}
DOWN = {"DownBlock2D": False, "AttnDownBlock2D": True, "ResnetDownsampleBlock2D": False}
UP = {"UpBlock2D": False, "AttnUpBlock2D": True, "ResnetUpsampleBlock2D": False}


def _place(network: UNet) -> Iterator[tuple[str, str, str]]:
    level = block = 0
    for ours, layer in layers(network):
        group, index = ours.split(".")
        if group == "mid":
            yield ours, f"mid_block.resnets.{index}", "mid_block.attentions.0"
            level = block = 0
        elif isinstance(layer, ResBlock) and layer.resample == 1:
            yield (
                ours,
                f"{group[:-1]}_blocks.{level}.resnets.{block}",
                f"{group[:-1]}_blocks.{level}.attentions.{block}",
            )
            block += 1
        else:
            place = f"{group[:-1]}_blocks.{level}.{group[:-1]}samplers.0"
            # a Downsample is a convolution, an Upsample has one
            yield ours, f"{place}.conv" if group == "downs" and not isinstance(layer, ResBlock) else place, ""
            level, block = level + 1, 0


DIFFUSERS = Layout(
    names={
        "norm_1": "norm1",
        "conv_1": "conv1",
        "time_bias": "time_emb_proj",
        "norm_2": "norm2",
        "conv_2": "conv2",
        "shortcut": "conv_shortcut",
        "attention.norm": "group_norm",
        "attention.out": "to_out.0",
    },
    top={
        "time_table": "time_proj",
        "time_mlp.0": "time_embedding.linear_1",
        "time_mlp.2": "time_embedding.linear_2",
        "class_emb": "class_embedding",
        "init_conv": "conv_in",
        "out_norm": "conv_norm_out",
        "out_conv": "conv_out",
    },
    place=_place,
    qkv=separate_qkv("to_q", "to_k", "to_v"),
)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ImportRefused for anything else."""
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ImportRefused(f"{path} is not readable JSON: {error}") from error
    if not isinstance(data, dict):
        raise ImportRefused(f"{path} is not a JSON object")
    return data


def import_diffusers(folder: Path, state: Weights, flags: Flags) -> Imported:
    """A network's folder, or a pipeline's with `unet` and `scheduler`, and the network's loaded tensors."""
    is_pipeline = (folder / "unet" / "config.json").is_file()
    theirs = read_json((folder / "unet" if is_pipeline else folder) / "config.json")
    config = unet_config(theirs, flags)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        diffusion = diffusion_config(read_json(scheduler), config.learned_variance)
    else:
        variance = "learned_range" if config.learned_variance else "fixed_small"
        diffusion = DiffusionConfig(flags.num_timesteps, flags.schedule, variance=variance)
    source = dict(state)
    for name in [name for name in source if ".attentions." in name]:
        head, _, leaf = name.rpartition(".")
        place, _, layer = head.rpartition(".")
        if layer in OLD_NAMES:
            source[f"{place}.{OLD_NAMES[layer]}.{leaf}"] = source.pop(name)
    first = source.get("time_embedding.linear_1.weight")
    if first is not None and theirs.get("flip_sin_to_cos", True) and not config.time_table:
        half = first.shape[1] // 2
        source["time_embedding.linear_1.weight"] = torch.cat([first[:, half:], first[:, :half]], dim=1)
    return convert(source, config, DIFFUSERS), config, diffusion


def unet_config(theirs: dict[str, Any], flags: Flags) -> UNetConfig:
    """Their network's configuration in our words. Raises ImportRefused for what ours cannot express."""
    get = theirs.get
    if get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise ImportRefused(f"it is a {get('_class_name')}; only UNet2DModel can be imported")
    down, up = get("down_block_types", ["DownBlock2D"] + ["AttnDownBlock2D"] * 3), get("up_block_types")
    up = ["AttnUpBlock2D"] * 3 + ["UpBlock2D"] if up is None else up
    widths = list(get("block_out_channels", (224, 448, 672, 896)))
    for name, value, valid in [
        *(("down_block_types", block, tuple(DOWN)) for block in down),
        *(("up_block_types", block, tuple(UP)) for block in up),
        ("mid_block_type", get("mid_block_type", "UNetMidBlock2D"), ("UNetMidBlock2D",)),
        ("add_attention", get("add_attention", True), (True,)),
        ("center_input_sample", get("center_input_sample", False), (False,)),
        ("time_embedding_type", get("time_embedding_type", "positional"), ("positional", "learned")),
        ("time_embedding_dim", get("time_embedding_dim"), (None, *range(1, 16385))),
        ("freq_shift", get("freq_shift", 0), (0, 1)),
        ("mid_block_scale_factor", get("mid_block_scale_factor", 1), (1,)),
        ("act_fn", get("act_fn", "silu"), ("silu", "swish")),
        ("class_embed_type", get("class_embed_type"), (None,)),
        ("resnet_time_scale_shift", get("resnet_time_scale_shift", "default"), ("default", "scale_shift")),
        ("downsample_padding", get("downsample_padding", 1), (0, 1)),
    ]:
        if value not in valid:
            raise ImportRefused(f"its {name} is {value!r}, which cannot be expressed here")
    attention = [DOWN[block] for block in down]
    if [UP[block] for block in reversed(up)] != attention or len(widths) != len(down) or not widths:
        raise ImportRefused("its levels differ on the way down and up, which cannot be expressed here")
    if any(width % widths[0] for width in widths):
        raise ImportRefused(f"its widths {widths} are not whole multiples of the first, which cannot be expressed here")
    kinds = (
        {  # of what changes the resolution, after each level but the last: a residual block, or a convolution
            block.startswith("Resnet") or (block.startswith("Attn") and get(f"{way}sample_type", "conv") == "resnet")
            for way, blocks in (("down", down), ("up", up))
            for block in blocks[:-1]
        }
        or {False}
    )
    if len(kinds) != 1:
        raise ImportRefused("it mixes ways of changing the resolution, which cannot be expressed here")
    size = get("sample_size") or flags.image_size
    head = get("attention_head_dim", 8)
    in_channels, out_channels = get("in_channels", 3), get("out_channels", 3)
    if out_channels not in (in_channels, 2 * in_channels):
        raise ImportRefused(f"it has {in_channels} channels in and {out_channels} out, which cannot be expressed here")
    is_table = get("time_embedding_type", "positional") == "learned"
    labels = get("num_class_embeds")
    config = UNetConfig(
        image_channels=in_channels,
        image_size=(size, size) if isinstance(size, int) else tuple(size),
        base_channels=widths[0],
        channel_mults=tuple(width // widths[0] for width in widths),
        num_res_blocks=get("layers_per_block", 2),
        attention_levels=tuple(i for i, has in enumerate(attention) if has),
        time_emb_dim=get("time_embedding_dim") or 4 * widths[0],
        num_classes=labels - flags.null_class if labels else None,
        null_class=flags.null_class,
        class_conditioning="embedding",
        dropout=get("dropout", 0.0),
        head_channels=head or 0,
        learned_variance=out_channels == 2 * in_channels,
        scale_shift_norm=get("resnet_time_scale_shift", "default") == "scale_shift",
        resblock_updown=kinds == {True},
        norm_groups=get("norm_num_groups", 32),
        norm_eps=get("norm_eps", 1e-5),
        downsample_padding=get("downsample_padding", 1),
        time_freq_shift=get("freq_shift", 0),
        time_table=get("num_train_timesteps") or 0 if is_table else 0,
    )
    if any(groups != config.norm_groups for groups in norm_groups(config)):
        raise ImportRefused(f"its norms have {config.norm_groups} groups, which do not divide all channels")
    return config


def norm_groups(config: UNetConfig) -> set[int]:
    """The numbers of groups of a network's GroupNorms."""
    with torch.device("meta"):
        network = UNet(config)
    return {module.num_groups for module in network.modules() if isinstance(module, torch.nn.GroupNorm)}


def diffusion_config(theirs: dict[str, Any], learned_variance: bool) -> DiffusionConfig:
    """Their scheduler's configuration in our words. Raises ImportRefused for what ours cannot express."""
    get = theirs.get
    steps, schedule = get("num_train_timesteps", 1000), get("beta_schedule", "linear")
    if not isinstance(steps, int) or not 2 <= steps <= 100_000:
        raise ImportRefused(f"its scheduler has num_train_timesteps {steps!r}")
    if get("trained_betas") is not None:
        betas = np.array(get("trained_betas"), np.float64)
    elif schedule == "linear":
        betas = np.linspace(get("beta_start", 1e-4), get("beta_end", 0.02), steps)
    elif schedule == "squaredcos_cap_v2":
        betas = cosine_betas(steps)
    else:
        raise ImportRefused(f"its beta schedule is {schedule!r}; only linear and squaredcos_cap_v2 can be imported")
    prediction, variance = get("prediction_type", "epsilon"), get("variance_type", "fixed_small")
    if prediction not in PREDICTIONS:
        raise ImportRefused(f"its prediction_type {prediction!r} cannot be expressed here")
    if learned_variance and "variance_type" not in theirs:
        variance = "learned_range"
    if variance not in VARIANCES or (variance == "learned_range") != learned_variance:
        raise ImportRefused(f"its variance_type {variance!r} cannot be expressed here")
    plain = diffusion_of(betas, prediction=PREDICTIONS[prediction], variance=VARIANCES[variance])
    return replace(plain, zero_terminal_snr=bool(get("rescale_betas_zero_snr", False)))
