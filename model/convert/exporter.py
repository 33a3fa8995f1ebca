"""python -m model.exporters SRC DST: a checkpoint → a folder that diffusers' DDPMPipeline.from_pretrained loads.

The configuration is written by hand: diffusers itself is not needed.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import checkpoint
from model.atomic_write import atomic_write
from model.checkpoint import Checkpoint
from model.convert.diffusers import CONSISTENCY_PIPELINE, DIFFUSERS
from model.convert.layout import Weights, norm_groups
from model.convert.scheduler import CM_SCHEDULER, CM_SIGMAS, CM_TIME_SCALE, PREDICTIONS, UNLIMITED
from model.diffusion import SCHEDULES, DiffusionConfig
from model.nn.config import UNetConfig
from model.nn.layers import ResBlock, time_embedding
from model.nn.unet import UNet
from model.safetensors_io import write_tensors
from model.sampling.solvers import CONSISTENCY
from model.sampling.step import DYNAMIC_QUANTILE


class UnsupportedExportError(ValueError):
    """diffusers' UNet2DModel cannot express this network; the message says why."""


def export(source: Checkpoint, folder: Path, class_label: int | None = None) -> None:
    """Writes the folder, of a ConsistencyModelPipeline for such models. Raises UnsupportedExportError.

    Where classes act in every block, `class_label` says which class the exported network, unconditional then, makes.
    Scaled timesteps become a learned table of embeddings, of the same numbers.
    """
    config, weights = source.config.unet, dict(source.network.state_dict())
    if not isinstance(config, UNetConfig):
        raise UnsupportedExportError(
            f"diffusers' UNet2DModel cannot express this network: it is {config.network}', with linear attention"
        )
    if (inside := source.config.distilled) and inside.has_fixed_steps:
        raise UnsupportedExportError(
            f"diffusers' schedulers have not the {inside.steps} steps that this student was distilled to"
        )
    is_consistency = source.config.diffusion.prediction == CONSISTENCY
    scheduler = scheduler_json(source.config.diffusion, source.config.sampling.limit)
    if config.num_classes is not None and config.class_conditioning != "embedding":
        if class_label is None:
            raise UnsupportedExportError(
                "its classes act in every block, so one class at a time is exported: give --class_label"
            )
        if not 0 <= class_label < config.num_classes + config.null_class:
            raise UnsupportedExportError(
                f"--class_label must be from 0 to {config.num_classes + config.null_class - 1}"
            )
        config, weights = _with_one_class(config, weights, class_label)
    elif class_label is not None:
        raise UnsupportedExportError(
            "--class_label is for networks whose classes act in every block; this one needs none"
        )
    config, weights = _with_table(config, weights, source.config.diffusion.num_timesteps)
    for problem, present in {
        f"its norm is {config.norm!r}, not group norm": config.norm != "gn",
        f"its activation is {config.activation!r}, not silu": config.activation != "silu",
        "its first level is wider than its first convolution": config.channel_mults[0] != 1,
        f"it has {config.num_heads} heads whatever the width": config.num_heads != 1 and not _head_channels(config),
        "it has another number of heads on the way up": config.num_heads_upsample and not config.head_channels,
        "it pads its images": config.initial_pad != 0,
        f"its norms have different numbers of groups, {sorted(norm_groups(config))}": len(norm_groups(config)) > 1,
        "consistency models have square images there": is_consistency and len(set(config.image_size)) > 1,
        "its image size does not divide by its resolutions": any(side % config.multiple for side in config.image_size),
        f"it folds squares of {config.patch_size} × {config.patch_size} pixels": config.patch_size != 1,
    }.items():
        if present:
            raise UnsupportedExportError(f"diffusers' UNet2DModel cannot express this network: {problem}")
    (folder / "unet").mkdir(parents=True, exist_ok=True)
    (folder / "scheduler").mkdir(exist_ok=True)
    files = {
        "model_index.json": {
            "_class_name": CONSISTENCY_PIPELINE if is_consistency else "DDPMPipeline",
            "_diffusers_version": "0.31.0",
            "scheduler": ["diffusers", scheduler["_class_name"]],
            "unet": ["diffusers", "UNet2DModel"],
        },
        "unet/config.json": unet_json(config),
        "scheduler/scheduler_config.json": scheduler,
    }
    if is_consistency:  # its pipeline takes one number
        files["unet/config.json"]["sample_size"] = config.image_size[0]
    write_tensors(folder / "unet" / "diffusion_pytorch_model.safetensors", renamed(config, weights), {"format": "pt"})
    for name, content in files.items():
        with atomic_write(folder / name) as part:
            part.write_text(json.dumps(content, indent=2) + "\n")


