"""Weights of Hugging Face diffusers: a UNet2DModel or DDPMPipeline folder. Only its JSON and its tensors are read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from model.convert import scheduler
from model.convert.files import TENSORFLOW, TENSORFLOW_SAYS, folder_weights, read_json
from model.convert.layout import (
    Flags,
    Imported,
    Layout,
    Source,
    UnsupportedCheckpointError,
    Weights,
    convert,
    cosines_first,
    diffusion_by_flags,
    layers,
    norm_groups,
    separate_qkv,
)
from model.diffusion import DiffusionConfig
from model.nn.config import UNetConfig
from model.nn.layers import ResBlock
from model.nn.unet import UNet
from model.sampling.solvers import CONSISTENCY

OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
CONSISTENCY_PIPELINE = "ConsistencyModelPipeline"
PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline", CONSISTENCY_PIPELINE)
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


@dataclass(frozen=True)
class _Folder:
    """What the configurations in a folder tell: all but the weights."""

    path: Path  # of the network
    theirs: dict[str, Any]
    unet: UNetConfig
    diffusion: DiffusionConfig
    origin: str
    assumed: tuple[str, ...]
    limit: str


def import_folder(source: Path, flags: Flags) -> Imported:
    """A network's folder, that of a pipeline, or of a training's checkpoint. Raises UnsupportedCheckpointError."""
    folder = _described(source, flags)
    state, file = folder_weights(folder.path)
    has_average = folder.path.name == "unet_ema" or (folder.path.parent / "unet_ema").is_dir()
    return Imported(
        _converted(state, folder.theirs, folder.unet),
        folder.unet,
        folder.diffusion,
        f"{folder.origin}; weights from {folder.path.name}/{file}",
        folder.assumed,
        folder.limit,
        frozenset({"weights"} if has_average else ()),
        {"sampler": CONSISTENCY, "steps": 1} if folder.diffusion.prediction == CONSISTENCY else {},
    )


def check_folder(source: Path, flags: Flags) -> None:
    """Raises UnsupportedCheckpointError where `import_folder` would, whatever the weights are: without them."""
    _described(source, flags)


def _described(source: Path, flags: Flags) -> _Folder:
    path = _network(source, flags)
    indices = [above / "model_index.json" for above in (source, path.parent)]
    pipelines = [_checked_pipeline(read_json(index)) for index in indices if index.exists()]
    if not (path / "config.json").exists():
        if any(TENSORFLOW.search(file.name) for file in source.iterdir()):
            raise UnsupportedCheckpointError(TENSORFLOW_SAYS)
        raise UnsupportedCheckpointError("this folder has no config.json, and no unet/config.json, as diffusers' have")
    theirs = read_json(path / "config.json")
    unet = unet_config(theirs, flags)
    assumed = [] if theirs.get("sample_size") or flags.image_size else ["image_size 32,32"]
    if path.name == "unet" and flags.weights is None and (path.parent / "unet_ema").is_dir():
        assumed.append("the raw weights are meant, though there is unet_ema")
    configuration = scheduler.find_scheduler(source, path)
    told = {} if configuration is None else read_json(configuration)
    if CONSISTENCY_PIPELINE in pipelines and told.get("_class_name") != scheduler.CM_SCHEDULER:
        raise UnsupportedCheckpointError(f"it is a {CONSISTENCY_PIPELINE}, but without a {scheduler.CM_SCHEDULER}")
    if configuration is None:
        flags.need(num_timesteps=1000, schedule="linear", prediction="eps")
        if not unet.learned_variance:
            flags.need(variance="fixed_small")
        flags.need_ends()
        variance = "learned_range" if unet.learned_variance else "fixed_small"
        diffusion, limit = diffusion_by_flags(flags, variance=variance), "clamp"
        return _Folder(path, theirs, unet, diffusion, "by flags, since there is no scheduler", tuple(assumed), limit)
    diffusion, limit, more = scheduler.read(told, unet.learned_variance)
    origin = f"from {told['_class_name']} in {configuration}"
    return _Folder(path, theirs, unet, diffusion, origin, (*assumed, *more), limit)


def _network(source: Path, flags: Flags) -> Path:
    """Where the network is. The average is preferred, unless the raw weights, or this very folder, are asked for."""
    has_network = (source / "config.json").exists() or not (source / "unet").is_dir()
    home = source.parent if source.name in ("unet", "unet_ema") and flags.weights else source
    wanted = ["unet_ema", "unet"] if flags.weights != "raw" else ["unet"]
    if home != source or not has_network or (source / "unet_ema").is_dir():
        for name in wanted:
            if (home / name / "config.json").exists():
                return home / name
    return source


def _checked_pipeline(index: dict[str, Any]) -> str:
    """Its name. Raises UnsupportedCheckpointError where it does not make images from a UNet2DModel's noise alone."""
    name = index.get("_class_name")
    if latent := [part for part in ("vae", "vqvae", "movq", "image_encoder") if part in index]:
        raise UnsupportedCheckpointError(
            f"it is a {name}: its network works on latents of its {latent[0]}, not on images"
        )
    if name not in PIPELINES:
        raise UnsupportedCheckpointError(
            f"it is a {name}; the pipelines that can be imported are {', '.join(PIPELINES)}"
        )
    return str(name)


