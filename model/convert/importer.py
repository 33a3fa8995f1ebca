"""python -m model.importers SRC DST: other projects' weights → a checkpoint of ours. Never executes what it loads.

What a file cannot tell comes by flags and is stored in our checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open

from model import checkpoint, hub
from model.atomic_write import atomic_write
from model.convert.conversion import config_of, import_path, told
from model.convert.files import load_weights
from model.convert.from_hub import from_hub
from model.convert.layout import Flags, UnsupportedCheckpointError
from model.convert.recognise import recognise
from model.diffusion import PRECONDITIONED, PREDICTIONS, SCHEDULES, VARIANCES
from model.nn.layers import ACTIVATIONS

__all__ = ["import_path", "load_weights", "main", "recognise"]

KINDS: dict[str, type] = {  # of flags that have no default to tell
    "num_timesteps": int,
    "num_heads": int,
    "head_channels": int,
    "num_heads_upsample": int,
    "norm_groups": int,
    "initial_pad": int,
    "schedule_low": float,
    "schedule_high": float,
    "time_scale": float,
    "time_theta": float,
}
CHOICES = {
    "weights": ("ema", "raw"),
    "schedule": tuple(SCHEDULES),
    "prediction": (*PREDICTIONS, *PRECONDITIONED),
    "variance": VARIANCES,
    "norm": ("gn", "in"),
    "activation": tuple(ACTIVATIONS),
}


def parser() -> argparse.ArgumentParser:
    """Every field of `Flags` is an option."""
    result = argparse.ArgumentParser(prog="python -m model.importers", description=(__doc__ or "").split("\n")[0])
    result.add_argument(
        "source",
        help="a diffusers folder (UNet2DModel or DDPMPipeline); ORG/NAME or ORG/NAME@REVISION on the Hugging Face hub; "
        "a file of abarankab/DDPM, lucidrains, improved- or guided-diffusion, w86763777, tqch, ermongroup or pesser",
    )
    result.add_argument("destination", help="the checkpoint to write (.safetensors)")
    what = "of a repository on the hub, .bin, .pt and other pickles, too; only tensors are read"
    result.add_argument("--allow_bin", action="store_true", help=what)
    for f in fields(Flags):
        if isinstance(f.default, bool):
            result.add_argument(f"--{f.name}", action="store_true")
        elif f.name in ("image_size", "class_names"):
            kind = _tuple_of(int if f.name == "image_size" else str)
            result.add_argument(f"--{f.name}", type=kind, default=f.default, metavar="A,B")
        elif f.name == "trained_betas":
            what = "a JSON file with all betas as one list, instead of a schedule"
            result.add_argument("--trained_betas", type=_betas, default=(), metavar="FILE", help=what)
        else:
            kind = KINDS.get(f.name, str)
            result.add_argument(f"--{f.name}", type=kind, default=f.default, choices=CHOICES.get(f.name))
    return result


def main(argv: list[str] | None = None) -> int:
    given = vars(parser().parse_args(argv))
    source, destination, allow_bin = str(given.pop("source")), Path(given.pop("destination")), given.pop("allow_bin")
    flags, name = Flags(**given), hub.parse(source)
    is_here = os.path.exists(source)
    say = partial(_say, source if name and not is_here else Path(source).name)
    try:
        if name and not is_here:
            kept = from_hub(name, flags, say, allow_bin=allow_bin)
            config = checkpoint.load(kept).config
            write: Callable[[], Any] = partial(_copy, kept, destination)
        else:
            if name:
                say("it is here, so the Hugging Face hub is not asked for it")
            if allow_bin:
                raise UnsupportedCheckpointError("--allow_bin is for names on the hub: leave it out")
            imported = import_path(Path(source), flags)
            config = config_of(imported, flags, Path(source).name)
            say(told(config))
            write = partial(checkpoint.save, destination, imported.weights, config)
    except (ValueError, OSError) as error:
        say(str(error))
        return 2
    try:
        write()
    except OSError as error:
        print(f"model.importers: {destination} cannot be written: {error.strerror or error}", file=sys.stderr)
        return 2
    with safe_open(destination, framework="pt") as file:
        count = sum(math.prod(file.get_slice(tensor).get_shape()) for tensor in file.keys())  # noqa: SIM118
    print(f"{destination}: {json.dumps({'parameters': count, 'image_shape': config.unet.image_shape})}")
    return 0


def _say(source: str, line: str) -> None:
    print(f"model.importers: {source}: {line}", file=sys.stderr)


def _copy(source: Path, destination: Path) -> None:
    with atomic_write(destination) as part:
        shutil.copyfile(source, part)


def _tuple_of(kind: type) -> Callable[[str], tuple[Any, ...]]:
    def parts(text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be whole numbers with commas between them, not {text!r}") from None

    return parts


def _betas(name: str) -> tuple[float, ...]:
    try:
        numbers = json.loads(Path(name).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no JSON"
        raise argparse.ArgumentTypeError(f"{name} cannot be read: {why}") from None
    if not isinstance(numbers, list) or len(numbers) < 2 or not all(isinstance(beta, float) for beta in numbers):
        raise argparse.ArgumentTypeError(f"{name} is not a list of betas, such as [0.0001, 0.00012]")
    return tuple(numbers)