def _head_channels(config: UNetConfig) -> int:
    """The width of all heads; 0 where it differs, or there is one head."""
    levels = {*config.attention_levels, len(config.channel_mults) - 1}  # the last: the middle's
    widths = {config.base_channels * config.channel_mults[level] for level in levels}
    if config.head_channels or config.num_heads == 1 or len(widths) > 1:
        return config.head_channels
    return widths.pop() // config.num_heads


def _with_table(config: UNetConfig, weights: Weights, num_timesteps: int) -> tuple[UNetConfig, Weights]:
    """Scaled timesteps as a table with a row for each, which a UNet2DModel can learn."""
    if config.time_scale == 1 or config.time_table:
        return config, weights
    t = torch.arange(num_timesteps) * config.time_scale
    table = time_embedding(t, config.base_channels, config.time_freq_shift)
    return replace(config, time_table=num_timesteps, time_scale=1.0), weights | {"time_table.weight": table}


def _with_one_class(config: UNetConfig, weights: Weights, class_label: int) -> tuple[UNetConfig, Weights]:
    """The class is constant then: it moves into the biases before it, of the time's layers and of convolutions."""
    if "class_emb.weight" in weights:
        weights["time_mlp.2.bias"] = weights["time_mlp.2.bias"] + weights.pop("class_emb.weight")[class_label]
    for name in [name for name in weights if name.endswith(".class_bias.weight")]:
        block = name.removesuffix(".class_bias.weight")
        target = f"{block}.time_bias.bias" if config.scale_shift_norm else f"{block}.conv_1.bias"
        weights[target] = weights[target] + weights.pop(name)[class_label]
    return replace(config, num_classes=None, null_class=False), weights


def renamed(config: UNetConfig, weights: Weights) -> Weights:
    """A U-Net's weights under diffusers' names, q, k and v apart."""
    with torch.device("meta"):
        network = UNet(config)
    places = {ours: (theirs, attention) for ours, theirs, attention in DIFFUSERS.place(network)}
    result: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        layer, leaf = name.rsplit(".", 1)
        if layer in DIFFUSERS.top:
            result[f"{DIFFUSERS.top[layer]}.{leaf}"] = tensor
            continue
        group, index, *rest = layer.split(".")
        theirs, attention = places[f"{group}.{index}"]
        inner = ".".join(rest)
        if inner == "attention.qkv":
            for part, value in zip(
                ("to_q", "to_k", "to_v"),
                tensor.flatten(1).chunk(3) if leaf == "weight" else tensor.chunk(3),
                strict=True,
            ):
                result[f"{attention}.{part}.{leaf}"] = value
        elif inner == "attention.out" and leaf == "weight":
            result[f"{attention}.to_out.0.weight"] = tensor.flatten(1)
        elif inner.startswith("attention."):
            result[f"{attention}.{DIFFUSERS.names[inner]}.{leaf}"] = tensor
        else:
            result[".".join(part for part in (theirs, DIFFUSERS.names.get(inner, inner), leaf) if part)] = tensor
    return {name: tensor.cpu().contiguous().clone() for name, tensor in result.items()}


