"""python -m model.importers SRC DST: other projects' weights → a checkpoint of ours. Never executes what it loads.

What a file cannot tell comes by flags and is stored in our checkpoint.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from model import checkpoint
from model.checkpoint import CheckpointConfig
from model.convert.diffusers import import_folder
from model.convert.files import load_weights
from model.convert.layout import Flags, Imported, UnsupportedCheckpointError
from model.convert.recognise import recognise, recognised
from model.diffusion import PRECONDITIONED, PREDICTIONS, SCHEDULES, TRAINED, VARIANCES, DiffusionConfig
from model.nn.layers import ACTIVATIONS
from model.sampling.schedule import SamplingParams

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


def import_path(source: Path, flags: Flags) -> Imported:
    """Weights and configuration of a file, or of a diffusers folder. Raises UnsupportedCheckpointError."""
    told = flags.with_schedule()
    try:
        if source.is_dir():
            imported = import_folder(source, told)
        else:
            state, importer = recognised(load_weights(source), told)
            imported = importer(state, told)
    except UnsupportedCheckpointError:
        raise
    except ValueError as error:  # a configuration that the network here cannot have, in our words
        raise UnsupportedCheckpointError(f"its network or its diffusion cannot be expressed here: {error}") from error
    except (LookupError, AttributeError, TypeError, ArithmeticError, RuntimeError, OSError) as error:
        raise UnsupportedCheckpointError(
            "it is damaged: its contents are not of the kind or shape that such files have"
        ) from error
    imported.check(flags)
    return imported


def parser() -> argparse.ArgumentParser:
    """Every field of `Flags` is an option."""
    result = argparse.ArgumentParser(prog="python -m model.importers", description=(__doc__ or "").split("\n")[0])
    result.add_argument(
        "source",
        help="abarankab/DDPM .pth, lucidrains model-1.pt, w86763777 ckpt.pt, improved- or guided-diffusion .pt, "
        "or a diffusers folder (UNet2DModel or DDPMPipeline)",
    )
    result.add_argument("destination", help="the checkpoint to write (.safetensors)")
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
    source, destination = Path(given.pop("source")), Path(given.pop("destination"))
    flags = Flags(**given)
    try:
        imported = import_path(source, flags)
        names = flags.class_names or tuple(str(i) for i in range(imported.unet.num_classes or 0))
        steps = min(SamplingParams.steps, imported.diffusion.num_timesteps)
        sampling = replace(SamplingParams(steps=steps, limit=imported.limit), **imported.sampling)
        provenance = {"imported_from": source.name, "diffusion": imported.origin, "flags": _noted(flags)}
        config = CheckpointConfig(imported.unet, imported.diffusion, names, sampling, provenance)
    except ValueError as error:
        print(f"model.importers: {source.name}: {error}", file=sys.stderr)
        return 2
    print(f"model.importers: {source.name}: {told(imported)}", file=sys.stderr)
    try:
        checkpoint.save(destination, imported.weights, config)
    except OSError as error:
        print(f"model.importers: {destination} cannot be written: {error.strerror or error}", file=sys.stderr)
        return 2
    print(
        f"{destination}: {json.dumps({'parameters': _count(imported.weights), 'image_shape': config.unet.image_shape})}"
    )
    return 0


def told(imported: Imported) -> str:
    """Which diffusion was taken from where, and what was assumed, in one line."""
    limit = {"none": "no limit of x0", "clamp": "x0 clamped to ±1", "dynamic": "x0 limited by its quantile"}
    text = f"diffusion: {_words(imported.diffusion)}, {limit[imported.limit]} ({imported.origin})"
    return f"{text}; assumed: {', '.join(imported.assumed)}" if imported.assumed else text


def _words(diffusion: DiffusionConfig) -> str:
    if (sigmas := diffusion.sigmas) is not None:
        return f"levels of noise from {sigmas.sigma_min:g} to {sigmas.sigma_max:g}, prediction {diffusion.prediction}"
    schedule = diffusion.schedule
    if schedule == "linear":
        schedule += f" {diffusion.schedule_low:.4g} to {diffusion.schedule_high:.4g}"
    elif schedule == TRAINED:
        schedule = f"its own betas {diffusion.trained_betas[0]:.4g} to {diffusion.trained_betas[-1]:.4g}"
    if diffusion.zero_terminal_snr:
        schedule += " with zero terminal SNR"
    return f"{diffusion.num_timesteps} timesteps, {schedule}, prediction {diffusion.prediction}, {diffusion.variance}"


def _tuple_of(kind: type) -> Callable[[str], tuple[Any, ...]]:
    def parts(text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(part) for part in text.split(","))
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be whole numbers with commas between them, not {text!r}") from None

    return parts


def _noted(flags: Flags) -> dict[str, Any]:
    """The flags for the provenance; betas are in the configuration, and many."""
    return {name: value for name, value in flags.given().items() if name != "trained_betas"}


def _betas(name: str) -> tuple[float, ...]:
    try:
        numbers = json.loads(Path(name).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no JSON"
        raise argparse.ArgumentTypeError(f"{name} cannot be read: {why}") from None
    if not isinstance(numbers, list) or len(numbers) < 2 or not all(isinstance(beta, float) for beta in numbers):
        raise argparse.ArgumentTypeError(f"{name} is not a list of betas, such as [0.0001, 0.00012]")
    return tuple(numbers)


def _count(weights: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in weights.values())
