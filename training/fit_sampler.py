"""python -m training.fit_sampler CHECKPOINT --steps 4,5,8: learns sampling schedules of so few steps for a checkpoint.

The network stays as it is; it needs no data. The tables are written into the checkpoint, for `sampler: "fitted"`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from model import checkpoint
from model.atomic_write import atomic_write
from model.backends.compile import best_precision
from model.checkpoint import PRETRAINED, Checkpoint, CheckpointConfig
from model.sampling.fitted import weights_digest, with_table
from training.cli.options import Parser, choice_option, expanded, integers, numbers
from training.fitting.setup import prepare
from training.fitting.tables import chosen_default, fit_one
from training.memory import memory_for
from training.run.config import torch_device

FEWEST = 2  # steps: with fewer a table alone does not do


def run(args: argparse.Namespace, argv: list[str]) -> dict[str, Any]:
    """Fits, and writes tables and report. Returns the report. Raises ValueError or OSError with a sentence."""
    device = torch_device(args.device)
    path = checkpoint.find(args.checkpoint)
    source = checkpoint.load(path, device)
    out = expanded(args.out) if args.out else path
    check(source, out, args)
    stored = stored_weights(path)
    digest = weights_digest(stored)
    config_there(out, source, digest)
    setup = prepare(source, device, out, args)
    results, new = [], []
    for steps in args.steps:
        result, table = fit_one(setup, steps, out, digest, argv)
        results.append(result)
        new.append(table)
    report = {
        "command": shlex.join(["python", "-m", "training.fit_sampler", *argv]),
        "checkpoint": {"name": source.name, "sha256": source.sha256},
        "teacher": asdict(setup.teacher),
        "features": args.features and Path(args.features).name,
        "held_out_images": len(setup.held_out),
        "fits": results,
    }
    there = config_there(out, source, digest)  # now: another fit may have ended
    tables = source.config.fitted
    for table in (*there.fitted, *new):
        tables = with_table(tables, table)
    sampling = chosen_default(there.sampling, results, setup.teacher, args)
    checkpoint.save(out, stored, replace(there, fitted=tables, sampling=sampling))
    report["default"] = asdict(sampling)
    with atomic_write(out.with_suffix(".fit.json")) as part:
        part.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def check(source: Checkpoint, out: Path, args: argparse.Namespace) -> None:
    """Raises ValueError where this checkpoint cannot be fitted so, before anything is written."""
    if source.config.distilled:
        raise ValueError(f"{source.name} is distilled, and has its own few steps: fit its teacher")
    if source.config.diffusion.sigmas is not None:
        raise ValueError(f"{source.name} has EDM's levels of noise, to which no table can be fitted here")
    last = source.config.diffusion.num_timesteps
    for steps in args.steps:
        if not FEWEST <= steps < last:
            raise ValueError(f"--steps must be from {FEWEST} to {last - 1}, not {steps}")
        if args.start and not any(expanded(args.start).glob(f"{steps}-*.pt")):
            raise ValueError(f"--start {args.start} has no fit of {steps} steps: no {steps}-….pt")
    if out.parent.resolve() == PRETRAINED.resolve():
        raise ValueError(f"{out} is bundled, and {checkpoint.CHECKSUMS_FILE} has its hash: give --out FILE")
    if out.suffix != ".safetensors":
        raise ValueError(f"{out}: a checkpoint's name ends with .safetensors")
    if not out.parent.is_dir():
        raise ValueError(f"{out}: there is no folder {out.parent}")


def config_there(out: Path, source: Checkpoint, digest: str) -> CheckpointConfig:
    """What `out` says of these weights, tables of earlier fits included; the source's where there is no file.

    Raises ValueError where it is anything else.
    """
    if not out.exists():
        return source.config
    try:
        there = checkpoint.load(out).config
    except checkpoint.CheckpointError as error:
        raise ValueError(f"{error}; choose another --out") from error
    is_same_network = (there.unet, there.diffusion) == (source.config.unet, source.config.diffusion)
    if not is_same_network or weights_digest(stored_weights(out)) != digest:
        raise ValueError(f"{out} is there, with other weights than {source.name}: choose another --out")
    return there


def stored_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint's file as they are there, in their own precision."""
    with safe_open(path, framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def table(report: dict[str, Any]) -> str:
    """The report in a few lines: distances to the teacher's images that no fit has seen."""
    lines = [f"{'steps':>5} {'rows':>5} {'before':>9} {'spacing':>10} {'after':>9}"]
    for fit in report["fits"]:
        best = fit["before"][fit["spacing"]]
        row = f"{fit['steps']:>5} {fit['rows_per_image']:>5} {best:>9.4f} {fit['spacing']:>10} {fit['after']:>9.4f}"
        lines.append(row)
    default = report["default"]
    return "\n".join([*lines, f"default: {default['sampler']}, {default['steps']} steps"])


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m training.fit_sampler",
        description="Learn sampling schedules of few steps for a checkpoint, which keeps them. It needs no data. "
        "A killed fit goes on by its command.",
    )
    add = parser.add_argument
    add("checkpoint", help="a bundled one's name, or the path of a .safetensors file")
    add("--steps", type=integers, required=True, metavar="N,N", help="a table for each of these numbers of steps")
    add("--guided", type=int, metavar="K", help="rows of a table with guidance (default: all that the teacher guides)")
    add("--out", metavar="FILE", help="the checkpoint to write (default: the same file)")
    add("--features", metavar="FILE", help="a classifier to compare images by (default: pixels)")
    add(
        "--default", type=int, metavar="N", help="steps of the default table, 0 to keep the default (default: the most)"
    )
    add("--set_spacing", action="store_true", help="other samplers take the best spacing measured, at the most steps")
    add("--start", metavar="FOLDER", help="begin where an earlier fit of as many steps ended: its OUT.fit")
    add("--teacher_steps", type=int, metavar="N", help="the teacher's steps (default: the checkpoint's)")
    add("--guidance_scale", type=float, metavar="X", help="the teacher's (default: the checkpoint's)")
    add("--guidance_interval", type=numbers, metavar="X,X", help="where it acts (default: the checkpoint's)")
    add("--limit", **choice_option(("none", "clamp")), help="of x0 (default: the checkpoint's)")
    add("--images", type=int, default=1400, metavar="N", help="teacher's images to learn from (default: 1400)")
    add("--held_out", type=int, default=128, metavar="N", help="teacher's images to measure by (default: 128)")
    add("--iterations", type=int, default=2000, metavar="N", help="of each fit (default: 2000)")
    add("--batch_size", type=int, default=16, metavar="N", help="images at once (default: 16)")
    add("--learning_rate", type=float, default=2e-3, metavar="X", help="at the start (default: 0.002)")
    add("--seed", type=int, default=0, metavar="N", help="(default: 0)")
    add("--precision", **choice_option(("auto", "fp32", "bf16")), default="auto", help="of products (default: auto)")
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, … (default: auto)")
    args = parser.read(argv)
    for name in ("images", "held_out", "iterations", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(args, name)}")
    if not args.steps:
        parser.error("--steps names no number of steps")
    args.steps = sorted(set(args.steps))
    if args.default not in (None, 0, *args.steps):
        parser.error(f"--default must be 0 or one of --steps, not {args.default}")
    if args.guided is not None and args.guided < 0:
        parser.error(f"--guided must not be negative, as {args.guided} is")
    if not 0 < args.learning_rate < 1:
        parser.error(f"--learning_rate must be between 0 and 1, not {args.learning_rate}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be at least 0 and below 2^32, not {args.seed}")
    return args


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    try:
        if args.precision == "auto":
            args.precision = best_precision(torch_device(args.device))
        with memory_for("the fit", "give a smaller --batch_size"):
            print(table(run(args, argv)))
    except (ValueError, OSError) as error:
        print(f"training.fit_sampler: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("training.fit_sampler: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
