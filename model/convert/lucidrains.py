"""Weights of lucidrains/denoising-diffusion-pytorch, from its version 2.0.0 on, and of its classifier-free network."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.convert.betas import PRECISION, diffusion_of
from model.convert.layout import (
    Flags,
    Imported,
    Source,
    UnsupportedCheckpointError,
    Weights,
    as_float32,
    diffusion_by_flags,
    format_value,
)
from model.diffusion import MIN_SNR_GAMMA, Table
from model.nn.config import LucidrainsConfig
from model.nn.lucidrains import LucidrainsUNet

SIGN = "final_res_block.block1.proj.weight"
HEADS, WIDTH = 4, 32  # of every linear attention of the classifier-free network, and by default of its middle's

RENAMED: tuple[tuple[str, str], ...] = (  # ours → theirs, one after another
    (r"^time_mlp\.0", "time_mlp.1"),
    (r"^time_mlp\.2", "time_mlp.3"),
    (r"^class_emb\.", "classes_emb."),
    (r"^class_mlp\.", "classes_mlp."),
    (r"^mid\.attention", "mid_attn"),
    (r"^mid\.block_", "mid_block"),
    (r"^out_block", "final_res_block"),
    (r"^out_conv", "final_conv"),
    (r"^(downs|ups)\.(\d+)\.block_1", r"\1.\2.0"),
    (r"^(downs|ups)\.(\d+)\.block_2", r"\1.\2.1"),
    (r"^(downs|ups)\.(\d+)\.attention", r"\1.\2.2"),
    (r"^(downs|ups)\.(\d+)\.resample\.conv", r"\1.\2.3"),
    (r"\.scale_shift\.", ".mlp.1."),
    (r"\.conv_([12])\.", r".block\1.proj."),
    (r"\.norm_([12])\.weight", r".block\1.norm.g"),
    (r"\.shortcut\.", ".res_conv."),
    (r"\.out_norm\.weight", ".to_out.1.g"),
    (r"\.norm\.weight", ".norm.g"),
    (r"\.qkv\.", ".to_qkv."),
    (r"\.out\.", ".to_out."),
    (r"\.memory$", ".mem_kv"),
)
# Names that theirs have where a container has more than one part: to none, so that a layer has one name.
CONTAINERS: tuple[tuple[str, str], ...] = (
    (r"^((?:downs|ups)\.\d+\.3)\.1\.", r"\1."),
    (r"\.fn\.fn\.", "."),
    (r"\.fn\.norm\.", ".norm."),
    (r"\.to_out\.0\.", ".to_out."),
)


def import_lucidrains(state: dict[str, Any], flags: Flags) -> Imported:
    """Its Trainer's `model-1.pt`, a GaussianDiffusion's or an EMA's `state_dict()`, or that of a U-Net alone."""
    process, used = _chosen(state, flags)
    prefix = next(name for name in process if name.endswith(SIGN)).removesuffix(SIGN)
    network = Source({name.removeprefix(prefix): t for name, t in process.items() if name.startswith(prefix)})
    if problem := _other_form(network, state.get("version")):
        raise UnsupportedCheckpointError(problem)
    config, assumed = _config(network, flags)
    variance = "learned_range" if config.learned_variance else "fixed_small"
    if not prefix:
        usual = ("sigmoid", "v") if config.num_classes is None else ("cosine", "eps")
        flags.need(num_timesteps=1000, schedule=usual[0], prediction=usual[1])
        diffusion, origin = diffusion_by_flags(flags, variance=variance), "by flags; the file is a network's alone"
    elif prefix == "model." and "betas" in process:
        betas = process["betas"]
        plain = diffusion_of(betas.double().numpy(), betas.dtype, variance=variance)
        prediction, weighting, more = _objective(process.get("loss_weight"), plain.betas(), flags)
        if config.learned_variance:  # LearnedGaussianDiffusion, whatever its objective says
            prediction = "eps"
        diffusion = replace(plain, prediction=prediction, weighting=weighting)
        origin, assumed = "from its betas and loss_weight", (*assumed, *more)
    else:
        raise UnsupportedCheckpointError(
            "it is a lucidrains checkpoint of another diffusion than GaussianDiffusion (continuous-time, elucidated, "
            "…), whose timesteps are not those of a DDPM"
        )
    if config.num_classes is not None:
        used |= {"num_heads"}  # the middle's, whose width the file has
    return Imported(_converted(network, config), config, diffusion, origin, assumed, used=used)