def unet_json(config: UNetConfig) -> dict[str, Any]:
    """UNet2DModel's configuration."""
    with torch.device("meta"):
        has_attention = [
            not isinstance(layer.attention, torch.nn.Identity)
            for layer in UNet(config).downs
            if isinstance(layer, ResBlock) and layer.resample == 1
        ][:: config.num_res_blocks]
    kind = "resnet" if config.resblock_updown else "conv"

    def blocks(way: str, plain: str, attention: list[bool]) -> list[str]:
        return [f"Attn{way}Block2D" if has else plain for has in attention]

    (groups,) = norm_groups(config)
    return {
        "_class_name": "UNet2DModel",
        "_diffusers_version": "0.31.0",
        "sample_size": list(config.image_size),
        "in_channels": config.image_channels,
        "out_channels": config.image_channels * (2 if config.learned_variance else 1),
        "center_input_sample": False,
        "time_embedding_type": "learned" if config.time_table else "positional",
        "time_embedding_dim": config.time_emb_dim,
        "num_train_timesteps": config.time_table or None,
        "freq_shift": config.time_freq_shift,
        "flip_sin_to_cos": False,
        "down_block_types": blocks(
            "Down", "ResnetDownsampleBlock2D" if config.resblock_updown else "DownBlock2D", has_attention
        ),
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": blocks(
            "Up", "ResnetUpsampleBlock2D" if config.resblock_updown else "UpBlock2D", has_attention[::-1]
        ),
        "block_out_channels": [config.base_channels * mult for mult in config.channel_mults],
        "layers_per_block": config.num_res_blocks,
        "mid_block_scale_factor": 1,
        "downsample_padding": config.downsample_padding,
        "downsample_type": kind,
        "upsample_type": kind,
        "dropout": config.dropout,
        "act_fn": "silu",
        "attention_head_dim": _head_channels(config) or None,
        "norm_num_groups": groups,
        "attn_norm_num_groups": groups,
        "norm_eps": config.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift_norm else "default",
        "add_attention": True,
        "class_embed_type": None,
        "num_class_embeds": None if config.num_classes is None else config.num_classes + config.null_class,
    }


def scheduler_json(config: DiffusionConfig, limit: str) -> dict[str, Any]:
    """DDPMScheduler's configuration, with the `limit` of x0 that the checkpoint is sampled with.

    Consistency models have CMStochasticIterativeScheduler's. Raises UnsupportedExportError for other levels of noise.
    """
    if (sigmas := config.sigmas) is not None:
        if config.prediction != CONSISTENCY:
            raise UnsupportedExportError("no pipeline of diffusers can express its diffusion: EDM's levels of noise")
        if limit == "dynamic" or sigmas.time_scale != CM_TIME_SCALE:
            raise UnsupportedExportError(f"{CM_SCHEDULER} cannot express its limit of x0, or its time_scale")
        told = {name: getattr(sigmas, name) for name in CM_SIGMAS} | {"clip_denoised": limit == "clamp"}
        return {"_class_name": CM_SCHEDULER, "_diffusers_version": "0.31.0", **told}
    scale = 1000 / config.num_timesteps  # theirs does not scale its betas
    betas = list(config.trained_betas) or None
    if config.schedule == "sigmoid":  # theirs of that name is another
        betas = SCHEDULES["sigmoid"](config).tolist()
    return {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": "0.31.0",
        "num_train_timesteps": config.num_timesteps,
        "beta_schedule": "squaredcos_cap_v2" if config.schedule == "cosine" else "linear",
        "beta_start": config.schedule_low * scale,
        "beta_end": config.schedule_high * scale,
        "trained_betas": betas,  # which count, where there are some
        "prediction_type": {ours: theirs for theirs, ours in PREDICTIONS.items()}[config.prediction],
        "variance_type": config.variance,
        "clip_sample": limit == "clamp",
        "clip_sample_range": 1.0,
        "thresholding": limit == "dynamic",
        "dynamic_thresholding_ratio": DYNAMIC_QUANTILE,
        "sample_max_value": UNLIMITED,
        "timestep_spacing": "trailing",
        "rescale_betas_zero_snr": config.zero_terminal_snr,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m model.exporters", description=__doc__.split("\n")[0])
    parser.add_argument("source", help="a checkpoint's file, or the name of a bundled one")
    parser.add_argument("destination", type=Path, help="the folder to write")
    parser.add_argument(
        "--class_label", type=int, help="number of the one class to export, where classes act in blocks"
    )
    given = parser.parse_args(argv)
    try:
        source = checkpoint.load(given.source)
        export(source, given.destination, given.class_label)
    except (ValueError, OSError) as error:
        print(f"model.exporters: {error}", file=sys.stderr)
        return 2
    if source.config.fitted:
        print("model.exporters: diffusers has no fitted tables: they are left out", file=sys.stderr)
    print(given.destination)
    return 0
