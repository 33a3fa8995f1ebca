"""python -m model.importers SRC DST: other projects' weights → a checkpoint of ours. Never executes what it loads.

What a file cannot tell comes by flags and is stored in our checkpoint.
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model import checkpoint
from model.checkpoint import CheckpointConfig
from model.convert.abarankab import import_original, import_w86763777
from model.convert.diffusers import import_diffusers
from model.convert.layout import Flags, Imported, ImportRefused
from model.convert.openai import import_openai
from model.diffusion import SCHEDULES
from model.nn.layers import ACTIVATIONS
from model.sampling.schedule import SamplingDefaults

DIFFUSERS_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def import_path(source: Path, flags: Flags) -> Imported:
    """Weights and configuration of a file, or of a diffusers folder. Raises ImportRefused with a sentence."""
    try:
        if not source.is_dir():
            state = load_weights(source)
            return _checked(recognise(state)(state, flags))
        unet = source / "unet" if (source / "unet").is_dir() else source
        if not (unet / "config.json").is_file():
            raise ImportRefused("this folder has no config.json, and no unet/config.json, as diffusers' have")
        for name in DIFFUSERS_FILES:
            if (unet / name).is_file():
                return _checked(import_diffusers(source, load_weights(unet / name), flags))
        raise ImportRefused(f"there is neither {' nor '.join(DIFFUSERS_FILES)} in {unet}")
    except (KeyError, AttributeError, IndexError, TypeError, ZeroDivisionError) as error:
        raise ImportRefused(f"something is missing in it, or not what it should be: {error!r}") from error


def _checked(imported: Imported) -> Imported:
    for name, tensor in imported[0].items():
        if not torch.isfinite(tensor).all():
            raise ImportRefused(f"tensor {name!r} has numbers that are not finite")
    return imported


def recognise(state: Any) -> Callable[[Any, Flags], Imported]:
    """The importer for a loaded file. Raises ImportRefused, naming what it is where that is known."""
    keys = {str(key) for key in state} if isinstance(state, dict) else set()
    if "betas" in keys and any(key.startswith("ema_model.downs.") for key in keys):
        return import_original
    if {"net_model", "ema_model"} <= keys:
        return import_w86763777
    if {"time_embed.0.weight", "input_blocks.0.0.weight"} <= keys:
        return import_openai
    if {"model", "opt", "ema"} <= keys or any("mem_kv" in key for key in keys):
        raise ImportRefused("it is a lucidrains checkpoint: another architecture (linear attention, RMS norm)")
    if {"model", "optimizer", "ema"} <= keys:
        raise ImportRefused("it is a tqch/ddpm-torch checkpoint, which cannot be imported")
    if isinstance(state, list) or "temb.dense.0.weight" in keys:
        raise ImportRefused("it is a checkpoint of ermongroup/ddim or pesser/pytorch_diffusion, not importable")
    if {"time_embedding.linear_1.weight", "conv_in.weight"} <= keys:
        raise ImportRefused("it has diffusers' weights without their configuration: give the folder with config.json")
    if {"state", "param_groups"} <= keys:
        raise ImportRefused("it is an optimiser's state, not a network's: import the file with the weights")
    raise ImportRefused("it is not a checkpoint of a project known here (see --help)")


def load_weights(path: Path) -> Any:
    """The content of a .pt, .pth, .bin or .safetensors file, tensors only. Raises ImportRefused for anything else."""
    if not path.is_file():
        raise ImportRefused(f"no file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise ImportRefused(
            "it holds code or objects besides tensors (as EDM's pickles do) and is not loaded"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, LookupError, OSError) as error:
        first = (str(error).splitlines() or [repr(error)])[0]
        raise ImportRefused(f"it is damaged, or no such file: {first}") from error


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m model.importers", description=__doc__.split("\n")[0])
    parser.add_argument(
        "source",
        help="abarankab/DDPM .pth, w86763777 ckpt.pt, improved- or guided-diffusion .pt, or a diffusers folder "
        "(UNet2DModel or DDPMPipeline)",
    )
    parser.add_argument("destination", help="the checkpoint to write (.safetensors)")
    choices = {
        "weights": ("ema", "raw"),
        "schedule": tuple(SCHEDULES),
        "norm": ("gn", "in"),
        "activation": tuple(ACTIVATIONS),
    }
    for f in fields(Flags):
        if isinstance(f.default, bool):
            parser.add_argument(f"--{f.name}", action="store_true")
        elif isinstance(f.default, tuple):
            kind = int if f.default else str
            parser.add_argument(f"--{f.name}", type=_tuple_of(kind), default=f.default, help="a,b,…")
        else:
            parser.add_argument(f"--{f.name}", type=type(f.default), default=f.default, choices=choices.get(f.name))
    given = vars(parser.parse_args(argv))
    source, destination = Path(given.pop("source")), given.pop("destination")
    try:
        weights, unet, diffusion = import_path(source, Flags(**given))
        names = given["class_names"] or tuple(str(i) for i in range(unet.num_classes or 0))
        provenance = {"imported_from": source.name, "flags": {k: v for k, v in given.items() if v}}
        sampling = SamplingDefaults(steps=min(SamplingDefaults.steps, diffusion.num_timesteps))
        checkpoint.save(destination, weights, CheckpointConfig(unet, diffusion, names, sampling, provenance))
    except (ValueError, OSError) as error:
        print(f"model.importers: {source.name}: {error}", file=sys.stderr)
        return 2
    print(f"{destination}: {json.dumps({'parameters': _count(weights), 'image_shape': unet.image_shape})}")
    return 0


def _tuple_of(kind: type) -> Callable[[str], tuple[Any, ...]]:
    return lambda text: tuple(kind(part) for part in text.split(","))


def _count(weights: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in weights.values())


if __name__ == "__main__":
    sys.exit(main())
