"""python -m training.export_checkpoint WHAT FILE: a checkpoint to give away, smaller or with other defaults."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

from model import checkpoint
from model.sampling.fitted import weights_digest
from training.cli.options import Parser, expanded
from training.cli.sampling_options import add_sampling_options, settings_of
from training.console import exit_code
from training.run import load_weights


def publish(args: argparse.Namespace) -> Path:
    """Writes the checkpoint. Raises ValueError or OSError with a sentence where that cannot be."""
    source, _ = load_weights.load(args.source, args.weights, {}, torch.device("cpu"))
    settings, _ = settings_of(source, args)
    provenance = source.config.provenance | ({} if args.notes is None else {"notes": args.notes})
    weights = source.network.state_dict()
    if args.half:
        weights = {name: tensor.to(torch.bfloat16) for name, tensor in weights.items()}
    path = expanded(args.destination)
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: a checkpoint's name ends with .safetensors")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    # Rounding moves the weights less than the arithmetic of a server that runs them in bfloat16
    tables = tuple(replace(table, weights=weights_digest(weights)) for table in source.config.fitted)
    config = replace(source.config, sampling=settings, provenance=provenance, fitted=tables)
    checkpoint.save(path, weights, config)
    return path


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="python -m training.export_checkpoint",
        description="Write the averaged weights of a checkpoint or run as a checkpoint with these settings.",
    )
    add = parser.add_argument
    add("source", metavar="WHAT", help="a bundled one by name, a file, or the folder of a run, for its best")
    add("destination", metavar="FILE", help="the .safetensors file to write")
    add("--half", action="store_true", help="weights rounded to bfloat16: half the bytes")
    add("--weights", **load_weights.weights_option("is in the folder of a run"))
    add("--notes", metavar="TEXT", help="what its card tells besides (default: what it told before)")
    add_sampling_options(parser)
    return parser.read(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)

    def export() -> None:
        path = publish(args)
        kept = len(checkpoint.load(path).config.fitted)
        print(f"{path}: {path.stat().st_size:,} bytes" + (f", {kept} fitted tables kept" if kept else ""))

    return exit_code("training.export_checkpoint", export)


if __name__ == "__main__":
    sys.exit(main())