def _chosen(state: dict[str, Any], flags: Flags) -> tuple[Weights, frozenset[str]]:
    """What holds the weights that are asked for, and the flags that chose."""
    both = frozenset({"weights"})
    if isinstance(state.get("model"), dict):
        if flags.weights == "raw" or not isinstance(state.get("ema"), dict):
            if flags.weights == "ema":
                raise UnsupportedCheckpointError("it has no average (ema): give --weights raw, or leave it out")
            return state["model"], both
        state = state["ema"]
    if any(name.startswith("ema_model.") for name in state):
        prefix = "online_model." if flags.weights == "raw" else "ema_model."
        part = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        if not any(name.endswith(SIGN) for name in part):
            raise UnsupportedCheckpointError("it has no weights but the average: leave out --weights raw")
        return part, both
    return state, frozenset()


def _other_form(network: Source, version: Any) -> str | None:
    """What is not the present form of their network, in words."""
    if network["init_conv.weight"].dim() != 4:
        return "it is a lucidrains network of sequences (Unet1D), which makes no images"
    if "time_mlp.0.weights" in network:
        return "its times are embedded by random or learned Fourier features, which no GaussianDiffusion there takes"
    if SIGN.replace("proj.weight", "norm.weight") not in network:
        return None
    if "null_classes_emb" in network:
        which = "before 2.0.0"
    elif any(name.endswith("mem_kv") for name in network):
        which = "from 1.9.0 to 1.11"
    else:
        which = "from 0.32.0 to 1.8" if "downs.0.3.1.weight" in network else "before 0.32.0"
    said = f"{version}, as the file says" if isinstance(version, str) else which
    return (
        f"it was made by denoising-diffusion-pytorch {said}: its network has group norms; "
        "those of version 2.0.0 and later, with RMS norms, are imported"
    )


