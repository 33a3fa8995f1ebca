"""From a number of steps to its table: before, guided rows, the fit, after."""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import SOLVER
from model.sampling.fitted import FITTED_TO, FittedTable
from model.sampling.schedule import FITTED, SamplingParams, SamplingSchedule, make_schedule
from model.sampling.timestep_spacing import SPACINGS
from training.cli.options import expanded
from training.fitting.fit import Fit, FitOptions, Pairs, has_to_recompute, mean_distance, read_state
from training.fitting.progress import left, say
from training.fitting.setup import Setup
from training.fitting.solver import LearnedSolver, Target, guided_rows
from training.fitting.teacher import draw, null_class

METHOD = "Generalized Solver (arXiv 2510.17699), end to end"
BASE_CHANNELS = 128  # of a network that does not say, for a guess of memory
CHOICE_IMAGES = 32  # images by which the rows that are guided are chosen


def fit_one(setup: Setup, steps: int, out: Path, digest: str, argv: list[str]) -> tuple[dict[str, Any], FittedTable]:
    """One table: what it is better than, and by how much."""
    args, source = setup.args, setup.source
    before = {spacing: solver_distance(setup, steps, spacing) for spacing in SPACINGS}
    before = {spacing: value for spacing, value in before.items() if value is not None}
    if not before:
        raise ValueError(f"{SOLVER} ends in numbers that are not finite in {steps} steps: give --limit clamp")
    best = min(before, key=lambda spacing: before[spacing])
    say(f"{steps} steps, {SOLVER} before: " + ", ".join(f"{k} {v:.4f}" for k, v in before.items()), end="\n")
    diffusion = source.diffusion
    timesteps = solver_schedule(setup, steps, best).timesteps
    whole = getattr(source.config.unet, "time_table", 0) > 0

    def solver_of(guided: tuple[bool, ...]) -> LearnedSolver:
        return LearnedSolver(diffusion, Target(setup.teacher, guided), timesteps, whole)

    guided = choose_guided(setup, steps, solver_of)
    options = FitOptions(args.iterations, args.learning_rate, args.batch_size, args.seed)
    _, height, width = source.config.unet.image_shape
    channels = getattr(source.config.unet, "base_channels", BASE_CHANNELS)
    recompute = has_to_recompute(steps, args.batch_size, height * width, channels)
    solver = solver_of(guided)
    if args.start:
        solver.load_state_dict(read_state(expanded(args.start) / f"{steps}-{sum(guided)}.pt", solver)["average"])
    fit = Fit(solver, setup.network, null_class(source), setup.distance, options, recompute)
    key = json.dumps([setup.key, args.images, asdict(options), steps, guided, best, args.start])

    def told(done: int, loss: float, seconds: float) -> None:
        say(f"{steps} steps: iteration {done} of {options.iterations}, loss {loss:.4f}, {left(seconds)} left")

    fit.run(setup.train, out.with_suffix(".fit") / f"{steps}-{sum(guided)}.pt", key, told)
    start, after = (
        mean_distance(maker(setup, solver), setup.held_out, setup.distance, args.batch_size)
        for solver in (solver_of(guided), fit.average)
    )
    solver = fit.average
    if not after <= start:
        say(f"{steps} steps: {after:.4f} is worse than {start:.4f} at the start, which stays", end="\n")
        solver, after = solver_of(guided), start
    result = {
        "steps": steps,
        "guided_rows": sum(guided),
        "rows_per_image": solver.target.nfe,
        "before": before,
        "spacing": best,
        "start": start,
        "after": after,
        "timesteps": [round(t, 2) for t in solver.told().tolist()],
    }
    say(f"{steps} steps, {result['rows_per_image']} rows an image: {before[best]:.4f} → {after:.4f}", end="\n")
    provenance = {
        "method": METHOD,
        "teacher": f"{setup.teacher.sampler}, {setup.teacher.steps} steps",
        "features": args.features and Path(args.features).name,
        "distance_before": before[best],
        "distance_after": after,
        "seed": args.seed,
        "command": shlex.join(["python", "-m", "training.fit_sampler", *argv]),
    }
    return result, solver.table(digest, provenance)


def solver_schedule(setup: Setup, steps: int, spacing: str) -> SamplingSchedule:
    """dpmpp_2m's, guided and limited as the teacher. Raises ValueError where the diffusion has none of this spacing."""
    params = replace(setup.teacher, sampler=SOLVER, steps=steps, spacing=spacing, eta=0.0)
    return make_schedule(setup.source.diffusion, **vars(params))


def solver_distance(setup: Setup, steps: int, spacing: str) -> float | None:
    """Of dpmpp_2m with this spacing; None where the diffusion has no such schedule, or it diverges."""
    try:
        schedule = solver_schedule(setup, steps, spacing)
    except ValueError:
        return None
    count, args = setup.args.images, setup.args
    indices = list(range(count, count + len(setup.held_out)))
    parts = [indices[i : i + args.batch_size] for i in range(0, len(indices), args.batch_size)]
    images = torch.cat([draw(setup.source, setup.fast, schedule, args.seed, part) for part in parts])
    value = mean_distance(lambda _: images.to(setup.held_out.images), setup.held_out, setup.distance, len(images))
    return value if math.isfinite(value) else None


def choose_guided(setup: Setup, steps: int, solver_of: Callable[[tuple[bool, ...]], LearnedSolver]) -> tuple[bool, ...]:
    """Which rows are guided: all in the teacher's interval, or the neighbours that are best before the fit."""
    if setup.teacher.guidance_scale == 1:
        return guided_rows(steps, ())
    last = setup.source.diffusion.num_timesteps - 1
    low, high = setup.teacher.guidance_interval
    times = (solver_of(guided_rows(steps, ())).timesteps() / last).tolist()
    inside = [i for i, t in enumerate(times) if low <= t + 1e-3 and t - 1e-3 <= high]
    count = len(inside) if setup.args.guided is None else min(setup.args.guided, len(inside))
    runs = [guided_rows(steps, inside[i : i + count]) for i in range(len(inside) - count + 1)]
    if count == 0 or len(runs) == 1:
        return runs[0]
    some = setup.held_out.select(torch.arange(min(CHOICE_IMAGES, len(setup.held_out))))
    found = [mean_distance(maker(setup, solver_of(run)), some, setup.distance, setup.args.batch_size) for run in runs]
    return runs[min(range(len(runs)), key=found.__getitem__)]


def maker(setup: Setup, solver: LearnedSolver) -> Callable[[Pairs], Tensor]:
    """What makes images of pairs' noise by this solver, without gradients."""
    return lambda pairs: solver(setup.fast, pairs.noise, pairs.y, null_class(setup.source))


def chosen_default(
    own: SamplingParams, results: list[dict[str, Any]], teacher: SamplingParams, args: argparse.Namespace
) -> SamplingParams:
    """The checkpoint's `own` settings from now on: a table where it is better than dpmpp_2m at as many steps.

    With --set_spacing other samplers have the spacing that was best at the most steps.
    """
    if args.set_spacing:
        own = replace(own, spacing=max(results, key=lambda result: result["steps"])["spacing"])
    if args.default == 0:
        return own
    wanted = args.default or max(args.steps)
    result = next(result for result in results if result["steps"] == wanted)
    if not result["after"] < min(result["before"].values()):
        say(f"{wanted} steps are no better than {SOLVER}'s: the checkpoint's default stays", end="\n")
        return own
    fitted_to = {name: getattr(teacher, name) for name in FITTED_TO}
    return SamplingParams(FITTED, wanted, spacing=own.spacing, **fitted_to)
