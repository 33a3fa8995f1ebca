"""How a checkpoint is sampled from the command line: options that stand in place of its own settings."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from model.checkpoint import Checkpoint
from model.sampling.schedule import THRESHOLDING, InvalidSamplingParams, SamplingParams, SamplingSchedule, make_schedule
from model.sampling.solvers import SAMPLERS
from model.sampling.timestep_spacing import SPACINGS
from training.cli.options import numbers, one_of


def add_sampling_options(parser: ArgumentParser) -> None:
    """--sampler, --steps, --eta, --guidance_scale, --guidance_interval, --spacing and --limit; None where not given."""
    add, own = parser.add_argument, "(default: the checkpoint's)"
    add("--sampler", **one_of(SAMPLERS), help=own)
    add("--steps", type=int, metavar="N", help="(default: the checkpoint's, or what suits another sampler)")
    add("--eta", type=float, metavar="X", help=f"noise of ddim, 0 to 1 {own}")
    add("--guidance_scale", type=float, metavar="X", help=f"towards the class, 1 for none {own}")
    add("--guidance_interval", type=numbers, metavar="X,X", help=f"where it acts: 0 is the image, 1 is noise {own}")
    add("--spacing", **one_of(SPACINGS), help=f"which timesteps the steps visit {own}")
    add("--limit", **one_of(THRESHOLDING), help=f"of the predicted image at every step {own}")


def settings_of(source: Checkpoint, args: Namespace) -> tuple[SamplingParams, SamplingSchedule]:
    """The checkpoint's own settings with what the command line gives in place of them, and their schedule.

    Raises ValueError, naming the option.
    """
    config, interval = source.config, args.guidance_interval
    if interval is not None and len(interval) != 2:
        raise ValueError(f"--guidance_interval must be two numbers, lower end first, not {len(interval)}")
    try:
        settings = config.sampling.with_overrides(
            config.diffusion.num_timesteps,
            sampler=args.sampler,
            steps=args.steps,
            eta=args.eta,
            guidance_scale=args.guidance_scale,
            guidance_interval=interval,
            spacing=args.spacing,
            limit=args.limit,
        )
        if settings.guidance_scale != 1 and not config.unet.null_class:
            raise InvalidSamplingParams(
                "guidance_scale", "must be 1: the checkpoint has no null class to guide away from"
            )
        return settings, make_schedule(source.diffusion, **vars(settings))
    except InvalidSamplingParams as error:
        raise ValueError(f"--{error}") from error
