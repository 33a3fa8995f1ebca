"""python -m model.importers SRC DST: other projects' weights → a checkpoint of ours. Never executes what it loads.

All of these networks are Ho et al.'s U-Net in other words: the same layers in the same order under other names, with
conventions that `UNetConfig` can express. What a file cannot tell comes by flags and is stored in our checkpoint.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model import checkpoint
from model.checkpoint import CheckpointConfig
from model.diffusion import SCHEDULES, DiffusionConfig
from model.unet import ResBlock, UNet, UNetConfig

Weights = dict[str, Tensor]


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


def _layers(network: UNet) -> Iterator[tuple[str, torch.nn.Module]]:
    for group in ("downs", "mid", "ups"):
        for i, layer in enumerate(getattr(network, group)):
            yield f"{group}.{i}", layer


def _separate_qkv(q: str, k: str, v: str) -> Callable[[Weights, str, UNetConfig], tuple[Tensor, Tensor]]:
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


# abarankab/DDPM, "the original"


def _original_place(network: UNet) -> Iterator[tuple[str, str, str]]:
    for ours, layer in _layers(network):
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


def import_original(state: Weights, flags: Flags) -> tuple[Weights, UNetConfig, DiffusionConfig]:
    """`GaussianDiffusion.state_dict()`: everything but dropout and activation (silu) is in the file."""
    betas = state["betas"].double().numpy()
    prefix = "ema_model." if flags.weights == "ema" else "model."
    source = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    levels: list[list[tuple[int, bool]]] = [[]]
    for k in itertools.count():
        if f"downs.{k}.downsample.weight" in source:
            levels.append([])
        elif f"downs.{k}.conv_1.weight" in source:
            has_attention = f"downs.{k}.attention.to_qkv.weight" in source
            levels[-1].append((len(source[f"downs.{k}.conv_1.weight"]), has_attention))
        else:
            break
    if "downs.0.norm_1.running_mean" in source:
        norm = "bn"
        source = {name: t for name, t in source.items() if not name.endswith("num_batches_tracked")}
    else:
        norm = "gn" if "downs.0.norm_1.weight" in source else "none"
    classes = source.get("downs.0.class_bias.weight")
    config = UNetConfig(
        image_channels=source["init_conv.weight"].shape[1],
        image_size=flags.image_size,
        time_emb_dim=len(source["time_mlp.1.weight"]),
        num_classes=None if classes is None else len(classes),
        norm=norm,
        **architecture(levels, len(source["init_conv.weight"])),
    )
    return convert(source, config, ORIGINAL), config, _diffusion_of(betas)


def _diffusion_of(betas: np.ndarray) -> DiffusionConfig:
    """The beta schedule that these betas, float32 in the file, are."""
    steps = len(betas)
    scale = 1000 / steps
    candidates = [
        DiffusionConfig(steps, "cosine"),
        DiffusionConfig(steps, "linear"),
        DiffusionConfig(steps, "linear", float(f"{betas[0] / scale:.6g}"), float(f"{betas[-1] / scale:.6g}")),
    ]
    for candidate in candidates:
        if np.allclose(candidate.betas(), betas, rtol=1e-5, atol=1e-9):
            return candidate
    raise ImportRefused("its betas are neither a linear nor the cosine schedule")


# w86763777/pytorch-ddpm


def _w86_place(network: UNet) -> Iterator[tuple[str, str, str]]:
    for ours, layer in _layers(network):
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
        "time_mlp.0": "time_embedding.timembedding.1",
        "time_mlp.2": "time_embedding.timembedding.3",
        "init_conv": "head",
        "out_norm": "tail.0",
        "out_conv": "tail.2",
    },
    place=_w86_place,
    qkv=_separate_qkv("proj_q", "proj_k", "proj_v"),
)


def import_w86763777(state: dict[str, Any], flags: Flags) -> tuple[Weights, UNetConfig, DiffusionConfig]:
    """`ckpt.pt`: {net_model, ema_model, …}. Its embedding table alternates sines and cosines. Always linear betas."""
    source = dict(state["ema_model" if flags.weights == "ema" else "net_model"])
    table = source.pop("time_embedding.timembedding.0.weight")
    first = source["time_embedding.timembedding.1.weight"]
    source["time_embedding.timembedding.1.weight"] = torch.cat([first[:, 0::2], first[:, 1::2]], dim=1)
    levels: list[list[tuple[int, bool]]] = [[]]
    for k in itertools.count():
        if f"downblocks.{k}.main.weight" in source:
            levels.append([])
        elif f"downblocks.{k}.block1.2.weight" in source:
            has_attention = f"downblocks.{k}.attn.proj.weight" in source
            levels[-1].append((len(source[f"downblocks.{k}.block1.2.weight"]), has_attention))
        else:
            break
    config = UNetConfig(
        image_channels=source["head.weight"].shape[1],
        image_size=flags.image_size,
        time_emb_dim=len(first),
        **architecture(levels, len(source["head.weight"])),
    )
    return convert(source, config, W86), config, DiffusionConfig(len(table), "linear", 1e-4 * len(table) / 1000, 0.02 * len(table) / 1000)


# openai/improved-diffusion and openai/guided-diffusion


def _openai_place(network: UNet) -> Iterator[tuple[str, str, str]]:
    outer = -1  # an up-sampling stands inside the block of the residual block before it
    inside = 0
    for ours, layer in _layers(network):
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


def import_openai(state: Weights, flags: Flags) -> tuple[Weights, UNetConfig, DiffusionConfig]:
    """A bare U-Net. Heads, their order, T and the beta schedule come by flags. It embeds cosines before sines."""
    source = dict(state)
    first = source["time_embed.0.weight"]
    half = first.shape[1] // 2
    source["time_embed.0.weight"] = torch.cat([first[:, half:], first[:, :half]], dim=1)
    ups = [n for n in source if n.startswith("output_blocks.") and n.endswith((".2.conv.weight", ".1.conv.weight"))]
    res_ups = [n for n in source if n.startswith("output_blocks.") and n.endswith(".in_layers.0.weight")]
    res_ups = [n for n in res_ups if n.split(".")[2] != "0"]
    num_levels = 1 + len(ups) + len(res_ups)
    count = sum(f"input_blocks.{i}.0.in_layers.2.weight" in source or f"input_blocks.{i}.0.op.weight" in source for i in range(1, 1000))
    per_level = (count + 1) // num_levels  # residual blocks and what halves the resolution after them
    levels = []
    for level in range(num_levels):
        numbers = range(1 + level * per_level, (level + 1) * per_level)
        try:
            levels.append(
                [(len(source[f"input_blocks.{i}.0.in_layers.2.weight"]), f"input_blocks.{i}.1.qkv.weight" in source) for i in numbers]
            )
        except KeyError as error:
            raise ImportRefused(f"tensor {error} is missing") from error
    in_channels, out_channels = source["input_blocks.0.0.weight"].shape[1], len(source["out.2.weight"])
    labels = source.get("label_emb.weight")
    scale_shift = len(source["middle_block.0.emb_layers.1.weight"]) == 2 * len(source["middle_block.0.out_layers.0.weight"])
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
    diffusion = DiffusionConfig(flags.num_timesteps, flags.schedule)
    return convert(source, config, OPENAI), config, diffusion


def _heads_first_to_qkv_first(fused: Tensor, flags: Flags) -> Tensor:
    """The older attention order has channels as heads × (q, k, v) × width."""
    channels = len(fused) // 3
    heads = channels // flags.head_channels if flags.head_channels else flags.num_heads
    return fused.reshape(heads, 3, channels // heads, *fused.shape[1:]).transpose(0, 1).reshape(fused.shape)


# Which is it?


def recognise(state: Any) -> Callable[[Any, Flags], tuple[Weights, UNetConfig, DiffusionConfig]]:
    """The importer for a loaded file. Raises ImportRefused, naming what it is where that is known."""
    keys = set(state) if isinstance(state, dict) else set()
    if "betas" in keys and any(str(key).startswith("ema_model.downs.") for key in keys):
        return import_original
    if {"net_model", "ema_model"} <= keys:
        return import_w86763777
    if {"time_embed.0.weight", "input_blocks.0.0.weight"} <= keys:
        return import_openai
    if {"model", "ema", "opt"} <= keys or any("mem_kv" in str(key) for key in keys):
        raise ImportRefused("this is a lucidrains checkpoint: another architecture (linear attention, RMS norm), not importable")
    if isinstance(state, list):
        raise ImportRefused("this is a list, as ermongroup/ddim saves: not importable")
    if {"state", "param_groups"} <= keys:
        raise ImportRefused("this is an optimiser's state, not a network's: import the file with the weights")
    raise ImportRefused("this is not a checkpoint of a project known here (see --help)")


def load_weights(path: Path) -> Any:
    """The content of a .pt, .pth or .safetensors file, tensors only. Raises ImportRefused for anything else."""
    if not path.is_file():
        raise ImportRefused(f"no file {path}")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ImportRefused("it holds code or objects besides tensors (as EDM's pickles do) and is not loaded") from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ImportRefused(f"it is damaged, or no PyTorch file: {str(error).splitlines()[0]}") from error


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m model.importers", description=__doc__.split("\n")[0])
    parser.add_argument("source", help="abarankab/DDPM .pth, w86763777 ckpt.pt, improved- or guided-diffusion .pt")
    parser.add_argument("destination", help="the checkpoint to write (.safetensors)")
    for f in fields(Flags):
        default = f.default
        if isinstance(default, bool):
            parser.add_argument(f"--{f.name}", action="store_true")
        elif isinstance(default, tuple):
            parser.add_argument(f"--{f.name}", type=lambda text: tuple(text.split(",")), default=default)
        else:
            choices = {"weights": ("ema", "raw"), "schedule": tuple(SCHEDULES)}.get(f.name)
            parser.add_argument(f"--{f.name}", type=type(default), default=default, choices=choices)
    given = vars(parser.parse_args(argv))
    source, destination = Path(given.pop("source")), given.pop("destination")
    try:
        given["image_size"] = tuple(int(side) for side in given["image_size"])
        flags = Flags(**given)
        state = load_weights(source)
        weights, unet, diffusion = recognise(state)(state, flags)
        names = flags.class_names or tuple(str(i) for i in range(unet.num_classes or 0))
        provenance = {"imported_from": source.name, "flags": {k: v for k, v in given.items() if v}}
        checkpoint.save(destination, weights, CheckpointConfig(unet, diffusion, names, provenance=provenance))
    except (ValueError, OSError, KeyError) as error:
        print(f"model.importers: {source.name}: {error}", file=sys.stderr)
        return 2
    print(f"{destination}: {json.dumps({'parameters': sum(t.numel() for t in weights.values())})}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
