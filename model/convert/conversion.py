"""From what another project saved to a checkpoint's configuration: what every way of importing shares."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from model.checkpoint import CheckpointConfig
from model.convert.diffusers import import_folder
from model.convert.files import load_weights
from model.convert.layout import Flags, Imported, UnsupportedCheckpointError
from model.convert.recognise import recognised
from model.diffusion import TRAINED, DiffusionConfig
from model.sampling.schedule import SamplingParams


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


def config_of(imported: Imported, flags: Flags, source: str, **provenance: Any) -> CheckpointConfig:
    """The configuration of a checkpoint with what was imported from `source`.

    Raises ValueError for names of classes that are not as many as the classes.
    """
    names = flags.class_names or tuple(str(i) for i in range(imported.unet.num_classes or 0))
    steps = min(SamplingParams.steps, imported.diffusion.num_timesteps)
    told = {"diffusion": imported.origin, "assumed": list(imported.assumed)}
    noted = {name: value for name, value in flags.given().items() if name != "trained_betas"}  # which are many
    return CheckpointConfig(
        imported.unet,
        imported.diffusion,
        names,
        replace(SamplingParams(steps=steps, limit=imported.limit), **imported.sampling),
        {"imported_from": source, **told, "flags": noted, **provenance},
    )


def told(config: CheckpointConfig) -> str:
    """Which diffusion an imported checkpoint has, from where, and what was assumed, in one line."""
    limit = {"none": "no limit of x0", "clamp": "x0 clamped to ±1", "dynamic": "x0 limited by its quantile"}
    origin, assumed = config.provenance.get("diffusion", "its own"), config.provenance.get("assumed")
    text = f"diffusion: {_words(config.diffusion)}, {limit[config.sampling.limit]} ({origin})"
    return f"{text}; assumed: {', '.join(assumed)}" if assumed else text


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
