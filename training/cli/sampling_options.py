"""How a checkpoint is sampled from the command line: options that stand in place of its own settings."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from dataclasses import fields
from typing import Any, get_type_hints

from model.checkpoint import Checkpoint
from model.sampling.schedule import InvalidSamplingParams, SamplingParams, SamplingSchedule
from training.cli.options import choice_option, numbers

OWN = "the checkpoint's"
DEFAULTS = {"steps": f"{OWN}, or what suits another sampler"}
ARGUMENTS: dict[Any, dict[str, Any]] = {  # of argparse, by the type of the setting
    int: {"type": int, "metavar": "N"},
    float: {"type": float, "metavar": "X"},
    tuple[float, float]: {"type": numbers, "metavar": "X,X"},
}


def add_sampling_options(parser: ArgumentParser) -> None:
    """An option for each field of `SamplingParams`, --sampler to --limit; None where not given."""
    types = get_type_hints(SamplingParams)
    for setting in fields(SamplingParams):
        description, choices = setting.metadata["description"], setting.metadata["choices"]
        words = f"{description} (default: {DEFAULTS.get(setting.name, OWN)})".lstrip().replace("%", "%%")
        arguments = choice_option(choices) if choices else ARGUMENTS[types[setting.name]]
        parser.add_argument(f"--{setting.name}", **arguments, help=words)


def settings_of(source: Checkpoint, args: Namespace) -> tuple[SamplingParams, SamplingSchedule]:
    """The checkpoint's own settings with what the command line gives in place of them, and their schedule.

    Raises ValueError, naming the option.
    """
    config = source.config
    try:
        given = {setting.name: getattr(args, setting.name) for setting in fields(SamplingParams)}
        settings = config.sampling_params(**given)
        return settings, config.schedule(settings)
    except InvalidSamplingParams as error:
        raise ValueError(f"--{error}") from error