def _converted(state: Weights, theirs: dict[str, Any], config: UNetConfig) -> Weights:
    source = Source(state)
    for name in [name for name in source if ".attentions." in name]:
        head, _, leaf = name.rpartition(".")
        place, _, layer = head.rpartition(".")
        if layer in OLD_NAMES:
            source[f"{place}.{OLD_NAMES[layer]}.{leaf}"] = source.pop(name)
    if theirs.get("flip_sin_to_cos", True) and not config.time_table:
        first = "time_embedding.linear_1.weight"
        source[first] = cosines_first(source[first])
    return convert(source, config, DIFFUSERS)


def unet_config(theirs: dict[str, Any], flags: Flags) -> UNetConfig:
    """Their network's configuration in our words. Raises UnsupportedCheckpointError for what ours cannot express."""
    get = theirs.get
    if get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise UnsupportedCheckpointError(f"it is a {get('_class_name')}; only UNet2DModel can be imported")
    groups, scale_shift = get("norm_num_groups", 32), get("resnet_time_scale_shift", "default") == "scale_shift"
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
        ("downsample_type", get("downsample_type", "conv"), ("conv", "resnet")),
        ("upsample_type", get("upsample_type", "conv"), ("conv", "resnet")),
        # the middle's attention has the groups of all others; with scale_shift none at all, where it does not tell
        ("attn_norm_num_groups", get("attn_norm_num_groups"), (groups,) if scale_shift else (None, groups)),
    ]:
        if value not in valid:
            raise UnsupportedCheckpointError(f"its {name} is {value!r}, which cannot be expressed here")
    attention = [DOWN[block] for block in down]
    if [UP[block] for block in reversed(up)] != attention or len(widths) != len(down) or not widths:
        raise UnsupportedCheckpointError("its levels differ on the way down and up, which cannot be expressed here")
    if any(width % widths[0] for width in widths):
        raise UnsupportedCheckpointError(
            f"its widths {widths} are not whole multiples of the first, which cannot be expressed here"
        )
    kinds = (
        {  # of what changes the resolution, after each level but the last: a residual block, or a convolution
            block.startswith("Resnet") or (block.startswith("Attn") and get(f"{way}sample_type", "conv") == "resnet")
            for way, blocks in (("down", down), ("up", up))
            for block in blocks[:-1]
        }
        or {False}
    )
    if len(kinds) != 1:
        raise UnsupportedCheckpointError("it mixes ways of changing the resolution, which cannot be expressed here")
    size = get("sample_size") or flags.image_size or (32, 32)
    head = get("attention_head_dim", 8)
    in_channels, out_channels = get("in_channels", 3), get("out_channels", 3)
    if out_channels not in (in_channels, 2 * in_channels):
        raise UnsupportedCheckpointError(
            f"it has {in_channels} channels in and {out_channels} out, which cannot be expressed here"
        )
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
        **flags.classes(labels),
        class_conditioning="embedding",
        dropout=get("dropout", 0.0),
        head_channels=head or 0,
        learned_variance=out_channels == 2 * in_channels,
        scale_shift_norm=scale_shift,
        resblock_updown=kinds == {True},
        norm_groups=groups,
        norm_eps=get("norm_eps", 1e-5),
        downsample_padding=get("downsample_padding", 1),
        time_freq_shift=get("freq_shift", 0),
        time_table=get("num_train_timesteps") or 0 if is_table else 0,
    )
    if any(groups != config.norm_groups for groups in norm_groups(config)):
        raise UnsupportedCheckpointError(
            f"its norms have {config.norm_groups} groups, which do not divide all channels"
        )
    return config