def _config(network: Source, flags: Flags) -> tuple[LucidrainsConfig, tuple[str, ...]]:
    """The architecture, read off the tensors, and what was assumed."""
    channels, out = network["init_conv.weight"].shape[1], len(network["final_conv.weight"])
    if channels == 2 * out:
        raise UnsupportedCheckpointError(
            "it is self-conditioned: its network takes its last prediction as an input, which is not done here"
        )
    if out not in (channels, 2 * channels):
        raise UnsupportedCheckpointError(f"its network makes {out} channels of {channels}, which is no image")
    if flags.image_size is None:
        raise UnsupportedCheckpointError(
            "the file does not tell the size of its images: add --image_size HEIGHT,WIDTH, its image_size"
        )
    classes = network.get("classes_emb.weight")
    levels = len({name.split(".")[1] for name in network if name.startswith("downs.")})
    places = [*(f"downs.{i}.2" for i in range(levels)), "mid_attn"]
    full = tuple(f"{place}.to_out.weight" in network for place in places[:-1])
    dim = network["time_mlp.1.weight"].shape[1]
    ends = [_either(network, f"downs.{i}.3.weight", f"downs.{i}.3.1.weight") for i in range(levels)]
    if any(len(end) % dim for end in ends):
        raise UnsupportedCheckpointError("its levels are not of widths that are multiples of its dim")
    assumed: tuple[str, ...] = () if flags.time_theta else ("time_theta 10000",)
    if classes is None:
        sizes = [network[f"{place}.mem_kv"].shape for place in places]
        is_full = [*full, True]
        heads = [size[1] for size in sizes]
        widths = [size[3 if at else 2] for size, at in zip(sizes, is_full, strict=True)]
        memories = {size[2 if at else 3] for size, at in zip(sizes, is_full, strict=True)}
        if len(memories) != 1:
            raise UnsupportedCheckpointError("its attentions have different numbers of learned keys")
        memory = memories.pop()
    else:
        hidden, memory = network["mid_attn.fn.fn.to_qkv.weight"].shape[0] // 3, 0
        middle = flags.num_heads or HEADS
        if flags.num_heads is None and hidden != HEADS * WIDTH:
            raise UnsupportedCheckpointError("the file does not tell its attn_heads: add --num_heads")
        if hidden % middle:
            raise UnsupportedCheckpointError(
                f"--num_heads {middle} does not divide the {hidden} channels of its attention"
            )
        heads, widths = [*[HEADS] * levels, middle], [*[WIDTH] * levels, hidden // middle]
        assumed += () if flags.num_heads else (f"num_heads {HEADS}",)
    config = LucidrainsConfig(
        image_channels=channels,
        image_size=flags.image_size,
        dim=dim,
        init_dim=len(network["init_conv.weight"]),
        dim_mults=tuple(len(end) // dim for end in ends),
        full_attention=full,
        heads=tuple(heads),
        head_channels=tuple(widths),
        memory=memory,
        strided=classes is not None,
        num_classes=None if classes is None else len(classes),
        null_class=classes is not None,
        learned_variance=out == 2 * channels,
        time_theta=flags.time_theta or 10_000.0,
    )
    return config, assumed


def _either(network: Source, name: str, other: str) -> Tensor:
    return network[name] if name in network else network[other]


def _objective(weights: Tensor | None, betas: Table, flags: Flags) -> tuple[str, str, tuple[str, ...]]:
    """Prediction and weighting, and what of them is not kept, from the weight of each timestep's loss [T].

    Theirs is min(SNR, γ), over SNR for a network that predicts ε, and over SNR + 1 for one that predicts v.
    """
    if weights is None or weights.shape != betas.shape:
        flags.need(prediction="v")
        return flags.prediction or "v", "none", ()
    alpha_bar = np.cumprod(1 - betas)
    snr = alpha_bar / (1 - alpha_bar)
    for prediction, factor in (("eps", snr), ("x0", np.ones_like(snr)), ("v", snr + 1)):
        clipped = weights.double().numpy() * factor
        gamma = clipped.max()
        if np.allclose(clipped, np.minimum(snr, gamma), PRECISION.get(weights.dtype, (1e-3, 0))[0], 0):
            if np.isclose(gamma, snr.max(), 1e-2):
                return prediction, "none", ()
            if np.isclose(gamma, MIN_SNR_GAMMA, 1e-2):
                return prediction, "min_snr", ()
            return prediction, "none", (f"weighting none: its min_snr_gamma {format_value(float(gamma))} is not here",)
    raise UnsupportedCheckpointError(
        "its loss_weight is that of no objective of its GaussianDiffusion (pred_noise, pred_x0, pred_v)"
    )


def _converted(network: Source, config: LucidrainsConfig) -> Weights:
    """Under our names. Raises UnsupportedCheckpointError where a tensor is missing, left over, or of another shape."""
    left = Source({_substituted(name, CONTAINERS): tensor for name, tensor in network.items()})
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in LucidrainsUNet(config).state_dict().items()}
    if config.null_class:
        left["classes_emb.weight"] = torch.cat([left["classes_emb.weight"], left.take("null_classes_emb")[None]])
    is_full = dict(zip((f"downs.{i}" for i in range(len(config.full_attention))), config.full_attention, strict=True))
    is_full |= {f"ups.{i}": full for i, full in enumerate(reversed(config.full_attention))}
    result: Weights = {}
    for name, shape in expected.items():
        tensor = left.take(_substituted(name, RENAMED))
        if name.endswith("memory") and not is_full.get(name.removesuffix(".attention.memory"), True):
            tensor = tensor.transpose(2, 3)  # a linear attention has its width before its number of keys
        if tensor.dim() == 4 and len(shape) == 1:  # the gain of a norm
            tensor = tensor.flatten() if tensor.shape[1] == tensor.numel() else tensor
        result[name] = as_float32(name, tensor, shape)
    if left:
        raise UnsupportedCheckpointError(
            f"{len(left)} tensors belong to no layer of such a network, {min(left)!r} among them"
        )
    return result


def _substituted(name: str, pairs: tuple[tuple[str, str], ...]) -> str:
    for pattern, text in pairs:
        name = re.sub(pattern, text, name)
    return name
